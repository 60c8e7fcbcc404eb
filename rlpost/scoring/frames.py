"""How pickles go over a pipe between the trainer and a scoring process: each behind its length in eight bytes."""

from __future__ import annotations

import pickle
import struct
from typing import Any, BinaryIO

SIZE = struct.Struct(">Q")


def packed(data: bytes) -> bytes:
    """A frame."""
    return SIZE.pack(len(data)) + data


def write(pipe: BinaryIO, what: Any) -> None:
    """Raises OSError when nobody reads any more."""
    pipe.write(packed(pickle.dumps(what)))
    pipe.flush()


def read(pipe: BinaryIO) -> Any:
    """Waits for a frame. Raises EOFError when the other side is gone."""
    head = pipe.read(SIZE.size)
    if len(head) < SIZE.size:
        raise EOFError
    return pickle.loads(pipe.read(SIZE.unpack(head)[0]))

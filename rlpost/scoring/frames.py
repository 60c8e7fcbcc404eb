"""What goes over the pipes between the trainer and a scoring process: frames, each behind its length in eight bytes.

The trainer sends pickles. What comes back is plain data as JSON: a pickle can run code where it is read, and a reward may have
written into the pipe, by mistake or not.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import BinaryIO

from rlpost.experience import Outcome
from rlpost.scoring.contract import Call, Reply

SIZE = struct.Struct(">Q")


def packed(data: bytes) -> bytes:
    """A frame."""
    return SIZE.pack(len(data)) + data


def write(pipe: BinaryIO, data: bytes) -> None:
    """Raises OSError when nobody reads any more."""
    pipe.write(packed(data))
    pipe.flush()


def read(pipe: BinaryIO) -> bytes:
    """Waits for a frame. Raises EOFError when the other side is gone."""
    head = pipe.read(SIZE.size)
    if len(head) < SIZE.size:
        raise EOFError
    return pipe.read(SIZE.unpack(head)[0])


def from_replies(replies: Sequence[Reply]) -> bytes:
    """What `to_replies` reads."""
    return json.dumps([(r.verdicts, r.breach, r.logged, r.seconds, r.disturbed) for r in replies]).encode()


def to_replies(data: bytes, calls: Sequence[Call]) -> list[Reply]:
    """The replies to these calls. Raises ValueError or TypeError where it is anything else."""
    made = []
    for call, (verdicts, breach, logged, seconds, disturbed) in zip(calls, json.loads(data), strict=True):
        if not breach and len(verdicts) != call.size:
            raise ValueError(f"{len(verdicts)} verdicts on {call.size} completions")
        checked = tuple(
            (Outcome(outcome).value, None if value is None else float(value), str(detail))
            for outcome, value, detail in verdicts
        )
        notes = tuple((str(name), float(value)) for name, value in logged)
        made.append(Reply(checked, str(breach), notes, float(seconds), bool(disturbed)))
    return made

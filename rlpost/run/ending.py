"""How a process of several ends."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Around everything that a process does: it then ends with its exit code as soon as its work and exit handlers are
    done, without Python's finalisation, if it is one of several.

    DeepSpeed and accelerate keep process groups alive beyond `destroy_process_group`. A gloo thread that then asks for
    the interpreter's lock during finalisation brings the process down with "terminate called without an active
    exception" (SIGABRT), now and then, after a run that was complete; the launcher kills the others for it.
    """
    code = 0

    def leave() -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit.register(leave)  # before torch and the rest register theirs, so that it comes after them
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException:
        code = 1
        raise


def tell_launcher(text: str) -> None:
    """Leaves an error where torch's launcher of several processes looks for it: the table that it prints last has it then."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with suppress(OSError):
            more = {"py_callstack": text, "timestamp": str(int(time.time()))}
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}), encoding="utf-8")

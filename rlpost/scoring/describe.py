"""What a reward function takes, found out in a process of its own: its file may start timers and threads, change signal
handlers and event loops, hang or crash while it is imported, and in the trainer any of that could end the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from rlpost.errors import RewardError
from rlpost.scoring.contract import RewardFunction
from rlpost.scoring.load import find_file, load_reward
from rlpost.scoring.process import described
from rlpost.scoring.surroundings import die_with

IMPORT_S = 180.0  # how long a file may take
_MAIN = "import sys; sys.path[:] = {path!r}; from rlpost.scoring.describe import main; main({said}, {spec!r}, {base!r})"

_known: dict[object, RewardFunction] = {}  # a run asks several times: when it is planned, rehearsed and begun


def describe_reward(spec: str, base: Path | None = None) -> RewardFunction:
    """The function that `spec` names, as `load_reward` finds it; nothing of its code runs in this process.

    Raises:
        RewardError: nothing by that name, the code fails when it is imported, or it is no reward function.
    """
    place, _, function = spec.strip().partition(":")
    file = find_file(place, base)  # no process is needed to say that a file is missing
    key: object = (spec, base, Path.cwd())
    if file is not None:
        key = (file, function, file.stat().st_mtime_ns, file.stat().st_size)
    if key not in _known:
        said = _ask(spec, base)
        if "error" in said:
            raise RewardError(said["error"])
        sets = {name: frozenset(said[name]) for name in ("parameters", "required")}
        _known[key] = RewardFunction(**{**said, **sets})
    return _known[key]


def _ask(spec: str, base: Path | None) -> dict[str, Any]:
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    with tempfile.TemporaryFile() as said:  # no pipe: what the file starts may hold it open
        code = _MAIN.format(path=sys.path, said=said.fileno(), spec=spec, base=base and str(base))
        command = [sys.executable, *flags, "-c", code]
        # A group of its own: Ctrl-C never reaches it, and what the file started ends with it.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(said.fileno(),), process_group=0)
        try:
            how = f"it ends the program ({described(process.wait(timeout=IMPORT_S))})"
        except subprocess.TimeoutExpired:
            how = f"it takes longer than {IMPORT_S:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10.0)
        said.seek(0)
        text = said.read()
    if not text:
        raise RewardError(
            f'The reward {spec} cannot be imported: {how}. Put what a script does under `if __name__ == "__main__":`.'
        )
    return dict(json.loads(text))


def main(said: int, spec: str, base: str | None) -> None:
    """In the process: writes what is asked into the file `said`."""
    process = os.getpid()
    threading.Thread(target=die_with, args=(os.getppid(),), daemon=True).start()
    try:
        found = load_reward(spec, None if base is None else Path(base))
    except RewardError as error:
        answer: dict[str, Any] = {"error": str(error)}
    else:
        answer = {"spec": found.spec, "name": found.name, "is_async": found.is_async, "takes_any": found.takes_any}
        answer |= {"parameters": sorted(found.parameters), "required": sorted(found.required)}
    if os.getpid() == process:  # and no child that the file forked
        os.write(said, json.dumps(answer).encode())
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the file may have closed or replaced them
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # waits for no thread of the file, and runs nothing that it left for the end

"""Runs inside the sandbox, by the plain interpreter: a process and a line of JSON for each test case. Knows no right answer.

The processes are forked from this one, which has an interpreter ready: starting one takes ten times as long as most programs.
"""

import json
import os
import select
import signal
import sys
import time
import types
from typing import Any, NoReturn

PROGRAM = "main.py"


def main() -> None:
    task = json.load(sys.stdin)
    with open(PROGRAM, encoding="utf-8") as file:  # noqa: PTH123 (pathlib is slow to import)
        program = file.read()
    for case in task["cases"]:
        told = json.dumps(one(program, case, task["seconds"], task["limit"]))
        os.write(1, told.encode() + b"\n")


def one(program: str, case: dict[str, Any], seconds: float, limit: int) -> dict[str, Any]:
    """What became of one case: {"time": true}, or the exit code with what was written, or what the expression gave."""
    reader, writer = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(reader)
        os.close(writer)
        return {"error": str(error)}
    if pid == 0:
        _child(program, case, writer, limit)
    os.close(writer)
    deadline = time.monotonic() + seconds
    out = _read(reader, deadline, limit)
    os.close(reader)
    late = out is None or not _ended(pid, deadline)
    os.kill(pid, signal.SIGKILL)  # it has not been waited for, so the number is still its own
    try:
        os.killpg(pid, signal.SIGKILL)  # what it has left behind
    except ProcessLookupError:
        pass  # it was killed before it had made a group of its own, so it has started nothing either
    _, status = os.waitpid(pid, 0)
    if late or out is None:
        return {"time": True}
    text = out.decode("utf-8", "replace")
    if "stdin" in case:
        return {"code": os.waitstatus_to_exitcode(status), "stdout": text}
    try:
        told = json.loads(text)
    except ValueError:
        return {"code": os.waitstatus_to_exitcode(status)}
    return told if isinstance(told, dict) else {}


def _read(reader: int, deadline: float, limit: int) -> "bytes | None":
    """All that is written until nobody can write any more, of which `limit` bytes are kept; None when the time is over."""
    kept = bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            return None
        piece = os.read(reader, 65536)
        if not piece:
            return bytes(kept)
        kept += piece[: limit - len(kept)]


def _ended(pid: int, deadline: float) -> bool:
    """Whether it ends in time. It is not waited for yet, so that no other process can get its number."""
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.001)
    return False


def _child(program: str, case: dict[str, Any], writer: int, limit: int) -> NoReturn:
    """Becomes the case's own process. A whole program ends as any: the interpreter's own end waits for threads, calls what is
    to be called and writes what is still held. Where a value was asked for, nothing happens behind the answer."""
    whole = "stdin" in case
    try:
        answer = _own_descriptors(case.get("stdin", ""), writer, whole=whole)
    except BaseException:
        os._exit(1)
    sys.setrecursionlimit(sys.getrecursionlimit() + 10)  # for the calls that lead here
    name = "program" if "expression" in case else "__main__"
    module = sys.modules[name] = types.ModuleType(name)
    space = module.__dict__
    exec(compile(program, PROGRAM, "exec"), space)
    if whole:
        sys.exit(0)
    if "expression" in case:
        told: dict[str, Any] = {"value": repr(eval(case["expression"], space))[:limit]}
    else:
        exec(compile(case["statements"], "tests.py", "exec"), space)
        told = {"held": True}
    os.write(answer, json.dumps(told).encode())
    os._exit(0)


def _own_descriptors(stdin: str, writer: int, *, whole: bool) -> int:
    """Gives the process its input, its output and nothing else of the parent's; returns where an answer is to be written."""
    os.setsid()
    given = os.memfd_create("stdin")
    os.write(given, stdin.encode("utf-8", "replace"))
    os.lseek(given, 0, os.SEEK_SET)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor, number in ((given, 0), (writer if whole else nowhere, 1), (nowhere, 2)):
        os.dup2(descriptor, number)
    answer = 1 if whole else os.dup(writer)
    os.closerange(3, max(3, answer))
    os.closerange(max(3, answer + 1), 64)  # the sandbox allows no more
    sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", closefd=False) for n in range(3))  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    sys.argv = [PROGRAM]
    return answer


if __name__ == "__main__":
    os.chdir("/sandbox")
    main()

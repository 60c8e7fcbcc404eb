"""Stands above a vLLM server: ends all of its processes when the learner is gone, and removes what they leave in memory.

vLLM's processes do not watch each other: if its API server is killed, engine and workers live on with the card's memory, and
their queues' shared memory is never removed. This process does nothing else, so that it is there when they are not.

python -m rlpost.rollout.remote.child [FOLDER ...] -- vllm's arguments

Its standard input is a pipe that the learner holds. The folders are removed when the learner is gone.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_LOOK_EVERY_S = 1.0


def main(arguments: list[str]) -> int:
    """Runs the server until it ends or standard input does. The exit code is the server's."""
    mark = arguments.index("--")
    folders = [Path(folder) for folder in arguments[:mark]]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    server = subprocess.Popen(
        [sys.executable, "-m", "rlpost.rollout.remote.vllm_serve", *arguments[mark + 1 :]], stdin=subprocess.DEVNULL
    )
    segments: set[Path] = set()
    gone = False
    try:
        while server.poll() is None and not gone:
            gone = bool(select.select([sys.stdin], [], [], _LOOK_EVERY_S)[0]) and not os.read(sys.stdin.fileno(), 1)
            segments |= shared_memory_of(group_members())
    finally:
        segments |= shared_memory_of(group_members())
        end_others()
        segments |= set(Path("/dev/shm").glob(f"sem.rlpost-{server.pid}-*"))
        for segment in segments:
            segment.unlink(missing_ok=True)
        for folder in folders if gone else ():
            shutil.rmtree(folder, ignore_errors=True)
    return server.returncode if server.returncode is not None else 0


def group_members() -> list[int]:
    """The other processes of this process's session."""
    own, session = os.getpid(), os.getsid(0)
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == own:
            continue
        try:
            if os.getsid(int(entry.name)) == session:
                members.append(int(entry.name))
        except (ProcessLookupError, PermissionError):
            continue
    return members


def shared_memory_of(pids: list[int]) -> set[Path]:
    """The segments of Python's shared memory that these processes have mapped."""
    segments = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:  # it ended meanwhile
            continue
        segments |= {Path(line.split()[-1]) for line in lines if "/dev/shm/psm_" in line}
    return segments


def end_others() -> None:
    """Kills the other processes of the session until there are none, for at most ten seconds."""
    until = time.monotonic() + 10
    while (members := [pid for pid in group_members() if not _is_dead(pid)]) and time.monotonic() < until:
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def _is_dead(pid: int) -> bool:
    """Whether a process ended and only its parent has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

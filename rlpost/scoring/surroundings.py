"""What a process looks like to a reward's code, and is made to look like again when that code is done.

Reward functions of several rewards and steps take turns in a process. What one of them leaves behind (another working
directory, a pending alarm, a closed standard output) must neither fail the next call nor depend on which call came first.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import multiprocessing
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

LOST_PIPES = 199
"""Exit code of a scoring process whose reward closed the pipes that lead to the trainer."""

CHECK_PARENT_S = 0.5

MAX_LINES = 50  # that a call may print
MAX_CHARACTERS = 10_000

Identity = tuple[int, int] | None  # of what a descriptor leads to: its device and inode

_SPARE_FROM = 200  # spare descriptors lie above those that programs usually close in a row
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


def die_with(parent: int) -> None:
    """Ends this process, and those it started, soon after the trainer is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(CHECK_PARENT_S)
    os.killpg(0, signal.SIGKILL)


class Surroundings:
    """Takes note of the process's state when it is made; `kept` brings that state back."""

    def __init__(self, *, pipes: Mapping[int, Identity] | None = None) -> None:
        """`pipes`: in a scoring process, those that lead to the trainer (`open_pipes` before a reward was imported). The
        standard descriptors then belong to the state, and the process ends when a pipe was closed."""
        self._directory = _working_directory()
        self._streams = (sys.stdin, sys.stdout, sys.stderr)
        self._recursion = sys.getrecursionlimit()
        self._start_method = multiprocessing.get_start_method(allow_none=True)
        self._made = time.monotonic()
        self._timers = {timer: signal.getitimer(timer) for timer in _TIMERS}
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # nobody else may set them
            self._handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        self._spare = {} if pipes is None else _spare_descriptors()
        self._pipes = dict(pipes or {})

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Around code of a reward: the state is as before afterwards, also after an error."""
        try:
            yield
        finally:
            self._restore()

    def _restore(self) -> None:
        sys.setrecursionlimit(self._recursion)
        self._restore_signals()
        if any(_identity(fd) != was for fd, was in self._pipes.items()):
            os._exit(LOST_PIPES)  # nothing can be sent to the trainer any more: it sees the process end, and says why
        for fd, (spare, was) in self._spare.items():
            if _identity(fd) != was:
                os.dup2(spare, fd)
        sys.stdin, sys.stdout, sys.stderr = self._streams
        if self._directory is not None and _working_directory() != self._directory:
            with contextlib.suppress(OSError):  # it was removed meanwhile
                os.chdir(self._directory)
        if multiprocessing.get_start_method(allow_none=True) != self._start_method:
            multiprocessing.set_start_method(self._start_method, force=True)

    def _restore_signals(self) -> None:
        """No alarm that was set goes off later, in another completion's call, and Ctrl-C does what it did."""
        if not self._handlers or threading.current_thread() is not threading.main_thread():
            return
        for timer, (left, every) in self._timers.items():
            if not left:
                signal.setitimer(timer, 0)
            elif timer == signal.ITIMER_REAL:  # the trainer's own: goes on as if nothing had been
                signal.setitimer(timer, max(left - (time.monotonic() - self._made), 0.001), every)
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:  # None: set by C code, not ours to set
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, handler)


class Printed(io.TextIOBase):
    """Standard output or error of a reward: passes on what is printed, up to a limit a call, and cannot be closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.begin()

    def begin(self) -> None:
        """A call begins."""
        self._lines, self._characters, self._dropped, self._cut = MAX_LINES, MAX_CHARACTERS, 0, False

    def end(self, name: str) -> None:
        """A call of the reward `name` is over: says how much it printed that is not shown."""
        if self._cut:
            self._put(f"\n[reward {name}] what else it printed in this call is not shown ({self._dropped} lines)\n")
        self.flush()

    def write(self, text: str) -> int:
        shown = "".join(text.splitlines(keepends=True)[: self._lines])[: self._characters]
        self._characters -= len(shown)
        self._lines -= _ends(shown)
        if shown:
            self._put(shown)
        if len(shown) < len(text):
            self._lines, self._cut = 0, True
            self._dropped += _ends(text) - _ends(shown)
        return len(text)

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone fails no reward
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def close(self) -> None:
        """Other rewards print here, too."""
        self.flush()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    @property
    def buffer(self) -> Any:
        return self._stream.buffer

    def reconfigure(self, **options: Any) -> None:
        """As of a text stream; the stream is shared, so nothing is changed."""


def _ends(text: str) -> int:
    """How many lines end in it; those of a progress bar, too."""
    return text.count("\n") + text.count("\r")


def _working_directory() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # it was removed
        return None


def _identity(fd: int) -> Identity:
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _spare_descriptors() -> dict[int, tuple[int, Identity]]:
    """Copies of the standard descriptors that are open, and what each is."""
    copies = {}
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            copies[fd] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _SPARE_FROM), _identity(fd)
    return copies


def open_pipes() -> dict[int, Identity]:
    """The pipes that are open, without the standard descriptors."""
    pipes: dict[int, Identity] = {}
    for fd in range(3, 256):
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                pipes[fd] = _identity(fd)
    return pipes

"""A deadline that needs no interpreter: behind the watchdog's own, for a process whose lock an extension holds.

A C function that never gives the interpreter's lock back stops every Python thread, the watchdog's too. The system's timers
then do what it would have done: a signal whose handler is faulthandler's (it prints all stacks without the lock), then the C
library's own `perror` with the watchdog's words, then its `_exit` with the exit code, each in a thread that no Python runs in.
"""

from __future__ import annotations

import ctypes
import faulthandler
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

GRACE_S = 5.0  # between the watchdog's deadline and this one: it prints more, and flushes what the process has to say
_STACKS = getattr(signal, "SIGRTMIN", 0) + 9  # a signal that nothing else here uses
_CLOCK_MONOTONIC = 1
_SIGEV_SIGNAL, _SIGEV_THREAD = 0, 2


class _Event(ctypes.Structure):
    """glibc's `struct sigevent`."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    ]


class _Time(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _Setting(ctypes.Structure):
    _fields_ = [("interval", _Time), ("value", _Time)]


@cache
def _library() -> Any:
    """The C library, with faulthandler on the signal; None where it has no such timers."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if not all(hasattr(library, name) for name in ("timer_create", "timer_settime", "timer_delete", "perror", "_exit")):
        return None
    faulthandler.register(_STACKS, file=2, all_threads=True, chain=False)
    return library


@contextmanager
def ends_without_lock(seconds: float, words: str, code: int) -> Iterator[None]:
    """Ends the process with `code` when what is inside takes longer than so many seconds, after the stacks of all threads and
    `words`; also where no Python can run. Does nothing on a system without such timers."""
    library = _library()
    text = ctypes.create_string_buffer(words.encode())
    timers: list[ctypes.c_void_p] = []
    if library is not None:
        timers = [
            _timer(library, seconds, _Event(signo=_STACKS, notify=_SIGEV_SIGNAL)),
            _timer(library, seconds + 0.5, _calls(library.perror, ctypes.addressof(text))),
            _timer(library, seconds + 1.0, _calls(library._exit, code)),
        ]
    try:
        yield
    finally:
        for timer in timers:
            library.timer_delete(timer)


def _calls(function: Any, argument: int) -> _Event:
    """That a function of the C library is called, with one argument."""
    return _Event(value=argument, notify=_SIGEV_THREAD, function=ctypes.cast(function, ctypes.c_void_p).value)


def _timer(library: Any, seconds: float, event: _Event) -> ctypes.c_void_p:
    timer = ctypes.c_void_p()
    if library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")
    setting = _Setting(value=_Time(int(seconds), int(seconds % 1 * 1e9)))
    library.timer_settime(timer, 0, ctypes.byref(setting), None)
    return timer

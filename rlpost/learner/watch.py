"""Phases with names and deadlines, and Ctrl-C that waits for a safe moment."""

from __future__ import annotations

import faulthandler
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rlpost.learner.deadline import GRACE_S, ends_without_lock

WATCHDOG_EXIT = 75  # EX_TEMPFAIL: trying again (resume=auto) is the right thing to do


class Phases:
    """Times the phases of a step, and ends the process when one outlives its deadline.

    A hung collective or engine cannot be interrupted from Python: the watchdog thread names the phase, dumps the stacks
    of all threads, and exits, so that the launcher takes the other processes down too. Where even that thread cannot run,
    `rlpost.learner.deadline` does it a little later.
    """

    def __init__(self, deadline_s: float, record: Callable[[str, float, float], None] | None = None) -> None:
        """`record` takes every phase's name, start and end (seconds since 1970)."""
        self._deadline, self._record = deadline_s, record
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, began = time.perf_counter(), time.time()
        try:
            with self.watch(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            if self._record is not None:
                self._record(name, began, time.time())

    @contextmanager
    def watch(self, name: str, *, at_least: float = 0.0) -> Iterator[None]:
        """The deadline alone, without a clock: for what lies between phases. `at_least`: seconds that it has in any case."""
        limit = max(self._deadline, at_least)
        said = f"rlpost: the phase '{name}' has taken longer than "
        said += f"learner.watchdog_s = {limit:g} s" if limit == self._deadline else f"{limit:g} s"
        timer = threading.Timer(limit, self._expire, args=(said,))
        timer.daemon = True
        timer.start()
        words = (
            f"{said}, and something that is no Python holds the interpreter's lock (the stacks stand above). The run ends with "
            f"exit code {WATCHDOG_EXIT}; start again with resume=auto. The system's own last word"
        )
        try:
            with ends_without_lock(limit + GRACE_S, words, WATCHDOG_EXIT):
                yield
        finally:
            timer.cancel()

    def take(self) -> dict[str, float]:
        """Seconds since the last call: `time/step` on the clock, `time/<phase>` by phase."""
        now = time.perf_counter()
        taken = {"time/step": now - self._since} | {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds, self._since = {}, now
        return taken

    @staticmethod
    def _expire(said: str) -> None:
        print(
            f"{said}. The stacks of all threads follow; then the run ends with exit code {WATCHDOG_EXIT}. Start again with "
            "resume=auto, or raise learner.watchdog_s if the phase is just slow.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        os._exit(WATCHDOG_EXIT)


_LAUNCHERS = (
    "accelerate",
    "torchrun",
    "torch.distributed",
    "rlpost.run.launch",
    "deepspeed",
)  # what Python is told to run
_LOOK_S = 1.0  # between looks at the launcher


def follow_launcher() -> None:
    """Has this process stop as at SIGTERM when the launcher that started it is killed alone: it would go on unseen, and hold
    the run's folder. Without a launcher (a shell, `nohup`) it lives on by itself."""
    parent = os.getppid()
    try:
        program, _, command = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").partition("\0")
    except OSError:  # no Linux: torch's launcher leaves a variable
        program, command = "python", "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else ""
    # A shell that was told to run a launcher, and then this process, is none.
    if not Path(program).name.startswith("python") or not any(name in command for name in _LAUNCHERS):
        return

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        _say(f"\nrlpost: the launcher (process {parent}) has ended without its run, so the run ends, too.\n")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="rlpost launcher", daemon=True).start()


class Interrupt:
    """Turns the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP into a flag; a later one acts as usual.

    A terminal sends Ctrl-C to the launcher and to us, and the launcher passes it on: one that follows at once is the same.
    Where SIGHUP is ignored (`nohup`) it stays so; else the terminal is gone, and nothing more is written to it.
    """

    SAME_WITHIN_S = 2.0

    def __init__(self) -> None:
        self.requested = False
        self._asked_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGHUP:
            _leave_terminal()
        if self.requested:
            if now - self._asked_at > self.SAME_WITHIN_S:
                signal.signal(number, self._previous.get(number, signal.SIG_DFL))
                os.kill(os.getpid(), number)
            return
        self.requested, self._asked_at = True, now
        if os.environ.get("RANK", "0") == "0":
            _say("\nrlpost: stopping at the next safe moment, then saving. Once more to stop at once.\n")


def _say(text: str) -> None:
    """Writes to stderr from within a signal handler: the signal may have come in the middle of a write to the same stream,
    which then refuses another, and the terminal may be gone."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (RuntimeError, OSError):
        with suppress(OSError):
            os.write(2, text.encode())


def _leave_terminal() -> None:
    """Sends what would be written to a terminal nowhere: one that was closed answers every word with an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        # A terminal that has hung up no longer says that it is one (`isatty`); it is still a device.
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)

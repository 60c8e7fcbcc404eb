"""One scoring process, as the pool's event loop knows it: pipes that it shares with nobody, and its end however it comes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import psutil

from rlpost.scoring.frames import SIZE, packed
from rlpost.scoring.surroundings import LOST_PIPES

_FLUSH_S = 1.0  # what a process wrote before it ended is in its pipe already
_LARGEST = 2**31  # bytes of a frame: a text that was taken for a length is more
_MAIN = "import sys; sys.path[:] = {path!r}; from rlpost.scoring.worker import main; main({jobs}, {replies})"


class ProcessEnded(Exception):
    """The process ended, or can no longer be talked to; its text says how."""


class _Frames(asyncio.Protocol):
    """Puts what comes over a pipe together to frames. Many may come at once, and each is then taken without waiting."""

    def __init__(self) -> None:
        self.whole: deque[bytes] = deque()
        self._part = bytearray()
        self.news = asyncio.Event()  # something came, or nothing can come any more
        self.closed = False
        self.torn = False  # the reward wrote into the pipe, too

    def data_received(self, data: bytes) -> None:
        self._part += data
        while len(self._part) >= SIZE.size and len(self._part) >= (end := SIZE.size + SIZE.unpack_from(self._part)[0]):
            self.whole.append(bytes(self._part[SIZE.size : end]))
            del self._part[:end]
        if len(self._part) >= SIZE.size and SIZE.unpack_from(self._part)[0] > _LARGEST:
            self.torn = self.closed = True
        if self.whole or self.torn:
            self.news.set()

    def connection_lost(self, _: Exception | None) -> None:
        self.closed = True
        self.news.set()


class ScoringProcess:
    """A fresh interpreter: nothing of the trainer (threads, CUDA, torch) is in it. It leads a process group of its own, so
    that Ctrl-C never reaches it, and all that it started is killed with it."""

    def __init__(self, process: asyncio.subprocess.Process, frames: _Frames, pipes: Sequence[Any]) -> None:
        self._process, self._frames = process, frames
        self._replies, self._jobs = pipes
        self._ended = asyncio.ensure_future(process.wait())

    @classmethod
    async def start(cls, specs: Sequence[str], memory: int | None) -> ScoringProcess:
        """Started, and not waited for: it loads the reward functions, and its first frame says that it is up. `memory`: the
        bytes that it may take for itself. Raises OSError when no process can be started."""
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        code = _MAIN.format(path=sys.path, jobs=theirs_in, replies=theirs_out)
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing starts its own
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *flags,
                "-c",
                code,
                stdin=subprocess.DEVNULL,  # a reward that asks for input fails at once, and takes nothing of the trainer's
                pass_fds=(theirs_in, theirs_out),
                process_group=0,
            )
        except BaseException:
            os.close(ours_in)
            os.close(ours_out)
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        loop, frames = asyncio.get_running_loop(), _Frames()
        replies, _ = await loop.connect_read_pipe(lambda: frames, os.fdopen(ours_in, "rb"))
        jobs, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(ours_out, "wb"))
        made = cls(process, frames, (replies, jobs))
        made.send((tuple(specs), memory))
        return made

    @property
    def alive(self) -> bool:
        return not self._ended.done()

    async def unless_ended(self, action: asyncio.Future[Any], seconds: float | None = None) -> None:
        """Waits for `action`, for the end of the process, or so long."""
        try:
            await asyncio.wait((action, self._ended), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            action.cancel()

    def send(self, what: Any) -> None:
        """Returns at once; what the pipe does not hold yet is written when the process reads. Raises what pickling raises."""
        self._jobs.write(packed(pickle.dumps(what)))

    async def receive(self, seconds: float) -> bytes:
        """The next frame that the process sends. Raises TimeoutError when nothing comes in time, ProcessEnded as soon as
        nothing can come any more, however it ended, and whoever else holds its pipes."""
        if not self._frames.whole:
            self._frames.news.clear()
            if not self._frames.closed:
                await self.unless_ended(asyncio.ensure_future(self._frames.news.wait()), seconds)
            if not self._frames.whole and not self._frames.closed and not self.alive:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._frames.news.wait(), _FLUSH_S)
        if self._frames.whole:
            return self._frames.whole.popleft()
        if self.alive and not self._frames.closed:
            raise TimeoutError
        raise ProcessEnded(await self._how())

    async def _how(self) -> str:
        if self._frames.torn:
            return "the reward wrote into the pipe to the trainer"
        await asyncio.wait((self._ended,), timeout=_FLUSH_S)
        if not self._ended.done():
            return "it closed the pipes to the trainer"
        return described(self._ended.result())

    async def kill(self) -> None:
        """Ends the process and all that it started."""
        # Once it has ended, its number may be another's; of its group only what is left of it has that number.
        for fallen in _descendants(self._process.pid) if self.alive else ():
            with contextlib.suppress(psutil.Error):
                fallen.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # those whose parent is gone are in its group still
        if not self._jobs.is_closing():  # it closes by itself where the process is gone
            self._jobs.abort()
        self._replies.close()
        await asyncio.wait((self._ended,), timeout=10.0)


def _descendants(pid: int) -> list[psutil.Process]:
    """Those in process groups of their own among them; none where the process is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def described(code: int) -> str:
    """How a process with this exit code ended."""
    if code == LOST_PIPES:
        return "the reward closed file descriptors that it had not opened"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"

"""The pool of scoring processes. One thread owns all of them and all waiting; nothing is shared that a process could take away
with it, so whatever a reward does to its process costs its own call, and is noticed at once."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import queue
import signal
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlpost.errors import RewardError
from rlpost.scoring.contract import Call, Reply
from rlpost.scoring.frames import to_replies
from rlpost.scoring.process import ProcessEnded, ScoringProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

START_S = 180.0  # how long a process may take to start and to load the reward functions
ATTEMPTS = 2  # how often in a row a process may fail to start, each of the pool
AHEAD_S = (
    0.005  # about so much work is handed to a process at once: quick calls need not wait for the trainer in between
)
MOST_AHEAD = 32  # jobs


@dataclass(frozen=True, slots=True)
class Job:
    """Calls that run in one process together, and the seconds after which that process is killed."""

    calls: tuple[Call, ...]
    kill_after_s: float


@dataclass(frozen=True, slots=True)
class Killed:
    """The job's process was killed at its deadline."""


@dataclass(frozen=True, slots=True)
class Died:
    """The job's process ended by itself."""

    detail: str


Result = list[Reply] | Killed | Died
Handle = Future[Result]


class WorkerPool:
    """Runs jobs in `workers` processes, in the order in which they are handed in."""

    def __init__(self, specs: Sequence[str], workers: int, memory: int | None = None) -> None:
        """`memory`: the bytes that a process may take for itself; None: no limit."""
        self._specs, self._workers, self._memory = tuple(specs), workers, memory
        self._owner: _Owner | None = None

    def start(self) -> None:
        """Starts the processes if there are none; does not wait for them."""
        if self._owner is None:
            self._owner = _Owner(self._specs, self._workers, self._memory)
            atexit.register(self.stop)

    def submit(self, job: Job) -> Handle:
        """Hands a job in; its result comes into the handle. From any thread."""
        self.start()
        assert self._owner is not None
        return self._owner.submit(job)

    def results(self, handles: Sequence[Handle]) -> Generator[tuple[int, Result], None, None]:
        """Place and result of each, as they come. Who stops in between, or is interrupted, ends the processes.

        Raises:
            RewardError: the processes cannot be started, or a job cannot be sent to them.
        """
        done: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i, handle in enumerate(handles):
            handle.add_done_callback(lambda _, i=i: done.put(i))  # type: ignore[misc]
        left = len(handles)
        try:
            while left:
                i = self._next(done)
                left -= 1
                yield i, handles[i].result(timeout=0)
        finally:
            if left:
                self.stop()

    def _next(self, done: queue.SimpleQueue[int]) -> int:
        while True:
            try:
                return done.get(timeout=5.0)
            except queue.Empty:
                if self._owner is None or not self._owner.alive:
                    raise RewardError("The scoring processes were ended while they were waited for.") from None

    def stop(self) -> None:
        """Kills the processes; what is not done is forgotten."""
        owner, self._owner = self._owner, None
        if owner is not None:
            atexit.unregister(self.stop)
            owner.stop()


class _Owner:
    """The thread of a pool, with its event loop: one task a process, which lives as long as the pool."""

    def __init__(self, specs: Sequence[str], workers: int, memory: int | None) -> None:
        self._specs, self._workers, self._memory = specs, workers, memory
        self._jobs: deque[tuple[Job, Handle]] = deque()
        self._news = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._failed = 0  # starts in a row, of all processes
        self._main = self._loop.create_task(self._serve_all())
        self._thread = threading.Thread(target=self._run, name="rlpost-scoring", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> Handle:
        handle: Handle = Future()
        try:
            self._loop.call_soon_threadsafe(self._take, job, handle)
        except RuntimeError:  # the loop was closed
            handle.set_exception(RewardError("The scoring processes were ended."))
        return handle

    def stop(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._main.cancel)
        except RuntimeError:
            return
        self._thread.join(timeout=30.0)

    def _take(self, job: Job, handle: Handle) -> None:
        self._jobs.append((job, handle))
        self._news.set()

    def _run(self) -> None:
        # The mask is inherited: a Ctrl-C while a process is still importing leaves no traceback on the terminal.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        asyncio.set_event_loop(self._loop)
        try:
            with contextlib.suppress(asyncio.CancelledError):  # that is how `stop` ends it
                self._loop.run_until_complete(self._main)
        finally:
            # A process that was being ended already when the pool was stopped.
            if left := asyncio.all_tasks(self._loop):
                self._loop.run_until_complete(asyncio.wait(left, timeout=10.0))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _serve_all(self) -> None:
        async with asyncio.TaskGroup() as tasks:  # which ends when all have ended, their processes with them
            for _ in range(self._workers):
                tasks.create_task(self._serve())

    async def _serve(self) -> None:
        """One process after another: each until it is lost."""
        while True:
            try:
                async with self._process() as process:
                    self._failed = 0
                    await self._serve_with(process)
                if not self._jobs:  # one that ended with nothing to do is replaced when there is something
                    self._news.clear()
                    await self._news.wait()
            except (
                Exception
            ) as error:  # mostly one of a start; whatever it is, the thread must go on for the other processes
                self._failed += 1
                if self._failed >= ATTEMPTS * self._workers:
                    self._refuse(error)
                await asyncio.sleep(min(0.1 * self._failed, 1.0))

    @asynccontextmanager
    async def _process(self) -> AsyncIterator[ScoringProcess]:
        """Up and ready. Raises ProcessEnded, TimeoutError or OSError when it does not come up."""
        process = await ScoringProcess.start(self._specs, self._memory)
        try:
            await process.receive(START_S)
            yield process
        finally:
            await asyncio.shield(process.kill())

    async def _serve_with(self, process: ScoringProcess) -> None:
        """Gives a process jobs until it is lost. Those that it had not begun go to others."""
        held: deque[tuple[Job, Handle]] = deque()
        seconds = AHEAD_S  # that a job took, lately
        try:
            while process.alive:
                if not held and not self._jobs:
                    await self._idle(process)
                    continue
                while self._jobs and len(held) < max(1, min(MOST_AHEAD, int(AHEAD_S / max(seconds, 1e-6)))):
                    self._hand_over(process, self._jobs.popleft(), held)
                if not held:
                    continue
                began = self._loop.time()
                job, handle = held[0]
                result, lost = await self._answer(process, job)
                held.popleft()
                seconds = 0.5 * (seconds + self._loop.time() - began)
                handle.set_result(result)
                if lost:
                    return
        finally:
            self._jobs.extendleft(reversed(held))
            if held:
                self._news.set()

    async def _idle(self, process: ScoringProcess) -> None:
        """Until there may be something to do, or the process may be gone."""
        self._news.clear()
        waiting = asyncio.ensure_future(self._news.wait())
        await process.unless_ended(waiting)

    def _hand_over(self, process: ScoringProcess, one: tuple[Job, Handle], held: deque[tuple[Job, Handle]]) -> None:
        job, handle = one
        try:
            process.send(job.calls)
        except Exception as error:  # what pickling raises of a user's columns is theirs
            what = f"A reward's keywords cannot be sent to its process ({error}): columns and arguments must be plain data."
            handle.set_exception(RewardError(what))
        else:
            held.append(one)

    async def _answer(self, process: ScoringProcess, job: Job) -> tuple[Result, bool]:
        """What became of a job that the process has, and whether the process is lost."""
        try:
            return to_replies(await process.receive(job.kill_after_s), job.calls), False
        except TimeoutError:
            return Killed(), True
        except ProcessEnded as error:
            return Died(f"its process died ({error})"), True
        except Exception as error:  # a reply that cannot be read
            return Died(f"its process sent no answer ({type(error).__name__}: {error})"), True

    def _refuse(self, error: BaseException) -> None:
        """Fails all jobs: no process comes up."""
        why = str(error) or f"not ready within {START_S:g} s"
        said = (
            f"The scoring processes do not start ({why}). Try the reward with `rlpost rewards try`, and look for a lack of "
            "memory or a module that ends the process when it is imported."
        )
        while self._jobs:
            self._jobs.popleft()[1].set_exception(RewardError(said))

"""The pool of scoring processes: pebble's, started quietly, killed with everything they started, replaced when lost."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TYPE_CHECKING

from rlpost.errors import RewardError
from rlpost.scoring import worker
from rlpost.scoring.contract import Call, Reply
from rlpost.scoring.surroundings import LOST_PIPES

if TYPE_CHECKING:
    from pebble import ProcessFuture, ProcessPool

START_S = 180.0  # how long a process may take to start and to load the reward functions
ENDED = 256  # stands for exit code 0 of a process that ended before its time: no process has this one
ATTEMPTS = 2  # how often a job is tried whose process was lost through no fault of its own


class Worker(SpawnProcess):
    """A process that Ctrl-C never reaches, and that takes its own children along when it is stopped."""

    def start(self) -> None:
        # The mask is inherited: a Ctrl-C while the process is still importing leaves no traceback on the terminal.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def exitcode(self) -> int | None:
        """Never 0: pebble takes that for a process that was asked to end, and waits on for the answer that it owes."""
        code = super().exitcode
        return ENDED if code == 0 else code

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.pid is not None and os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, signal.SIGKILL)
                return
        super().terminate()


class _Context(SpawnContext):
    """Fresh interpreters: nothing of the trainer (threads, CUDA, torch) is in them."""

    Process = Worker


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


class WorkerPool:
    """Runs jobs in `workers` processes; results come in the order of the jobs."""

    def __init__(self, specs: Sequence[str], workers: int) -> None:
        self._specs = tuple(specs)
        self._workers = workers
        self._pool: ProcessPool | None = None

    def start(self) -> None:
        """Starts the processes if there are none; does not wait for them."""
        if self._pool is not None:
            return
        from pebble import ProcessPool

        self._pool = ProcessPool(
            max_workers=self._workers,
            initializer=worker.initialize,
            initargs=(self._specs,),
            context=_Context(),
        )
        self._pool.schedule(worker.ready)

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """Runs the jobs and waits for all.

        Raises:
            RewardError: the processes cannot be started, or die again and again between calls.
        """
        results: dict[int, Result] = {}
        for _ in range(ATTEMPTS):
            todo = [i for i in range(len(jobs)) if i not in results]
            if not todo:
                break
            self._run_some(jobs, todo, results)
        if len(results) < len(jobs):
            self.stop()
            raise RewardError(
                f"{len(jobs) - len(results)} of {len(jobs)} scoring calls were lost {ATTEMPTS} times: the scoring "
                f"processes do not start within {START_S:g} s, or end between calls. Try the reward with `rlpost "
                "rewards try`, and look for a lack of memory or a script without `if __name__ == '__main__'`."
            )
        return [results[i] for i in range(len(jobs))]

    def _run_some(self, jobs: Sequence[Job], todo: Sequence[int], results: dict[int, Result]) -> None:
        """Runs the jobs numbered `todo`; those whose process was lost are missing from `results` afterwards."""
        self.start()
        assert self._pool is not None
        lost = False
        try:
            futures = [
                self._pool.schedule(worker.run, args=(jobs[i].calls,), timeout=jobs[i].kill_after_s) for i in todo
            ]
            for i, future in zip(todo, futures, strict=True):
                result = _wait(future, 0.0 if lost else jobs[i].kill_after_s + START_S)
                if result is None:
                    lost = True
                else:
                    results[i] = result
        except RuntimeError:  # pebble's word for a pool that broke while jobs were handed in
            lost = True
        except BaseException:
            self.stop()
            raise
        if lost:
            self.stop()

    def stop(self) -> None:
        """Kills the processes."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()


def _wait(future: ProcessFuture[list[Reply]], seconds: float) -> Result | None:
    """What became of a job; None if its process, or the pool, was lost.

    Jobs start in the order in which they were handed in. So once all jobs before this one are done, this one is running or
    will start at once, and its deadline can be counted from now.
    """
    from concurrent.futures.process import BrokenProcessPool
    from pickle import PicklingError

    from pebble import ProcessExpired

    try:
        return future.result(timeout=seconds)
    except FutureTimeout:
        return Killed() if future.done() else None
    except ProcessExpired as error:
        return Died(f"its process died ({_exit_code(error.exitcode)})")
    except BrokenProcessPool:
        return None
    except (PicklingError, TypeError, AttributeError) as error:
        raise RewardError(
            f"A reward's keywords cannot be sent to its process ({error}): columns and arguments must be plain data."
        ) from error
    except Exception as error:  # nothing that a scoring process sends is meant to raise here
        return Died(f"its process sent no answer ({type(error).__name__}: {error})")


def _exit_code(code: int) -> str:
    if code == ENDED:
        return "exit code 0"
    if code == LOST_PIPES:
        return "the reward closed file descriptors that it had not opened"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"

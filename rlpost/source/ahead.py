"""Rollouts that are made while the learner learns from earlier ones (`rollout.staleness`)."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from rlpost.learner.watch import Phases
from rlpost.source.collect import Collector

if TYPE_CHECKING:
    from rlpost.run.parts import Parts
    from rlpost.teaching.teacher import Teaching


@dataclass(frozen=True, slots=True)
class Collected:
    """A rollout's scored groups on this process, and what is to be known of how they came about."""

    teaching: Teaching
    optimizer_step: int  # how many steps had made the weights that sampled it
    before: dict[str, Any] = field(default_factory=dict)  # the prompt sampler's state when it was begun
    after: dict[str, Any] = field(default_factory=dict)  # and when it was done
    metrics: dict[str, float] = field(default_factory=dict)  # seconds that it took beside the learner


class Collects(Protocol):
    """Where a `SampledSource` gets its groups from. All calls are collective."""

    def collect(self, rollout: int, memory: Mapping[str, int]) -> Collected:
        """Rollout number `rollout`, waited for."""
        ...

    def ahead(self, rollout: int, memory: Mapping[str, int]) -> None:
        """Begins what may be made while `rollout` is learned from, with the weights that are in the engine now."""
        ...

    def settle(self) -> None:
        """Waits until nothing is under way: the engine may then be given other weights, or be asked by others."""
        ...

    def position(self) -> dict[str, Any]:
        """The prompt sampler's state before all that is not learned from yet, as plain JSON."""
        ...

    def kept(self) -> Any:
        """What is made and not learned from yet, to be pickled; None: nothing."""
        ...

    def load(self, position: Mapping[str, Any]) -> None:
        """Goes back to where `position` was taken; what was made since is forgotten."""
        ...

    def keep(self, kept: Any) -> None:
        """Takes back what `kept` gave, after `load`."""
        ...


class InTurn:
    """Makes every rollout when it is asked for, with the newest weights. A `Collects`."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.collector = parts, Collector(parts)

    def collect(self, rollout: int, memory: Mapping[str, int]) -> Collected:
        with self.parts.learner.parked():
            return Collected(self.collector.collect(rollout, memory), self.parts.optimizer_step)

    def ahead(self, rollout: int, memory: Mapping[str, int]) -> None:
        return

    def settle(self) -> None:
        return

    def position(self) -> dict[str, Any]:
        return self.parts.sampler.state_dict()

    def kept(self) -> None:
        return

    def load(self, position: Mapping[str, Any]) -> None:
        self.parts.sampler.load_state_dict(position)

    def keep(self, kept: Any) -> None:
        return  # of a run that sampled ahead and does so no longer: its prompts are drawn again


@dataclass(slots=True)
class _Job:
    """One rollout to be made."""

    rollout: int
    memory: Mapping[str, int]
    optimizer_step: int
    done: Future[Collected]
    before: dict[str, Any] | None = None  # None until it is begun


class Ahead:
    """Makes rollouts up to `lag` rollouts ahead, one after the other in a thread. A `Collects`.

    While rollout n is learned from, rollout n + lag is made, wholly by the weights that n rollouts have made: the next sync
    waits for it. So nothing depends on how fast either side is. A run is reproducible, and resumes exactly: a checkpoint waits
    for what is under way and keeps it. The thread has its own channel between processes, clock and tokenizer.
    """

    def __init__(self, parts: Parts, lag: int) -> None:
        self.parts, self.lag = parts, lag
        self._phases = Phases(parts.recipe.learner.watchdog_s)
        self._beside = replace(
            parts,
            processes=parts.processes.apart(),
            phases=self._phases,
            tokenizer=copy.deepcopy(parts.tokenizer),  # a fast tokenizer may not be used by two threads at once
        )
        self._collector = Collector(self._beside)
        self._jobs: dict[int, _Job] = {}  # by rollout, in the order in which they are made
        self._queue: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        # A daemon: a run that fails does not wait for what its engine still samples.
        threading.Thread(target=self._work, name="rlpost-ahead", daemon=True).start()

    def collect(self, rollout: int, memory: Mapping[str, int]) -> Collected:
        """Raises what went wrong in the thread, such as RolloutError and RewardError."""
        self._submit(rollout, memory)
        with self.parts.phases("wait"):
            collected = self._jobs[rollout].done.result()
        del self._jobs[rollout]
        return collected

    def ahead(self, rollout: int, memory: Mapping[str, int]) -> None:
        last = self.parts.recipe.learner.planned_rollouts - 1
        for number in range(rollout + 1, min(rollout + self.lag, last) + 1):
            self._submit(number, memory)

    def settle(self) -> None:
        with self.parts.phases("wait"):
            wait([job.done for job in self._jobs.values()])  # an error is for `collect` to raise

    def position(self) -> dict[str, Any]:
        self.settle()
        first = next((job.before for job in self._jobs.values()), None)
        return self.parts.sampler.state_dict() if first is None else first

    def kept(self) -> Any:
        self.settle()
        kept: list[tuple[int, Collected]] = []
        for job in self._jobs.values():
            if job.done.exception() is not None:
                break  # from here on prompts are drawn again
            kept.append((job.rollout, job.done.result()))
        return kept

    def load(self, position: Mapping[str, Any]) -> None:
        self.settle()
        self._jobs = {}
        self.parts.sampler.load_state_dict(position)

    def keep(self, kept: Any) -> None:
        for rollout, collected in kept or ():
            done: Future[Collected] = Future()
            done.set_result(collected)
            self._jobs[rollout] = _Job(rollout, {}, collected.optimizer_step, done, collected.before)
            self.parts.sampler.load_state_dict(collected.after)

    def _submit(self, rollout: int, memory: Mapping[str, int]) -> None:
        if rollout in self._jobs:
            return
        self._jobs[rollout] = job = _Job(rollout, dict(memory), self.parts.optimizer_step, Future())
        self._queue.put(job)

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            try:
                job.done.set_result(self._make(job))
            except BaseException as error:  # SystemExit, too: the run's thread raises it
                job.done.set_exception(error)

    def _make(self, job: _Job) -> Collected:
        job.before = self.parts.sampler.state_dict()
        self._beside.optimizer_step = job.optimizer_step
        self._phases.take()
        teaching = self._collector.collect(job.rollout, job.memory)
        seconds = self._phases.take()
        own = {
            f"time/beside_{name.removeprefix('time/')}": value for name, value in seconds.items() if name != "time/step"
        }
        return Collected(teaching, job.optimizer_step, job.before, self.parts.sampler.state_dict(), own)

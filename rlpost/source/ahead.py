"""Rollouts that are made while the learner learns from earlier ones (`rollout.staleness`, `rollout.in_flight`)."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rlpost.experience import Group, without_columns
from rlpost.learner.watch import Phases
from rlpost.source.collect import Collector
from rlpost.source.collects import Collected

if TYPE_CHECKING:
    from rlpost.run.parts import Parts


@dataclass(slots=True)
class _Job:
    """One rollout to be made."""

    rollout: int
    memory: Mapping[str, int]
    optimizer_step: int
    sampled: Future[list[Group]] = field(default_factory=Future)  # its first samples, before any is scored
    done: Future[Collected] = field(default_factory=Future)
    drawn: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Ahead:
    """Makes rollouts up to `lag` rollouts ahead, in threads. A `Collects`.

    While rollout n is learned from, rollout n + lag is begun. Otherwise than `in_flight` one thread makes them, one after the
    other, wholly by the weights that they were begun with, since the next sync waits for them. So nothing depends on how fast
    either side is: a run is reproducible, and resumes exactly.

    `in_flight`: the first samples of up to `lag` rollouts are under way at once, and a sync does not wait for them: what is not
    finished goes on with the new weights, and each token knows which sampled it. A rollout keeps its prompts however slow they
    are, so nothing is thrown away, and no token is older than in a run of the same lag otherwise. Scoring, hints and refilling
    go on in the order of the rollouts. Which weights sampled a token depends on how fast both sides are.

    Either way a checkpoint waits for what is under way and keeps it. Each thread has its own channel between processes, clock
    and tokenizer.
    """

    def __init__(self, parts: Parts, lag: int, *, in_flight: bool = False) -> None:
        self.parts, self.lag, self.in_flight = parts, lag, in_flight
        self._jobs: dict[int, _Job] = {}  # by rollout, in the order in which they are made
        self._taken: _Job | None = None  # the one that was collected last
        self._drawing = threading.Lock()
        self._finisher = _Hand(self, "scoring" if in_flight else "rollouts")
        # Rollout n is sampled by hand n modulo lag, in every process: their channels must meet.
        self._samplers = [_Hand(self, f"rollouts {i + 1}") for i in range(lag)] if in_flight else []

    def collect(self, rollout: int, memory: Mapping[str, int]) -> Collected:
        """Raises what went wrong in the thread, such as RolloutError and RewardError."""
        self._submit(rollout, memory)
        with self.parts.phases("wait"):
            collected = self._jobs[rollout].done.result()
        self._taken = self._jobs.pop(rollout)
        return collected

    def ahead(self, rollout: int, memory: Mapping[str, int]) -> None:
        last = self.parts.recipe.learner.planned_rollouts - 1
        for number in range(rollout + 1, min(rollout + self.lag, last) + 1):
            self._submit(number, memory)

    def settle(self) -> None:
        if not self.in_flight:
            self.rest()

    def rest(self) -> None:
        with self.parts.phases("wait"):
            wait([job.done for job in self._jobs.values()])  # an error is for `collect` to raise

    def bookmark(self) -> Callable[[], None]:
        before = self._taken

        def go_back() -> None:
            if (taken := self._taken) is not before and taken is not None:
                self._jobs = {taken.rollout: taken} | self._jobs

        return go_back

    def position(self) -> dict[str, Any]:
        with self._drawing:
            state = self.parts.sampler.state_dict()
            waiting = [index for job in self._jobs.values() for index in job.drawn]
        return state | {"returned": waiting + state["returned"]}

    def kept(self) -> Any:
        self.rest()
        kept: list[tuple[int, Collected]] = []
        for job in self._jobs.values():
            if job.done.exception() is not None:
                break  # from here on prompts are drawn again
            made = job.done.result()
            groups = [without_columns(group) for group in made.teaching.groups]
            kept.append((job.rollout, replace(made, teaching=replace(made.teaching, groups=groups))))
        return kept

    def load(self, position: Mapping[str, Any]) -> None:
        self.rest()
        self._jobs = {}
        self.parts.sampler.load_state_dict(position)

    def keep(self, kept: Any) -> None:
        for rollout, collected in kept or ():
            job = _Job(rollout, {}, collected.optimizer_step, drawn=list(collected.drawn))
            job.done.set_result(collected)
            self._jobs[rollout] = job
            self.parts.sampler.next(len(collected.drawn))  # they were given back, and are not to be drawn again

    def draw(self, job: _Job, hand: _Hand, k: int) -> list[int]:
        """The next k prompts, for `job`. Where several threads draw, the main process does so for all."""
        apart = self.in_flight and self.parts.processes.world > 1
        with self._drawing:
            drawn = self.parts.sampler.next(k) if not apart or self.parts.processes.is_main else []
            job.drawn += drawn
        if apart:
            told = hand.parts.processes.gather(drawn)[0]
            job.drawn += told if not self.parts.processes.is_main else []
            return told
        return drawn

    def _submit(self, rollout: int, memory: Mapping[str, int]) -> None:
        if rollout in self._jobs:
            return
        self._jobs[rollout] = job = _Job(rollout, dict(memory), self.parts.optimizer_step)
        if self._samplers:
            self._samplers[rollout % self.lag].give(job, self._sample)
        self._finisher.give(job, self._finish)

    def _sample(self, hand: _Hand, job: _Job) -> None:
        try:
            job.sampled.set_result(hand.timed(job, lambda: hand.collector.begin(job.rollout)))
        except BaseException as error:  # SystemExit, too: the run's thread raises it
            job.sampled.set_exception(error)

    def _finish(self, hand: _Hand, job: _Job) -> None:
        try:
            if not self._samplers:
                self._sample(hand, job)
            groups = job.sampled.result()
            teaching = hand.timed(job, lambda: hand.collector.finish(groups, job.rollout, job.memory))
            seconds = {f"time/beside_{name.removeprefix('time/')}": value for name, value in job.seconds.items()}
            job.done.set_result(Collected(teaching, job.optimizer_step, tuple(job.drawn), seconds))
        except BaseException as error:
            job.done.set_exception(error)


class _Hand:
    """A thread that works on one rollout after the other, with what it may share with no other thread."""

    def __init__(self, ahead: Ahead, name: str) -> None:
        """`name`: as the timeline shows it."""
        parts = ahead.parts
        self.phases = Phases(parts.recipe.learner.watchdog_s, parts.timeline.of(name))
        self.parts = replace(
            parts,
            processes=parts.processes.apart(),
            phases=self.phases,
            tokenizer=copy.deepcopy(parts.tokenizer),  # a fast tokenizer may not be used by two threads at once
        )
        self._job: _Job | None = None
        self.collector = Collector(self.parts, lambda k: ahead.draw(self._job, self, k) if self._job else [])
        self._queue: queue.SimpleQueue[tuple[_Job, Callable[[_Hand, _Job], None]]] = queue.SimpleQueue()
        # A daemon: a run that fails does not wait for what its engine still samples.
        threading.Thread(target=self._work, name=f"rlpost {name}", daemon=True).start()

    def give(self, job: _Job, action: Callable[[_Hand, _Job], None]) -> None:
        """Puts an action at the end of what is to be done."""
        self._queue.put((job, action))

    def timed(self, job: _Job, action: Callable[[], Any]) -> Any:
        """Runs a part of the job, and adds what its phases took."""
        self._job, self.parts.optimizer_step = job, job.optimizer_step
        self.phases.take()
        result = action()
        for name, seconds in self.phases.take().items():
            if name != "time/step":
                job.seconds[name] = job.seconds.get(name, 0.0) + seconds
        return result

    def _work(self) -> None:
        while True:
            job, action = self._queue.get()
            action(self, job)

"""Scores groups of completions with the recipe's reward functions: deadlines, outcomes, and a check that they work."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from rlpost.errors import RewardError
from rlpost.experience import Group, Outcome, Score
from rlpost.recipe.secrets import hide
from rlpost.recipe.sections.base import unknown_choice
from rlpost.scoring.contract import Call, Reply, RewardFunction, TrainerState
from rlpost.scoring.keywords import Sample, keywords
from rlpost.scoring.load import check_arguments, check_signature, load_reward
from rlpost.scoring.pool import Died, Job, Killed, Result, WorkerPool

if TYPE_CHECKING:
    from rlpost.recipe.sections.reward import RewardSection, ScoringSection

Place = tuple[int, int]  # which of the flattened samples, which reward
Task = tuple[Job, list[list[Place]]]  # a job, and for each of its calls the places that its verdicts go to

ASYNC_CHUNK = 64  # async calls that share a process at the most


class FailureTally:
    """How many scores of each reward failed in a step, over all of the step's calls."""

    def __init__(self, max_failed_share: float) -> None:
        self.max_failed_share = max_failed_share
        self.kinds: defaultdict[str, Counter[Outcome]] = defaultdict(Counter)
        self.samples: Counter[str] = Counter()

    def clear(self) -> None:
        """A new step begins."""
        self.kinds.clear()
        self.samples.clear()

    def too_many(self, name: str, failed: Sequence[Score], samples: int) -> bool:
        """Counts one call's failed scores; whether failures of this call have made a larger share than allowed."""
        self.kinds[name].update(score.outcome for score in failed)
        self.samples[name] += samples
        return bool(failed) and self.kinds[name].total() > self.max_failed_share * self.samples[name]


class Scorer:
    """Runs reward functions in processes of their own.

    After each `score`, `counts[reward name][outcome]` counts its completions, `slowest[reward name]` has the seconds of
    the slowest call that came back, and `logged[metric]` the mean of what functions gave to TRL's `log_metric`.
    """

    def __init__(self, rewards: Sequence[RewardSection], scoring: ScoringSection, base: Path | None = None) -> None:
        """Loads and checks the functions, and starts the processes without waiting for them.

        Args:
            rewards: the recipe's `rewards`.
            scoring: the recipe's `scoring`.
            base: the recipe's folder, for relative paths.

        Raises:
            RewardError: a function cannot be found or imported, does not take its arguments, or two share a name.
        """
        self.sections = tuple(rewards)
        self.scoring = scoring
        self.functions: tuple[RewardFunction, ...] = tuple(load_reward(r.function, base) for r in rewards)
        self.names = _names(self.sections, self.functions)
        for settings, function in zip(self.sections, self.functions, strict=True):
            check_arguments(function, settings.arguments)
        self.counts: dict[str, Counter[Outcome]] = {}
        self.slowest: dict[str, float] = {}
        self.logged: dict[str, float] = {}
        self._failures = FailureTally(scoring.max_failed_share)
        self._pool = WorkerPool([f.spec for f in self.functions], scoring.workers)
        if self.functions:
            self._pool.start()

    def check(self, columns: Collection[str]) -> None:
        """Raises RewardError if a function needs a keyword that neither `columns` nor its arguments provide."""
        for settings, function in zip(self.sections, self.functions, strict=True):
            check_signature(function, columns, settings.arguments)

    def score(self, groups: Sequence[Group], step: int = 0, max_steps: int = 0, *, more: bool = False) -> list[Group]:
        """The same groups in the same order, with `scores` filled in.

        Args:
            groups: prompts with their completions; the groups may differ in size.
            step: how many optimizer steps were taken before, and
            max_steps: how many the run takes: what functions see in `trainer_state`.
            more: whether these groups are added to those of the call before, as samples of a hinted prompt are. The share of
                failed scores is then judged over both calls together.

        Raises:
            RewardError: a function broke its contract, or failed on more than `scoring.max_failed_share` of them.
        """
        samples: list[Sample] = [(group, completion) for group in groups for completion in group.completions]
        state = TrainerState(step, max_steps)
        jobs = [job for r in range(len(self.sections)) for job in self._jobs(r, groups, state)]
        self.slowest = dict.fromkeys(self.names, 0.0)
        logged: dict[str, list[float]] = {}
        scores = self._ask(jobs, logged)
        self._blame(jobs, samples, state, scores)
        self.logged = {name: sum(values) / len(values) for name, values in logged.items()}
        self.counts = {
            name: Counter(scores[s, r].outcome for s in range(len(samples))) for r, name in enumerate(self.names)
        }
        self._check_failures(scores, len(samples), more)
        rows = iter(tuple(scores[s, r] for r in range(len(self.names))) for s in range(len(samples)))
        return [replace(group, scores=tuple(next(rows) for _ in group.completions)) for group in groups]

    def close(self) -> None:
        """Ends the processes."""
        self._pool.stop()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _jobs(self, r: int, groups: Sequence[Group], state: TrainerState) -> Iterator[Task]:
        """The calls of reward r as jobs, each with the places that its calls' verdicts go to."""
        settings, function = self.sections[r], self.functions[r]
        calls, places, first = [], [], 0
        for samples in _split(groups, settings.call):
            calls.append(self._call(r, samples, state))
            places.append([(first + i, r) for i in range(len(samples))])
            first += len(samples)
        size = min(ASYNC_CHUNK, -(-len(calls) // self.scoring.workers)) if function.is_async else 1
        for i in range(0, len(calls), max(size, 1)):
            yield _job(calls[i : i + size], function), places[i : i + size]

    def _call(self, r: int, samples: Sequence[Sample], state: TrainerState) -> Call:
        """One call of reward r."""
        settings = self.sections[r]
        return Call(
            reward=r,
            size=len(samples),
            keywords=keywords(self.functions[r], samples, settings.arguments, settings.completions),
            deadline_s=settings.deadline_s * len(samples),
            state=state,
            guarded=settings.completions == "auto",
        )

    def _replies(self, jobs: Sequence[Task]) -> Iterator[tuple[list[Place], Reply]]:
        """Each call's places and reply, as they come. Calls that shared a process which was lost are made again, alone."""
        again: list[Task] = []
        handles = [self._pool.submit(job) for job, _ in jobs]
        with contextlib.closing(self._pool.results(handles)) as results:  # what is left is ended with an error
            for i, result in results:
                job, places = jobs[i]
                function, lost = self.functions[job.calls[0].reward], isinstance(result, Killed | Died)
                for call, place, reply in zip(job.calls, places, _as_replies(job, result), strict=True):
                    if len(job.calls) > 1 and (lost or reply.disturbed):
                        again.append((_job([call], function), [place]))
                    else:
                        yield place, reply
        if again:
            yield from self._replies(again)

    def _blame(
        self, jobs: Sequence[Task], samples: Sequence[Sample], state: TrainerState, scores: dict[Place, Score]
    ) -> None:
        """Gives the completions on which a function hangs their reward's `timeout_score`.

        Of a call with several completions each is put to the function alone, to find those on which it hangs. The others
        are then scored by another call without them: those at fault need a baseline to fall short of.
        """
        late = [
            places
            for job, several in jobs
            for call, places in zip(job.calls, several, strict=True)
            if self.sections[call.reward].timeout_score is not None
            and all(scores[place].outcome is Outcome.TIMED_OUT for place in places)
        ]
        hung = {places[0] for places in late if len(places) == 1}
        together = [places for places in late if len(places) > 1]
        alone = self._ask([self._task([place], samples, state) for places in together for place in places], {})
        hung |= {place for place, score in alone.items() if score.outcome is Outcome.TIMED_OUT}
        innocent = [[place for place in places if place not in hung] for places in together]
        # Where none hangs alone, no one is to blame: the call as a whole stays timed out.
        again = [rest for rest, places in zip(innocent, together, strict=True) if 0 < len(rest) < len(places)]
        scores |= self._ask([self._task(rest, samples, state) for rest in again], {})
        for s, r in hung:
            scores[s, r] = Score(Outcome.HUNG, self.sections[r].timeout_score, scores[s, r].detail)

    def _task(self, places: list[Place], samples: Sequence[Sample], state: TrainerState) -> Task:
        """One call for these places of one reward."""
        r = places[0][1]
        call = self._call(r, [samples[s] for s, _ in places], state)
        return _job([call], self.functions[r]), [places]

    def _ask(self, jobs: Sequence[Task], logged: dict[str, list[float]]) -> dict[Place, Score]:
        """Makes the calls; what functions gave to `log_metric` is added to `logged`."""
        scores: dict[Place, Score] = {}
        for places, reply in self._replies(jobs):
            self._take(places, reply, scores)
            for name, value in reply.logged:
                logged.setdefault(name, []).append(value)
        return scores

    def _take(self, places: list[Place], reply: Reply, scores: dict[Place, Score]) -> None:
        r = places[0][1]
        name = self.names[r]
        if reply.breach:
            raise RewardError(f"The reward function {self.functions[r].spec} (reward {name!r}) {reply.breach}.")
        self.slowest[name] = max(self.slowest[name], reply.seconds)
        for place, (outcome, value, detail) in zip(places, reply.verdicts, strict=True):
            scores[place] = Score(Outcome(outcome), value, hide(detail))

    def _check_failures(self, scores: Mapping[Place, Score], samples: int, more: bool) -> None:
        if not more:
            self._failures.clear()
        for r, name in enumerate(self.names):
            # A function that hangs on most completions is broken, whatever a hang is worth.
            failed = [score for s in range(samples) if (score := scores[s, r]).failed or score.outcome is Outcome.HUNG]
            if self._failures.too_many(name, failed, samples):
                kinds, total = self._failures.kinds[name], self._failures.samples[name]
                said = ", ".join(f"{n} {kind.value}" for kind, n in kinds.most_common())
                raise RewardError(
                    f"The reward {name!r} ({self.functions[r].spec}) failed on {kinds.total()} of {total} completions "
                    f"({said}), more than scoring.max_failed_share={self.scoring.max_failed_share:g} allows. For "
                    f"example: {failed[0].detail or failed[0].outcome.value}. Try it alone with `rlpost rewards try`."
                )


def _names(sections: Sequence[RewardSection], functions: Sequence[RewardFunction]) -> tuple[str, ...]:
    names = tuple(s.name or f.name for s, f in zip(sections, functions, strict=True))
    double = sorted(name for name, n in Counter(names).items() if n > 1)
    if double:
        raise RewardError(f"Two rewards are named {double[0]!r}: give each its own `name` in the recipe's `rewards`.")
    return names


def _split(groups: Sequence[Group], call: Literal["sample", "group", "batch"]) -> Iterator[list[Sample]]:
    """The samples that one call sees, in order."""
    by_group = [[(group, completion) for completion in group.completions] for group in groups if group.completions]
    if call == "group":
        yield from by_group
    elif call == "sample":
        yield from ([sample] for samples in by_group for sample in samples)
    elif call == "batch":
        yield from [[sample for samples in by_group for sample in samples]] if by_group else []
    else:
        raise unknown_choice("rewards.call", call)


def _job(calls: Sequence[Call], function: RewardFunction) -> Job:
    """Calls that one process makes one after another, and the seconds after which that process is killed. The event loop of an
    async function ends a call at its deadline by itself, so the process is killed later, for code that blocks the loop."""
    longest = max(call.deadline_s for call in calls)
    return Job(tuple(calls), longest + max(1.0, 0.5 * longest) if function.is_async else longest)


def _as_replies(job: Job, result: Result) -> list[Reply]:
    if isinstance(result, list):
        return result
    if isinstance(result, Died):
        return [Reply(((Outcome.CRASHED.value, None, result.detail),) * call.size) for call in job.calls]
    verdicts = [(Outcome.TIMED_OUT.value, None, f"no answer in {call.deadline_s:g} s") for call in job.calls]
    return [Reply((verdict,) * call.size) for verdict, call in zip(verdicts, job.calls, strict=True)]

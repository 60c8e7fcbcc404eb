"""Scores groups of completions with the recipe's reward functions: deadlines, outcomes, and a check that they work."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from rlpost.errors import RewardError
from rlpost.experience import Completion, Group, Outcome, Score
from rlpost.recipe.secrets import hide
from rlpost.recipe.sections.base import unknown_choice
from rlpost.scoring.contract import Call, Reply, RewardFunction, TrainerState
from rlpost.scoring.describe import describe_reward
from rlpost.scoring.keywords import Sample, keywords
from rlpost.scoring.load import check_arguments, check_signature
from rlpost.scoring.pool import Died, Handle, Job, Killed, Result, WorkerPool

if TYPE_CHECKING:
    from rlpost.recipe.sections.reward import RewardSection, ScoringSection

Place = tuple[int, int]  # which of the flattened samples, which reward


@dataclass(frozen=True, slots=True)
class Task:
    """A job, for each of its calls the places that its verdicts go to, its handle where it was handed in already, and whether
    it was run before."""

    job: Job
    places: list[list[Place]]
    handle: Handle | None = None
    again: bool = False

    def at(self, first: int) -> Task:
        """The same for samples that stand behind `first` others."""
        return replace(self, places=[[(s + first, r) for s, r in places] for places in self.places])


@dataclass(frozen=True, slots=True)
class Begun:
    """What was handed in of a group before the others were there. It holds the completions, so that no others get their ids."""

    state: TrainerState
    completions: tuple[Completion, ...]
    tasks: list[Task]


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

    def hopeless(self, name: str, failed: int, samples: int) -> bool:
        """Whether so many failures of a call under way, with `samples` in all, are too many whatever comes of the rest."""
        return self.kinds[name].total() + failed > self.max_failed_share * (self.samples[name] + samples)

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
        """Looks at the functions and checks them, and starts the processes without waiting for them.

        Args:
            rewards: the recipe's `rewards`.
            scoring: the recipe's `scoring`.
            base: the recipe's folder, for relative paths.

        Raises:
            RewardError: a function cannot be found or imported, does not take its arguments, or two share a name.
        """
        self.sections = tuple(rewards)
        self.scoring = scoring
        self.functions: tuple[RewardFunction, ...] = tuple(describe_reward(r.function, base) for r in rewards)
        self.names = _names(self.sections, self.functions)
        for settings, function in zip(self.sections, self.functions, strict=True):
            check_arguments(function, settings.arguments)
        self.counts: dict[str, Counter[Outcome]] = {}
        self.slowest: dict[str, float] = {}
        self.logged: dict[str, float] = {}
        self._failures = FailureTally(scoring.max_failed_share)
        memory = None if scoring.memory_gib is None else int(scoring.memory_gib * 2**30)
        self._pool = WorkerPool([f.spec for f in self.functions], scoring.workers, memory)
        self._begun: dict[tuple[int, tuple[int, ...]], Begun] = {}  # by reward and completions' ids
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
        if not more:
            self._failures.clear()
        jobs = [job for r in range(len(self.sections)) for job in self._jobs(r, groups, state)]
        self.slowest = dict.fromkeys(self.names, 0.0)
        logged: dict[str, list[float]] = {}
        scores = self._ask(jobs, logged, of=len(samples))
        self._blame(jobs, samples, state, scores)
        self.logged = {name: sum(values) / len(values) for name, values in logged.items()}
        self.counts = {
            name: Counter(scores[s, r].outcome for s in range(len(samples))) for r, name in enumerate(self.names)
        }
        self._check_failures(scores, len(samples))
        rows = iter(tuple(scores[s, r] for r in range(len(self.names))) for s in range(len(samples)))
        return [replace(group, scores=tuple(next(rows) for _ in group.completions)) for group in groups]

    def ahead(self, group: Group, step: int = 0, max_steps: int = 0) -> None:
        """Begins to score a group whose `score` will be asked for later, with the same completions. Nothing is said of it
        before. From any thread. `step`, `max_steps`: as `score` will be given them; else it is scored anew."""
        state = TrainerState(step, max_steps)
        for r, settings in enumerate(self.sections):
            if settings.needs_all_groups or not group.completions:
                continue
            tasks = [replace(t, handle=self._pool.submit(t.job)) for t in self._fresh(r, [group], state)]
            self._begun[r, _ids(group)] = Begun(state, group.completions, tasks)

    def close(self) -> None:
        """Ends the processes."""
        self._pool.stop()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _jobs(self, r: int, groups: Sequence[Group], state: TrainerState) -> list[Task]:
        """The calls of reward r as jobs, those that were begun ahead among them."""
        made: list[Task] = []
        rest: list[Group] = []
        behind: list[int] = []  # of each of the rest's samples the place among all
        first = 0
        for group in groups:
            begun = self._begun.pop((r, _ids(group)), None)
            if begun is not None and begun.state == state:
                made += [task.at(first) for task in begun.tasks]
            else:
                rest.append(group)
                behind += range(first, first + len(group.completions))
            first += len(group.completions)
        fresh = self._fresh(r, rest, state)
        return made + [replace(t, places=[[(behind[s], r) for s, r in one] for one in t.places]) for t in fresh]

    def _fresh(self, r: int, groups: Sequence[Group], state: TrainerState) -> Iterator[Task]:
        """The calls of reward r as jobs, their places counted from the first of these groups."""
        settings, function = self.sections[r], self.functions[r]
        calls, places, first = [], [], 0
        for samples in _split(groups, settings.call):
            calls.append(self._call(r, samples, state))
            places.append([(first + i, r) for i in range(len(samples))])
            first += len(samples)
        size = min(ASYNC_CHUNK, -(-len(calls) // self.scoring.workers)) if function.is_async else 1
        for i in range(0, len(calls), max(size, 1)):
            yield Task(_job(calls[i : i + size], function), places[i : i + size])

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

    def _replies(self, jobs: Sequence[Task]) -> Generator[tuple[list[Place], Reply], None, None]:
        """Each call's places and reply, as they come. Calls that shared a process which was lost, or an event
        loop that was disturbed, are made again, alone."""
        again: list[Task] = []
        handles = [task.handle or self._pool.submit(task.job) for task in jobs]
        with contextlib.closing(self._pool.results(handles)) as results:  # what is left is ended with an error
            for i, result in results:
                job, places = jobs[i].job, jobs[i].places
                function, lost = self.functions[job.calls[0].reward], isinstance(result, Killed | Died)
                for call, place, reply in zip(job.calls, places, _as_replies(job, result), strict=True):
                    if (lost and len(job.calls) > 1) or (reply.disturbed and not jobs[i].again):
                        again.append(Task(_job([call], function), [place], again=True))
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
            for task in jobs
            for call, places in zip(task.job.calls, task.places, strict=True)
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
        return Task(_job([call], self.functions[r]), [places])

    def _ask(self, jobs: Sequence[Task], logged: dict[str, list[float]], of: int | None = None) -> dict[Place, Score]:
        """Makes the calls; what functions gave to `log_metric` is added to `logged`. `of`: the number of completions where all
        of them are asked for; then no more is waited for once too many have failed."""
        scores: dict[Place, Score] = {}
        failed = [0] * len(self.names)
        with contextlib.closing(self._replies(jobs)) as replies:  # after an error nothing is left running
            for places, reply in replies:
                self._take(places, reply, scores)
                if of is not None:
                    r = places[0][1]
                    failed[r] += self._surely_failed(r, [scores[place] for place in places])
                    if self._failures.hopeless(self.names[r], failed[r], of):
                        self._check_failures(scores, of)
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

    def _surely_failed(self, r: int, scores: Sequence[Score]) -> int:
        """How many of a call's scores have failed whatever is found out about them later: of a call that timed out, one
        completion may be to blame."""
        late = all(score.outcome is Outcome.TIMED_OUT for score in scores)
        if late and self.sections[r].timeout_score is not None:
            return 1
        return sum(score.failed for score in scores)

    def _check_failures(self, scores: Mapping[Place, Score], samples: int) -> None:
        """`scores`: of all `samples` completions, or of those that are known."""
        for r, name in enumerate(self.names):
            # A function that hangs on most completions is broken, whatever a hang is worth.
            known = [score for s in range(samples) if (score := scores.get((s, r))) is not None]
            failed = [score for score in known if score.failed or score.outcome is Outcome.HUNG]
            if self._failures.too_many(name, failed, samples):
                kinds, total = self._failures.kinds[name], self._failures.samples[name]
                said = ", ".join(f"{n} {kind.value}" for kind, n in kinds.most_common())
                waiting = f"; without waiting for {samples - len(known)} more" if len(known) < samples else ""
                raise RewardError(
                    f"The reward {name!r} ({self.functions[r].spec}) failed on {kinds.total()} of {total} completions "
                    f"({said}{waiting}), more than scoring.max_failed_share={self.scoring.max_failed_share:g} allows. For "
                    f"example: {failed[0].detail or failed[0].outcome.value}. Try it alone with `rlpost rewards try`."
                )


def _names(sections: Sequence[RewardSection], functions: Sequence[RewardFunction]) -> tuple[str, ...]:
    names = tuple(s.name or f.name for s, f in zip(sections, functions, strict=True))
    double = sorted(name for name, n in Counter(names).items() if n > 1)
    if double:
        raise RewardError(f"Two rewards are named {double[0]!r}: give each its own `name` in the recipe's `rewards`.")
    return names


def _ids(group: Group) -> tuple[int, ...]:
    return tuple(map(id, group.completions))


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

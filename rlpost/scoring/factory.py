"""Makes what scores completions from the recipe's `rewards`: functions in processes, reward models, or both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from rlpost.errors import RewardError
from rlpost.experience import Group, Outcome
from rlpost.recipe.sections.reward import Reward, RewardModelSection, RewardSection, ScoringSection
from rlpost.scoring.scorer import Scorer


class ChecksColumns(Protocol):
    """What looking at a data set asks of whatever scores."""

    def check(self, columns: Collection[str]) -> None: ...


class GroupScorer(ChecksColumns, Protocol):
    """What the loop asks of whatever scores: a `Scorer`, a `RewardModel`, or several of them."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def counts(self) -> dict[str, Counter[Outcome]]: ...

    @property
    def slowest(self) -> dict[str, float]: ...

    @property
    def logged(self) -> dict[str, float]: ...

    def score(
        self, groups: Sequence[Group], step: int = 0, max_steps: int = 0, *, more: bool = False
    ) -> list[Group]: ...

    def ahead(self, group: Group, step: int = 0, max_steps: int = 0) -> None: ...

    def close(self) -> None: ...


def make_scorer(rewards: Sequence[Reward], scoring: ScoringSection, base: Path | None = None) -> GroupScorer:
    """The scorer of a recipe, for training and for evaluation: a completion's scores stand in the order of `rewards`.

    Functions share one pool of processes, which start without being waited for; reward models are loaded here. Relative
    paths of functions are also looked for in `base`, the recipe's folder. Raises RewardError where anything is missing,
    and then leaves nothing running.
    """
    functions = [i for i, reward in enumerate(rewards) if isinstance(reward, RewardSection)]
    scorer = Scorer([r for r in rewards if isinstance(r, RewardSection)], scoring, base)
    models = [(i, reward) for i, reward in enumerate(rewards) if isinstance(reward, RewardModelSection)]
    if not models:
        return scorer
    from rlpost.scoring.reward_model import RewardModel  # torch and transformers: only where they are needed

    parts: list[GroupScorer] = [scorer]
    try:
        for _, settings in models:
            parts.append(RewardModel(settings, max_failed_share=scoring.max_failed_share))
        return JoinedScorers(parts, [*functions, *(i for i, _ in models)])
    except BaseException:
        for part in parts:
            part.close()
        raise


class JoinedScorers:
    """Several scorers as one."""

    def __init__(self, parts: Sequence[GroupScorer], places: Sequence[int] | None = None) -> None:
        """`places` says of every score of the parts, one part behind the other, where it stands among a completion's
        scores; None: in that order. Raises RewardError where two rewards have the same name."""
        self.parts = tuple(parts)
        names = tuple(name for part in parts for name in part.names)
        double = sorted(name for name, n in Counter(names).items() if n > 1)
        if double:
            raise RewardError(
                f"Two rewards are named {double[0]!r}: give each its own `name` in the recipe's `rewards`."
            )
        places = range(len(names)) if places is None else places
        self._order = sorted(range(len(names)), key=places.__getitem__)
        self.names: tuple[str, ...] = tuple(names[i] for i in self._order)

    @property
    def counts(self) -> dict[str, Counter[Outcome]]:
        return {name: count for part in self.parts for name, count in part.counts.items()}

    @property
    def slowest(self) -> dict[str, float]:
        return {name: seconds for part in self.parts for name, seconds in part.slowest.items()}

    @property
    def logged(self) -> dict[str, float]:
        return {name: value for part in self.parts for name, value in part.logged.items()}

    def check(self, columns: Collection[str]) -> None:
        for part in self.parts:
            part.check(columns)

    def score(self, groups: Sequence[Group], step: int = 0, max_steps: int = 0, *, more: bool = False) -> list[Group]:
        """The groups with the scores of all parts. Raises RewardError as the parts do."""
        scored = [part.score(groups, step, max_steps, more=more) for part in self.parts]
        made = []
        for g, group in enumerate(groups):
            rows = [sum(row, ()) for row in zip(*(part[g].scores for part in scored), strict=True)]
            made.append(replace(group, scores=tuple(tuple(row[i] for i in self._order) for row in rows)))
        return made

    def ahead(self, group: Group, step: int = 0, max_steps: int = 0) -> None:
        """Begins with the group where a part can."""
        for part in self.parts:
            part.ahead(group, step, max_steps)

    def close(self) -> None:
        for part in self.parts:
            part.close()

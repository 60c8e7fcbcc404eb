"""How old samples are, in optimizer steps, token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlpost.experience import Group

if TYPE_CHECKING:
    from rlpost.learner.process import Processes


def age_metrics(groups: Sequence[Group], optimizer_step: int, processes: Processes) -> dict[str, float]:
    """Mean, maximum and shares of the ages of the rollout's tokens when the first optimizer step on it is taken. Collective.

    A token's age is `optimizer_step` (how many steps were taken) less the number of steps that had made the weights which
    sampled it.
    """
    own: Counter[int] = Counter()
    for group in groups:
        for completion in group.completions:
            for version, tokens in completion.versions:
                own[optimizer_step - version] += tokens
    ages = sum(processes.gather(own), Counter())
    total = ages.total()
    if not total:
        return {}
    shares = {f"staleness/share_of_age_{age}": count / total for age, count in sorted(ages.items())}
    mean = sum(age * count for age, count in ages.items()) / total
    return {"staleness/mean": mean, "staleness/max": float(max(ages)), **shares}

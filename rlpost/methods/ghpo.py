"""GHPO (arXiv 2507.10628): which groups get a hint, of which size, and what is remembered of a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlpost.experience import Group, Score
from rlpost.recipe.guidance import HintGuidance


def accuracy(scores: Sequence[Score], accuracy_rewards: Sequence[bool]) -> float | None:
    """The sum of a completion's accuracy rewards; None (unknown) when one of them failed or none applies.

    Other rewards (format, length) have no say. `accuracy_rewards` says of every reward whether it is one.
    """
    counted = [score for score, counts in zip(scores, accuracy_rewards, strict=True) if counts]
    values = [score.value for score in counted if score.value is not None]
    if not values or any(score.failed for score in counted):
        return None
    return math.fsum(values)


def accuracies(group: Group, accuracy_rewards: Sequence[bool]) -> list[float | None]:
    """The accuracy of every completion of a scored group."""
    return [accuracy(scores, accuracy_rewards) for scores in group.scores]


def is_hard(found: Sequence[float | None], wrong_at_most: float = 0.0) -> bool:
    """Whether every completion of the group is known to be wrong: the paper's sum_i f(a, o_i) = 0.

    A group with a completion whose accuracy is unknown (None) is not hard: unknown is not wrong.
    """
    return bool(found) and all(value is not None and value <= wrong_at_most for value in found)


def level_ratios(section: HintGuidance, rollout: int, rollouts: int) -> tuple[float, ...]:
    """The share of the solution that each level shows in rollout `rollout` (from 0) of `rollouts`; () for no hints."""
    if rollout < section.cold_start:
        return ()
    progress = min(1.0, rollout / max(1, rollouts - 1))
    scale = 1.0 + (section.final_scale - 1.0) * progress
    return tuple(ratio * scale for ratio in section.ratios) if scale > 0 else ()


def next_first_level(first: int, solved_at: int | None, levels: int) -> int:
    """At which level (from 1) a hard prompt begins when it comes again.

    `first` is where it began this time, `solved_at` the level that solved it, None if none did. Where the first try
    succeeded, an easier one may do next time.
    """
    if solved_at is None:
        return levels
    return max(1, solved_at - 1) if solved_at == first else solved_at

"""Right, wrong or unknown: one rule for evaluation, guidance and gates, so that their figures can be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlpost.experience import Group, Score

ROUNDING = 1e-9
"""Rewards such as 0.1 + 0.2 + 0.7 miss 1 by rounding alone."""


def accuracy(scores: Sequence[Score], accuracy_rewards: Sequence[bool]) -> float | None:
    """The sum of a completion's accuracy rewards, weighted 1 each; None (unknown) when one failed or none applies.

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


def is_right(value: float, threshold: float) -> bool:
    """Whether a completion with the known accuracy `value` is right (`scoring.threshold`)."""
    return value >= threshold - ROUNDING


def right_of_known(values: Sequence[float | None], threshold: float) -> tuple[int, int]:
    """(right completions, completions of known accuracy), where `values` are the completions' accuracies (None: unknown)."""
    known = [value for value in values if value is not None]
    return sum(is_right(value, threshold) for value in known), len(known)

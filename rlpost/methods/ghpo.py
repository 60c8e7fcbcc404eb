"""GHPO (arXiv 2507.10628): which groups get a hint, of which size, and what is remembered of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from rlpost.recipe.sections.guidance import HintGuidance
from rlpost.teaching.verdict import is_right


def is_wrong(value: float, guidance: HintGuidance) -> bool:
    """Whether a known accuracy is wrong: not right, or, where the recipe says so, at most `wrong_at_most`."""
    limit = guidance.wrong_at_most
    return not is_right(value, guidance.threshold) if limit is None else value <= limit


def is_hard(accuracies: Sequence[float | None], guidance: HintGuidance) -> bool:
    """Whether every completion of the group is known to be wrong: the paper's sum_i f(a, o_i) = 0.

    A group with a completion whose accuracy is unknown (None) is not hard: unknown is not wrong.
    """
    return bool(accuracies) and all(value is not None and is_wrong(value, guidance) for value in accuracies)


def is_solved(accuracies: Sequence[float | None], guidance: HintGuidance) -> bool:
    """Whether a completion is known not to be wrong. Unknown is not solved either, so this is not the opposite of hard."""
    return any(value is not None and not is_wrong(value, guidance) for value in accuracies)


def level_ratios(guidance: HintGuidance, rollout: int, rollouts: int) -> tuple[float, ...]:
    """The share of the solution that each level shows in rollout `rollout` (from 0) of `rollouts`; () for no hints."""
    if rollout < guidance.cold_start:
        return ()
    progress = min(1.0, rollout / max(1, rollouts - 1))
    scale = 1.0 + (guidance.final_scale - 1.0) * progress
    return tuple(ratio * scale for ratio in guidance.ratios) if scale > 0 else ()


def next_first_level(first: int, last: int, solved: bool) -> int:
    """At which level (from 1) a hard prompt begins when it comes again.

    `first` is where it began this time, `last` the last level that it was sampled at (a higher one may not have fitted, and
    a prompt that began there would get no hint at all), `solved` whether that solved it. Where the first try succeeded, an
    easier one may do next time.
    """
    return max(1, last - 1) if solved and last == first else last

"""What a rollout's advantages are worth: the share of groups that teach nothing, and how large advantages are."""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.gradient.metrics import Metric, mean_of
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.guidance import SrftGate
from rlpost.recipe.sections.method import MethodSection


def group_is_baseline(method: MethodSection) -> bool:
    """Whether a completion is compared with others of its group, so that a group of equal rewards teaches nothing.

    Not with a critic, whose value is the baseline, nor with SRFT, which takes right and wrong as +1 and -1.
    """
    if method.critic is not None or isinstance(method.gate, SrftGate):
        return False
    match method.advantage.center:
        case "group" | "leave_one_out":
            return True
        case "batch" | "none":
            return method.pairs is not None  # the best of a group is paired with its worst
        case _:
            raise unknown_choice("advantage.center", method.advantage.center)


def advantage_metrics(
    method: MethodSection,
    advantage: Tensor,
    known: Tensor,
    *,
    zero_variance: Tensor,
    shaping: Tensor | None = None,
    learned: Tensor | None = None,
    prompt: Tensor | None = None,
) -> dict[str, Metric]:
    """Metrics of S samples of P groups, over all processes when they are given all.

    `advantage` [S]; `known` [S] bool: the reward is known; `zero_variance` [P] bool: the group's known
    shaped rewards are all equal;
    `shaping` [S] what was added to rewards. `learned` [P] bool says which groups are learned from by their samples (with a
    gate not all are; `prompt` [S] then names the groups): only these count in `zero_variance_share` and `mean_abs`.
    """
    taking_part = known if learned is None or prompt is None else known & learned[prompt]
    metrics: dict[str, Metric] = {
        "advantage/unknown_share": mean_of((~known).double()),
    }
    if method.pairs is None:  # where pairs are made, the advantages are not learned from
        metrics["advantage/mean_abs"] = mean_of(advantage.abs(), taking_part)
    if group_is_baseline(method):
        metrics["reward/zero_variance_share"] = mean_of(
            zero_variance.double(), torch.ones_like(zero_variance) if learned is None else learned
        )
    if shaping is not None:
        metrics["reward/shaping"] = mean_of(shaping, known)
    return metrics

"""What changes rewards before they become advantages, and which groups are worth another sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.gradient.segments import spread_by
from rlpost.recipe.sections.method import MethodSection, OverlongSection


def overlong_share(overlong: OverlongSection, lengths: Tensor, max_completion_tokens: int) -> Tensor:
    """How far into its buffer a completion is, in DAPO's soft overlong punishment (arXiv 2503.14476 eq. 13), [S] float64.

    0 up to L_max - L_cache tokens, then linear, 1 from L_max on; L_cache is the share `overlong.buffer` of L_max =
    `max_completion_tokens`.
    """
    cache = overlong.buffer * max_completion_tokens
    into = lengths.double() - (max_completion_tokens - cache)
    return (into / cache).clamp(0.0, 1.0)


def overlong_penalty(overlong: OverlongSection, lengths: Tensor, max_completion_tokens: int) -> Tensor:
    """The penalty >= 0 to subtract, [S] float64: `overlong.penalty` times `overlong_share`."""
    return overlong.penalty * overlong_share(overlong, lengths, max_completion_tokens)


def sum_rewards(rewards: Tensor) -> Tensor:
    """[S] sum over the rewards [S, R] that apply (are not NaN); NaN where none does."""
    known = ~rewards.isnan()
    total = torch.where(known, rewards, torch.zeros_like(rewards)).sum(1)
    return torch.where(known.any(1), total, torch.full_like(total, torch.nan))


def equal_rewards(rewards: Tensor, prompt: Tensor, groups: int) -> Tensor:
    """[P] bool: the group's known rewards [S] are all equal, or fewer than two are known."""
    known = ~rewards.isnan()
    return spread_by(rewards[known], prompt[known], groups) == 0


def groups_to_refill(method: MethodSection, rewards: Tensor, prompt: Tensor, groups: int) -> Tensor:
    """DAPO's dynamic sampling (arXiv 2503.14476 eq. 11): [P] bool, the groups to be replaced by other prompts.

    `rewards` [S, R] are the weighted scores before any shaping (NaN: unknown or not applicable). Where rewards are
    normalised one by one, (1, 0) and (0, 1) in a group teach something although their sums are equal: there a group is
    replaced only if every reward is.
    """
    equal = torch.full((groups,), method.dynamic_sampling.enabled, device=rewards.device)
    for column in rewards.unbind(1) if method.advantage.each_alone else (sum_rewards(rewards),):
        equal &= equal_rewards(column, prompt, groups)
    return equal

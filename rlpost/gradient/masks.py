"""What single masks compute (random, low probability, off-policy, stale): which tokens to REJECT. They are brought together in
`rlpost.methods.masking`; the curvature mask decides in `rlpost.gradient.curvature`, on what `rlpost.methods.capo` predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.gradient.ratio import log_difference
from rlpost.gradient.segments import count_by, mean_by
from rlpost.gradient.types import TokenView
from rlpost.recipe.sections.masks import OffPolicyMask, StaleMask

_MASK32 = 0xFFFFFFFF


def token_uniform(token_index: Tensor, seed: int, step: int) -> Tensor:
    """[N] float64 in [0, 1), a function of (seed, step, token) alone: the same however tokens are split or ordered.

    `token_index` [N] int64, all 64 bits of which count, names a token (see `rlpost.learner.buffer.token_keys`).
    """
    x = token_index.to(torch.int64)
    x = (x & _MASK32) ^ _mix32((x >> 32) & _MASK32)
    for word in (seed & _MASK32, (seed >> 32) & _MASK32, step & _MASK32):
        x = _mix32(x ^ _mix32(torch.full_like(x, word + 1)))
    return x.double() / 2**32


def _mix32(x: Tensor) -> Tensor:
    """A 32-bit finaliser (lowbias32), in int64 so that products do not overflow the sign."""
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK32
    return x ^ (x >> 15)


def reject_lowest(score: Tensor, quota: Tensor, sequence: Tensor, eligible: Tensor) -> Tensor:
    """[N] bool: in every completion the `quota` [S] eligible tokens of lowest `score` [N] (ties: the earlier token)."""
    inf = torch.full_like(score, torch.inf)
    by_score = torch.argsort(torch.where(eligible, score, inf), stable=True)
    order = by_score[torch.argsort(sequence[by_score], stable=True)]
    lengths = count_by(sequence, quota.numel())
    start = torch.cumsum(lengths, 0) - lengths
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) - start[sequence[order]]
    return eligible & (rank < quota[sequence])


def off_policy_rejects(mask: OffPolicyMask, view: TokenView) -> Tensor:
    """[N] bool: completions whose mean log pi_sampler - log pi exceeds `max_gap` (DeepSeek-V3.2's sequence mask).

    Where the sampler's log-prob is not known, the learner's own from the rollout's start stands in.
    """
    behaviour = torch.where(view.sampler_logp.isnan(), view.old_logp, view.sampler_logp)
    gap = mean_by(log_difference(behaviour, view.logp), view.sequence, view.prompt.numel())[view.sequence]
    far = gap > mask.max_gap
    return far & (view.advantage < 0) if mask.negative_only else far


def stale_rejects(mask: StaleMask, view: TokenView, optimizer_step: int) -> Tensor:
    """[N] bool: tokens whose weights lack more than `max_age` of the `optimizer_step` steps that were taken. Tokens of unknown
    weights are kept."""
    if view.version is None:
        return torch.zeros_like(view.logp, dtype=torch.bool)
    return optimizer_step - view.version > mask.max_age

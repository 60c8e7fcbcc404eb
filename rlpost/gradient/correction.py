"""Correction for the rollout engine's numerics: the tokens were sampled from pi_sampler, not from the learner's pi_old."""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.gradient.metrics import Metric, max_of, mean_of
from rlpost.gradient.ratio import MAX_LOG_RATIO
from rlpost.gradient.segments import sum_by
from rlpost.gradient.types import TokenView
from rlpost.recipe.sections.method import CorrectionSection


def sampler_correction(section: CorrectionSection, view: TokenView) -> tuple[Tensor, dict[str, Metric]]:
    """[N] weight pi_old / pi_sampler, truncated at `max` (truncated importance sampling), or 0 outside [min, max].

    1 where the sampler's log-prob is not known. `level: sequence` takes the product over the completion's tokens.
    """
    known = ~view.sampler_logp.isnan() & ~view.demonstration[view.sequence]
    gap = torch.where(known, view.old_logp - view.sampler_logp, torch.zeros_like(view.old_logp))
    log_weight = gap
    if section.level == "sequence":
        log_weight = sum_by(gap, view.sequence, view.prompt.numel())[view.sequence]
    weight = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    outside = weight > section.max
    if section.action == "mask":
        outside = outside | (weight < section.min)
    metrics: dict[str, Metric] = {
        "mismatch/mean_abs_gap": mean_of(gap.abs(), known),
        "mismatch/max_abs_gap": max_of(gap[known].abs()),
        # Tokens come from the sampler, so this is the k3 estimate of KL(sampler || learner).
        "mismatch/kl": mean_of(gap.exp() - 1 - gap, known),
    }
    if section.action == "none":
        return torch.ones_like(weight), metrics
    metrics["mismatch/truncated_share"] = mean_of(outside.double(), known)
    if section.action == "mask":
        return torch.where(outside, torch.zeros_like(weight), weight), metrics
    return weight.clamp(max=section.max), metrics

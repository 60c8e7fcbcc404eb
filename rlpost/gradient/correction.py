"""Correction for the rollout engine's numerics: the tokens were sampled from pi_sampler, not from the learner's pi_old."""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.gradient.metrics import Metric, max_of, mean_of
from rlpost.gradient.ratio import MAX_LOG_RATIO, log_difference
from rlpost.gradient.segments import sum_by
from rlpost.gradient.types import TokenView
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.method import CorrectionSection


def sampler_correction(settings: CorrectionSection, view: TokenView) -> tuple[Tensor, dict[str, Metric]]:
    """[N] weight pi_old / pi_sampler, truncated at `max` (truncated importance sampling), or 0 outside [min, max].

    1 where the sampler's log-prob is not known. `level: sequence` takes the product over the completion's tokens.

    Both are softmax(scores / temperature) over the whole vocabulary, computed by the learner and by the engine, also where
    top-k or top-p kept tokens from being drawn: the weight is 1 where the two compute alike, and corrects numerics only.
    What was drawn from is mu = pi_sampler / Z on the tokens kept, with Z(state) the mass kept. The weight pi_old / mu, lower
    by the factor Z, is not used: it cannot bring back what was never drawn, and would only turn down states in which the
    policy is unsure, by a product over the tokens. Nor is it needed: the score of mu is grad log pi - grad log Z, whose
    second part depends on the state alone, and like a baseline has mean zero under an advantage that has mean zero in that
    state (as nearly as the method's advantage has it: exactly with a perfect critic, nearly with a group's mean). So the
    update is the policy gradient of the truncated policy, which is what was sampled and scored.
    """
    known = ~view.sampler_logp.isnan() & ~view.demonstration[view.sequence]
    gap = torch.where(known, log_difference(view.old_logp, view.sampler_logp), torch.zeros_like(view.old_logp))
    match settings.level:
        case "token":
            log_weight = gap
        case "sequence":
            log_weight = sum_by(gap, view.sequence, view.prompt.numel())[view.sequence]
        case _:
            raise unknown_choice("correction.level", settings.level)
    weight = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    small = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    metrics: dict[str, Metric] = {
        "mismatch/mean_abs_gap": mean_of(gap.abs(), known),
        "mismatch/max_abs_gap": max_of(gap[known].abs()),
        # Tokens come from the sampler, so this is the k3 estimate of KL(sampler || learner).
        "mismatch/kl": mean_of(small.exp() - 1 - small, known),
    }
    match settings.action:
        case "none":
            return torch.ones_like(weight), metrics
        case "truncate":
            outside = weight > settings.max
            corrected = weight.clamp(max=settings.max)
        case "mask":
            outside = (weight > settings.max) | (weight < settings.min)
            corrected = torch.where(outside, torch.zeros_like(weight), weight)
        case _:
            raise unknown_choice("correction.action", settings.action)
    metrics["mismatch/truncated_share"] = mean_of(outside.double(), known)
    return corrected, metrics

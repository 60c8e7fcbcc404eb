"""Importance ratios and what limits them: the weight on each token's advantage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.gradient.segments import mean_by
from rlpost.gradient.types import TokenView
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.method import CispoClip, Clip, NoClip, PpoClip, RatioSection

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: beyond any clip, but finite
FAR = 1e6  # what a token of probability 0 counts as in a mean of log-ratios


@dataclass(frozen=True, slots=True)
class Limited:
    """The detached factor on the advantage, and which tokens a limit acted on, below and above."""

    ratio: Tensor  # [N] the importance ratio after its limit
    low: Tensor  # [N] bool
    high: Tensor  # [N] bool


def importance_ratio(settings: RatioSection, view: TokenView) -> Tensor:
    """[N] pi / pi_old per token, or per completion (1 for `level: none`).

    Sequence level is GSPO's s_i (arXiv 2507.18071 eq. 7): exp of the mean over the completion's tokens of the log-ratio.
    """
    log_ratio = log_difference(view.logp, view.old_logp)
    match settings.level:
        case "none":
            return torch.ones_like(view.logp)
        case "token":
            pass
        case "sequence":
            log_ratio = mean_by(log_ratio, view.sequence, view.prompt.numel())[view.sequence]
        case _:
            raise unknown_choice("ratio.level", settings.level)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def log_difference(logp: Tensor, other: Tensor) -> Tensor:
    """`logp - other`, 0 where both are the same, minus infinity included, and never infinite: a token of probability 0 must
    not make a whole completion NaN."""
    return torch.where(logp == other, torch.zeros_like(logp), logp - other).clamp(-FAR, FAR)


def limit_ratio(clip: Clip, ratio: Tensor, advantage: Tensor) -> Limited:
    """The weight w for which d/dtheta [surrogate] = w * A * d log pi.

    PPO (arXiv 1707.06347 eq. 7): the gradient of min(r A, clip(r) A) is r A d log pi where the clip does not bind, else
    0; it binds above 1 + high for A > 0 and below 1 - low for A < 0. Dual clip (arXiv 1912.09729 eq. 5): also above
    `dual` for A < 0. CISPO (arXiv 2506.13585 eq. 4): the clipped ratio itself, as a constant.
    """
    match clip:
        case NoClip():
            none = torch.zeros_like(ratio, dtype=torch.bool)
            return Limited(ratio, none, none)
        case PpoClip():
            high = (advantage > 0) & (ratio > 1 + clip.high)
            low = (advantage < 0) & (ratio < 1 - clip.low)
            if clip.dual is not None:
                high = high | ((advantage < 0) & (ratio > clip.dual))
            return Limited(torch.where(low | high, torch.zeros_like(ratio), ratio), low, high)
        case CispoClip():
            floor = 0.0 if clip.low is None else 1 - clip.low
            moved = advantage != 0
            return Limited(ratio.clamp(floor, 1 + clip.high), (ratio < floor) & moved, (ratio > 1 + clip.high) & moved)
        case _:
            raise unknown_choice("clip", clip)

"""KL estimators of Schulman's note (k1, k2, k3), as values and as what they add to a token's coefficient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlpost.gradient.ratio import MAX_LOG_RATIO, log_difference
from rlpost.gradient.segments import sum_by
from rlpost.recipe.sections.base import unknown_choice

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(estimator: Estimator, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) from tokens sampled from pi; with d = logp - ref_logp:
    k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1."""
    d = log_difference(logp, ref_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match estimator:
        case "k1":
            return d
        case "k2":
            return d**2 / 2
        case "k3":
            return torch.exp(-d) + d - 1
        case _:
            raise unknown_choice("kl.estimator", estimator)


def kl_coefficient(estimator: Estimator, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """d KL / d logp, so that `-beta *` this is what beta * KL in the loss adds to the coefficient.

    k1: 1; k2: d; k3: 1 - exp(-d). In expectation over pi, k1's gradient is 0 and k2's is the true gradient of the KL.
    """
    d = log_difference(logp, ref_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match estimator:
        case "k1":
            return torch.ones_like(d)
        case "k2":
            return d
        case "k3":
            return 1 - torch.exp(-d)
        case _:
            raise unknown_choice("kl.estimator", estimator)


def sequence_kl(estimator: Estimator, logp: Tensor, ref_logp: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """[S] sum over a completion's tokens of the estimate, under the policy that sampled it: for `kl.where: reward`."""
    return sum_by(kl_estimate(estimator, logp, ref_logp), sequence, sequences)

"""The one loss of all methods: a weighted log-likelihood with constant coefficients."""

from __future__ import annotations

from torch import Tensor

from rlpost.gradient.types import Coefficients


def coefficient_loss(coefficients: Coefficients, logp: Tensor, entropy: Tensor) -> Tensor:
    """- sum_t weight[t] * (coefficient[t] * logp[t] + entropy_coefficient[t] * entropy[t]), a scalar.

    `logp` and `entropy` [N] carry gradients; everything else is constant. Its gradient is that of the method's published
    surrogate; its value is not. Add it up over micro-batches and processes: nothing is left to be averaged.
    """
    terms = coefficients.coefficient * logp + coefficients.entropy_coefficient * entropy
    return -(coefficients.weight * terms).sum()

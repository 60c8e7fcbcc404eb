"""Methods: pure tensor maths from rewards and log-probs to one coefficient per token."""

from __future__ import annotations

from rlpost.gradient.step import StepContext
from rlpost.methods.estimator import (
    AdvantageResult,
    compute_advantages,
    compute_coefficients,
    dead_groups,
    needs_reference,
    needs_statistics,
)

__all__ = [
    "AdvantageResult",
    "StepContext",
    "compute_advantages",
    "compute_coefficients",
    "dead_groups",
    "needs_reference",
    "needs_statistics",
]

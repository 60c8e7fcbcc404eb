"""What a method may know of the optimizer step besides the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlpost.methods.capo import CurvatureTracker


@dataclass(frozen=True, slots=True)
class StepContext:
    """The optimizer step that the coefficients are for."""

    learning_rate: float  # of this step
    optimizer_step: int  # how many steps were taken before this one
    seed: int = 0  # of the run; random masks depend on (seed, optimizer_step, token_index)
    peak_learning_rate: float | None = None  # of the schedule; None: the largest seen
    logit_slope: float = 1.0  # d score / d (W h): the model's logit scale over the sampling temperature
    kl_coefficient: float | None = None  # of KL in the loss, from a controller; None: the recipe's
    curvature: CurvatureTracker | None = None  # for methods with a curvature mask (see rlpost.methods.capo)

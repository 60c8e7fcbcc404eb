"""What a method may know of the optimizer step besides the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from rlpost.methods.capo import CurvatureTracker


@dataclass(frozen=True, slots=True)
class StepContext:
    """The optimizer step that the coefficients are for."""

    learning_rate: float  # of this step
    optimizer_step: int  # how many steps were taken before this one
    seed: int = 0  # of the run; random masks depend on (seed, optimizer_step, token_index)
    later_rates: Sequence[float] = ()  # learning rates of the optimizer steps after this one; for calibrated limits
    # d score / d (W h): the model's logit scale over the sampling temperature; or, of capped logits, that of scores [n, k]
    logit_slope: float | Callable[[Tensor], Tensor | float] = 1.0
    kl_coefficient: float | None = None  # of KL in the loss, from a controller; None: the recipe's
    curvature: CurvatureTracker | None = None  # for methods with a curvature mask (see rlpost.methods.capo)

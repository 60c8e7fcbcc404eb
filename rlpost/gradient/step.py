"""What a method may know of the optimizer step besides the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rlpost.gradient.curvature import Curvature, Limits
from rlpost.gradient.types import TokenView


@dataclass(frozen=True, slots=True)
class StepContext:
    """The optimizer step that the coefficients are for."""

    learning_rate: float  # of this step
    optimizer_step: int  # how many steps were taken before this one
    seed: int = 0  # of the run; random masks depend on (seed, optimizer_step, token_index)
    later_rates: Sequence[float] = ()  # learning rates of the optimizer steps after this one; for calibrated limits
    # d score / d (W h), with W h what the LM head computes: the model's logit scale over the sampling temperature. Of capped
    # logits it depends on the scores: then a function of scores [n, k].
    logit_slope: float | Callable[[Tensor], Tensor | float] = 1.0
    kl_coefficient: float | None = None  # of KL in the loss, from a controller; None: the recipe's
    curvature: CurvaturePredictor | None = None  # for methods with a curvature mask (see rlpost.methods.capo)


class CurvaturePredictor(Protocol):
    """What a curvature mask asks (see rlpost.methods.capo): how far a token's own step would move the policy, and how far it
    may."""

    def predict(self, view: TokenView, context: StepContext) -> Curvature:
        """The predictions for the view's N tokens."""
        ...

    def limits(self) -> Limits:
        """The limits in force."""
        ...


@dataclass(frozen=True, slots=True)
class Predicted:
    """A `CurvaturePredictor` for one micro-batch whose predictions are known already."""

    curvature: Curvature
    in_force: Limits

    def predict(self, view: TokenView, context: StepContext) -> Curvature:
        return self.curvature

    def limits(self) -> Limits:
        return self.in_force

"""`method.masks`: what a recipe may say of masks. Which tokens they reject is computed in `rlpost.methods.masking`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlpost.recipe.sections.base import Section, unknown_choice


class FixedThresholds(Section):
    """Curvature limits as numbers. The published ones belong to one model, learning rate and advantage scale."""

    type: Literal["fixed"] = "fixed"
    max_kl: PositiveFloat | None = None
    """tau_F: a token is rejected when its predicted KL m_F is not below this; null: no such rule."""
    max_objective: PositiveFloat | None = None
    """tau_H: a token is rejected when its predicted objective change m_H is not below this; null: no such rule."""
    min_objective: float | None = None
    """Lower limit of m_H, itself rejected; null: minus `max_objective` (the released code's symmetric rule)."""


class CalibratedThresholds(Section):
    """Curvature limits from what is observed in the first optimizer steps, scaled to the largest step of the rest of the run:
    learning rate times Adam's bias correction."""

    type: Literal["calibrated"] = "calibrated"
    target: float = Field(0.08, gt=0, lt=1)
    """The share of tokens to be rejected where steps are largest, by all `rules` together; later less is."""
    steps: PositiveInt = 10
    """Optimizer steps that are only observed: nothing is rejected during them. Steps at learning rate 0, or without a token of
    non-zero advantage, do not count."""
    rules: tuple[Literal["kl", "objective"], ...] = ("kl", "objective")
    """Which limits are set: on the predicted KL m_F, on the predicted objective change m_H, or on both."""


Thresholds = Annotated[FixedThresholds | CalibratedThresholds, Field(discriminator="type")]


class CurvatureMask(Section):
    """CAPO (arXiv 2510.00819): reject tokens whose own step on the LM head would change the policy too much."""

    type: Literal["curvature"] = "curvature"
    step: Literal["adam", "sgd"] = "adam"
    """The model of the optimizer's step: Adam from tracked moments of LM-head rows, or plain SGD (four scalars a token)."""
    kl: Literal["sampled", "exact"] = "sampled"
    """m_F from the sampled token (s^2/2, as released) or exact over the vocabulary (Var_p(u)/2)."""
    form: Literal["taylor", "exact"] = "taylor"
    """Second-order forms (as published), or the exact ratio and KL of the predicted step. `exact` needs `step: adam`."""
    thresholds: Thresholds = Field(default_factory=CalibratedThresholds)
    """Where the limits come from."""
    top_k: PositiveInt = 50
    """`step: adam` looks at the k most likely tokens of a position, the sampled one always among them."""
    chunk_tokens: PositiveInt = 64
    """Tokens whose k x d predicted step is held at once; on a CPU at most 16 are, which is faster there."""
    verify_every: NonNegativeInt = 10
    """Every so many optimizer steps the prediction is compared with what the step did (one more forward pass); 0: never."""

    @property
    def by_adam(self) -> bool:
        """Whether predicted steps are Adam's, from tracked moments."""
        match self.step:
            case "adam":
                return True
            case "sgd":
                return False
            case _:
                raise unknown_choice("masks.step", self.step)

    @model_validator(mode="after")
    def _check(self) -> CurvatureMask:
        if self.form == "exact" and self.step == "sgd":
            raise ValueError(
                "curvature: form `exact` needs `step: adam`; the four scalars of `step: sgd` give only `taylor`"
            )
        return self


class RandomMask(Section):
    """Control: reject tokens at random, at a given rate or exactly as many per completion as a curvature mask would."""

    type: Literal["random"] = "random"
    rate: float | None = Field(None, ge=0, le=1)
    """The share of tokens to reject."""
    match: CurvatureMask | None = None
    """Instead of `rate`: reject as many tokens of every completion as this curvature mask would."""

    @model_validator(mode="after")
    def _check(self) -> RandomMask:
        if (self.rate is None) == (self.match is None):
            raise ValueError("random: give exactly one of `rate` and `match`")
        return self


class ProbabilityMask(Section):
    """Control: reject sampled tokens of low probability, by cut-off or exactly as many as a curvature mask would."""

    type: Literal["probability"] = "probability"
    below: float | None = Field(None, ge=0, le=1)
    """Reject tokens that the policy gives less than this probability."""
    match: CurvatureMask | None = None
    """Instead of `below`: reject the least likely tokens of every completion, as many as this curvature mask would."""

    @model_validator(mode="after")
    def _check(self) -> ProbabilityMask:
        if (self.below is None) == (self.match is None):
            raise ValueError("probability: give exactly one of `below` and `match`")
        return self


class OffPolicyMask(Section):
    """Reject whole completions that the policy has moved away from since they were sampled (DeepSeek-V3.2)."""

    type: Literal["off_policy"] = "off_policy"
    max_gap: PositiveFloat = 0.5
    """Limit of the mean over tokens of log pi_sampler - log pi (nats)."""
    negative_only: bool = True
    """Only completions with a negative advantage are rejected."""


class StaleMask(Section):
    """Reject tokens that old weights have sampled (for `rollout.staleness`)."""

    type: Literal["stale"] = "stale"
    max_age: NonNegativeInt = 4
    """Limit of a token's age: how many optimizer steps were taken since those that had made the weights which sampled it."""


Mask = Annotated[CurvatureMask | RandomMask | ProbabilityMask | OffPolicyMask | StaleMask, Field(discriminator="type")]

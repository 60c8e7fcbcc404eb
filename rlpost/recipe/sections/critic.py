"""`method.critic` and `method.controller`: what actor-critic methods add to a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from rlpost.recipe.sections.base import Section, unknown_choice

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
KlTerm = Literal["coefficient", "literal", "reward", "released"]


class ValueLossSection(Section):
    """How far a value is from its target: l(V) = (V - target)^2 / 2, or Huber's; then clipped against the old value."""

    type: Literal["squared", "huber"] = "squared"
    """Squared error, or squared up to `delta` and linear beyond."""
    delta: PositiveFloat = 0.5
    """Where `type: huber` becomes linear."""
    clip: PositiveFloat | None = 0.2
    """With V_c = V_old + clip(V - V_old, -clip, clip), l(V_c) counts too (see `combine`); null: only l(V)."""
    combine: Literal["max", "mean"] = "max"
    """max(l(V), l(V_c)), as in PPO; or their mean, as in SAFE's code."""
    weight: NonNegativeFloat = 0.5
    """The value loss's factor in the total loss."""


class CriticSection(Section):
    """The critic: what an answer is expected to earn, as the baseline of its advantage."""

    model: Literal["trunk", "separate"] = "trunk"
    """A head on the policy's last hidden states, or a model of its own."""
    path: str | None = None
    """`model: separate`: where it starts from (a reward model, for one); null: the policy's own `model.path`."""
    heads: Literal[1, 2] = 1
    """One value, or two (a double critic)."""
    layer_norm: bool = True
    """Normalise the hidden states before the heads."""
    hidden_share: NonNegativeFloat = 0.25
    """Each head is Linear(d, share * d) - GELU - Linear(share * d, 1); 0: one linear layer."""
    aggregate: Literal["mean", "min", "soft_min"] = "mean"
    """From two values to one: their mean, the smaller, or -alpha log mean exp(-V / alpha), which lies between."""
    alpha: PositiveFloat = 0.3
    """Temperature of `soft_min`, in units of the value."""
    train: Literal["aggregate", "heads"] = "aggregate"
    """What the loss is taken of: the aggregate (as published: the higher head then learns little), or every head."""
    level: Literal["token", "sequence", "answer"] = "token"
    """A value before every token (GAE), or one value a completion: read at the prompt's end (`sequence`), or, as in SAFE's
    code, when all of the answer but its last token is known (`answer`): a baseline that explains away what it should leave
    to the policy."""
    gamma: Share = 1.0
    """Discount per token. Only for `level: token`."""
    lam: Share = 0.95
    """GAE's lambda of the policy's advantages. Only for `level: token`."""
    value_lam: Share | None = None
    """GAE's lambda of the values' targets; null: `lam`."""
    trunk_gradient: NonNegativeFloat = 0.0
    """How much of the value loss's gradient reaches the policy's trunk: 0 none, 1 all (as in SAFE's code)."""
    loss: ValueLossSection = Field(default_factory=ValueLossSection)
    """The value loss."""
    learning_rate: NonNegativeFloat | None = None
    """Peak learning rate of the critic's own parameters, on the learner's schedule; null: the learner's."""
    max_grad_norm: PositiveFloat | None = 0.5
    """The critic's gradients are scaled down to this norm, apart from the policy's; null: not clipped."""
    whiten_reward: Literal["none", "scale", "full"] = "none"
    """Rewards over all rollouts so far: as they are, divided by their spread, or also centred."""
    whiten_advantage: bool = True
    """Advantages of a rollout get mean 0 and spread 1."""
    warmup_rollouts: NonNegativeInt = 0
    """Rollouts at the beginning in which only the critic learns."""

    @property
    def per_token(self) -> bool:
        """Whether every token has a value of its own; else a completion has one."""
        match self.level:
            case "token":
                return True
            case "sequence" | "answer":
                return False
            case _:
                raise unknown_choice("critic.level", self.level)

    @model_validator(mode="after")
    def _check(self) -> CriticSection:
        if self.aggregate != "mean" and self.heads == 1:
            raise ValueError(
                f"critic.aggregate `{self.aggregate}` needs critic.heads 2: one value has nothing to combine"
            )
        if self.path is not None and self.model == "trunk":
            raise ValueError(
                "critic.path is for critic.model `separate`: a head on the policy's trunk has no model of its own"
            )
        if self.model == "separate" and self.trunk_gradient:
            raise ValueError(
                "critic.trunk_gradient is for critic.model `trunk`: a separate critic shares nothing with the policy"
            )
        return self


def penalty_place(term: KlTerm) -> Literal["loss", "reward"]:
    """Where the penalty of a controller with this `term` acts; one that does not act is measured where a loss would be."""
    match term:
        case "reward":
            return "reward"
        case "coefficient" | "literal" | "released":
            return "loss"
        case _:
            raise unknown_choice("controller.term", term)


class AdaptiveKlController(Section):
    """A KL coefficient that is raised while KL is above its target and lowered below (arXiv 1909.08593, sec. 2.2)."""

    type: Literal["adaptive_kl"] = "adaptive_kl"
    term: Literal["coefficient", "reward"] = "reward"
    """`coefficient`: coefficient * KL in the loss; `reward`: subtracted from the reward, per token."""
    initial: PositiveFloat = 0.05
    """The coefficient at the start."""
    target: PositiveFloat = 0.05
    """The wanted KL to the reference, in nats per token."""
    gain: PositiveFloat = 0.1
    """K_beta: the coefficient changes by at most the share gain * clip in an optimizer step."""
    clip: PositiveFloat = 0.2
    """Limit of the relative error KL / target - 1."""


class AsymmetricPenalty(Section):
    """SAFE's second trainer: weight * (KL - threshold)^2 above a threshold, and a penalty on KL that grows."""

    threshold: NonNegativeFloat = 0.3
    """KL (nats per token) that is free."""
    weight: NonNegativeFloat = 0.1
    """Factor of the squared excess."""
    momentum: NonNegativeFloat = 5.0
    """Factor of the squared growth per step over the window, where it is growth."""
    window: int = Field(50, ge=2)
    """Steps over which growth is measured."""


class PublishedSafeController(Section):
    """SAFE's controller (arXiv 2602.04651) with its published constants, which are absolute in reward and entropy."""

    type: Literal["safe_published"] = "safe_published"
    term: KlTerm = "coefficient"
    """How the penalty acts: as a constant times KL in the loss; as its literal derivative, through the moving average of
    KL (ten times weaker); in the reward; or not at all (`released`: the code adds a number without a gradient)."""
    threshold: PositiveFloat = 0.3
    """KL (nats per token) that is free, before PID and phase change it."""
    threshold_limits: tuple[PositiveFloat, PositiveFloat] = (0.1, 0.6)
    """Where the changed threshold is cut."""
    weight: NonNegativeFloat = 0.1
    """lambda: penalty = gate * lambda * (KL_ema - threshold)^2 above the threshold."""
    kl_decay: Decay = 0.9
    """Decay of KL's moving average, which starts at 0."""
    entropy_floor: PositiveFloat = 2.0
    """gate = max(gate_min, entropy_floor / (entropy + 0.1)), in nats per token."""
    gate_min: NonNegativeFloat = 0.5
    """Lower limit of the gate."""
    kp: NonNegativeFloat = 0.3
    """Proportional gain."""
    ki: NonNegativeFloat = 0.01
    """Integral gain."""
    kd: NonNegativeFloat = 0.05
    """Derivative gain."""
    integral_limit: PositiveFloat = 1.0
    """The integral is cut to this."""
    reward_decay: Decay = 0.95
    """Decay of the reward's moving average, whose change is the velocity."""
    target_velocity: float = 0.001
    """The velocity that leaves the threshold alone, in reward per rollout."""
    window: int = Field(50, ge=2)
    """Rollouts in the phase detector's window."""
    climb: NonNegativeFloat = 0.01
    """CLIMBING: the window's mean is higher than that of the window before by more than this."""
    steady: NonNegativeFloat = 0.02
    """CONVERGED: the window's spread is below this..."""
    converged_above: float = 0.7
    """...and its mean above this."""
    phases: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (1.5, 1.2, 0.8, 1.0)
    """The threshold's factors in WARMUP, CLIMBING, PLATEAU, CONVERGED."""
    asymmetric: AsymmetricPenalty | None = None
    """The penalty of SAFE's second trainer on top; null: none."""
    brake: PositiveFloat | None = None
    """A step whose predicted KL exceeds this is made with the share brake / prediction of the learning rate; null: off."""

    @model_validator(mode="after")
    def _check(self) -> PublishedSafeController:
        _ordered("threshold_limits", self.threshold_limits)
        _no_brake_on_rewards(self.term, self.brake)
        return self


class SafeController(Section):
    """SAFE's controller, scale-free: rewards in units of their spread, entropy of its start, gains that act.

    penalty coefficient = weight * gate * (max(0, KL_ema - threshold) + momentum * growth of KL) / threshold_0
    """

    type: Literal["safe"] = "safe"
    term: Literal["coefficient", "literal", "reward"] = "coefficient"
    """As a constant times KL in the loss; as the literal derivative through KL's moving average; or in the reward."""
    threshold: PositiveFloat = 0.3
    """KL (nats per token) that is free, before PID and phase change it."""
    threshold_limits: tuple[PositiveFloat, PositiveFloat] = (0.33, 2.0)
    """Where the changed threshold is cut, as shares of `threshold`."""
    weight: NonNegativeFloat = 0.05
    """The coefficient when KL exceeds the threshold by `threshold`, at the entropy of the start."""
    max_coefficient: PositiveFloat = 1.0
    """Upper limit of the coefficient."""
    kl_decay: Decay = 0.9
    """Decay of KL's moving average, which starts at the first value."""
    gate_softness: PositiveFloat = 0.1
    """s in gate = (1 + s) H_0 / (H + s H_0), with H_0 the mean entropy of the first `window` steps."""
    gate_limits: tuple[NonNegativeFloat, PositiveFloat] = (0.5, 5.0)
    """Where the gate is cut."""
    kp: NonNegativeFloat = 10.0
    """Proportional gain: relative change of the threshold per velocity."""
    ki: NonNegativeFloat = 0.3
    """Integral gain: relative change per spread that the reward has gained."""
    kd: NonNegativeFloat = 2.0
    """Derivative gain."""
    leak: Share = 0.99
    """The integral keeps this share of itself from rollout to rollout; 1: all."""
    authority: float = Field(0.5, gt=0, lt=1)
    """The PID's output is cut to this: it changes the threshold by no larger share."""
    reward_decay: Decay = 0.95
    """Decay of the reward's moving average, whose change per spread is the velocity."""
    spread_decay: Decay = 0.99
    """Decay of the moving average of the rewards' standard deviation in a rollout."""
    target_velocity: float = 0.0
    """The velocity that leaves the threshold alone, in spreads per rollout."""
    error_limit: PositiveFloat = 0.1
    """The error (velocity minus target) is cut to this, so that one odd rollout does not swing the threshold."""
    window: int = Field(25, ge=2)
    """Rollouts in the phase detector's window, optimizer steps in that of KL's growth."""
    climb: NonNegativeFloat = 0.1
    """CLIMBING: the newer half of the last two windows is higher than the older by more than so many spreads."""
    steady: PositiveFloat = 0.5
    """CONVERGED: the window's mean rewards spread by less than this, in spreads..."""
    converged_within: NonNegativeFloat = 0.25
    """...and their mean is at most so many spreads below the best moving average so far."""
    phases: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (1.5, 1.2, 0.8, 1.0)
    """The threshold's factors in WARMUP, CLIMBING, PLATEAU, CONVERGED."""
    momentum: NonNegativeFloat = 0.5
    """How much growth of KL over the last window counts beside excess; 0: not at all."""
    brake: PositiveFloat | None = None
    """A step whose predicted KL exceeds this is made with the share brake / prediction of the learning rate; null: off."""

    @model_validator(mode="after")
    def _check(self) -> SafeController:
        _ordered("threshold_limits", self.threshold_limits)
        _ordered("gate_limits", self.gate_limits)
        _no_brake_on_rewards(self.term, self.brake)
        return self


Controller = Annotated[AdaptiveKlController | SafeController | PublishedSafeController, Field(discriminator="type")]


def _ordered(name: str, limits: tuple[float, float]) -> None:
    if limits[0] >= limits[1]:
        raise ValueError(f"controller.{name} must be (low, high), but {limits[0]:g} is not below {limits[1]:g}")


def _no_brake_on_rewards(term: str, brake: float | None) -> None:
    if term == "reward" and brake is not None:
        raise ValueError(
            "controller.brake shrinks steps by the KL that the one before them led to, but with controller.term `reward` the "
            "controller is asked once a rollout: set controller.term to `coefficient`, or controller.brake to null"
        )


def describe_critic(critic: CriticSection) -> list[str]:
    """For `rlpost plan`: what the critic does, in order."""
    where = (
        "head on the policy's trunk" if critic.model == "trunk" else f"model of its own ({critic.path or 'as policy'})"
    )
    heads = f"{critic.heads} heads, {critic.aggregate}" if critic.heads > 1 else "1 head"
    lam = f"GAE(gamma {critic.gamma:g}, lambda {critic.lam:g})"
    ends = {"sequence": "at the prompt's end", "answer": "before the answer's last token (as released)"}
    what = lam if critic.per_token else f"reward - value {ends[critic.level]}"
    loss = critic.loss
    clip = f", clip {loss.clip:g} ({loss.combine})" if loss.clip is not None else ""
    return [
        *([f"reward whitened over all rollouts ({critic.whiten_reward})"] if critic.whiten_reward != "none" else []),
        f"critic: {where}, {heads}; advantage: {what}{', whitened' if critic.whiten_advantage else ''}",
        f"value loss: {loss.weight:g} * {loss.type}{clip}; {critic.trunk_gradient:.0%} of its gradient into the trunk",
    ]


def describe_controller(controller: AdaptiveKlController | SafeController | PublishedSafeController) -> str:
    """For `rlpost plan`: what becomes of KL to the reference."""
    where = {
        "coefficient": "coefficient * KL in the loss",
        "literal": "literal derivative in the loss",
        "reward": "coefficient * KL subtracted from the reward",
        "released": "ABLATION: logged only, no gradient, as in the released code",
    }[controller.term]
    match controller:
        case AdaptiveKlController():
            return f"controller: adaptive KL, target {controller.target:g} nats per token; {where}"
        case SafeController():
            kind = "scale-free"
        case PublishedSafeController():
            kind = "published constants"
        case _:
            raise unknown_choice("controller", controller)
    return f"controller: SAFE ({kind}), KL above about {controller.threshold:g} nats per token; {where}"

"""`method`: slots, filled by a preset. A method is a choice for every slot; any slot can be overridden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rlpost.recipe.sections.base import Section, unknown_choice
from rlpost.recipe.sections.critic import Controller, CriticSection, describe_controller, describe_critic, penalty_place
from rlpost.recipe.sections.describe import describe_settings
from rlpost.recipe.sections.guidance import Gate, HintGuidance, SftFirstGate, describe_gate, describe_guidance
from rlpost.recipe.sections.masks import CurvatureMask, Mask, ProbabilityMask, RandomMask
from rlpost.recipe.sections.preference import PairsSection, describe_pairs
from rlpost.recipe.sections.presets import fill_preset


class AdvantageSection(Section):
    """From rewards to one advantage per completion: (reward - centre) / (scale + eps)."""

    center: Literal["group", "leave_one_out", "batch", "none"] = "group"
    """What is subtracted: the group's mean, the mean of the group's other completions, the batch's mean, or nothing."""
    scale: Literal["none", "group_std", "batch_std"] = "group_std"
    """What the centred reward is divided by."""
    combine: Literal["sum_then_normalise", "normalise_then_sum", "gdpo"] = "sum_then_normalise"
    """Several rewards, and what is added to them (`overlong.penalty`, KL with `kl.where: reward`): add them first; or centre
    and scale each alone and add the results times their weights and coefficients; or, with GDPO (arXiv 2601.05242), divide
    that sum by its standard deviation over the batch as well."""
    eps: NonNegativeFloat = 1e-4
    """Added to what is divided by; 0 is allowed: where rewards do not differ, nothing is divided."""
    unbiased: bool = True
    """Standard deviation with n - 1 (as TRL and verl compute it) rather than n."""

    @property
    def whitened(self) -> bool:
        """Whether the sum of what was normalised is scaled once more, over the batch."""
        match self.combine:
            case "sum_then_normalise" | "normalise_then_sum":
                return False
            case "gdpo":
                return True
            case _:
                raise unknown_choice("advantage.combine", self.combine)

    @property
    def each_alone(self) -> bool:
        """Whether rewards are centred and scaled one by one."""
        match self.combine:
            case "sum_then_normalise":
                return False
            case "normalise_then_sum" | "gdpo":
                return True
            case _:
                raise unknown_choice("advantage.combine", self.combine)


class RatioSection(Section):
    """The importance ratio between the policy being updated and the policy at the start of the rollout's updates."""

    level: Literal["token", "sequence", "none"] = "token"
    """Per token; per completion as the geometric mean over its tokens (GSPO); or none: plain REINFORCE."""


class PpoClip(Section):
    """min(ratio * A, clip(ratio, 1 - low, 1 + high) * A): clipped tokens get no gradient."""

    type: Literal["ppo"] = "ppo"
    low: NonNegativeFloat = 0.2
    """The ratio may fall by this much."""
    high: NonNegativeFloat = 0.2
    """The ratio may rise by this much."""
    dual: float | None = Field(None, gt=1)
    """Dual clip: with a negative advantage, no gradient above this ratio; null: off."""


class CispoClip(Section):
    """stop_gradient(clip(ratio, 1 - low, 1 + high)) * A * log pi: every token keeps a gradient (CISPO)."""

    type: Literal["cispo"] = "cispo"
    low: NonNegativeFloat | None = None
    """Lower limit 1 - low of the weight; null: none."""
    high: NonNegativeFloat = 4.0
    """Upper limit 1 + high of the weight."""


class NoClip(Section):
    """ratio * A, unclipped."""

    type: Literal["none"] = "none"


Clip = Annotated[PpoClip | CispoClip | NoClip, Field(discriminator="type")]


class CorrectionSection(Section):
    """Importance correction for the sampler's numerics: weight = pi_old / pi_sampler (truncated importance sampling)."""

    level: Literal["token", "sequence"] = "token"
    """One weight per token, or one per completion (the product over its tokens)."""
    action: Literal["truncate", "mask", "none"] = "truncate"
    """truncate: weights above `max` become `max`. mask: tokens whose weight is above `max` or below `min` are dropped. none: no
    correction at all."""
    max: PositiveFloat = 2.0
    """Upper limit of the weight."""
    min: NonNegativeFloat = 0.0
    """`action: mask` also drops tokens whose weight is below this."""


class KlSection(Section):
    """Penalty for leaving the reference policy, coefficient * KL."""

    coefficient: NonNegativeFloat = 0.0
    """beta; 0: no penalty and no reference model."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = log pi - log pi_ref: d, d^2/2, or exp(-d) + d - 1."""
    where: Literal["loss", "reward"] = "loss"
    """Added to the loss per token, or subtracted from the reward per completion (sum over its tokens)."""


class EntropySection(Section):
    """Bonus for the entropy of the policy's next-token distribution."""

    coefficient: float = 0.0
    """Weight of the bonus; 0: none."""


class ReductionSection(Section):
    """How token terms become one number. All counts are of the whole batch: all processes, all micro-batches."""

    type: Literal["token", "sequence", "constant", "prompt"] = "token"
    """Mean over tokens (DAPO); mean over completions of token means (GRPO); sum over tokens / `constant`, mean over
    completions (Dr.GRPO); mean over prompts of the token mean of the prompt's completions."""
    constant: PositiveInt | None = None
    """The divisor of `type: constant`; null: the longest completion allowed."""
    denominator: Literal["all", "accepted"] = "all"
    """Whether tokens rejected by `masks` still count in a completion's token mean; `accepted` is CAPO's released code."""


class DynamicSamplingSection(Section):
    """DAPO: prompts whose completions all have the same reward are replaced by others before the update."""

    enabled: bool = False
    """Sample again."""
    max_rounds: PositiveInt = 3
    """Further rounds of sampling in a step at the most; after that the step goes on with what there is."""


class OverlongSection(Section):
    """Completions that ran into the token limit."""

    filter: bool = False
    """Leave truncated completions out of the update (they still count in group means and denominators)."""
    penalty: NonNegativeFloat = 0.0
    """DAPO's soft punishment: subtracted from the reward, rising linearly from 0 to this within the buffer; 0: off."""
    buffer: float = Field(0.2, gt=0, le=1)
    """The buffer's share of the token limit, at its end."""


class MethodSection(Section):
    """What is maximised. Slots not given come from `preset`."""

    preset: str = "grpo"
    """grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, capo, dr_capo, rein_capo, ppo, safe, safe_released, ghpo,
    ghpo_released, hpt, hpt_paper, hpt_released, sft, dpo, rpo or rpo_average."""
    advantage: AdvantageSection = Field(default_factory=AdvantageSection)
    """From rewards to advantages."""
    ratio: RatioSection = Field(default_factory=RatioSection)
    """The importance ratio."""
    clip: Clip = Field(default_factory=PpoClip)
    """What limits the ratio."""
    masks: tuple[Mask, ...] = ()
    """Tokens left out of the update; a token must pass all of them."""
    correction: CorrectionSection = Field(default_factory=CorrectionSection)
    """Correction for the difference between sampler and learner."""
    kl: KlSection = Field(default_factory=KlSection)
    """Penalty for leaving the reference policy."""
    entropy: EntropySection = Field(default_factory=EntropySection)
    """Entropy bonus."""
    reduction: ReductionSection = Field(default_factory=ReductionSection)
    """From token terms to the loss."""
    dynamic_sampling: DynamicSamplingSection = Field(default_factory=DynamicSamplingSection)
    """Replacement of groups without signal."""
    overlong: OverlongSection = Field(default_factory=OverlongSection)
    """Treatment of truncated completions."""
    guidance: HintGuidance | None = None
    """GHPO: hints for prompts that no completion solved; null: none. Needs demonstrations."""
    gate: Gate | None = None
    """HPT and its relatives: which prompts are learned from their demonstration; null: none. Needs demonstrations."""
    critic: CriticSection | None = None
    """PPO: learned values as the baseline; null: none. Needs advantage.center and advantage.scale `none`."""
    controller: Controller | None = None
    """What sets the coefficient of the KL penalty from step to step; null: `kl.coefficient` stands. Its `term` replaces
    `kl.where`."""
    pairs: PairsSection | None = None
    """DPO and RPO: learn from pairs of a chosen and a rejected response; null: none. From a data set (`data.train` of type
    `preference`), or from the best and the worst completion of every sampled group."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, raw: Any) -> Any:
        return fill_preset(raw)[0] if isinstance(raw, Mapping) else raw

    @model_validator(mode="after")
    def _check(self) -> MethodSection:
        problems = [text for wrong, text in _rules(self) if wrong]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def curvature(self) -> CurvatureMask | None:
        """The curvature mask that acts, or that a control mask is matched to."""
        return next(iter(_curvature_masks(self)), None)

    @property
    def kl_place(self) -> Literal["loss", "reward"] | None:
        """Where a penalty on KL to the reference acts; None: there is none, and no reference is needed."""
        if self.controller is not None:
            return penalty_place(self.controller.term)
        return self.kl.where if self.kl.coefficient > 0 else None

    @property
    def needs_demonstrations(self) -> bool:
        """Whether the method learns from worked solutions."""
        return self.guidance is not None or self.gate is not None

    @property
    def samples(self) -> bool:
        """Whether training ever samples completions of prompts; plain SFT does not."""
        return not (isinstance(self.gate, SftFirstGate) and self.gate.rollouts is None)


def _curvature_masks(method: MethodSection) -> list[CurvatureMask]:
    masks = [mask for mask in method.masks if isinstance(mask, CurvatureMask)]
    controls = [mask for mask in method.masks if isinstance(mask, RandomMask | ProbabilityMask)]
    return masks + [mask.match for mask in controls if mask.match is not None]


def _rules(m: MethodSection) -> list[tuple[bool, str]]:
    """Combinations that mean nothing: (whether it is there, what to say)."""
    adv, clip, red = m.advantage, m.clip, m.reduction
    return [
        (
            m.ratio.level == "none" and clip.type != "none",
            f"clip.type `{clip.type}` limits a ratio, but ratio.level is `none`: set clip to {{type: none}}",
        ),
        (
            m.ratio.level == "sequence" and clip.type == "ppo" and clip.dual is not None,
            "clip.dual is a limit on token ratios, but ratio.level is `sequence`: set clip.dual to null",
        ),
        (
            m.kl.where == "reward" and m.kl.coefficient == 0,
            "kl.where is `reward` but kl.coefficient is 0: set a coefficient, or kl.where to `loss`",
        ),
        (
            adv.center == "leave_one_out" and adv.scale == "batch_std",
            "advantage.center `leave_one_out` is a group's baseline, advantage.scale `batch_std` the batch's spread: "
            "use scale `none` (RLOO), or center `batch` (REINFORCE++)",
        ),
        (
            adv.center in ("batch", "none") and adv.scale == "group_std",
            f"advantage.scale `group_std` needs center `group` or `leave_one_out`, not `{adv.center}`",
        ),
        (
            adv.combine == "gdpo" and adv.center == "none",
            "advantage.combine `gdpo` adds up rewards that are normalised, but advantage.center is `none`: set it to "
            "`group`, or combine to `sum_then_normalise`",
        ),
        (
            red.constant is not None and red.type != "constant",
            f"reduction.constant is only for reduction.type `constant`, not `{red.type}`",
        ),
        (
            red.denominator == "accepted" and red.type != "sequence",
            f"reduction.denominator `accepted` is only for reduction.type `sequence`, not `{red.type}`: "
            "other denominators are fixed before the forward pass",
        ),
        (
            m.correction.min >= m.correction.max,
            "correction.min must be below correction.max",
        ),
        (
            len(set(_curvature_masks(m))) > 1,
            "masks: more than one curvature mask; there is one tracker of moments, so give one (controls must match it)",
        ),
        *_slot_rules(m),
    ]


def _slot_rules(m: MethodSection) -> list[tuple[bool, str]]:
    """The same for slots that cannot act together."""
    return [
        (
            m.gate is not None and m.dynamic_sampling.enabled,
            "gate and dynamic_sampling.enabled contradict each other: one learns from the solutions of unsolved prompts, the "
            "other replaces these prompts by others. Set dynamic_sampling.enabled to false, or gate to null",
        ),
        (
            m.guidance is not None and not m.samples,
            "guidance and a gate of SFT alone (preset `sft`) contradict each other: hints are for prompts that are sampled. "
            "Set guidance to null, or gate.rollouts to the rollouts of SFT before RL",
        ),
        (
            m.guidance is not None
            and isinstance(m.gate, SftFirstGate)
            and m.guidance.cold_start < (m.gate.rollouts or 0),
            "guidance.cold_start must be at least gate.rollouts: nothing is sampled in the rollouts of SFT",
        ),
        *[
            (
                m.pairs is not None and wrong,
                f"pairs and {slot} cannot act together: a pair's coefficients come from both its responses. Set {slot} to {to}",
            )
            for slot, wrong, to in (
                ("gate", m.gate is not None, "null"),
                ("guidance", m.guidance is not None, "null"),
                ("masks", bool(m.masks), "[]"),
                ("kl.coefficient", m.kl.coefficient != 0, "0 (pairs.beta ties the policy to its reference)"),
                ("entropy.coefficient", m.entropy.coefficient != 0, "0"),
                ("overlong.penalty", m.overlong.penalty != 0, "0 (pairs are made by the rewards alone)"),
                ("overlong.filter", m.overlong.filter, "false"),
                ("controller", m.controller is not None, "null (pairs.beta ties the policy to its reference)"),
            )
        ],
        *_critic_rules(m),
    ]


def _critic_rules(m: MethodSection) -> list[tuple[bool, str]]:
    """The same for critics and controllers."""
    return [
        (
            m.critic is not None and (m.advantage.center != "none" or m.advantage.scale != "none"),
            "critic gives every token its own baseline: set advantage.center and advantage.scale to none "
            "(critic.whiten_advantage scales instead)",
        ),
        (
            m.critic is not None and (m.gate is not None or m.pairs is not None),
            "critic and gate or pairs cannot act together: values are of sampled answers only. Set the other slot to null",
        ),
        (
            m.gate is not None and m.controller is not None,
            "gate and controller cannot act together: a controller follows the reward and KL of sampled answers, and a gate "
            "replaces some of these, or all, by worked solutions. Set controller to null (kl.coefficient is a fixed penalty)",
        ),
        (
            m.controller is not None and m.kl.coefficient != 0,
            "controller sets the KL coefficient itself: set kl.coefficient to 0, or controller to null",
        ),
        (
            m.controller is not None and m.controller.term == "reward" and m.critic is None,
            "controller.term `reward` needs a critic: set it to `coefficient`, or add one",
        ),
        (
            m.critic is not None and m.critic.warmup_rollouts > 0 and m.critic.trunk_gradient > 0,
            "critic.warmup_rollouts with critic.trunk_gradient above 0 would train the policy on values alone: set one to 0",
        ),
    ]


def describe_order(method: MethodSection) -> list[str]:
    """The filled slots in the order in which they act, for `rlpost plan`."""
    m, adv, kl, fix = method, method.advantage, method.kl, method.correction
    if m.pairs is not None:
        return describe_pairs(m.pairs)
    if m.gate is not None and not m.samples:
        return [describe_gate(m.gate, guided=False), f"reduction: {m.gate.reduction} (gate.reduction)"]
    steps: list[tuple[bool, str]] = [
        *[(True, text) for text in (describe_guidance(m.guidance) if m.guidance is not None else [])],
        (
            m.dynamic_sampling.enabled,
            f"groups of equal rewards sampled anew, at most {m.dynamic_sampling.max_rounds} rounds",
        ),
        (m.gate is not None, describe_gate(m.gate, m.guidance is not None) if m.gate is not None else ""),
        (
            m.overlong.penalty > 0,
            f"reward -= up to {m.overlong.penalty:g} in the last {m.overlong.buffer:.0%} of the limit",
        ),
        (
            kl.where == "reward" and kl.coefficient > 0,
            f"reward -= {kl.coefficient:g} * KL to the reference ({kl.estimator})",
        ),
        *[(True, text) for text in (describe_critic(m.critic) if m.critic is not None else [])],
        (m.critic is None, f"advantage: centre {adv.center}, {_describe_scale(adv)} ({adv.combine})"),
        (m.controller is not None, describe_controller(m.controller) if m.controller is not None else ""),
        (m.ratio.level != "none", f"ratio per {m.ratio.level}, clip {_describe_clip(m.clip)}"),
        (fix.action != "none", f"sampler correction: {_describe_correction(fix)}"),
        (
            kl.where == "loss" and kl.coefficient > 0,
            f"coefficient -= {kl.coefficient:g} * d KL({kl.estimator})/d log pi",
        ),
        (m.entropy.coefficient != 0, f"entropy bonus {m.entropy.coefficient:g}"),
        *[(True, f"mask: {describe_settings(mask).removeprefix('type ')}") for mask in m.masks],
        (m.overlong.filter, "mask: truncated completions"),
        (True, f"reduction: {_describe_reduction(m.reduction)}"),
    ]
    return [text for present, text in steps if present]


def _describe_scale(adv: AdvantageSection) -> str:
    return "scale none" if adv.scale == "none" and not adv.whitened else f"scale {adv.scale} + {adv.eps:g}"


def _describe_correction(fix: CorrectionSection) -> str:
    what = f"{fix.action} pi_old/pi_sampler per {fix.level}"
    match fix.action:
        case "truncate":
            return f"{what} at {fix.max:g}"
        case "mask":
            return f"{what} outside [{fix.min:g}, {fix.max:g}]"
        case "none":
            return "none"
        case _:
            raise unknown_choice("correction.action", fix.action)


def _describe_reduction(reduction: ReductionSection) -> str:
    constant = "the token limit" if reduction.constant is None else f"{reduction.constant}"
    more = f" {constant}" if reduction.type == "constant" else ""
    more += " over accepted tokens" if reduction.denominator == "accepted" else ""
    return f"{reduction.type}{more}"


def _describe_clip(clip: Clip) -> str:
    match clip:
        case PpoClip():
            dual = f", dual {clip.dual:g}" if clip.dual is not None else ""
            return f"ppo [{1 - clip.low:g}, {1 + clip.high:g}]{dual}"
        case CispoClip():
            return f"cispo [{0 if clip.low is None else 1 - clip.low:g}, {1 + clip.high:g}]"
        case NoClip():
            return "none"
        case _:
            raise unknown_choice("clip", clip)

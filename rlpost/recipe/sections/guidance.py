"""`method.guidance` and `method.gate`: learning from worked solutions that the policy cannot find by itself yet."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlpost.recipe.sections.base import Section, unknown_choice

Ratio = Annotated[float, Field(gt=0, le=1)]
Unit = Literal["characters", "tokens", "lines", "steps"]


class HintGuidance(Section):
    """GHPO (arXiv 2507.10628): prompts that no completion solved are sampled again with the beginning of their solution."""

    type: Literal["hint"] = "hint"
    ratios: tuple[Ratio, ...] = Field((0.25, 0.5, 0.75), min_length=1)
    """The levels: which share of the worked solution is shown. Groups still unsolved go on to the next one, in one step."""
    unit: Unit = "characters"
    """What the share is counted in. A step is a line or a sentence."""
    snap: bool = True
    """Shorten the hint so that no word, number or LaTeX command (with its arguments) is cut; false: the exact share."""
    place: Literal["user", "assistant"] = "user"
    """Where the hint stands: behind the question, or as the beginning of the assistant's turn, which is then continued."""
    wording: str = (
        "\nThe text below is the beginning of the answer. You may refer to it for solving the problem:\n{hint}"
    )
    """What is put behind the question with `place: user`; `{hint}` is the hint."""
    judge: Literal["completion", "turn"] = "completion"
    """With `place: assistant`, what reward functions see: what was sampled, or the hint and what was sampled."""
    threshold: float = 1.0
    """A completion is right when its accuracy rewards sum to at least this; not given: `scoring.threshold`. A group is hard
    when all of its completions are known and wrong."""
    wrong_at_most: float | None = None
    """A completion is wrong only when its accuracy rewards sum to at most this (released: 0); null: when it is not right."""
    cold_start: NonNegativeInt = 0
    """Rollouts at the beginning without any hint (the paper's optional 20)."""
    final_scale: float = Field(1.0, ge=0, le=1)
    """The ratios' factor at the last rollout; it goes there linearly from 1 at the first. 1: no schedule."""
    memory: bool = False
    """Remember which level a prompt needed, and begin with it when the prompt comes again and is hard again."""
    condition: Literal["hinted", "question", "released"] = "hinted"
    """The prompt that completions are learned under: the one they were sampled from; ablations: always the bare question,
    or the released code's rule (bare for groups solved before the last level that this process sampled)."""

    @property
    def continues(self) -> bool:
        """Whether the assistant's turn begins with the hint, and is continued; else the hint is behind the question."""
        match self.place:
            case "assistant":
                return True
            case "user":
                return False
            case _:
                raise unknown_choice("guidance.place", self.place)

    @property
    def judges_turn(self) -> bool:
        """Whether rewards see the hint in front of what was sampled."""
        match self.judge:
            case "turn":
                return True
            case "completion":
                return False
            case _:
                raise unknown_choice("guidance.judge", self.judge)

    @model_validator(mode="after")
    def _check(self) -> HintGuidance:
        if list(self.ratios) != sorted(set(self.ratios)):
            raise ValueError(f"guidance.ratios must rise from level to level, but they are {list(self.ratios)}")
        if "{hint}" not in self.wording:
            raise ValueError("guidance.wording must contain `{hint}`, the place of the hint")
        if self.judge == "turn" and self.place == "user":
            raise ValueError("guidance.judge `turn` is for guidance.place `assistant`: a hint to the user is no answer")
        return self


class _Gate(Section):
    """What all gates decide about demonstrations that are learned from."""

    sft_weight: NonNegativeFloat = 1.0
    """beta, the factor on the log-likelihood of demonstrations."""
    rl_weight: NonNegativeFloat = 1.0
    """alpha, the factor on the advantages of sampled completions."""
    reduction: Literal["sequence", "token", "as_samples"] = "sequence"
    """How a demonstration's tokens are averaged: over its own length, over all demonstrations' tokens of the optimizer
    step (pooled), or as `method.reduction` does it for one more completion of its group."""
    balance: Literal["prompts", "parts"] = "prompts"
    """Which share all demonstrations have: that of their prompts among all prompts of the step, so that every prompt counts
    the same; or a mean of their own that is added to the samples' loss (as released), whatever their number."""
    entropy: bool = False
    """Whether `method.entropy` acts on the tokens of demonstrations too (as released)."""
    threshold: float = 1.0
    """A completion is right when its accuracy rewards sum to at least this; not given: `scoring.threshold`."""


class SolveRateGate(_Gate):
    """HPT (arXiv 2509.04419): a prompt whose share of right completions P is at most gamma is learned from its solution."""

    type: Literal["solve_rate"] = "solve_rate"
    gamma: float = Field(0.0, le=1)
    """P <= gamma: demonstration; P > gamma: RL. 0: only unsolved prompts; 1: always SFT (`preset: sft` does it without
    sampling); below 0: always RL."""
    below: Literal["sft", "off_policy", "both"] = "sft"
    """What is done below the gate: SFT instead of RL; the demonstration as an off-policy sample in its group; or that with
    SFT on top (the paper's ablations; `sft_weight` 0.1 there)."""
    shaping: PositiveFloat = 0.1
    """c of the off-policy objective pi / (pi + c)."""

    @property
    def joins(self) -> bool:
        """Whether a demonstration joins its prompt's samples, instead of taking their place."""
        match self.below:
            case "sft":
                return False
            case "off_policy" | "both":
                return True
            case _:
                raise unknown_choice("gate.below", self.below)


class SoftGate(_Gate):
    """Soft switching: RL and SFT on every prompt, with weights by the number of right completions."""

    type: Literal["soft"] = "soft"
    rl: tuple[NonNegativeFloat, ...] = Field((0.0, 0.125, 0.25, 0.5, 1.0), min_length=1)
    """RL's weight at 0, 1, 2, ... right completions; the last one also above."""
    sft: tuple[NonNegativeFloat, ...] = Field((1.0, 0.5, 0.25, 0.125, 0.0), min_length=1)
    """SFT's weight, likewise."""


class LuffyGate(_Gate):
    """LUFFY (arXiv 2504.14945): every group gets its demonstration as one more, off-policy completion of full reward."""

    type: Literal["luffy"] = "luffy"
    shaping: PositiveFloat | None = 0.1
    """c of the objective pi / (pi + c); null: pi itself (denominator 1, no shaping)."""
    sft_weight: NonNegativeFloat = 0.0
    """SFT on top."""
    reduction: Literal["sequence", "token", "as_samples"] = "as_samples"
    """As for other gates; here the demonstration is one more completion of its group."""


class SrftGate(_Gate):
    """SRFT (arXiv 2506.19767), as HPT's authors re-implemented it: SFT, off-policy and on-policy terms, weighted by entropy.

    Right samples: `positive` * exp(H), wrong ones -1; demonstrations: `sft_weight` * exp(-H) and pi * advantage, with H
    the completion's mean entropy, a constant.
    """

    type: Literal["srft"] = "srft"
    sft_weight: NonNegativeFloat = 0.5
    """The factor on exp(-H)."""
    positive: NonNegativeFloat = 0.1
    """The factor on exp(H)."""
    reduction: Literal["sequence", "token", "as_samples"] = "as_samples"
    """As for other gates; here the demonstration is one more completion of its group."""


class SftFirstGate(_Gate):
    """SFT on every prompt for some rollouts, which are not sampled, and RL ever after (SFT then GRPO)."""

    type: Literal["sft_first"] = "sft_first"
    rollouts: PositiveInt | None
    """Rollouts of SFT; null: all of them, so that nothing is ever sampled (`preset: sft`)."""


Gate = Annotated[SolveRateGate | SoftGate | LuffyGate | SrftGate | SftFirstGate, Field(discriminator="type")]


def either_or(gate: Gate) -> bool:
    """Whether a prompt is learned from its samples or from its demonstration, never from both."""
    return isinstance(gate, SftFirstGate) or (isinstance(gate, SolveRateGate) and not gate.joins)


def describe_guidance(guidance: HintGuidance) -> list[str]:
    """For `rlpost plan`: what guidance does, in the order in which it does it."""
    levels = ", ".join(f"{ratio:.0%}" for ratio in guidance.ratios)
    where = "behind the question" if guidance.place == "user" else "as the beginning of the answer"
    more = [f"from rollout {guidance.cold_start + 1} on"] if guidance.cold_start else []
    more += [f"shrinking to {guidance.final_scale:.0%} of that"] if guidance.final_scale < 1 else []
    more += ["beginning at the level needed last time"] if guidance.memory else []
    text = f"guide: groups with no right completion sampled again, {levels} of the solution {where}"
    condition = {
        "hinted": "learned under the prompt that was sampled from",
        "question": "ABLATION: learned under the bare question",
        "released": "ABLATION: learned under the bare question if solved before the last level",
    }
    return ["; ".join([text, *more]), f"hinted groups replace the unsolved ones, {condition[guidance.condition]}"]


def describe_gate(gate: Gate, guided: bool) -> str:
    """For `rlpost plan`: where prompts go."""
    match gate:
        case SftFirstGate():
            until = "; nothing is sampled" if gate.rollouts is None else f" for {gate.rollouts} rollouts, then RL"
            return f"gate: SFT on every prompt's demonstration{until}"
        case SoftGate():
            return f"gate: by right completions 0, 1, 2...: RL x {list(gate.rl)}, SFT x {list(gate.sft)}"
        case LuffyGate():
            return "gate: every group gets its demonstration as one more, off-policy completion"
        case SrftGate():
            return f"gate: RL, off-policy and SFT terms on every prompt; SFT weight {gate.sft_weight:g} exp(-entropy)"
        case SolveRateGate():
            return _describe_solve_rate(gate, guided)
        case _:
            raise unknown_choice("gate", gate)


def _describe_solve_rate(gate: SolveRateGate, guided: bool) -> str:
    still = ", also at the last hint" if guided else ""
    what = {
        "sft": f"SFT (x {gate.sft_weight:g}) on the demonstration instead of RL",
        "off_policy": "the demonstration joins the group as an off-policy completion",
        "both": f"the demonstration joins the group, and SFT (x {gate.sft_weight:g}) on it",
    }
    return f"gate: prompts with at most {gate.gamma:.0%} right{still}: {what[gate.below]}; masks act on RL rows only"

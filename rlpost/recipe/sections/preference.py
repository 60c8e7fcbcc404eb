"""Learning from preferences: the slot `method.pairs` (DPO and RPO) and the data source `preference`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from rlpost.recipe.sections.base import Section, unknown_choice


class NoSft(Section):
    """The preference loss alone: DPO."""

    type: Literal["none"] = "none"


class SumSft(Section):
    """RPO as its paper prints it (arXiv 2405.16436): loss += eta * beta * (-log pi(y)), the sum over the response's tokens."""

    type: Literal["sum"] = "sum"
    eta: NonNegativeFloat = 0.005
    """The paper's eta; the coefficient of the summed log-prob is eta * beta. 0: DPO."""


class SequenceMeanSft(Section):
    """RPO's average variant (its appendix F): loss += weight * (-log pi(y) / length), a mean over responses."""

    type: Literal["sequence_mean"] = "sequence_mean"
    weight: NonNegativeFloat = 0.2
    """The coefficient as it is, not multiplied by beta."""


class TokenMeanSft(Section):
    """TRL's loss_type ["sigmoid", "sft"]: loss += weight * (-log pi per token), pooled over the step's tokens."""

    type: Literal["token_mean"] = "token_mean"
    weight: NonNegativeFloat = 1.0
    """TRL's second loss weight, not multiplied by beta."""


Sft = Annotated[NoSft | SumSft | SequenceMeanSft | TokenMeanSft, Field(discriminator="type")]


class PairsSection(Section):
    """DPO and RPO: for a pair, h = (log-ratio of chosen) - (log-ratio of rejected) to the reference, and a loss of h."""

    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """-log sigmoid(beta h) (DPO, arXiv 2305.18290); max(0, 1 - beta h) (SLiC); (h - 1 / (2 beta))^2 (IPO, arXiv 2310.12036)."""
    beta: PositiveFloat = 0.1
    """The strength of the tie to the reference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels taken to be wrong (conservative DPO); only with `loss: sigmoid`."""
    length_normalised: bool | None = None
    """Log-ratios divided by their response's length; null: only for `ipo` (as its authors do; TRL calls DPO with it
    `sigmoid_norm`)."""
    sft: Sft = Field(default_factory=NoSft)
    """The regulariser: none, or the negative log-likelihood of the baseline responses in one of three normalisations. May be
    given as a word: `sft: sum`."""
    baseline: Literal["chosen", "initial"] = "chosen"
    """Whose likelihood `sft` holds up: the chosen response, or a response of the initial model, from the column
    `data.train.baseline` or, without one, sampled once before training (greedily, by `rollout.engine`) and kept on disk."""
    reference: Literal["cached", "live"] = "cached"
    """Reference log-probs of a preference data set: computed once and kept on disk, or in every step (under LoRA by the model
    without its adapter, else by a second copy). Pairs made on the spot always use `live`."""
    min_gap: NonNegativeFloat = 0.0
    """Pairs made on the spot: the best completion's reward must exceed the worst's by more than this."""

    @property
    def normalised(self) -> bool:
        """Whether log-ratios are divided by lengths."""
        return self.loss == "ipo" if self.length_normalised is None else self.length_normalised

    @property
    def from_initial(self) -> bool:
        """Whether `sft` holds up responses of the initial model, instead of the chosen ones."""
        match self.baseline:
            case "initial":
                return True
            case "chosen":
                return False
            case _:
                raise unknown_choice("pairs.baseline", self.baseline)

    @property
    def cached(self) -> bool:
        """Whether the reference's log-probs of a data set are computed once and kept."""
        match self.reference:
            case "cached":
                return True
            case "live":
                return False
            case _:
                raise unknown_choice("pairs.reference", self.reference)

    @field_validator("sft", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> PairsSection:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is only for loss `sigmoid`, not `{self.loss}`: set it to 0")
        if self.baseline == "initial" and isinstance(self.sft, NoSft):
            raise ValueError(
                "baseline `initial` says what `sft` acts on, but sft is `none`: choose one, or baseline `chosen`"
            )
        return self


Drop = Literal["drop", "refuse"]


class PreferenceSource(Section):
    """Preference pairs: a hub data set or local files with a prompt, a chosen and a rejected response.

    Responses are texts or chat messages, as TRL takes them; the prompt may be implicit in both. The columns `tools` and
    `chat_template_kwargs`, where there are any, go to the chat template, as with TRL.
    """

    type: Literal["preference"] = "preference"
    path: str
    """A hub name such as `argilla/dpo-mix-7k`, or a local file or glob ending in .jsonl, .json, .csv or .parquet (the first
    three also compressed: .gz, .bz2, .xz)."""
    name: str | None = None
    """The hub dataset's configuration."""
    split: str = "train"
    """The hub dataset's split. Local files have only `train`."""
    prompt: str | None = "prompt"
    """The column with the prompt; null: the part that both responses begin with. Chat messages may do without the column
    `prompt`; texts may not, unless this is null."""
    chosen: str = "chosen"
    """The column with the preferred response."""
    rejected: str = "rejected"
    """The column with the other response."""
    baseline: str | None = None
    """The column with a response of the initial model, for `method.pairs.baseline: initial`; null: it is sampled."""
    limit: PositiveInt | None = None
    """Use only the first so many rows."""
    plain: bool = False
    """Texts are used as they are, without a chat template (TRL's standard format); false: a prompt's text is a user message."""
    too_long: Literal["drop", "refuse", "cut"] = "drop"
    """Pairs with a response of more than `rollout.max_completion_tokens` tokens: drop them (counted), refuse to start, or cut
    the response there (as the published runs do; it then has no end)."""
    empty: Drop = "refuse"
    """Pairs with an empty response."""
    identical: Drop = "drop"
    """Pairs whose two responses are the same, as texts or as tokens (after the template, and cut at the limit): nothing can
    be learned from them."""
    missing: Drop = "refuse"
    """Rows without a chosen or a rejected response (null), with one of another type than text or chat messages of texts, or
    without the response that `baseline` names."""
    mismatch: Drop = "refuse"
    """Rows whose two responses answer different prompts, or another than the one given; and rows whose prompt is null, empty
    or no question."""


def describe_pairs(pairs: PairsSection) -> list[str]:
    """For `rlpost plan`: what is minimised."""
    h = "h = mean over tokens" if pairs.normalised else "h = sum over tokens"
    h += " of log(pi / pi_ref), chosen minus rejected"
    loss = {
        "sigmoid": f"-log sigmoid({pairs.beta:g} h)",
        "hinge": f"max(0, 1 - {pairs.beta:g} h)",
        "ipo": f"(h - {1 / (2 * pairs.beta):g})^2",
    }[pairs.loss]
    smooth = f", labels smoothed by {pairs.label_smoothing:g}" if pairs.label_smoothing else ""
    steps = [f"pairs: {h}", f"loss: {loss}{smooth}"]
    whose = "chosen responses" if pairs.baseline == "chosen" else "the initial model's responses"
    match pairs.sft:
        case NoSft():
            pass
        case SumSft():
            steps.append(f"+ {pairs.sft.eta:g} x {pairs.beta:g} x (-sum of log pi) of {whose} (RPO as published)")
        case SequenceMeanSft():
            steps.append(f"+ {pairs.sft.weight:g} x (-mean log pi of each response) of {whose} (RPO, average variant)")
        case TokenMeanSft():
            steps.append(f"+ {pairs.sft.weight:g} x (-mean log pi of all tokens) of {whose} (TRL's sft loss)")
        case _:
            raise unknown_choice("pairs.sft", pairs.sft)
    steps.append("reduction: mean over the pairs of the optimizer step")
    return steps

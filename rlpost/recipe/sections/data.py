"""`data`: where prompts come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rlpost.recipe.sections.base import Section
from rlpost.recipe.sections.preference import PreferenceSource


class DatasetSource(Section):
    """A Hugging Face dataset: a hub name, or local JSONL, JSON, CSV or parquet files."""

    type: Literal["dataset"] = "dataset"
    path: str
    """A hub name such as `openai/gsm8k`, or a local file or glob ending in .jsonl, .json, .csv or .parquet (the first three
    also compressed: .gz, .bz2, .xz)."""
    name: str | None = None
    """The hub dataset's configuration, such as `main`."""
    split: str = "train"
    """The hub dataset's split. Local files have only `train`."""
    prompt: str = "prompt"
    """The column with the question: a string, or a list of chat messages."""
    demonstration: str | None = None
    """The column with a worked solution, for methods that learn from solutions: a string, or chat messages of which the
    last one counts."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Further columns for reward functions, by their new name; dots lead into a column's fields, such as
    `{answer: reward_model.ground_truth}`."""
    system: Literal["keep", "drop"] = "keep"
    """What becomes of the system message of prompts that are chats."""
    limit: PositiveInt | None = None
    """Use only the first so many rows."""


class ReasoningGymSource(Section):
    """Procedural tasks from `reasoning-gym`, by name, scored by their own verifiers (reward `reasoning_gym`)."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    """The task's name, such as `basic_arithmetic` or `countdown`."""
    size: PositiveInt = 2000
    """How many questions to generate."""
    seed: NonNegativeInt = 0
    """The generator's seed."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The task's own settings, such as `{min_digits: 1, max_digits: 2}`."""
    suffix: str = ""
    """Text put behind every question, such as " Answer with the number only."."""


class ArithmeticSource(Section):
    """Sums and differences of small numbers: the quickstart's task. Columns: `answer`."""

    type: Literal["arithmetic"] = "arithmetic"
    size: PositiveInt = 2000
    """How many questions to generate."""
    seed: NonNegativeInt = 0
    """The generator's seed."""
    low: int = 0
    """The smallest operand."""
    high: int = 99
    """The largest operand."""
    operations: tuple[Literal["+", "-"], ...] = ("+", "-")
    """Which operations to ask for. Differences are never negative."""
    template: str = "What is {a} {op} {b}?"
    """The question's wording."""


Source = Annotated[
    DatasetSource | ReasoningGymSource | ArithmeticSource | PreferenceSource, Field(discriminator="type")
]


class DataSection(Section):
    """Prompts for training and for evaluation."""

    train: Source
    """Where training prompts come from."""
    eval: Source | None = None
    """Where held-out prompts come from; without it, `held_out` rows are split off `train`."""
    held_out: NonNegativeInt = 64
    """How many rows of `train` are set aside for evaluation when `eval` is not given."""
    system_prompt: str | None = None
    """A system message put before every question."""
    max_prompt_tokens: PositiveInt = 512
    """Prompts longer than this (after the chat template) are `too_long`. Never cut."""
    too_long: Literal["drop", "refuse"] = "drop"
    """What becomes of prompts longer than `max_prompt_tokens`: drop them (counted and reported) or refuse to start."""
    max_demonstration_tokens: PositiveInt | None = None
    """Longer worked solutions are not learned from by `method.gate`; null: those that would not fit a micro-batch
    (`learner.micro_batch_tokens`) behind a prompt of `max_prompt_tokens`. Nor are those that do not fit the model's context
    behind their question."""
    long_demonstrations: Literal["drop", "refuse"] = "drop"
    """What becomes of worked solutions too long for `method.gate`, and of hints of `method.guidance` with which a prompt is
    longer than `max_prompt_tokens`. drop: their prompts are left to RL, without these hints, and counted at the start and
    in every step. refuse: the run does not start."""
    shuffle: bool = True
    """Shuffle anew in every epoch, from the run's seed."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Extra keywords for the chat template, such as `{enable_thinking: false}`."""

    @property
    def has_pairs(self) -> bool:
        """Whether training data are preference pairs, so that nothing is sampled."""
        return isinstance(self.train, PreferenceSource)

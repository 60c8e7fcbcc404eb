"""`rewards` and `scoring`: what is rewarded, and how reward functions are run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlpost.recipe.sections.base import Section, unknown_choice


class RewardSection(Section):
    """One reward function."""

    type: Literal["function"] = "function"
    function: str
    """`path/to/file.py:function`, `package.module:function`, or the name of a file in rewards/ (such as `math`)."""
    weight: float = 1.0
    """Its share in the sum."""
    name: str | None = None
    """Its name in metrics; the function's name by default."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Fixed keyword arguments, next to the data set's columns."""
    completions: Literal["auto", "text", "messages"] = "auto"
    """In which form the function is handed prompts and completions. auto: as TRL does, texts where the data's prompt column
    holds texts (`completion[-1]["content"]` works, too), lists of messages where it holds chats."""
    deadline_s: PositiveFloat = 10.0
    """Seconds that one completion may take. After that its process is killed and the outcome is `timed_out`."""
    timeout_score: FiniteFloat | None = None
    """The score of a completion on which the function does not come back in time, such as 0: it counts as wrong, with the
    outcome `hung`. null: its reward is unknown, so that it costs the policy nothing."""
    call: Literal["sample", "group", "batch"] = "sample"
    """What one call sees: one completion (a crash costs one), its whole group, or the whole batch."""
    accuracy: bool = True
    """Whether this reward says if the answer is right (format and length rewards do not); used by guidance and gates."""

    @property
    def needs_all_groups(self) -> bool:
        """Whether a call sees more than one group, so that none can be begun before all are sampled."""
        match self.call:
            case "sample" | "group":
                return False
            case "batch":
                return True
            case _:
                raise unknown_choice("rewards.call", self.call)


class RewardModelSection(Section):
    """A Hugging Face sequence-classification model whose score is a completion's reward."""

    type: Literal["model"] = "model"
    path: str
    """Its folder or hub name."""
    weight: float = 1.0
    """Its share in the sum of rewards."""
    name: str = "reward_model"
    """Its name in metrics."""
    device: str = "auto"
    """`auto` (the process's own GPU, else the CPU), `cpu`, or a device such as `cuda:1`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of its weights."""
    label: NonNegativeInt | None = None
    """Which of several outputs is the reward; null: the model has one."""
    text: Literal["chat", "plain"] = "chat"
    """The conversation in the model's own chat template, or the prompt's text and the completion's as they are."""
    batch_tokens: PositiveInt = 16384
    """Positions (completions x longest) per forward pass."""
    max_tokens: PositiveInt = 4096
    """Longer conversations are not scored: their outcome is `unparsable`."""
    trust_remote_code: bool = False
    """Run model code from the hub."""
    accuracy: bool = False
    """Whether the reward says if an answer is right."""


def _with_type(reward: Any) -> Any:
    """An entry's `type` follows from its keys: `function` names a function, `path` a model."""
    if not isinstance(reward, dict) or "type" in reward:
        return reward
    return {"type": "model" if "path" in reward and "function" not in reward else "function", **reward}


Reward = Annotated[
    Annotated[RewardSection | RewardModelSection, Field(discriminator="type")], BeforeValidator(_with_type)
]


def reward_ceiling(rewards: Sequence[Reward]) -> float:
    """The highest sum there can be, if functions give at most 1; infinite with a reward model, whose scores have no limit."""
    if any(isinstance(reward, RewardModelSection) for reward in rewards):
        return math.inf
    return sum(max(reward.weight, 0.0) for reward in rewards)


class ScoringSection(Section):
    """The processes that run reward functions."""

    workers: PositiveInt = 2
    """Worker processes per learner process."""
    max_failed_share: float = Field(0.5, gt=0, le=1)
    """Stop when a larger share of a step's scores timed out, crashed or was unparsable: the reward is broken. Of all of the
    step's scores so far, those of hinted and refilled groups included."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory in GiB that a worker process, and each process that it starts, may take for itself: more is a MemoryError in the
    reward. null: as much as there is."""
    threshold: float = 1.0
    """A completion is right when its accuracy rewards sum to at least this, and wrong below it: for evaluation, guidance and
    gate alike, unless one of them has a `threshold` of its own. Lower it for rewards that give partial credit."""

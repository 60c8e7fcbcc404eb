"""What a reward function is given and may do, and what travels between the trainer and its scoring processes.

Imported by every scoring process: nothing heavy here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

BUILTINS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Keywords that TRL's GRPOTrainer passes to every reward function besides the data set's columns."""

EXTRAS = ("truncated", "demonstration")
"""Keywords of our own; passed only to functions that name them, so that `**kwargs` holds what it would hold in TRL."""

IN_WORKER = ("trainer_state", "log_extra", "log_metric")
"""Built-in keywords that are made in the scoring process instead of being sent there."""


LARGEST_REWARD = 1e20
"""A larger number is no reward: learning from it would overflow the learner's float32 numbers."""


class Unparsable(Exception):
    """Raise it in a reward function whose input cannot be read (a gold answer in a strange form, say).

    The outcome is `unparsable`: the completion's reward is then unknown, rather than low.
    """


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What `trainer_state` offers: the part of transformers' TrainerState that rewards are scheduled by, as TRL means it."""

    global_step: int = 0  # optimizer steps taken so far: all completions of a rollout see the same number
    max_steps: int = 0  # of the whole run: learner.rollouts x minibatches x epochs


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """What the trainer knows of a reward function. `spec` loads the same function in any process, whatever its working
    directory."""

    spec: str
    name: str
    is_async: bool
    parameters: frozenset[str]  # that can be given by keyword
    required: frozenset[str]  # those of them without a default
    takes_any: bool  # it has **kwargs

    def wants(self, keyword: str) -> bool:
        """Whether the function is to be given `keyword`."""
        return keyword in self.parameters or (self.takes_any and keyword not in EXTRAS)


@dataclass(frozen=True, slots=True)
class LoadedReward(RewardFunction):
    """And the function itself, in a process that may call it."""

    function: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a reward function, as sent to a scoring process: plain data, lists with one entry a completion."""

    reward: int  # place in the recipe's list of rewards
    size: int  # completions
    keywords: Mapping[str, Any]
    deadline_s: float  # of this call; for async functions also kept by the event loop
    state: TrainerState = field(default_factory=TrainerState)
    guarded: bool = False  # chats among prompts and completions refuse to be taken for texts


@dataclass(frozen=True, slots=True)
class Reply:
    """What one call came to: a verdict (outcome, value, detail) a completion, or how the contract was broken.

    `disturbed`: neither, perhaps: a call beside it, or before it, ended or cancelled the event loop that both shared.
    """

    verdicts: tuple[tuple[str, float | None, str], ...] = ()
    breach: str = ""
    logged: tuple[tuple[str, float], ...] = ()  # what the function gave to log_metric
    seconds: float = 0.0
    disturbed: bool = False

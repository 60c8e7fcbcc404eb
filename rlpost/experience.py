"""The nouns of rlpost: what flows from a data source to a gradient.

    Prompt -> Completion -> Score -> Group -> TokenRows

All are frozen. Everything per token is kept flat, without padding: a rollout with S completions of lengths n_1..n_S
has N = n_1 + ... + n_S tokens, and "[N]" below always means those tokens, completion after completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:  # the nouns are imported by light processes (scoring workers, the CLI) that never load torch
    from torch import Tensor


class Message(TypedDict):
    """One chat message. It may have further keys (`name`, `tool_calls`, `reasoning_content`), as it stands in the data set."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A worked solution of a prompt, for the methods that learn from solutions."""

    text: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, ready to be sampled from.

    `id` is stable across runs and resumes (`<source>/<row>`). `columns` holds what reward functions receive as keywords,
    `options` the row's own keywords of the chat template (such as `tools`).
    """

    id: str
    messages: tuple[Message, ...]
    text: str
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    demonstration: Demonstration | None = None
    hint: str = ""  # the part of the demonstration that this prompt shows
    origin: Prompt | None = None  # of a hinted prompt: the bare one
    is_text: bool = False  # the data's question is a text and no chat: rewards are handed texts, as in TRL
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bare(self) -> Prompt:
        """The prompt without a hint."""
        return self.origin or self


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer. `token_ids` includes the end-of-sequence token when `finish` is "stop".

    `sampler_logprobs` are the rollout engine's own log-probs (nats) of the sampled tokens, one a token, under
    softmax(logits / temperature) over the whole vocabulary, whatever top-k and top-p left out. `versions` are the weights that
    sampled it: stretches of (optimizer steps that had made the weights, number of tokens), in order, together all tokens.
    """

    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    text: str
    finish: Literal["stop", "length"]
    versions: tuple[tuple[int, int], ...] = field(default=(), compare=False)  # (): not known

    @property
    def truncated(self) -> bool:
        return self.finish == "length"


class Outcome(StrEnum):
    """What became of scoring one completion with one reward function."""

    SCORED = "scored"
    NOT_APPLICABLE = "not_applicable"  # the function returned None
    HUNG = "hung"  # the deadline passed, and the recipe gives a score for that (`timeout_score`)
    TIMED_OUT = "timed_out"  # the deadline passed; its process was killed
    CRASHED = "crashed"  # the function raised, or its process died
    UNPARSABLE = "unparsable"  # the function could not read its input (raised Unparsable) or returned no finite number


@dataclass(frozen=True, slots=True)
class Score:
    """The verdict of one reward function on one completion. `value` is None unless `outcome` is SCORED or HUNG."""

    outcome: Outcome
    value: float | None = None
    detail: str = ""

    @property
    def failed(self) -> bool:
        """Whether scoring itself went wrong, so that the completion's reward is unknown rather than low."""
        return self.outcome in (Outcome.TIMED_OUT, Outcome.CRASHED, Outcome.UNPARSABLE)


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt, its G completions, and their scores: `scores[i][r]` is reward function r's verdict on completion i."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[tuple[Score, ...], ...] = ()

    def reward(self, i: int, weights: tuple[float, ...]) -> float:
        """The weighted sum of the scores that apply to completion i; NaN when one failed or none applies."""
        scores = self.scores[i]
        if any(score.failed for score in scores):
            return math.nan
        values = [w * s.value for w, s in zip(weights, scores, strict=True) if s.value is not None]
        return sum(values) if values else math.nan


def without_columns(group: Group) -> Group:
    """The group as it is saved. Columns are for rewards, which have been called; and data may hold whatever class it likes,
    which a checkpoint that is to be loaded safely may not name."""

    def bare(prompt: Prompt) -> Prompt:
        return replace(prompt, columns={}, origin=None if prompt.origin is None else bare(prompt.origin))

    return replace(group, prompt=bare(group.prompt))


@dataclass(frozen=True, slots=True)
class TokenRows:
    """A micro-batch as the model sees it: R rows of T positions, and the N completion tokens to be scored in it.

    A row holds one or more trees; a tree is a prompt (branch 0) and its completions (branches 1, 2, ...), each of which
    continues the prompt. Position q may attend to position k iff k <= q, both belong to the same tree, and k is on
    branch 0 or on q's own branch. With one branch a tree this is ordinary causal attention.
    """

    input_ids: Tensor  # [R, T] int64; padding is at the right end
    position_ids: Tensor  # [R, T] int64; restarts at the prompt's length in every branch
    tree: Tensor  # [R, T] int64; which tree of the row, -1 for padding
    branch: Tensor  # [R, T] int64; 0 for prompt tokens, k for the k-th completion, -1 for padding
    predict_row: Tensor  # [N] int64; where the hidden state stands that predicts token n
    predict_col: Tensor  # [N] int64
    target: Tensor  # [N] int64; the token itself
    token_index: Tensor  # [N] int64; the token's place in the rollout's flat arrays
    sequence: Tensor  # [N] int64; the token's completion, 0 <= sequence < S of the rollout
    causal: bool  # plain causal rows (one tree a row, one branch a tree): no mask is needed
    useful_tokens: int  # N
    real_tokens: int  # positions that are not padding

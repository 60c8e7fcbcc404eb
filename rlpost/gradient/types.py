"""What a method is given and what it gives back: flat tensors over the N completion tokens of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from rlpost.gradient.metrics import Metric


@dataclass(frozen=True, slots=True)
class HeadStatistics:
    """What curvature masks need from the LM head, per completion token. Detached, float32.

    `top_logits`/`top_ids` hold the k largest logits with the sampled token always among them (last place if it was not).
    """

    hidden: Tensor  # [N, d] the head's input at the position that predicts the token
    sum_p2: Tensor | None = None  # [N] sum over the vocabulary of p^2
    sum_p3: Tensor | None = None  # [N] sum over the vocabulary of p^3
    top_ids: Tensor | None = None  # [N, k] int64
    top_logits: Tensor | None = None  # [N, k]


@dataclass(frozen=True, slots=True)
class StatisticsRequest:
    """Which `HeadStatistics` a method needs; `hidden` always comes along."""

    k: int | None = None
    """How many of the largest logits, the sampled token among them; None: none."""
    powers: bool = True
    """Whether `sum_p2` and `sum_p3` are needed."""


@dataclass(frozen=True, slots=True)
class TokenView:
    """All that is known of N completion tokens of S completions of P prompts, when their coefficients are computed.

    Everything is detached. Completions are whole: all tokens of a completion are in the same view, but a view may hold
    only some of the batch (a micro-batch), so nothing may be normalised over the view: see `Counts`.
    """

    logp: Tensor  # [N] log-prob under the policy being updated
    entropy: Tensor  # [N] nats, full vocabulary
    old_logp: Tensor  # [N] log-prob under the policy as it was before the first update on this rollout
    sampler_logp: Tensor  # [N] what the rollout engine reported; NaN where it is not known
    advantage: Tensor  # [N] NaN never; 0 where the reward is unknown
    sequence: Tensor  # [N] int64, 0 <= sequence < S, non-decreasing: which completion of this view
    prompt: Tensor  # [S] int64, 0 <= prompt < P: which group
    truncated: Tensor  # [S] bool: the completion was cut at the token limit
    demonstration: Tensor  # [S] bool: the completion is a worked solution to imitate, not a sample
    ref_logp: Tensor | None = None  # [N] log-prob under the reference policy
    statistics: HeadStatistics | None = None
    token: Tensor | None = None  # [N] int64: the token itself
    token_index: Tensor | None = None  # [N] int64: names the token in the rollout of all processes (for random masks)
    version: Tensor | None = (
        None  # [N] float64: optimizer steps that had made the weights which sampled it; NaN: not known
    )


@dataclass(frozen=True, slots=True)
class Counts:
    """The denominators of one optimizer step, over all micro-batches and processes, skipped groups included.

    Tokens and sequences are those of samples; demonstrations are counted by themselves.
    """

    tokens: int
    sequences: int
    prompts: int
    prompt_tokens: Tensor | None = None  # [P of the view] completion tokens of each prompt's whole group (float64)
    max_completion_tokens: int = 0
    demonstrations: int = 0  # that are learned from
    demonstration_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What the one loss needs: loss = -sum_t weight[t] * (coefficient[t] * logp[t] + entropy_coefficient[t] * entropy[t]).

    `weight` is the reduction's (see `rlpost.gradient.reduction`); all three are detached.
    """

    coefficient: Tensor  # [N]
    entropy_coefficient: Tensor  # [N]
    weight: Tensor  # [N]
    keep: Tensor  # [N] bool: the token passed all masks
    metrics: dict[str, Metric] = field(default_factory=dict)

"""How the transformers engine draws the next token: one uniform number a token from the sequence's own seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlpost.experience import Completion
from rlpost.rollout.engine import SamplingSettings

if TYPE_CHECKING:
    from transformers import LogitsProcessorList


@dataclass(slots=True)
class Row:
    """One sequence being decoded."""

    index: int  # its place among the requests
    prompt: tuple[int, ...]
    uniforms: Tensor  # [max_new] float64: all its randomness, drawn from its own seed
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: Completion | None = None


def make_truncation(settings: SamplingSettings) -> LogitsProcessorList:
    """Top-k and top-p in transformers' own order, for logits that the temperature has divided already; empty for none."""
    from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

    truncation = LogitsProcessorList()
    if settings.truncates and settings.top_k > 0:
        truncation.append(TopKLogitsWarper(settings.top_k))
    if settings.truncates and settings.top_p < 1:
        truncation.append(TopPLogitsWarper(settings.top_p))
    return truncation


def draw(
    logits: Tensor, rows: list[Row], settings: SamplingSettings, truncation: LogitsProcessorList
) -> tuple[Tensor, Tensor]:
    """The next token of every row [B] and its log-prob [B]; logits are [B, V].

    Tokens are drawn from what truncation leaves; log-probs are of the whole distribution (see `RolloutEngine`).
    """
    scores = logits.float()
    if settings.temperature not in (0, 1):
        scores = scores / settings.temperature
    logps = scores.log_softmax(-1)
    if settings.temperature == 0:
        tokens = logps.argmax(-1)
    else:
        drawn_from = truncation(None, scores).log_softmax(-1) if truncation else logps
        cumulative = drawn_from.double().exp().cumsum(-1)
        uniform = torch.stack([row.uniforms[len(row.tokens)] for row in rows]).to(logits.device)
        # right=True: the first token whose cumulative probability is above the draw, never one of probability zero.
        place = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
        tokens = place[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]

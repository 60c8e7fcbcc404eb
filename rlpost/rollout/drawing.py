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


def make_warpers(settings: SamplingSettings) -> LogitsProcessorList:
    """Temperature, top-k and top-p in transformers' own order; empty for greedy decoding."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList()
    if settings.temperature > 0:
        if settings.temperature != 1:
            warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k > 0:
            warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            warpers.append(TopPLogitsWarper(settings.top_p))
    return warpers


def draw(
    logits: Tensor, rows: list[Row], settings: SamplingSettings, warpers: LogitsProcessorList
) -> tuple[Tensor, Tensor]:
    """The next token of every row [B] and its log-prob [B] under the distribution sampled from; logits are [B, V]."""
    logps = warpers(None, logits.float()).log_softmax(-1)
    if settings.temperature == 0:
        tokens = logps.argmax(-1)
    else:
        cumulative = logps.double().exp().cumsum(-1)
        uniform = torch.stack([row.uniforms[len(row.tokens)] for row in rows]).to(logits.device)
        # right=True: the first token whose cumulative probability is above the draw, never one of probability zero.
        place = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
        tokens = place[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]

"""The one reduction: how much each token's term weighs in the loss. Denominators are of the whole batch, never a view's."""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.gradient.segments import count_by, sum_by
from rlpost.gradient.types import Counts, TokenView
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.method import ReductionSection


def token_weights(reduction: ReductionSection, view: TokenView, counts: Counts, keep: Tensor) -> Tensor:
    """[N] weights; summed over all tokens of the optimizer step's batch they give 1 (`constant`: the mean length / C).

    token: 1 / tokens. sequence: 1 / (completion's tokens * completions). constant: 1 / (C * completions).
    prompt: 1 / (tokens of the prompt's completions * prompts). A masked token keeps its place in the denominator, except
    with `denominator: accepted`. The loss of a step is the SUM over micro-batches and processes of the weighted terms.
    """
    match reduction.type:
        case "token":
            return torch.full_like(view.logp, 1.0 / max(counts.tokens, 1))
        case "constant":
            constant = reduction.constant or counts.max_completion_tokens
            if constant <= 0:
                raise ValueError("reduction `constant` without a constant needs Counts.max_completion_tokens")
            return torch.full_like(view.logp, 1.0 / (constant * max(counts.sequences, 1)))
        case "prompt":
            if counts.prompt_tokens is None:
                raise ValueError("reduction `prompt` needs Counts.prompt_tokens")
            per_prompt = counts.prompt_tokens.to(view.logp.dtype).clamp(min=1) * max(counts.prompts, 1)
            return 1.0 / per_prompt[view.prompt][view.sequence]
        case "sequence":
            lengths = count_by(view.sequence, view.prompt.numel(), _counted(reduction, keep))
            return 1.0 / (lengths.clamp(min=1).to(view.logp.dtype) * max(counts.sequences, 1))[view.sequence]
        case _:
            raise unknown_choice("reduction.type", reduction.type)


def _counted(reduction: ReductionSection, keep: Tensor) -> Tensor | None:
    """[N] bool: the tokens that a completion's mean is over; None: all."""
    match reduction.denominator:
        case "all":
            return None
        case "accepted":
            return keep
        case _:
            raise unknown_choice("reduction.denominator", reduction.denominator)


def count_batch(lengths: Tensor, prompt: Tensor, max_completion_tokens: int) -> Counts:
    """Counts of completions of `lengths` [S] tokens that belong to groups `prompt` [S]; add the numbers over processes."""
    groups = int(prompt.max()) + 1 if prompt.numel() else 0
    return Counts(
        tokens=int(lengths.sum()),
        sequences=lengths.numel(),
        prompts=int(prompt.unique().numel()),
        prompt_tokens=sum_by(lengths.double(), prompt, groups),
        max_completion_tokens=max_completion_tokens,
    )

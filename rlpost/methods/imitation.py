"""Demonstration tokens: their coefficients, and their weight beside the samples'."""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.gradient.metrics import Metric, Total, mean_of
from rlpost.gradient.segments import count_by, mean_by
from rlpost.gradient.types import Counts, TokenView
from rlpost.recipe.sections.guidance import Gate, LuffyGate, SolveRateGate, SrftGate


def joins_group(gate: Gate) -> bool:
    """Whether demonstrations take part in RL as off-policy completions of their group."""
    return isinstance(gate, LuffyGate | SrftGate) or (isinstance(gate, SolveRateGate) and gate.below != "sft")


def demonstration_coefficient(gate: Gate | None, view: TokenView) -> Tensor:
    """[N] the coefficient of log pi for tokens of demonstrations (meaningless for others).

    SFT: the row's weight, which stands in `advantage`. Off-policy, with A in `advantage` (arXiv 2509.04419, table 1): the
    objective f(pi) A has the gradient f'(pi) pi A d log pi; LUFFY (arXiv 2504.14945) eq. 8 has f(x) = x / (x + c), SRFT
    f(x) = x. SFT on top adds its weight, SRFT's times exp(-H) with H the demonstration's mean entropy.
    """
    if gate is None or not joins_group(gate):
        return view.advantage
    shaping = None if isinstance(gate, SrftGate) else gate.shaping  # type: ignore[union-attr]
    coefficient = off_policy_slope(view.logp, shaping) * view.advantage
    if isinstance(gate, SrftGate):
        return coefficient + gate.sft_weight * torch.exp(-_mean_entropy(view))
    if isinstance(gate, SolveRateGate) and gate.below == "off_policy":
        return coefficient
    return coefficient + gate.sft_weight


def off_policy_slope(logp: Tensor, shaping: float | None) -> Tensor:
    """[N] f'(pi) pi for f(x) = x / (x + shaping), or for f(x) = x where `shaping` is None."""
    p = logp.exp()
    return p if shaping is None else shaping * p / (p + shaping) ** 2


def sample_factor(gate: Gate | None, view: TokenView) -> Tensor | None:
    """[N] what multiplies the coefficients of sampled tokens, or None. SRFT: `positive` * exp(H) on right samples."""
    if not isinstance(gate, SrftGate):
        return None
    weight = gate.positive * torch.exp(_mean_entropy(view))
    return torch.where(view.advantage > 0, weight, torch.ones_like(weight))


def demonstration_weights(gate: Gate, view: TokenView, counts: Counts, as_samples: Tensor) -> Tensor:
    """[N] the reduction's weight of demonstration tokens; denominators are of the whole optimizer step.

    With D demonstrations of T tokens among P prompts, summed over all demonstration tokens it gives D / P (`balance:
    prompts`) or 1 (`parts`). `as_samples` [N] are the weights that samples would have.
    """
    if gate.reduction == "as_samples":
        return as_samples
    share = 1.0 if gate.balance == "parts" else counts.demonstrations / max(counts.prompts, 1)
    if gate.reduction == "token":
        return torch.full_like(view.logp, share / max(counts.demonstration_tokens, 1))
    lengths = count_by(view.sequence, view.prompt.numel()).clamp(min=1).to(view.logp.dtype)
    return (share / (lengths * max(counts.demonstrations, 1)))[view.sequence]


def loss_parts(view: TokenView, coefficient: Tensor, weight: Tensor) -> dict[str, Metric]:
    """The two parts of the step's loss, and how well demonstrations are known already."""
    demonstration = view.demonstration[view.sequence]
    terms = -(weight * coefficient * view.logp).double()
    return {
        "gate/loss_demonstrations": Total(float(terms[demonstration].sum())),
        "gate/loss_samples": Total(float(terms[~demonstration].sum())),
        "gate/demonstration_nll": mean_of(-view.logp, demonstration),
        "gate/demonstration_entropy": mean_of(view.entropy, demonstration),
    }


def _mean_entropy(view: TokenView) -> Tensor:
    return mean_by(view.entropy, view.sequence, view.prompt.numel())[view.sequence]

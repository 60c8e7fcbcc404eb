"""Demonstration tokens: their coefficients, and their weight beside the samples'."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlpost.gradient.metrics import Metric, Total, mean_of
from rlpost.gradient.segments import count_by, mean_by
from rlpost.gradient.types import Counts, TokenView
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.guidance import Gate, LuffyGate, SftFirstGate, SoftGate, SolveRateGate, SrftGate


def joins_group(gate: Gate) -> bool:
    """Whether demonstrations take part in RL as off-policy completions of their group."""
    match gate:
        case LuffyGate() | SrftGate():
            return True
        case SoftGate() | SftFirstGate():
            return False
        case SolveRateGate():
            return gate.joins
        case _:
            raise unknown_choice("gate", gate)


def demonstration_coefficient(gate: Gate | None, view: TokenView) -> Tensor:
    """[N] the coefficient of log pi for tokens of demonstrations (meaningless for others).

    SFT: the row's weight, which stands in `advantage`. Off-policy, with A in `advantage` (arXiv 2509.04419, table 1): the
    objective f(pi) A has the gradient f'(pi) pi A d log pi; LUFFY (arXiv 2504.14945) eq. 8 has f(x) = x / (x + c), SRFT
    f(x) = x. SFT on top adds its weight, SRFT's times exp(-H) with H the demonstration's mean entropy.
    """
    match gate:
        case None | SoftGate() | SftFirstGate():
            return view.advantage
        case SrftGate():
            on_top = gate.sft_weight * torch.exp(-_mean_entropy(view))
            return off_policy_slope(view.logp, None) * view.advantage + on_top
        case LuffyGate():
            return off_policy_slope(view.logp, gate.shaping) * view.advantage + gate.sft_weight
        case SolveRateGate():
            off_policy = off_policy_slope(view.logp, gate.shaping) * view.advantage
            match gate.below:
                case "sft":
                    return view.advantage
                case "off_policy":
                    return off_policy
                case "both":
                    return off_policy + gate.sft_weight
                case _:
                    raise unknown_choice("gate.below", gate.below)
        case _:
            raise unknown_choice("gate", gate)


def off_policy_slope(logp: Tensor, shaping: float | None) -> Tensor:
    """[N] f'(pi) pi for f(x) = x / (x + shaping), or for f(x) = x where `shaping` is None.

    x / (x + c) is the sigmoid of log x - log c, which is finite however small both are.
    """
    if shaping is None:
        return logp.exp()
    distance = logp - math.log(shaping)
    return torch.sigmoid(distance) * torch.sigmoid(-distance)


def sample_factor(gate: Gate | None, view: TokenView) -> Tensor | float:
    """[N] what multiplies the advantages of sampled tokens; 1 for most gates. SRFT: `positive` * exp(H) on right samples."""
    if not isinstance(gate, SrftGate):
        return 1.0
    weight = gate.positive * torch.exp(_mean_entropy(view))
    return torch.where(view.advantage > 0, weight, torch.ones_like(weight))


def demonstration_weights(gate: Gate, view: TokenView, counts: Counts, as_samples: Tensor) -> Tensor:
    """[N] the reduction's weight of demonstration tokens; denominators are of the whole optimizer step.

    With D demonstrations of T tokens among P prompts, summed over all demonstration tokens it gives D / P (`balance:
    prompts`) or 1 (`parts`). `as_samples` [N] are the weights that samples would have.
    """
    match gate.reduction:
        case "as_samples":
            return as_samples
        case "token":
            return torch.full_like(view.logp, _share(gate, counts) / max(counts.demonstration_tokens, 1))
        case "sequence":
            lengths = count_by(view.sequence, view.prompt.numel()).clamp(min=1).to(view.logp.dtype)
            return (_share(gate, counts) / (lengths * max(counts.demonstrations, 1)))[view.sequence]
        case _:
            raise unknown_choice("gate.reduction", gate.reduction)


def _share(gate: Gate, counts: Counts) -> float:
    """What all demonstrations of the step weigh together."""
    match gate.balance:
        case "parts":
            return 1.0
        case "prompts":
            return counts.demonstrations / max(counts.prompts, 1)
        case _:
            raise unknown_choice("gate.balance", gate.balance)


def loss_parts(view: TokenView, coefficient: Tensor, weight: Tensor) -> dict[str, Metric]:
    """The two parts of the step's loss, and how well demonstrations are known already."""
    demonstration = view.demonstration[view.sequence]
    # Where a token of probability 0 has no coefficient, it has no part in the loss either.
    terms = torch.where(coefficient == 0, 0.0, -(weight * coefficient * view.logp).double())
    return {
        "gate/loss_demonstrations": Total(float(terms[demonstration].sum())),
        "gate/loss_samples": Total(float(terms[~demonstration].sum())),
        "gate/demonstration_nll": mean_of(-view.logp, demonstration),
        "gate/demonstration_entropy": mean_of(view.entropy, demonstration),
    }


def _mean_entropy(view: TokenView) -> Tensor:
    return mean_by(view.entropy, view.sequence, view.prompt.numel())[view.sequence]

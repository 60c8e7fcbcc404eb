"""HPT (arXiv 2509.04419) and its relatives: which prompts are learned from their samples, and which from their solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlpost.gradient.metrics import Metric
from rlpost.methods.estimator import AdvantageResult, compute_advantages
from rlpost.methods.imitation import joins_group
from rlpost.methods.signal import advantage_metrics
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.guidance import Gate, LuffyGate, SftFirstGate, SoftGate, SolveRateGate, SrftGate
from rlpost.recipe.sections.method import MethodSection
from rlpost.teaching.verdict import right_of_known


@dataclass(frozen=True, slots=True)
class Route:
    """What one prompt is learned from."""

    samples: bool = True  # its sampled completions take part in the update
    demonstration: bool = False  # its demonstration does
    rl_weight: float = 1.0  # alpha: factor on the samples' advantages
    sft_weight: float = 0.0  # beta: a demonstration's coefficient, where it does not join the group

    @property
    def dropped(self) -> Route:
        """The route of a prompt without a usable demonstration: its samples are learned from after all."""
        return replace(self, samples=True, demonstration=False, sft_weight=0.0)


def route(gate: Gate, accuracies: Sequence[float | None], rollout: int) -> Route:
    """Where the gate sends a prompt whose completions have the `accuracies` (None: unknown).

    HPT eq. 10: P <= gamma goes to SFT. Completions of unknown accuracy are left out of P; a prompt of which nothing is
    known is sent to SFT only by gamma = 1, which sends all.
    """
    right, known = right_of_known(accuracies, gate.threshold)
    match gate:
        case SftFirstGate():
            first = gate.rollouts is None or rollout < gate.rollouts
            return Route(not first, first, gate.rl_weight, gate.sft_weight if first else 0.0)
        case SoftGate():
            alpha, beta = gate.rl[min(right, len(gate.rl) - 1)], gate.sft[min(right, len(gate.sft) - 1)]
            if not known:
                return Route(rl_weight=gate.rl_weight)
            return Route(alpha > 0, beta > 0, gate.rl_weight * alpha, gate.sft_weight * beta)
        case SolveRateGate():
            below = gate.gamma >= 0 and (right <= gate.gamma * known + 1e-9 if known else gate.gamma >= 1)
            return Route(
                samples=not below or gate.joins,
                demonstration=below,
                rl_weight=gate.rl_weight,
                sft_weight=gate.sft_weight if below else 0.0,
            )
        case LuffyGate() | SrftGate():  # every prompt, both
            return Route(True, True, gate.rl_weight, gate.sft_weight)
        case _:
            raise unknown_choice("gate", gate)


def needs_samples(gate: Gate | None, rollout: int) -> bool:
    """Whether anything that is sampled in this rollout could be learned from, or decides a route."""
    return not (isinstance(gate, SftFirstGate) and (gate.rollouts is None or rollout < gate.rollouts))


@dataclass(frozen=True, slots=True)
class GatedAdvantages:
    """Advantages of S samples of P prompts, and of the prompts' demonstrations."""

    samples: Tensor  # [S] float64, rl_weight included
    demonstrations: Tensor  # [P] float64; beta, or the advantage among the group's completions; 0 where there is none
    result: AdvantageResult  # the base method's
    metrics: dict[str, Metric]  # of the samples; demonstrations that joined a group are in none


def gated_advantages(
    method: MethodSection,
    rewards: Tensor,
    prompt: Tensor,
    routes: Sequence[Route],
    *,
    weights: Sequence[float],
    right: Tensor,
    lengths: Tensor | None = None,
    max_completion_tokens: int = 0,
    sequence_kl: Tensor | None = None,
) -> GatedAdvantages:
    """The advantages of samples and demonstrations, where a gate decides which of them a prompt is learned from.

    Without a gate this is `compute_advantages` (see there) of the samples, unchanged. With one, samples have their route's
    factor, and demonstrations that join their group enter its mean and standard deviation.
    Such a demonstration has full marks: the sum of the positive `weights`. `right` [S] (1, 0; NaN: unknown) is what SRFT
    makes +1 and -1 of.
    """
    gate = method.gate
    joined = [p for p, r in enumerate(routes) if r.demonstration] if gate is not None and joins_group(gate) else []
    marks = torch.tensor([[max(float(w), 0.0) for w in weights]] * len(joined), dtype=torch.float64)
    n = len(joined)
    result = compute_advantages(
        method,
        torch.cat([rewards.double(), marks.reshape(n, rewards.shape[1])]) if n else rewards,
        torch.cat([prompt, torch.tensor(joined, dtype=prompt.dtype)]) if n else prompt,
        weights=weights,
        lengths=torch.cat([lengths, lengths.new_zeros(n)]) if n and lengths is not None else lengths,
        max_completion_tokens=max_completion_tokens,
        sequence_kl=torch.cat([sequence_kl, sequence_kl.new_zeros(n)])
        if n and sequence_kl is not None
        else sequence_kl,
    )
    size = len(prompt)
    samples, known = result.advantage[:size], result.known[:size]
    if isinstance(gate, SrftGate):
        known = ~right.isnan()
        samples = torch.where(known, 2 * right.to(samples.dtype) - 1, torch.zeros_like(samples))
    alpha = torch.tensor([r.rl_weight for r in routes], dtype=torch.float64)
    samples = samples * alpha[prompt] if len(routes) else samples
    demonstrations = torch.tensor([r.sft_weight for r in routes], dtype=torch.float64)
    if n:
        demonstrations = torch.zeros_like(demonstrations)
        demonstrations[joined] = result.advantage[size:]
    metrics = advantage_metrics(
        method,
        samples,
        known,
        zero_variance=result.zero_variance,
        shaping=None if result.shaping is None else result.shaping[:size],
        learned=torch.tensor([r.samples for r in routes], dtype=torch.bool)[: len(result.zero_variance)]
        if routes
        else None,
        prompt=prompt,
    )
    return GatedAdvantages(samples, demonstrations, result, metrics)

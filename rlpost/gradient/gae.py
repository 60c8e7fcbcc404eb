"""Generalised advantage estimation over flat tokens, several value heads as one value, and the value loss's gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.critic import CriticSection, ValueLossSection


def generalised_advantage(
    reward: Tensor,
    value: Tensor,
    sequence: Tensor,
    sequences: int,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    final_value: Tensor | None = None,
) -> Tensor:
    """GAE (arXiv 1506.02438 eq. 16) of N tokens of S completions: A_t = d_t + gamma lambda A_{t+1}, [N], with
    d_t = r_t + gamma V_{t+1} - V_t.

    `reward` [N] is earned by a token, `value` [N] that of the state before it. `sequence` [N] int64 is non-decreasing, and
    need not name every completion. A completion's last token is followed by `final_value` [S], or by 0: its end ends the
    episode. The target of the values is A + V. Completions do not touch each other, whatever their order or padding.
    """
    lengths = torch.bincount(sequence, minlength=sequences)
    ends = lengths.cumsum(0)
    present = lengths > 0
    following = torch.zeros_like(value)
    following[:-1] = value[1:]
    last = torch.zeros(sequences, dtype=value.dtype, device=value.device) if final_value is None else final_value
    following[ends[present] - 1] = last[present].to(value.dtype)
    advantage = reward + gamma * following - value
    if gamma * lam == 0:
        return advantage
    by_length = torch.argsort(lengths, descending=True)
    ends, sizes = ends[by_length], lengths[by_length].tolist()
    active = len(sizes)
    for back in range(1, sizes[0] if sizes else 0):  # all completions at once, from their last tokens backwards
        while sizes[active - 1] <= back:
            active -= 1
        place = ends[:active] - 1 - back
        advantage[place] += gamma * lam * advantage[place + 1]
    return advantage


def first_tokens(sequence: Tensor) -> Tensor:
    """[S] int64: where each completion present in `sequence` [N] (non-decreasing) begins."""
    if not sequence.numel():
        return sequence
    new = torch.ones_like(sequence, dtype=torch.bool)
    new[1:] = sequence[1:] != sequence[:-1]
    return new.nonzero().squeeze(1)


def last_tokens(sequence: Tensor) -> Tensor:
    """[S] int64: where each completion present in `sequence` [N] (non-decreasing) ends."""
    first = first_tokens(sequence)
    return torch.cat([first[1:] - 1, torch.full_like(first[:1], sequence.numel() - 1)])


def soft_min(values: Tensor, alpha: float) -> Tensor:
    """-alpha log mean_i exp(-V_i / alpha) over the last dimension (SAFE, arXiv 2602.04651): between the smallest and the
    mean, the smallest for alpha -> 0, the mean for alpha -> infinity, and at most alpha log H above the smallest."""
    return -alpha * (torch.logsumexp(-values / alpha, dim=-1) - math.log(values.shape[-1]))


def aggregate_values(critic: CriticSection, values: Tensor) -> Tensor:
    """[M] one value from the heads' [M, H]."""
    match critic.aggregate:
        case "mean":
            return values.mean(-1)
        case "min":
            return values.amin(-1)
        case "soft_min":
            return soft_min(values, critic.alpha)
        case _:
            raise unknown_choice("critic.aggregate", critic.aggregate)


def head_shares(critic: CriticSection, values: Tensor) -> Tensor:
    """[M, H] d aggregate / d V_i: shares that add up to 1. Equal smallest heads share alike."""
    match critic.aggregate:
        case "mean":
            return torch.full_like(values, 1.0 / values.shape[-1])
        case "min":
            smallest = (values == values.amin(-1, keepdim=True)).to(values.dtype)
            return smallest / smallest.sum(-1, keepdim=True)
        case "soft_min":
            return torch.softmax(-values / critic.alpha, dim=-1)
        case _:
            raise unknown_choice("critic.aggregate", critic.aggregate)


@dataclass(frozen=True, slots=True)
class ValueCoefficients:
    """What the value loss does to every head's value. Detached: its gradient is all that training needs."""

    gradient: Tensor  # [M, H] d loss / d V_i
    loss: Tensor  # [M]
    clipped: Tensor  # [M] bool: the clip holds the gradient back (of any head)


@torch.no_grad()
def value_coefficients(critic: CriticSection, values: Tensor, old: Tensor, target: Tensor) -> ValueCoefficients:
    """The value loss (see `ValueLossSection`) of M values, and its gradient with respect to every head.

    `values` [M, H] from the heads now; `old` [M] the aggregate (`train: aggregate`) or [M, H] the heads (`train: heads`)
    at the start of the rollout's updates; `target` [M]. With `train: aggregate` the loss is l(agg(V)), with `heads` the
    mean over heads of l(V_i).
    """
    match critic.train:
        case "heads":
            target = target[:, None].expand_as(values)
            loss, slope, clipped = value_loss(critic.loss, values, old, target)
            heads = values.shape[-1]
            return ValueCoefficients(slope / heads, loss.mean(-1), clipped.any(-1))
        case "aggregate":
            loss, slope, clipped = value_loss(critic.loss, aggregate_values(critic, values), old, target)
            return ValueCoefficients(slope[:, None] * head_shares(critic, values), loss, clipped)
        case _:
            raise unknown_choice("critic.train", critic.train)


def value_loss(settings: ValueLossSection, value: Tensor, old: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d loss / d value, whether the clip holds the gradient back), each of the shape of `value`.

    PPO's value clip: max(l(V), l(V_c)) with V_c = V_old + clip(V - V_old, -c, c). Beyond the clip l(V_c) is constant, so
    the gradient vanishes where l(V_c) is the larger (`combine: max`) or halves (`combine: mean`, SAFE).
    """
    loss, slope = _distance(settings, value - target)
    none = torch.zeros_like(value, dtype=torch.bool)
    if settings.clip is None:
        return loss, slope, none
    move = value - old
    outside = move.abs() > settings.clip
    limited, _ = _distance(settings, old + move.clamp(-settings.clip, settings.clip) - target)
    limited = torch.where(outside, limited, loss)  # the same number, free of the rounding of old + (V - old)
    match settings.combine:
        case "mean":
            return (loss + limited) / 2, torch.where(outside, slope / 2, slope), outside
        case "max":
            held = outside & (limited > loss)
            return torch.maximum(loss, limited), torch.where(held, torch.zeros_like(slope), slope), held
        case _:
            raise unknown_choice("critic.loss.combine", settings.combine)


def _distance(settings: ValueLossSection, error: Tensor) -> tuple[Tensor, Tensor]:
    """(l, dl / d error)."""
    match settings.type:
        case "squared":
            return error.square() / 2, error
        case "huber":
            delta, size = settings.delta, error.abs()
            return torch.where(size <= delta, error.square() / 2, delta * (size - delta / 2)), error.clamp(
                -delta, delta
            )
        case _:
            raise unknown_choice("critic.loss.type", settings.type)


def value_surrogate(coefficients: ValueCoefficients, weight: Tensor, values: Tensor) -> Tensor:
    """sum_m weight[m] * sum_i gradient[m, i] * V_i[m]: a scalar whose gradient is that of the weighted value loss.

    `values` [M, H] carry gradients, everything else is constant, as in `rlpost.gradient.loss.coefficient_loss`.
    """
    return (weight[:, None] * coefficients.gradient * values).sum()

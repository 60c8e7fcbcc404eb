"""From rewards to one advantage per completion: centre, scale, combine. Always over the whole batch of groups."""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.gradient.segments import count_by, spread_by, sum_by
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.method import AdvantageSection

TOO_LARGE = 1e100
"""Rewards beyond this are normalised in units of the largest, so that their squares do not overflow."""


def normalise(settings: AdvantageSection, reward: Tensor, prompt: Tensor, groups: int) -> Tensor:
    """(reward - centre) / (scale + eps), [S]; 0 where `reward` [S] is unknown (NaN, or infinite), which enters no mean either.

    GRPO (arXiv 2402.03300) eq. 3: group mean and std; Dr.GRPO (arXiv 2503.20783): scale none; RLOO (arXiv 2402.14740)
    eq. 9: leave_one_out; REINFORCE++ (arXiv 2501.03262): batch mean and std. Where all known rewards are equal (of a group,
    or of the batch, as the centre has it) the result is exactly 0, whatever rounding and eps say. Where `_scale`
    gives exactly 0 nothing is divided: without a centre, equal rewards have a standard deviation of 0, and a division by eps
    alone would blow them up.
    """
    known = reward.isfinite()
    value = torch.where(known, reward, torch.zeros_like(reward))
    size = float(value.abs().max()) if value.numel() else 0.0
    if size > TOO_LARGE:  # its square has no place in a float64: the same in units of the largest reward
        return _rescaled(settings, reward, prompt, groups, size)
    equal = _equal_rewards(settings, value, known, prompt, groups)
    centred = torch.where(known, value - _centre(settings, value, known, prompt, groups), torch.zeros_like(value))
    centred = torch.where(equal, torch.zeros_like(centred), centred)
    if settings.scale == "none":
        return centred
    scale = _scale(settings, value, centred, known, prompt, groups)
    return centred / torch.where(scale == 0, torch.ones_like(scale), scale + settings.eps)


def whiten_batch(settings: AdvantageSection, advantage: Tensor, known: Tensor) -> Tensor:
    """GDPO's last step (arXiv 2601.05242): the summed advantages [S] over their standard deviation in the batch, 0 where not
    `known` [S] bool, which does not count.

    The paper subtracts the batch's mean too. Rewards that were centred add up to 0 in every group (or in the batch), so that
    this mean is 0, and is not subtracted: rounding would give groups without signal an advantage.
    """
    value = torch.where(known, advantage, torch.zeros_like(advantage))
    less = 1 if settings.unbiased else 0
    scale = (value.square().sum() / (known.sum() - less).clamp(min=1)).sqrt()
    return value / torch.where(scale == 0, torch.ones_like(scale), scale + settings.eps)


def _rescaled(settings: AdvantageSection, reward: Tensor, prompt: Tensor, groups: int, size: float) -> Tensor:
    """`normalise` of rewards as large as `size`, which does not overflow."""
    in_units = normalise(settings.model_copy(update={"eps": settings.eps / size}), reward / size, prompt, groups)
    most = torch.finfo(in_units.dtype).max
    return (in_units * size).clamp(-most, most) if settings.scale == "none" else in_units


def _equal_rewards(settings: AdvantageSection, value: Tensor, known: Tensor, prompt: Tensor, groups: int) -> Tensor:
    """[S] bool: all known rewards that the centre is taken over are equal."""
    match settings.center:
        case "none":
            return torch.zeros_like(known)
        case "batch":
            there = value[known]
            return torch.full_like(known, not there.numel() or bool(there.max() == there.min()))
        case "group" | "leave_one_out":
            return (spread_by(value[known], prompt[known], groups) == 0)[prompt]
        case _:
            raise unknown_choice("advantage.center", settings.center)


def _centre(settings: AdvantageSection, value: Tensor, known: Tensor, prompt: Tensor, groups: int) -> Tensor:
    """[S] what is subtracted."""
    match settings.center:
        case "none":
            return torch.zeros_like(value)
        case "batch":
            return (value.sum() / known.sum().clamp(min=1)).expand_as(value)
        case "group":
            total, count = _totals(value, known, prompt, groups)
            return total / count.clamp(min=1)
        case "leave_one_out":
            total, count = _totals(value, known, prompt, groups)
            # A completion without known siblings has no baseline: so its advantage is 0.
            return torch.where(count > 1, (total - value) / (count - 1).clamp(min=1), value)
        case _:
            raise unknown_choice("advantage.center", settings.center)


def _totals(value: Tensor, known: Tensor, prompt: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """([S] sum, [S] number) of the known rewards of a completion's group."""
    return sum_by(value, prompt, groups)[prompt], count_by(prompt, groups, known)[prompt]


def _scale(
    settings: AdvantageSection, value: Tensor, centred: Tensor, known: Tensor, prompt: Tensor, groups: int
) -> Tensor:
    """[S] or scalar: what `centred` is divided by, eps not yet added. 0: it is not divided; infinity: the advantage is 0."""
    less = 1 if settings.unbiased else 0
    match settings.scale:
        case "none":
            return torch.ones_like(value)
        case "batch_std":
            count = known.sum()
            mean = centred.sum() / count.clamp(min=1)
            squares = torch.where(known, (centred - mean) ** 2, torch.zeros_like(centred)).sum()
            equal = count == 0 or bool((centred[known] == centred[known][0]).all())
            return torch.zeros_like(squares) if equal else (squares / (count - less).clamp(min=1)).sqrt()
        case "group_std":
            count = count_by(prompt, groups, known)
            mean = sum_by(value, prompt, groups) / count.clamp(min=1)
            squares = sum_by(torch.where(known, (value - mean[prompt]) ** 2, torch.zeros_like(value)), prompt, groups)
            return (squares / (count - less).clamp(min=1)).sqrt()[prompt]
        case _:
            raise unknown_choice("advantage.scale", settings.scale)

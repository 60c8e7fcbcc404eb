"""From rewards to one advantage per completion: centre, scale, combine. Always over the whole batch of groups."""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.gradient.segments import count_by, spread_by, sum_by
from rlpost.recipe.sections.method import AdvantageSection


def normalise(section: AdvantageSection, reward: Tensor, prompt: Tensor, groups: int) -> Tensor:
    """(reward - centre) / (scale + eps), [S]; 0 where `reward` [S] is NaN (unknown), which enters no mean either.

    GRPO (arXiv 2402.03300) eq. 3: group mean and std; Dr.GRPO (arXiv 2503.20783): scale none; RLOO (arXiv 2402.14740)
    eq. 9: leave_one_out; REINFORCE++ (arXiv 2501.03262): batch mean and std. A group whose known rewards are all equal
    gets exactly 0 from a group's centre, whatever rounding says.
    """
    known = ~reward.isnan()
    value = torch.where(known, reward, torch.zeros_like(reward))
    centred = torch.where(known, value - _centre(section, value, known, prompt, groups), torch.zeros_like(value))
    if section.center in ("group", "leave_one_out"):
        flat = spread_by(value[known], prompt[known], groups) == 0
        centred = torch.where(flat[prompt], torch.zeros_like(centred), centred)
    if section.scale == "none":
        return centred
    return centred / (_scale(section, value, centred, known, prompt, groups) + section.eps)


def _centre(section: AdvantageSection, value: Tensor, known: Tensor, prompt: Tensor, groups: int) -> Tensor:
    """[S] what is subtracted."""
    if section.center == "none":
        return torch.zeros_like(value)
    if section.center == "batch":
        return (value.sum() / known.sum().clamp(min=1)).expand_as(value)
    total = sum_by(value, prompt, groups)[prompt]
    count = count_by(prompt, groups, known)[prompt]
    if section.center == "group":
        return total / count.clamp(min=1)
    # A completion without known siblings has no baseline: the rule below makes its advantage 0.
    return torch.where(count > 1, (total - value) / (count - 1).clamp(min=1), value)


def _scale(
    section: AdvantageSection, value: Tensor, centred: Tensor, known: Tensor, prompt: Tensor, groups: int
) -> Tensor:
    """[S] or scalar standard deviation."""
    less = 1 if section.unbiased else 0
    if section.scale == "batch_std":
        count = known.sum()
        mean = centred.sum() / count.clamp(min=1)
        squares = torch.where(known, (centred - mean) ** 2, torch.zeros_like(centred)).sum()
        return (squares / (count - less).clamp(min=1)).sqrt()
    count = count_by(prompt, groups, known)
    mean = sum_by(value, prompt, groups) / count.clamp(min=1)
    squares = sum_by(torch.where(known, (value - mean[prompt]) ** 2, torch.zeros_like(value)), prompt, groups)
    return (squares / (count - less).clamp(min=1)).sqrt()[prompt]

"""Sums, means and extremes per completion or per group of flat tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """[size] sums of `values` [N] over the places with the same `index` [N]; 0 where there are none."""
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(0, index, values)


def count_by(index: Tensor, size: int, where: Tensor | None = None) -> Tensor:
    """[size] int64: how often each index occurs (where the boolean `where` [N] holds)."""
    return torch.bincount(index if where is None else index[where], minlength=size)


def mean_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """[size] means of `values` over the places with the same `index`; 0 where there are none."""
    return sum_by(values, index, size) / count_by(index, size).clamp(min=1)


def spread_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """[size] largest minus smallest of `values` per index; 0 where there are fewer than two."""
    high = torch.full((size,), -torch.inf, dtype=values.dtype, device=values.device)
    low = -high
    high = high.scatter_reduce(0, index, values, "amax")
    low = low.scatter_reduce(0, index, values, "amin")
    return torch.where(high > low, high - low, torch.zeros_like(high))

"""Metrics that can be added over micro-batches and processes without weighting errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean, kept as total and count."""

    total: float
    count: float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(frozen=True, slots=True)
class Total:
    """A sum."""

    total: float

    def __add__(self, other: Total) -> Total:
        return Total(self.total + other.total)

    def value(self) -> float | None:
        return self.total


@dataclass(frozen=True, slots=True)
class Maximum:
    """A maximum."""

    maximum: float

    def __add__(self, other: Maximum) -> Maximum:
        return Maximum(max(self.maximum, other.maximum))

    def value(self) -> float | None:
        return self.maximum


# Bins of the logarithmic histogram behind quantiles: 32 a decade (a relative error below 4 %), 1e-14 to 1e6.
BINS_PER_DECADE, LOWEST_DECADE, DECADES = 32, -14, 20


@dataclass(frozen=True, slots=True)
class Quantile:
    """A quantile of non-negative values, from a histogram that can be added. Values below 1e-14 count as 0."""

    q: float
    counts: tuple[float, ...]  # of zeros, then of each bin

    def __add__(self, other: Quantile) -> Quantile:
        return Quantile(self.q, tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    def value(self) -> float | None:
        return histogram_quantile(torch.tensor(self.counts, dtype=torch.float64), self.q)


Metric = Mean | Total | Maximum | Quantile


def mean_of(values: Tensor, where: Tensor | None = None) -> Mean:
    """The mean of `values`, or of those where the boolean `where` holds."""
    if where is not None:
        values = values[where]
    return Mean(float(values.double().sum()), float(values.numel()))


def max_of(values: Tensor) -> Maximum:
    """The maximum of `values`; -inf for none."""
    return Maximum(float(values.max()) if values.numel() else -torch.inf)


def log_bins(values: Tensor) -> Tensor:
    """The bin of every one of the non-negative `values`, int64 of the same shape: 0 for about 0, else a logarithmic one."""
    bins = BINS_PER_DECADE * DECADES
    place = torch.floor((values.double().log10() - LOWEST_DECADE) * BINS_PER_DECADE)
    return place.nan_to_num(nan=-1.0, posinf=bins - 1.0, neginf=-1.0).clamp(-1, bins - 1).long() + 1


def upper_edge(place: float) -> float:
    """The value at the upper end of bin `place`; between two bins' ends for a fractional `place`; 0 for bin 0."""
    return 0.0 if place <= 0 else 10.0 ** (LOWEST_DECADE + place / BINS_PER_DECADE)


def log_histogram(values: Tensor) -> Tensor:
    """[1 + bins] float64 on the CPU: how many of the non-negative `values` are about 0, and in each logarithmic bin."""
    return torch.bincount(log_bins(values).flatten(), minlength=BINS_PER_DECADE * DECADES + 1).double().cpu()


def histogram_quantile(counts: Tensor, q: float) -> float | None:
    """The upper edge of the lowest bin such that it and those below hold the share `q` of the values; None for no values."""
    total = float(counts.sum())
    if not total:
        return None
    reached = counts.cumsum(0) >= q * total * (1 - 1e-12)
    return upper_edge(int(reached.to(torch.int8).argmax()))


def quantiles_of(name: str, values: Tensor, shares: Iterable[float] = (0.5, 0.9, 0.99)) -> dict[str, Metric]:
    """Metrics `name`_p50, _p90, _p99 of the absolute `values`."""
    counts = tuple(log_histogram(values.abs()).tolist())
    return {f"{name}_p{round(q * 100)}": Quantile(q, counts) for q in shares}


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Adds metrics of the same name."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name] + metric if name in merged else metric  # type: ignore[operator]
    return merged


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The numbers to report; metrics without any observation are left out."""
    numbers = {name: metric.value() for name, metric in metrics.items()}
    return {
        name: number for name, number in numbers.items() if number is not None and number not in (torch.inf, -torch.inf)
    }

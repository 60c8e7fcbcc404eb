"""Metric rows as columns of numbers: of a long run these take a twentieth of the rows' memory, and are read once."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlpost.tracking.metrics import MetricRow, number

Numbers = NDArray[np.float64]
DRAWN = 1000
"""A picture is about so many dots wide: of a longer curve the highest and the lowest value of every so manieth part are drawn,
which looks the same, peaks included."""


class Columns:
    """Rows in their order. A number that is missing or not finite is NaN."""

    def __init__(self, steps: NDArray[np.int64], numbers: dict[str, Numbers]) -> None:
        self.steps, self._numbers = steps, numbers

    @classmethod
    def of(cls, rows: Iterable[MetricRow]) -> Columns:
        """The numbers of rows, which are read one after the other."""
        columns: dict[str, array[float]] = {}
        steps, isfinite = array("q"), math.isfinite
        for place, row in enumerate(rows):
            steps.append(int(row["step"]))
            for key, value in row.items():
                usual = type(value) is float and isfinite(value)
                if not usual and (key in ("step", "kind") or (value := number(row, key)) is None):
                    continue
                if (column := columns.get(key)) is None:
                    column = columns[key] = array("d")
                if len(column) < place:  # rows that lacked it
                    column.extend([math.nan] * (place - len(column)))
                column.append(value)
        for column in columns.values():
            column.extend([math.nan] * (len(steps) - len(column)))
        return cls(np.array(steps, dtype=np.int64), {key: np.array(column) for key, column in columns.items()})

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def keys(self) -> list[str]:
        """The metrics of which any row has a number, in their order."""
        return sorted(self._numbers)

    def numbers(self, key: str) -> Numbers:
        """One for every row."""
        known = self._numbers.get(key)
        return np.full(len(self), math.nan) if known is None else known

    def known(self, key: str) -> int:
        """How many rows have this number."""
        return int(np.count_nonzero(~np.isnan(self.numbers(key))))

    def having(self, *keys: str) -> Columns:
        """The rows that have at least one of these numbers."""
        mask = np.zeros(len(self), dtype=bool)
        for key in keys:
            mask |= ~np.isnan(self.numbers(key))
        return Columns(self.steps[mask], {key: column[mask] for key, column in self._numbers.items()})

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, without the rows that lack it."""
        values = self.numbers(key)
        there = ~np.isnan(values)
        return self.steps[there].tolist(), values[there].tolist()


def thinned(steps: Sequence[int], values: Sequence[float], parts: int = DRAWN) -> tuple[list[int], list[float]]:
    """A curve of at most about twice `parts` points that looks like a longer one: of every part the lowest and the highest
    value, at their places, and both ends."""
    if len(values) <= 2 * parts:
        return list(steps), list(values)
    numbers = np.asarray(values, dtype=np.float64)
    places = {0, len(numbers) - 1}
    for part in np.array_split(np.arange(len(numbers)), parts):
        inside = numbers[part[0] : part[-1] + 1]
        places |= {int(part[0] + inside.argmin()), int(part[0] + inside.argmax())}
    chosen = sorted(places)
    return [steps[place] for place in chosen], [values[place] for place in chosen]


def highest(totals: Numbers, parts: int = DRAWN) -> NDArray[np.int64]:
    """The places to draw of a long series of bars: of every part the highest bar."""
    if len(totals) <= parts:
        return np.arange(len(totals))
    return np.array([part[0] + totals[part].argmax() for part in np.array_split(np.arange(len(totals)), parts)])

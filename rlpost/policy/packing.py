"""Which rows share a micro-batch, and which completions share a tree: integer arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stack:
    """Rows (their numbers) that form one micro-batch, each padded to `width` positions."""

    rows: tuple[int, ...]
    width: int


def stack_rows(lengths: Sequence[int], budget: int) -> list[Stack]:
    """Partitions rows into stacks with len(rows) * width <= budget; a row longer than that stands alone.

    Rows are sorted by length, longest first, and cut into runs so that positions (padding included) plus budget / 8 a
    stack are fewest: another pass through the model is only worth it where it saves that much padding. The optimum over
    all such cuts is found by dynamic programming in O(rows * longest run). The longest rows come first, so that running
    out of memory happens at once or never.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    overhead = budget / 8
    best: list[float] = [0.0] * (len(order) + 1)  # best[i]: the cost of rows order[i:]
    cut = [0] * len(order)
    for first in range(len(order) - 1, -1, -1):
        width = lengths[order[first]]
        most = max(1, budget // width)
        options = range(first + 1, min(first + most, len(order)) + 1)
        cut[first] = min(options, key=lambda end: (end - first) * width + best[end])
        best[first] = (cut[first] - first) * width + overhead + best[cut[first]]
    stacks, first = [], 0
    while first < len(order):
        stacks.append(Stack(tuple(order[first : cut[first]]), lengths[order[first]]))
        first = cut[first]
    return stacks


def balanced_split(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Parts of item numbers, each with a sum of lengths <= capacity; an item longer than that stands alone.

    As few parts as the longest-first greedy rule can fill evenly, starting from the fewest conceivable; where it never
    stays within the capacity, first-fit decreasing does. Numbers are ascending within a part.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    fitted = _first_fit(lengths, order, capacity)
    fewest = -(-sum(lengths) // capacity) if capacity > 0 else len(lengths)
    for count in range(min(fewest, len(fitted)), len(fitted) + 1):
        even = _even(lengths, order, count)
        if all(len(part) == 1 or sum(lengths[i] for i in part) <= capacity for part in even):
            return [sorted(part) for part in even]
    return [sorted(part) for part in fitted]


def _even(lengths: Sequence[int], order: Sequence[int], count: int) -> list[list[int]]:
    """Deals the items to `count` parts, each to the part that holds least so far."""
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for item in order:
        least = loads.index(min(loads))
        parts[least].append(item)
        loads[least] += lengths[item]
    return parts


def _first_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts each item into the first part that has room for it, or opens a new one."""
    parts: list[list[int]] = []
    loads: list[int] = []
    for item in order:
        room = next((p for p, load in enumerate(loads) if load + lengths[item] <= capacity), None)
        if room is None:
            parts.append([item])
            loads.append(lengths[item])
        else:
            parts[room].append(item)
            loads[room] += lengths[item]
    return parts

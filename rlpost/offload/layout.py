"""The flat optimizer state of a process, cut into pieces that are updated one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

UNIT = 64
"""Pieces begin at multiples of this many elements after their sub-group's first. torch's fused AdamW on a CPU computes whole
vectors of up to 16 elements and a scalar tail that rounds otherwise: cut elsewhere, the bits would depend on the pieces."""

Where = Literal["gpu", "cpu", "resident"]
"""What updates a piece. gpu: its state lies on the host and passes through the accelerator. cpu: the host updates it where it
lies. resident: its state stays on the accelerator (the static share of ZeRO-Offload++, also called Twin-Flow)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` of the flat vectors."""

    start: int
    stop: int
    group: int  # the optimizer's parameter group: its own rate and weight decay
    where: Where

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def on_gpu(self) -> bool:
        """Whether it passes through the accelerator, and takes a staging set there."""
        return self.where == "gpu"


def cut(
    sizes: Sequence[int], groups: Sequence[int], largest: int, *, gpu_of: int, every: int, resident: float = 0.0
) -> list[Piece]:
    """Pieces of at most about `largest` elements (rounded up to `UNIT`), as even as may be, none across two sub-groups.

    `sizes` and `groups`: elements and parameter group of each of DeepSpeed's sub-groups, end to end. Small sub-groups come
    first in the list (not in the flat vectors): norms and biases, which every process keeps whole, are ready early. Who
    updates what: see `pattern`. Raises ValueError for a share or a size that cannot be.
    """
    if largest < 1:
        raise ValueError(f"pieces of at most {largest} elements cannot be")
    bounds: list[tuple[int, int, int]] = []
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    for size, first, group in sorted(zip(sizes, firsts, groups, strict=True)):
        parts = max(1, math.ceil(size / largest))
        step = max(1, math.ceil(size / parts / UNIT)) * UNIT
        bounds += [(first + at, first + min(at + step, size), group) for at in range(0, size, step)]
    wheres = pattern([stop - start for start, stop, _ in bounds], gpu_of=gpu_of, every=every, resident=resident)
    return [Piece(*bound, where) for bound, where in zip(bounds, wheres, strict=True)]


def pattern(sizes: Sequence[int], *, gpu_of: int, every: int, resident: float = 0.0) -> list[Where]:
    """Who updates each of the pieces, whose elements are `sizes`.

    The first pieces are resident, as many as fit into the share `resident` of all elements. Of every `every` elements of the
    others `gpu_of` pass through the accelerator, spread evenly, so that neither side waits for the other's run of pieces; with
    pieces of one size these are `gpu_of` of every `every` pieces. Raises ValueError for a share that cannot be.
    """
    if every < 1 or not 0 <= gpu_of <= every or not 0.0 <= resident <= 1.0:
        raise ValueError(f"{gpu_of} of {every} pieces, and a share of {resident} resident, cannot be")
    room, due = resident * sum(sizes), 0
    wheres: list[Where] = []
    for size in sizes:
        if room >= size > 0 and all(where == "resident" for where in wheres):
            room -= size
            wheres.append("resident")
            continue
        due += gpu_of * size  # elements that the accelerator should have been given by now, times `every`
        to_gpu = gpu_of > 0 and due >= every * size
        due -= every * size if to_gpu else 0
        wheres.append("gpu" if to_gpu else "cpu")
    return wheres

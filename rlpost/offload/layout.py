"""The flat optimizer state of a process, cut into pieces that are updated one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

UNIT = 64
"""Pieces begin at multiples of this many elements after their sub-group's first. torch's fused AdamW on a CPU computes whole
vectors of up to 16 elements and a scalar tail that rounds otherwise: cut elsewhere, the bits would depend on the pieces."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` of the flat vectors."""

    start: int
    stop: int
    group: int  # the optimizer's parameter group: its own rate and weight decay
    on_gpu: bool  # where it is updated

    @property
    def size(self) -> int:
        return self.stop - self.start


def cut(sizes: Sequence[int], groups: Sequence[int], largest: int, *, gpu_of: int, every: int) -> list[Piece]:
    """Pieces of at most about `largest` elements (rounded up to `UNIT`), as even as may be, none across two sub-groups.

    `sizes` and `groups`: elements and parameter group of each of DeepSpeed's sub-groups, end to end. Of every `every` pieces
    `gpu_of` are updated on the accelerator, spread evenly, so that neither side waits for the other's run of pieces.
    """
    if not 0 <= gpu_of <= every or every < 1 or largest < 1:
        raise ValueError(f"{gpu_of} of {every} pieces of at most {largest} elements cannot be")
    pieces: list[Piece] = []
    first = 0
    for size, group in zip(sizes, groups, strict=True):
        parts = max(1, math.ceil(size / largest))
        step = max(1, math.ceil(size / parts / UNIT)) * UNIT
        for start in range(0, size, step):
            number = len(pieces)
            on_gpu = (number + 1) * gpu_of // every > number * gpu_of // every
            pieces.append(Piece(first + start, first + min(start + step, size), group, on_gpu))
        first += size
    return pieces

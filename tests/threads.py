"""Several processes of a run, as threads of one: what `Processes.gather` does, for tests of what is gathered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Threads:
    """One of `world` processes."""

    def __init__(self, rank: int, world: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world, self._slots, self._barrier = rank, world, slots, barrier
        self.is_main = rank == 0

    def gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait(30)
        found = list(self._slots)
        self._barrier.wait(30)
        return found


def together(world: int, action: Callable[[Threads], Any]) -> list[Any]:
    """What `action` gives on every process, by rank."""
    slots, barrier = [None] * world, threading.Barrier(world)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: action(Threads(rank, world, slots, barrier)), range(world)))

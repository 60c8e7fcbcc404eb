"""Where an engine's process stands among those of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True, slots=True)
class Place:
    """One process of a run; by default the only one."""

    rank: int = 0
    local_rank: int = 0  # on its node
    gather: Callable[[Any], list[Any]] = _alone
    """Every process's value, by rank, on every process. Collective."""
    logs: Path | None = None
    """The folder for what servers print; by default a new temporary one."""

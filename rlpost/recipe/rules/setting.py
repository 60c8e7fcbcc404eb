"""What a recipe is judged in: its launch and its folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rlpost.recipe.sections.root import Recipe


@dataclass(frozen=True, slots=True)
class Setting:
    """What a recipe is judged in: how many processes will run it, and the folder that it lies in."""

    processes: int = 1
    base: Path = Path()
    zero_stage: int = 0  # DeepSpeed's, which keeps a float32 copy of bfloat16 weights; 0: without DeepSpeed
    learns: bool = True  # False for `rlpost eval` and `rlpost serve`, which make no learner


Rule = Callable[[Recipe, Setting], Iterable[str]]


def processes_from_environment() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def zero_stage_from_environment() -> int:
    """The ZeRO stage of the launch file; 0 without DeepSpeed. Raises RecipeError for a stage that does not exist."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return 0
    from rlpost.learner.deepspeed import zero_stage  # imports torch

    return zero_stage()

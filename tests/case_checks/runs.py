"""Checks of the cases about runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REWARD, save_tiny_model

from rlpost.errors import CheckpointError
from rlpost.recipe.load import load_recipe
from rlpost.run.loop import train


def resume_other_temperature(folder: Path) -> None:
    """In the middle of a rollout another temperature is refused; at the rollout's end it is taken."""
    save_tiny_model(folder / "model")
    (folder / "graded.py").write_text(REWARD)
    run = train(load_recipe(folder / "recipe.yaml")).run_dir
    with pytest.raises(CheckpointError, match=r"rollout\.temperature=1\.0, in the middle of a rollout"):
        changes = ["rollout.temperature=0.3", "learner.stop_after=null"]
        train(load_recipe(folder / "recipe.yaml", [f"resume={run}/checkpoints/step_000003", *changes]))
    assert train(load_recipe(folder / "recipe.yaml", ["resume=auto", *changes])).optimizer_steps == 6


CHECKS: dict[str, Callable[[Path], None]] = {"resume-other-temperature": resume_other_temperature}

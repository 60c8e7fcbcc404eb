"""Checks of the cases about runs."""

from __future__ import annotations

import json
import runpy
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


def generation_config_not_saved(folder: Path) -> None:
    """The run ends with its model, whose generation settings are those that the model came with."""
    from transformers import AutoModelForCausalLM

    runpy.run_path("make_model.py")
    result = train(load_recipe("recipe.yaml"))
    assert result.optimizer_steps == 2 and result.checkpoint is not None
    AutoModelForCausalLM.from_pretrained(result.checkpoint)
    before, after = (
        json.loads((f / "generation_config.json").read_text()) for f in (folder / "model", result.checkpoint)
    )
    assert {name: after[name] for name in before} == before


CHECKS: dict[str, Callable[[Path], None]] = {
    "resume-other-temperature": resume_other_temperature,
    "generation-config-not-saved": generation_config_not_saved,
}

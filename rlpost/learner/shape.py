"""What a checkpoint's files depend on: the choices of a recipe that a resumed run cannot change, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpost.errors import CheckpointError
from rlpost.recipe.sections.model import LoraSection
from rlpost.recipe.sections.root import Recipe

# Of a rollout in progress: between rollouts these may be changed freely.
_IN_ROLLOUT = ("learner.minibatches", "learner.epochs", "method.kl", "method.pairs")
# What a method remembers: it can be left behind, but not be taken up where it was never written.
_MEMORY = ("method.masks", "method.controller")


def run_shape(recipe: Recipe) -> dict[str, Any]:
    """Recipe keys with what is saved because of them, as plain values; `trainer/state.json` holds it."""
    lora, method = recipe.model.lora, recipe.method
    critic, mask, controller = method.critic, method.curvature, method.controller
    head = {"model", "heads", "layer_norm", "hidden_share"}
    thresholds = None if mask is None else mask.thresholds.model_dump(mode="json").get("type")
    found = {
        "model.lora": None if lora is None else lora.model_dump(mode="json", include={"rank", "targets"}),
        "method.critic": None if critic is None else critic.model_dump(mode="json", include=head),
        "method.controller": None if controller is None else controller.type,
        "method.masks": None if mask is None else {"type": "curvature", "step": mask.step, "thresholds": thresholds},
        "method.kl": None if method.kl_place is None else {"where": method.kl_place},
        "method.pairs": None if method.pairs is None else {"baseline": method.pairs.baseline},
        "learner.minibatches": recipe.learner.minibatches,
        "learner.epochs": recipe.learner.epochs,
    }
    return json.loads(json.dumps(found))  # as it will be read back: tuples become lists


def check_shape(path: Path, saved: Mapping[str, Any], recipe: Recipe, *, in_rollout: bool) -> None:
    """Whether the recipe can go on from a checkpoint that was saved with the shape `saved` ({}: by an older version, which
    did not say). Raises CheckpointError naming the first key that differs, and both values."""
    for key, now in run_shape(recipe).items():
        before = saved.get(key, now)
        if now == before or (key in _IN_ROLLOUT and not in_rollout) or (key in _MEMORY and now is None):
            continue
        if key in _IN_ROLLOUT:
            where, way_out = ", in the middle of a rollout", _BETWEEN_ROLLOUTS
        else:
            where, way_out = "", f"begin a new run from its weights with model.path={path}"
        raise CheckpointError(
            f"{path} was saved with {key}={json.dumps(before)}{where}, and the recipe now has {key}={json.dumps(now)}: what "
            f"was saved does not fit it. Set {key} back to {json.dumps(before)}, or {way_out}."
        )


_BETWEEN_ROLLOUTS = (
    "resume from a checkpoint at a rollout's end (a checkpoint.every that is a multiple of minibatches x epochs makes all of "
    "them such)"
)


def check_adapter(folder: Path, lora: LoraSection | None) -> None:
    """Whether a folder with weights holds what the recipe trains: a whole model, or adapters. Raises CheckpointError."""
    adapter = (folder / "adapter_config.json").is_file()
    if lora is not None and not adapter:
        raise CheckpointError(
            f"{folder} holds a whole model and no adapter (adapter_config.json), but the recipe has model.lora. Set "
            "model.lora=null, or name the folder of a run with model.lora."
        )
    if lora is None and adapter:
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json) and no whole model, but the recipe has model.lora=null. Set "
            "model.lora as in the run that saved it (its recipe.yaml says how)."
        )

"""Whether a folder with weights holds what the recipe trains."""

from __future__ import annotations

from pathlib import Path

from rlpost.errors import CheckpointError
from rlpost.recipe.sections.model import LoraSection


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

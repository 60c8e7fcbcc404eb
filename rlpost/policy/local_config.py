"""A model's configuration as far as it is on this machine: for what is decided before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlpost.recipe.sections.model import ModelSection


def local_config(model: ModelSection) -> Any | None:
    """The model's Hugging Face configuration, if it is on this machine; never asks the network."""
    path = model.path
    if path.startswith("package:"):
        from rlpost.data.packaged import described_by
        from rlpost.errors import RecipeError

        try:
            path = described_by(path)
        except RecipeError:  # the rules say what is wrong with it
            return None
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path,
            local_files_only=True,
            trust_remote_code=model.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError):
        return None  # neither a folder nor in the hub's cache: the caller says so

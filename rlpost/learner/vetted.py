"""What a checkpoint's pickles would call when they are loaded: looked at before any is.

Everything that `torch.save` writes holds a pickle, and a pickle can name any function. A manifest is no help: whoever changes a
checkpoint writes it anew. So the names in every pickle are read without running it, and a file that names more than tensors,
plain values, and the classes that rlpost and DeepSpeed save is refused.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile

from torch.serialization import get_unsafe_globals_in_checkpoint

from rlpost.errors import CheckpointError

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_HARMLESS = frozenset(
    {
        *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
        *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
_NOUNS = (
    *("rlpost.experience", "rlpost.data.pairs", "rlpost.gradient.types", "rlpost.learner.buffer"),
    *("rlpost.methods.", "rlpost.source.", "rlpost.teaching.", "rlpost.rollout.verify", "rlpost.rollout.probe"),
)
"""Modules whose dataclasses and enumerations are saved."""


def refuse_code(folder: Path) -> None:
    """Raises CheckpointError for a file below `folder` that could run code when it is loaded, or is no file of `torch.save`."""
    for file in sorted(folder.rglob("*")):
        if file.suffix not in PICKLES or not file.is_file():
            continue
        try:
            names = get_unsafe_globals_in_checkpoint(str(file))
        except (ValueError, RuntimeError, EOFError, UnpicklingError, BadZipFile, OSError, AssertionError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{file} is not a file as rlpost saves it ({why}): it is damaged or something else. Go on from another."
            ) from error
        if strange := sorted(name for name in names if not _known(name)):
            raise CheckpointError(
                f"{file} would call {', '.join(strange[:3])} when it is loaded, which no checkpoint of rlpost does: it may "
                "have been made to run a program on your machine. Load it with nothing else either. Its weights, if they are "
                f"safetensors, can be used: model.path={folder}."
            )


def _known(name: str) -> bool:
    """Whether a pickle may name this: it is in the list, or one of the dataclasses and enumerations that are saved."""
    if name in _HARMLESS:
        return True
    module, _, attribute = name.rpartition(".")
    if not f"{module}.".startswith(tuple(noun if noun.endswith(".") else f"{noun}." for noun in _NOUNS)):
        return False
    try:
        named = getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return False
    if not isinstance(named, type) or not named.__module__.startswith("rlpost."):
        return False
    return dataclasses.is_dataclass(named) or issubclass(named, enum.Enum)

"""What `auto` means for the precision of the learner's products and of the sampler, on the machine at hand."""

from __future__ import annotations

from typing import Literal

from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.recipe.sections.root import Recipe

_CPU_FEATURES = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")


def has_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 in hardware. A CPU that does not emulates it, some thirty times slower."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return any(bool(features.get(name)) for name in _CPU_FEATURES)


def autocast_of(model: ModelSection) -> Literal["bfloat16", "none"]:
    """`model.autocast` with `auto` decided."""
    match model.autocast:
        case "bfloat16" | "none":
            return model.autocast
        case "auto":
            return "bfloat16" if model.dtype == "bfloat16" or has_bfloat16() else "none"
        case _:
            raise unknown_choice("model.autocast", model.autocast)


def sampler_dtype(engine: VllmEngine) -> Literal["bfloat16", "float16", "float32"]:
    """`rollout.engine.dtype` with `auto` decided."""
    match engine.dtype:
        case "bfloat16" | "float16" | "float32":
            return engine.dtype
        case "auto":
            return "bfloat16" if has_bfloat16() else "float32"
        case _:
            raise unknown_choice("rollout.engine.dtype", engine.dtype)


def decide_precision(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with every `auto` precision decided, and a line about each that became float32."""
    model = recipe.model.model_copy(update={"autocast": autocast_of(recipe.model)})
    changes: dict[str, object] = {"model": model}
    notes = []
    if recipe.model.autocast == "auto" and model.autocast == "none":
        notes.append(
            "model.autocast: none, because this device has no bfloat16 instructions and would emulate them slowly"
        )
    engine = recipe.rollout.engine
    if isinstance(engine, VllmEngine) and engine.dtype == "auto":
        decided = engine.model_copy(update={"dtype": sampler_dtype(engine)})
        changes["rollout"] = recipe.rollout.model_copy(update={"engine": decided})
        if decided.dtype == "float32":
            notes.append("rollout.engine.dtype: float32, for the same reason")
    return recipe.model_copy(update=changes), tuple(notes)

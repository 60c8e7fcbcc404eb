"""Cross-field rules about how the model is held and attends. No model is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlpost.recipe.sections.root import Recipe

if TYPE_CHECKING:
    from rlpost.recipe.rules.setting import Setting


def quantization_problems(r: Recipe, setting: Setting) -> Iterator[str]:
    """What stands against `model.lora.quantize`."""
    if r.model.lora is None or not r.model.quantized:
        return
    asked = f"model.lora.quantize={r.model.lora.quantize}"
    if importlib.util.find_spec("bitsandbytes") is None:
        yield f"{asked}, but the package bitsandbytes is not installed. Run `pip install rlpost[qlora]`, or set it to none"
    if setting.zero_stage == 3:
        yield (
            f"{asked} with DeepSpeed ZeRO-3, which would cut the packed 4-bit weights into pieces that nothing can unpack. "
            "Use ZeRO-2 (launch/zero2.yaml) or plain processes (launch/gpus.yaml), or set it to none"
        )


def flex_problems(r: Recipe, _: Setting) -> Iterator[str]:
    """What stands against `model.attention=flex_attention` on this machine."""
    if r.model.attention != "flex_attention":
        return
    import torch  # a second or two, and only for recipes that need the answer

    if not torch.cuda.is_available():
        yield (
            "model.attention=flex_attention needs a CUDA GPU (torch's FlexAttention has no backward pass on the CPU), and "
            "torch sees none here. Use model.attention=auto or sdpa"
        )


def capped_logits(r: Recipe, _: Setting) -> Iterator[str]:
    """CAPO's SGD form is of plain logits; where the model is not on this machine, the first step says so."""
    mask = r.method.curvature
    if mask is None or mask.step != "sgd":
        return
    from rlpost.recipe.plan.memory import local_config

    config = local_config(r.model)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        yield (
            f"method.masks: the curvature mask's step `sgd` has no form for capped logits, and {r.model.path} caps them "
            f"(final_logit_softcapping={cap:g}). Use step: adam"
        )


def quantization_advice(r: Recipe, _: Setting) -> Iterator[str]:
    """What is wasteful beside 4-bit weights."""
    if r.model.quantized and r.model.dtype == "float32":
        yield (
            "model.dtype=float32 with 4-bit weights: embeddings, output layer and activations stay in float32. "
            "model.dtype=bfloat16 needs half of that, and adapters are in float32 all the same"
        )

"""QLoRA's frozen weights: linear layers in 4 bits (NormalFloat, with quantised scales), held by bitsandbytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlpost.errors import RecipeError
from rlpost.policy.precision import autocast_of
from rlpost.recipe.sections.model import ModelSection

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


def loading_options(model: ModelSection, device: torch.device | str) -> dict[str, Any]:
    """What `from_pretrained` has to be told so that a model's linear layers are in 4 bits; nothing for other models.

    They are quantised tensor by tensor on `device`, so a GPU never holds the whole model. Raises RecipeError naming
    `model.lora.quantize` where bitsandbytes is missing.
    """
    if not model.quantized:
        return {}
    return {"quantization_config": _configuration(model), "device_map": {"": str(device)}}


def _configuration(model: ModelSection) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "model.lora.quantize needs the package bitsandbytes, which is not installed: `pip install rlpost[qlora]`, or "
            "set model.lora.quantize to none"
        )
    from transformers import BitsAndBytesConfig

    # bitsandbytes multiplies in this precision, whatever autocast says.
    compute = torch.bfloat16 if autocast_of(model) == "bfloat16" else getattr(torch, model.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter holds packed 4-bit weights."""
    return getattr(parameter, "quant_state", None) is not None


def dequantized(parameter: Any) -> Tensor:
    """The weights [outputs, inputs] that a packed parameter stands for, in the precision they were loaded in."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)


def refuse_misread(causal_lm: nn.Module) -> None:
    """Raises RecipeError for packed layers that bitsandbytes would read wrongly: its kernel for CPUs with AVX-512 (0.50)
    mixes up the scales of rows whose length is no multiple of a scale's block."""
    for name, parameter in causal_lm.named_parameters():
        if not is_quantized(parameter) or parameter.device.type != "cpu":
            continue
        width, block = parameter.quant_state.shape[-1], parameter.quant_state.blocksize
        if width % block and not _reads_rows(width, block):
            raise RecipeError(
                f"model.lora.quantize: {name} has {width} inputs, no multiple of {block}, and bitsandbytes unpacks such "
                f"layers wrongly on this CPU. Set model.lora.quantize to none, or train on a GPU"
            )


@cache
def _reads_rows(width: int, block: int) -> bool:
    """Whether rows of this length are unpacked on the CPU as one long row of the same numbers is."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    rows = torch.linspace(-1, 1, block * width).view(block, width)  # as many scales as a row has numbers
    read, wanted = (
        dequantize_4bit(*quantize_4bit(shaped, blocksize=block, quant_type="nf4"))
        for shaped in (rows, rows.view(1, -1))
    )
    return torch.equal(read.view(1, -1), wanted)


def quantization_note(causal_lm: nn.Module) -> str:
    """How much of a model is in 4 bits: layers that are not plain linear ones, such as fused experts, are not."""
    packed = rest = 0
    for parameter in causal_lm.parameters():
        if is_quantized(parameter):
            packed += parameter.quant_state.shape.numel()
        else:
            rest += parameter.numel()
    total = (packed + rest) / 1e6
    return f"model.lora.quantize: {packed / 1e6:,.1f} M of {total:,.1f} M frozen weights are held in 4 bits"


@contextmanager
def saved_unquantized(causal_lm: PreTrainedModel) -> Iterator[None]:
    """While open, `save_pretrained` writes the state dict it is given and a configuration that says nothing of 4 bits."""
    config = causal_lm.config
    own: dict[str, Any] = {}
    for place, name in ((causal_lm, "hf_quantizer"), (config, "quantization_config")):
        if name in vars(place):
            own[name] = vars(place).pop(name)
    try:
        yield
    finally:
        for place, name in ((causal_lm, "hf_quantizer"), (config, "quantization_config")):
            if name in own:
                setattr(place, name, own[name])

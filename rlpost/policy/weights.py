"""The policy's weights under their Hugging Face names: one at a time for the rollout engine, or saved to a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlpost.policy.quantized import dequantized, is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Makes sharded parameters whole while its context is open (DeepSpeed's `zero.GatheredParameters`, for one).
Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[object]]


def gather_nothing(_parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
    """For parameters that are whole already."""
    return nullcontext()


def named_weights(causal_lm: PreTrainedModel, gather: Gather = gather_nothing) -> Iterator[tuple[str, Tensor]]:
    """Full weights under the names of a Hugging Face checkpoint, detached, one at a time.

    LoRA updates are added on the fly, without changing the trained tensors, to what 4-bit weights stand for. A tied
    output layer is left out. A tensor is valid until the next one is asked for.
    """
    from transformers.core_model_loading import revert_weight_conversion

    for name, tensor in module_weights(causal_lm, gather):
        # Some models hold their checkpoint's tensors fused (the experts of mixtures); engines want the original ones.
        yield from revert_weight_conversion(causal_lm, {name: tensor}).items()


@torch.no_grad()
def module_weights(causal_lm: PreTrainedModel, gather: Gather = gather_nothing) -> Iterator[tuple[str, Tensor]]:
    """As `named_weights`, under the names that the parameters have in the module before adapters were added."""
    adapted = _adapted_layers(causal_lm)
    for name, parameter in causal_lm.named_parameters():  # names a tied parameter once
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            continue
        layer = adapted.get(owner.removesuffix(".base_layer")) if leaf == "weight" else None
        needed = [parameter, *(_adapter_parameters(layer) if layer is not None else ())]
        with gather(needed):
            tensor = dequantized(parameter) if is_quantized(parameter) else parameter.detach()
            if layer is not None:
                tensor = _merged(tensor, layer)
            yield name.replace(".base_layer.", "."), tensor
    persistent = causal_lm.state_dict().keys()
    yield from ((name, buffer) for name, buffer in causal_lm.named_buffers() if name in persistent)


def _adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The LoRA layers by name."""
    if not hasattr(model, "peft_config") and not any(".lora_A." in name for name, _ in model.named_modules()):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _adapter_parameters(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if "lora_" in name]


def _merged(base: Tensor, layer: nn.Module) -> Tensor:
    """base + (alpha / rank) B A, summed in float32, in the base's precision."""
    total = base.float()
    for adapter in layer.active_adapters:
        total = total + layer.get_delta_weight(adapter).float()
    return total.to(base.dtype)

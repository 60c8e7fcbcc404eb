"""The policy's weights, whole and with adapters merged: one at a time for the rollout engine, or saved to a folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from rlpost.policy.names import WeightNames
from rlpost.policy.quantized import dequantized, is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Makes sharded parameters whole while its context is open (DeepSpeed's `zero.GatheredParameters`, for one).
Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[object]]


def gather_nothing(_parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
    """For parameters that are whole already."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of a module as it lies there: perhaps a shard, perhaps packed, perhaps with adapters beside it."""

    tensor: Tensor
    adapters: tuple[nn.Module, ...] = ()  # peft's LoRA layers whose updates belong to it

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What has to be whole before `value` is asked for."""
        own = [self.tensor] if isinstance(self.tensor, nn.Parameter) else []
        return [*own, *(parameter for layer in self.adapters for parameter in _adapter_parameters(layer))]

    @property
    def shape(self) -> torch.Size:
        """Of the whole, unpacked tensor."""
        if is_quantized(self.tensor):
            return torch.Size(self.tensor.quant_state.shape)
        return torch.Size(getattr(self.tensor, "ds_shape", self.tensor.shape))  # ZeRO-3 leaves shards without one

    def value(self) -> Tensor:
        """The whole tensor with its adapters' updates, detached."""
        tensor = dequantized(self.tensor) if is_quantized(self.tensor) else self.tensor.detach()
        for layer in self.adapters:
            tensor = _merged(tensor, layer)
        return tensor


Form = Literal["merged", "apart", "adapters"]
"""merged: whole weights with the adapters added. apart: without, and the adapters after them. adapters: those alone."""


@torch.no_grad()
def named_weights(
    causal_lm: PreTrainedModel, gather: Gather = gather_nothing, *, merged: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Full weights under the names of a Hugging Face checkpoint, detached, one at a time.

    LoRA updates are added on the fly, without changing the trained tensors, to what 4-bit weights stand for, unless `merged` is
    false. Buffers that a checkpoint holds come too; an output layer that is tied to the embedding does not. A tensor is valid
    until the next one is asked for. Sharded parameters are gathered one at a time, except where a checkpoint's tensor is made
    of several of the module's (`names.Bundle`): those are gathered together.
    """
    held = held_tensors(causal_lm)
    if not merged:
        held = {name: Held(part.tensor) for name, part in held.items()}
    names = weight_names(causal_lm, held)
    for bundle in names.bundles:
        parts = {name: held[name] for name in bundle.module}
        with gather([parameter for part in parts.values() for parameter in part.parameters]):
            yield from names.to_checkpoint(bundle, {name: part.value() for name, part in parts.items()}).items()


@torch.no_grad()
def adapter_weights(model: nn.Module, gather: Gather = gather_nothing) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a peft model's LoRA adapters under the names of peft's checkpoints, one at a time."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            with gather([parameter]):
                yield name.replace(".default.", "."), parameter.detach()


@torch.no_grad()
def module_weights(causal_lm: PreTrainedModel, gather: Gather = gather_nothing) -> Iterator[tuple[str, Tensor]]:
    """As `named_weights`, under the names that the tensors have in the module before adapters were added."""
    for name, part in held_tensors(causal_lm).items():
        with gather(part.parameters):
            yield name, part.value()


def held_tensors(causal_lm: PreTrainedModel) -> dict[str, Held]:
    """What belongs into a checkpoint, by the names that it has in the module before adapters were added: parameters, a tied
    one once under the name that `save_pretrained` keeps, and persistent buffers."""
    adapters = _adapters(causal_lm)
    tied = set(getattr(causal_lm, "all_tied_weights_keys", None) or ())
    held: dict[str, Held] = {}
    first: dict[int, str] = {}
    for raw, parameter in causal_lm.named_parameters(remove_duplicate=False):
        name = _without_wrappers(raw)
        if ".lora_" in raw or (id(parameter) in first and (name in tied or first[id(parameter)] not in tied)):
            continue
        held.pop(first.get(id(parameter), ""), None)
        first[id(parameter)] = name
        held[name] = Held(parameter, tuple(adapters.get(id(parameter), ())))
    persistent = causal_lm.state_dict().keys()
    held |= {_without_wrappers(raw): Held(buffer) for raw, buffer in causal_lm.named_buffers() if raw in persistent}
    return held


def weight_names(causal_lm: PreTrainedModel, held: Mapping[str, Held] | None = None) -> WeightNames:
    """The mapping between a model's names and its checkpoint's."""
    held = held_tensors(causal_lm) if held is None else held
    like = {n: torch.empty(part.shape, dtype=part.tensor.dtype, device="meta") for n, part in held.items()}
    return WeightNames(causal_lm, like)


def _without_wrappers(name: str) -> str:
    """The name without peft's wrappers, each of which holds what it wraps as `base_layer`. A layer has one of them; a module
    whose parameters are adapted one by one has one for each, nested."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _adapters(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The LoRA layers by the parameter (its id) that they add to."""
    if not hasattr(model, "peft_config") and not any(".lora_A." in name for name, _ in model.named_modules()):
        return {}
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    adapters: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, ParamWrapper):  # of a parameter that belongs to no linear layer, such as fused experts
            adapters[id(module.get_param())].append(module)
        elif isinstance(module, LoraLayer):
            adapters[id(module.get_base_layer().weight)].append(module)
    return adapters


def _adapter_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """The adapter's own parameters, without those of another wrapper inside it."""
    return [
        parameter
        for name, parameter in layer.named_parameters()
        if name.startswith("lora_") and not name.startswith("base_layer.")
    ]


def _merged(base: Tensor, layer: nn.Module) -> Tensor:
    """base + (alpha / rank) B A, summed in float32, in the base's precision."""
    total = base.float()
    for adapter in layer.active_adapters:
        total = total + layer.get_delta_weight(adapter).float()
    return total.to(base.dtype)

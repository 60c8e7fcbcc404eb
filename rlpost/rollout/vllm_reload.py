"""What vLLM (0.32) has to be helped with when its weights are replaced, and when it borrows transformers' classes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def replace_weights(worker: Any, weights: Iterable[tuple[str, Tensor]], *, on_cpu: bool) -> list[str]:
    """Loads a checkpoint's weights into vLLM's running model, layer by layer. Returns the layers that none reached."""
    from vllm.config import set_current_vllm_config

    model = worker.get_model()
    with set_current_vllm_config(worker.vllm_config):
        begin_replacing(model, on_cpu=on_cpu)
        model.load_weights(weights)
        return end_replacing(model, worker.model_config, on_cpu=on_cpu)


def begin_replacing(model: Any, *, on_cpu: bool) -> None:
    """Has `model.load_weights`, called any number of times from now on, replace what the model holds."""
    from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

    if on_cpu:
        _forget_packed_experts(model)
    initialize_layerwise_reload(model)


def end_replacing(model: Any, model_config: Any, *, on_cpu: bool) -> list[str]:
    """Puts what was loaded in place. Returns the layers that nothing reached.

    As vLLM's own `reload_weights`, which tells such layers to its log only: the code of some models (GPT-OSS, for one) writes
    past the loaders that a reload goes through, and leaves old weights where they were.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, get_layerwise_info

    missed = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        own = [n for n, p in layer.named_parameters(recurse=False) if p.numel()]
        # An attention layer has no weights of a checkpoint; a tied head is loaded as the embedding that it is.
        if own and info.can_load() and not info.load_numel and not is_deferred_attention_layer(layer):
            missed += [] if isinstance(layer, ParallelLMHead) else [f"{name}.{own[0]}"]
    finalize_layerwise_reload(model, model_config)
    if on_cpu:
        _repack_heads(model)
    return missed


def _forget_packed_experts(model: Any) -> None:
    """Makes vLLM pack the experts of a mixture anew.

    Its CPU kernel holds them in a layout of its own, into which they are brought once, together with making the kernel. At
    a reload vLLM keeps the kernel, and would hand it weights as they are in the checkpoint: every expert's would be wrong.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _repack_heads(model: Any) -> None:
    """Packs the LM head anew.

    vLLM keeps a packed copy of the head for its CPU kernels and renews it only if the head itself is loaded. A tied head is
    not: it would go on scoring with the weights of the start, next to new embeddings.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def is_borrowed(config: Any) -> bool:
    """Whether vLLM has no code of its own for a type of model, and runs transformers' classes."""
    from vllm import ModelRegistry

    places = [getattr(ModelRegistry.models.get(name), "module_name", "") for name in config.architectures or ()]
    return not any(place and not place.startswith("vllm.model_executor.models.transformers") for place in places)


@contextmanager
def transformers_classes_kept(config: Any) -> Iterator[None]:
    """Takes back what vLLM does to the transformers classes of the model with this Hugging Face configuration.

    Where vLLM has no code of its own for a type of model, it builds transformers' and changes the class itself, so that it
    can be compiled: the learner's model in the same process, which is of that class too, could not be run any more.
    """
    from transformers import MODEL_MAPPING, PreTrainedModel

    known = MODEL_MAPPING.get(type(config), None)
    module = None if known is None else sys.modules[known.__module__]
    classes = [c for c in vars(module or object).values() if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    before = [(c, c.__bases__, dict(vars(c))) for c in classes]
    try:
        yield
    finally:
        for changed, bases, own in before:
            if changed.__bases__ == bases:
                continue
            changed.__bases__ = bases
            for name in set(vars(changed)) - set(own):
                delattr(changed, name)
            for name in ("__init__", "__call__", "forward"):
                if name in own:
                    setattr(changed, name, own[name])

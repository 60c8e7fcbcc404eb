"""Rotary frequencies that transformers changes with the longest position of a pass (LongRoPE, dynamic NTK) are chosen once.

A completion's log-probs must not depend on what shares its micro-batch, nor a sampler's on what it sampled beside. vLLM has
one set of frequencies as well: LongRoPE's long ones as soon as its `max_model_len` is above the length of the original
training. So learner, reference, critic and transformers engine take the set for the longest sequence that the run may have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlpost.errors import RecipeError
from rlpost.policy.family import length_dependent_rope

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


def horizon(config: PreTrainedConfig, longest: int | None) -> int:
    """The length in tokens that frequencies are chosen for: `longest`, or the model's window where that is less or `longest`
    is not known."""
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(n for n in (longest, window, 2**31) if n is not None)


def chosen_length(config: PreTrainedConfig, longest: int | None) -> int | None:
    """What log-probs depend on beside the weights: the length that frequencies are chosen for; None where they are fixed."""
    return None if length_dependent_rope(config) is None else horizon(config, longest)


def rotary_note(config: PreTrainedConfig, longest: int | None) -> str | None:
    """A line for the user where frequencies depend on length: which ones the run has."""
    length = chosen_length(config, longest)
    if length is None:
        return None
    return (
        f"model: rotary frequencies of type {length_dependent_rope(config)} are those of sequences of {length} tokens, the "
        "longest that this run may have, for all sequences, in sampler and learner"
    )


def fix_frequencies(model: PreTrainedModel, longest: int | None) -> None:
    """Gives a model whose frequencies depend on length the ones for sequences of `longest` tokens, for good. Changes `model`.

    Its configuration stays as it is, and so do checkpoints. Raises RecipeError naming `model.path` where the model's own code
    keeps it from being done.
    """
    config = model.config
    kind = length_dependent_rope(config)
    if kind is None:
        return
    length = horizon(config, longest)
    owners = [module for module in model.modules() if hasattr(module, "rope_type") and hasattr(module, "config")]
    fixed = [_fix(module, length) for module in owners]
    if not any(fixed):
        raise RecipeError(
            f"model.path: model type {config.model_type} computes rotary frequencies of type {kind} in its own way, from the "
            "longest sequence of a pass, so that log-probs would depend on what shares a micro-batch. Use a model without, or "
            "one of type phi3"
        )


def _fix(module: nn.Module, length: int) -> bool:
    """Whether this module had frequencies that depend on length."""
    kinds: Any = module.rope_type
    if not isinstance(kinds, dict):
        if kinds not in ("longrope", "dynamic"):
            return False
        _set(module, kinds, length, None, "")
        module.rope_type = "default"  # what decides in every pass whether frequencies are chosen anew
        return True
    layers = [layer for layer, kind in kinds.items() if kind in ("longrope", "dynamic")]
    for layer in layers:
        _set(module, kinds[layer], length, layer, f"{layer}_")
    module.rope_type = {layer: "default" if layer in layers else kind for layer, kind in kinds.items()}
    return bool(layers)


def _set(module: Any, kind: str, length: int, layer: str | None, prefix: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    present = getattr(module, f"{prefix}inv_freq")
    more = {} if layer is None else {"layer_type": layer}
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, present.device, seq_len=length, **more)
    module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
    setattr(module, f"{prefix}attention_scaling", scaling)

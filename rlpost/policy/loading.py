"""Turns a checkpoint into a model that can be trained: no dropout, a scoring head, adapters where wanted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlpost.errors import RecipeError
from rlpost.policy.accumulation import accumulating_embedding
from rlpost.policy.attention import allow_many_shapes
from rlpost.policy.family import choose_attention, refuse_untrainable
from rlpost.policy.generation import loading_options as generation_options
from rlpost.policy.head import LogitRule, ScoringLinear
from rlpost.policy.linear import recast_linear
from rlpost.policy.quantized import loading_options
from rlpost.policy.rotary import fix_frequencies, rotary_note
from rlpost.policy.rows import Layout
from rlpost.recipe.sections.model import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Settings that make a transformers model behave at random in training mode.
_RANDOM_SETTING = re.compile("drop|input_jitter_noise")


def load_config(
    model: ModelSection,
    path: str,
    *,
    device: torch.device | str = "cpu",
    layout: Layout = "tree",
    longest: int | None = None,
    key: str = "model.path",
) -> tuple[PreTrainedConfig, tuple[str, ...]]:
    """The Hugging Face configuration with the attention kernel for a model that runs on `device` with rows of `layout`, in
    which a sequence has `longest` tokens at the most (None: not known); and notes for the user about what was chosen.

    Raises RecipeError naming `key` if there is no model at `path`, or one that cannot be trained.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if path.startswith(("/", "./", "../", "~")) and not Path(path).expanduser().is_dir():
        raise RecipeError(f"{key}: there is no folder {path}; give a Hugging Face model name or an existing folder")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise RecipeError(_cannot_load(path, error, key)) from error
    refuse_untrainable(config, key)
    notes = []
    if random := [
        f"{name}={value}" for name, value in _settings(config.to_dict()) if _RANDOM_SETTING.search(name) and value
    ]:
        notes.append(f"model: {', '.join(random)} not applied in training, so that log-probs are exact")
    config._attn_implementation, note = choose_attention(
        model.attention, config, device=device, layout=layout, longest=longest
    )
    notes += filter(None, (note, rotary_note(config, longest)))
    return config, tuple(notes)


def _settings(tree: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a configuration and of those inside it, by name."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _settings({str(key): inner for key, inner in value.items()})
        elif isinstance(value, float | int) and not isinstance(value, bool):
            yield name, value


def load_causal_lm(
    model: ModelSection,
    path: str,
    config: PreTrainedConfig,
    device: torch.device | str = "cpu",
    longest: int | None = None,
) -> PreTrainedModel:
    """The causal LM ready to be trained, on `device`, with a `ScoringLinear` as output layer. `longest` as in `load_config`."""
    from transformers import AutoModelForCausalLM

    if model.attention == "flash_attention_2" and model.dtype == "float32" and model.autocast == "none":
        raise RecipeError(
            "model.attention: flash_attention_2 needs 16-bit products; set model.autocast to bfloat16, or"
            " model.attention to sdpa"
        )
    if config._attn_implementation == "flex_attention":
        allow_many_shapes()
    generation, _ = generation_options(path)
    try:
        with without_progress_bars():
            causal_lm = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=getattr(torch, model.dtype),
                attn_implementation=config._attn_implementation,
                trust_remote_code=model.trust_remote_code,
                **loading_options(model, device),
                **generation,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of all kinds: the code is the model's own, and reads whatever its configuration says
        raise RecipeError(_cannot_load(path, error)) from error
    fix_frequencies(causal_lm, longest)
    return prepare(causal_lm.to(device), gradient_checkpointing=model.gradient_checkpointing)


def prepare(causal_lm: PreTrainedModel, *, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """Gives a causal LM its scoring head and makes it ready to be trained. Changes and returns `causal_lm`."""
    head = causal_lm.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = ScoringLinear  # in place: the weight stays tied, and copies of the model keep working
    elif type(head) is not ScoringLinear:
        raise RecipeError(
            f"model.path: the output layer of model type {causal_lm.config.model_type} is {type(head).__name__}, not a"
            " plain linear layer, so token log-probs cannot be computed in chunks; use an unquantised causal LM"
        )
    return ready_to_train(causal_lm, gradient_checkpointing=gradient_checkpointing)


def ready_to_train(model: PreTrainedModel, *, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """Layers that hold less in a pass, and nothing that is another function in training than in the sampler: no dropout, no
    dropped layers, no noise on routers. Changes and returns `model`.

    So the model is in evaluation mode, which changes no gradient. Transformers recomputes activations in training mode only,
    and bitsandbytes repacks its weights for good outside of it: such modules are in that mode, with their own dropout at 0.
    """
    recast_linear(model)
    accumulating_embedding(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _RANDOM_SETTING.search(name):
                setattr(module, name, 0.0)
        packed = type(module).__module__.startswith("bitsandbytes.")
        if packed or getattr(module, "gradient_checkpointing", False):
            module.training = True
    return model


def backbone(causal_lm: PreTrainedModel) -> nn.Module:
    """The part of a causal LM whose hidden states its output layer reads."""
    from transformers import PreTrainedModel

    base = causal_lm.base_model
    if base is not causal_lm:
        return base
    # Llama 4's text model says that its part has another name than it has.
    return next((child for child in causal_lm.children() if isinstance(child, PreTrainedModel)), base)


def logit_rule(config: PreTrainedConfig, temperature: float) -> LogitRule:
    """How this model's output layer turns into scores: Gemma caps them, Granite divides, Cohere multiplies.

    `verify_head` finds what is not known here."""
    scale = 1.0
    if divisor := _number(config, "logits_scaling", "logits_mup_width_multiplier"):
        scale = 1.0 / divisor
    elif factor := _number(config, "logit_scale", "lm_head_multiplier"):
        scale = factor
    cap = _number(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return LogitRule(temperature, scale, cap)


def _number(config: PreTrainedConfig, *names: str) -> float | None:
    """The first of these settings that is a number other than 0."""
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if isinstance(value, float | int) and value), None)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keeps transformers' progress bars out of the run's console."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _cannot_load(path: str, error: Exception, key: str = "model.path") -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{key}: cannot load a causal language model from {path} ({type(error).__name__}: {first}); give a local"
        " folder in Hugging Face layout, or a model name that this machine can download"
    )

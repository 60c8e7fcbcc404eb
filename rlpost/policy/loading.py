"""Turns a checkpoint into a model that can be trained: no dropout, a scoring head, adapters where wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlpost.errors import RecipeError
from rlpost.policy.accumulation import accumulating_embedding
from rlpost.policy.attention import allow_many_shapes, choose_attention
from rlpost.policy.head import HeadRequest, LogitRule, ScoringLinear
from rlpost.policy.linear import recast_linear
from rlpost.policy.quantized import loading_options
from rlpost.policy.rows import Layout
from rlpost.recipe.sections.model import LoraSection, ModelSection

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

# Settings that make a transformers model behave at random in training mode.
_RANDOM_SETTINGS = ("dropout", "_pdrop", "layerdrop", "router_jitter_noise")


def load_config(
    section: ModelSection,
    path: str,
    *,
    device: torch.device | str = "cpu",
    layout: Layout = "tree",
    longest: int | None = None,
) -> tuple[PreTrainedConfig, tuple[str, ...]]:
    """The Hugging Face configuration with every dropout set to 0 and the attention kernel for a model that runs on `device`
    with rows of `layout`, in which a sequence has `longest` tokens at the most (None: not known); and notes for the user
    about what was changed or chosen.

    With dropout the log-probs of the update would not be those of the distribution sampled from. Raises RecipeError
    naming `model.path` if there is no model at `path`.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if path.startswith(("/", "./", "../", "~")) and not Path(path).expanduser().is_dir():
        raise RecipeError(
            f"model.path: there is no folder {path}; give a Hugging Face model name or an existing folder"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise RecipeError(_cannot_load(path, error)) from error
    zeroed, notes = [], []
    for name, value in config.to_dict().items():
        if name.endswith(_RANDOM_SETTINGS) and isinstance(value, float | int) and value:
            setattr(config, name, 0.0)
            zeroed.append(f"{name}={value}")
    if zeroed:
        notes.append(f"model: {', '.join(zeroed)} set to 0, so that log-probs are exact")
    config._attn_implementation, note = choose_attention(
        section.attention, config, device=device, layout=layout, longest=longest
    )
    if note:
        notes.append(note)
    return config, tuple(notes)


def load_causal_lm(
    section: ModelSection, path: str, config: PreTrainedConfig, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The causal LM in training mode, on `device`, with a `ScoringLinear` as output layer."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if section.attention == "flash_attention_2" and section.dtype == "float32" and section.autocast == "none":
        raise RecipeError(
            "model.attention: flash_attention_2 needs 16-bit products; set model.autocast to bfloat16, or"
            " model.attention to sdpa"
        )
    if config._attn_implementation == "flex_attention":
        allow_many_shapes()
    try:
        with without_progress_bars():
            causal_lm = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=getattr(torch, section.dtype),
                attn_implementation=config._attn_implementation,
                trust_remote_code=section.trust_remote_code,
                **loading_options(section, device),
            )
    except (
        OSError,
        ValueError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:  # RuntimeError: sizes do not match
        raise RecipeError(_cannot_load(path, error)) from error
    return prepare(causal_lm.to(device), gradient_checkpointing=section.gradient_checkpointing)


def prepare(causal_lm: PreTrainedModel, *, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """Gives a causal LM its scoring head, no dropout and training mode. Changes and returns `causal_lm`."""
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
    """Training mode without dropout, with layers that hold less in a pass. Changes and returns `model`."""
    recast_linear(model)
    accumulating_embedding(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def logit_rule(config: PreTrainedConfig, temperature: float) -> LogitRule:
    """How this model's output layer turns into scores: Gemma caps them, Granite divides, Cohere multiplies."""
    scale = 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale = 1.0 / float(divisor)
    elif factor := getattr(config, "logit_scale", None):
        scale = float(factor)
    cap = getattr(config, "final_logit_softcapping", None)
    return LogitRule(temperature, scale, float(cap) if cap else None)


@torch.no_grad()
def verify_head(causal_lm: PreTrainedModel, rule: LogitRule, autocast: Any) -> None:
    """Compares our log-probs with those of the model's own forward on four tokens.

    Catches every model whose forward does something to its scores that `logit_rule` does not know. Raises RecipeError.
    """
    device = causal_lm.device
    ids = torch.arange(5, 9, device=device)[None] % causal_lm.config.get_text_config().vocab_size
    captured: list[torch.Tensor] = []
    hook = causal_lm.base_model.register_forward_hook(lambda _m, _a, out: captured.append(out[0]))
    try:
        with autocast:
            logits = causal_lm(input_ids=ids, use_cache=False).logits[0]
            request = HeadRequest(ids[0], rule, chunk=4)
            ours, _entropy = causal_lm.get_output_embeddings()(captured[0][0], request)
    finally:
        hook.remove()
    theirs = (logits.float() / rule.temperature).log_softmax(-1).gather(-1, ids[0][:, None]).squeeze(-1)
    exact, gap = logits.dtype == torch.float32, float((ours - theirs).abs().max())
    if not torch.allclose(ours.float(), theirs, rtol=1e-3 if exact else 2e-2, atol=1e-3 if exact else 1e-1):
        raise RecipeError(
            f"model.path: model type {causal_lm.config.model_type} changes its scores after the output layer in a way"
            f" that rlpost does not know (log-probs differ by up to {gap:.3g}); use another model"
        )


def add_lora(causal_lm: PreTrainedModel, lora: LoraSection) -> PeftModel:
    """Wraps the model with peft's LoRA and freezes all else. Raises RecipeError for targets that cannot be."""
    from peft import LoraConfig, get_peft_model

    if lora.dropout:
        raise RecipeError(
            f"model.lora.dropout={lora.dropout} would make the update's log-probs differ from those of the policy that"
            " sampled; set it to 0"
        )
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        wrapped = get_peft_model(causal_lm, config)
    except ValueError as error:
        raise RecipeError(f"model.lora.targets={lora.targets} does not fit this model: {error}") from error
    if type(causal_lm.get_output_embeddings()) is not ScoringLinear:
        raise RecipeError("model.lora.targets names the output layer, which is scored in chunks and cannot be adapted")
    return wrapped


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


def _cannot_load(path: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"model.path: cannot load a causal language model from {path} ({type(error).__name__}: {first}); give a local"
        " folder in Hugging Face layout, or a model name that this machine can download"
    )

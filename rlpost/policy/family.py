"""What a model's Hugging Face configuration says about how it is trained and sampled from: one place that all sides ask.

Learner, reference, critic, rollout engine and `rlpost plan` must mean the same function of the same tokens, so none of them
decides for itself which attention kernel computes it, in which rows it may stand, or whether it can be trained at all. Only
configurations are looked at here; `policy/verify.py` looks at the loaded model, and knows no names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlpost.errors import RecipeError
from rlpost.recipe.sections.base import unknown_choice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from rlpost.policy.rows import Layout

# Model types whose layers are plain causal softmax attention over rotary positions, and whose transformers code takes a
# ready 4-D mask and position ids. tests/test_policy_layouts.py compares trees with plain rows for the common ones.
TREE_MODEL_TYPES = frozenset(
    (
        "llama",
        "mistral",
        "mixtral",
        "ministral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "granite",
        "granitemoe",
        "cohere",
        "smollm3",
        "stablelm",
        "starcoder2",
        "glm",
        "glm4",
        "gpt_neox",
        "helium",
        "seed_oss",
    )
)
TREE_ATTENTION = ("sdpa", "eager", "flex_attention")
INSTEAD = "Use a decoder-only text model, such as Qwen3, Llama 3, Gemma 3 (text) or SmolLM3"
# Types with a class of their own for causal language modelling that cannot be trained here, and why.
UNTRAINABLE = {
    "xlstm": "its chunks give a padded text other log-probs than a bare one",
    "modernbert-decoder": "it transforms hidden states before its output layer",
    "prophetnet": "its decoder predicts several tokens at once",
    "rwkv": "it divides its own weights in place while it only predicts, so its sampler would not have the learner's weights",
    "reformer": "it hashes positions at random, so that no two passes give the same log-probs",
    "xlnet": "its attention sees the whole text, not only what comes before a token",
    "xlm": "it is a masked language model",
    "cpmant": "it puts prompt tokens of its own before every text",
}
# Layers that choose what they attend to by comparing positions of one pass, padding and other rows among them.
_SELECTING_LAYERS = ("indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention")
_FLEX_SMALLEST_HEAD = 16  # torch's kernel refuses smaller ones
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # transformers changes frequencies with a pass's longest position
_KERNELS = {
    "sdpa": "_supports_sdpa",
    "flex_attention": "_supports_flex_attn",
    "flash_attention_2": "_supports_flash_attn",
}


def architecture(config: PreTrainedConfig) -> Any | None:
    """The class that transformers makes of this configuration as causal language model; None where the code comes with the
    checkpoint, or where there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return None if _own_code(config) else MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def why_untrainable(config: PreTrainedConfig) -> str | None:
    """Why a model with this Hugging Face configuration cannot be trained, by name and with what to use instead; None if
    nothing speaks against it. Costs an import of the model's class, and loads nothing."""
    kind = config.model_type
    if reason := UNTRAINABLE.get(kind) or _why_no_causal_text_model(config):
        return f"model type {kind} cannot be trained: {reason}. {INSTEAD}"
    pad, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        return (
            f"its config.json says pad_token_id={pad}, but vocab_size={rows}, so that its embedding has no such row. Set "
            "pad_token_id there to that of the eos_token"
        )
    return None


def refuse_untrainable(config: PreTrainedConfig, key: str = "model.path") -> None:
    """Raises RecipeError naming `key` for a model that cannot be trained."""
    if reason := why_untrainable(config):
        raise RecipeError(f"{key}: {reason}")


def _why_no_causal_text_model(config: PreTrainedConfig) -> str | None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose prompt and completion are read by two models"
    parts = [
        name for name in getattr(type(config), "sub_configs", None) or {} if name not in ("attn_config", "ffn_config")
    ]
    if parts:
        return (
            f"it is put together from several models ({', '.join(parts)}), for images, sound or bytes beside text; if there "
            "is a text-only checkpoint of its language model, use that"
        )
    if packed := getattr(config, "quantization_config", None):
        method = packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", None)
        return (
            f"its checkpoint holds weights in few bits (quant_method={method}), which take no updates; use one in 16 "
            "or 32 bits, with model.lora.quantize=nf4 where memory is short"
        )
    if _own_code(config):
        return None
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return "it is a masked language model, whose tokens see what comes after them"
    if getattr(config, "is_decoder", True) is False and config.model_type == "bert-generation":
        return "it is bidirectional as long as its config.json does not say `is_decoder: true`"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "the installed transformers has no causal language model of that type"
    if config.model_type == "phimoe" and (rope := length_dependent_rope(config)):
        return f"its code takes rotary frequencies of type {rope} and their scale from the longest sequence of a pass"
    if chosen := sorted(set(getattr(config, "layer_types", None) or ()).intersection(_SELECTING_LAYERS)):
        return f"its layers of type {', '.join(chosen)} depend on what shares a pass with a sequence"
    return None


def check_tree_support(config: PreTrainedConfig, longest: int | None = None) -> str | None:
    """Why a model with this Hugging Face configuration cannot use tree rows, or None if it can.

    `longest` is how many tokens a prompt with its completion may have at the most. A sliding window of at least as many
    never hides anything: positions restart in every branch, and transformers takes a ready 4-D mask as it is. None: not
    known, so that no window is taken.
    """
    if config.model_type not in TREE_MODEL_TYPES:
        return "attention or positions that are not known to be plain causal attention over rotary positions"
    kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    fits = window is not None and longest is not None and window >= longest
    if others := kinds - {"full_attention"} - ({"sliding_attention"} if fits else set()):
        return "layers of type " + ", ".join(sorted(others)) + ("" if window is None else f" (sliding_window={window})")
    if not kinds and window is not None and not fits:
        return f"sliding_window={window}" + ("" if longest is None else f", where a sequence may have {longest} tokens")
    if getattr(config, "use_bidirectional_attention", False):
        return "bidirectional attention"
    return None


def choose_layout(
    config: PreTrainedConfig, wanted: Layout, attention: str = "sdpa", longest: int | None = None
) -> tuple[Layout, str | None]:
    """The layout to use, and a line saying why where it is not the wanted one. `longest` as in `check_tree_support`."""
    match wanted:
        case "sorted" | "padded":
            return wanted, None
        case "tree":
            pass
        case _:
            raise unknown_choice("learner.layout", wanted)
    if attention not in TREE_ATTENTION:
        return "sorted", f"learner.layout: sorted instead of tree, because model.attention={attention} takes no mask"
    reason = check_tree_support(config, longest)
    if reason is None:
        return "tree", None
    return "sorted", f"learner.layout: sorted instead of tree, because model type {config.model_type} has {reason}"


def choose_attention(
    wanted: str, config: PreTrainedConfig, *, device: torch.device | str, layout: Layout, longest: int | None = None
) -> tuple[str, str | None]:
    """The learner's attention kernel for a model that runs on `device` with rows of this layout, and a line for the user
    where the recipe does not say it by itself. `wanted` is `model.attention`; `longest` as in `check_tree_support`.

    Of "auto" comes "flex_attention", or what `plain_kernel` says. Raises RecipeError for a kernel that the model lacks.
    """
    note, place = None, str(device).partition(":")[0]
    if wanted in _KERNELS and not _has(config, wanted):
        has = ", ".join(["eager", *(name for name in _KERNELS if _has(config, name))])
        raise RecipeError(
            f"model.attention={wanted}: model type {config.model_type} has no such attention (it has {has}). Use "
            "model.attention=auto"
        )
    if wanted == "eager" and config.model_type == "falcon" and getattr(config, "alibi", False):
        raise RecipeError("model.attention=eager: transformers' eager attention counts ALiBi twice in falcon. Use auto")
    if wanted == "auto" and place != "cpu":
        obstacle = _why_not_flex(config, place, layout, longest)
        if obstacle is None:
            return "flex_attention", "model.attention: flex_attention, because rows are trees and the device is a GPU"
        note = f"model.attention: {plain_kernel(config)}, because {obstacle}"
    if wanted not in ("auto", "sdpa"):
        return wanted, None
    if plain_kernel(config) == "eager":
        note = f"model.attention: eager instead of sdpa, which {_why_not_sdpa(config)}"
    return plain_kernel(config), note


def sampler_attention(wanted: str, config: PreTrainedConfig) -> str:
    """The kernel of the transformers rollout engine beside a learner with `model.attention: wanted`: the same function, by a
    kernel that takes a cache and left padding."""
    return "eager" if wanted == "eager" else plain_kernel(config)


def plain_kernel(config: PreTrainedConfig) -> str:
    """ "sdpa" where that computes the model's own attention, else "eager", which always does."""
    return "eager" if _why_not_sdpa(config) else "sdpa"


def rope_types(config: PreTrainedConfig) -> frozenset[str]:
    """The kinds of rotary frequencies of a model: of one parameter set, or of one set per layer type."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return frozenset(str(part.get("rope_type", "default")) for part in (nested or [parameters]))


def length_dependent_rope(config: PreTrainedConfig) -> str | None:
    """The kind of rotary frequencies that transformers changes with the longest position of a pass; None: they are fixed."""
    return next((kind for kind in _LENGTH_DEPENDENT_ROPE if kind in rope_types(config)), None)


def _why_not_sdpa(config: PreTrainedConfig) -> str | None:
    if getattr(config, "attn_logit_softcapping", None):
        return f"cannot cap scores as {config.model_type} does"
    return None if _has(config, "sdpa") else f"{config.model_type} does not have"


def _why_not_flex(config: PreTrainedConfig, device: str, layout: Layout, longest: int | None) -> str | None:
    """What stands against FlexAttention, or None."""
    if device != "cuda":
        return f"FlexAttention cannot train on {device}"
    if choose_layout(config, layout, longest=longest)[0] != "tree":
        return "rows are no trees"  # causal rows have faster kernels
    if architecture(config) is None or not _has(config, "flex_attention"):
        return f"model type {config.model_type} does not take FlexAttention"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"FlexAttention does not take heads of {head} numbers" if head < _FLEX_SMALLEST_HEAD else None


def _has(config: PreTrainedConfig, kernel: str) -> bool:
    """Whether the model's class says that it takes a kernel; of code that comes with a checkpoint nothing is known."""
    model = architecture(config)
    return model is None or bool(getattr(model, _KERNELS[kernel], False))


def _own_code(config: PreTrainedConfig) -> bool:
    """Whether the model's code comes with the checkpoint and not with transformers."""
    return not type(config).__module__.startswith("transformers.")

"""Turns what vLLM says when it cannot start into what to change in the recipe."""

from __future__ import annotations

from rlpost.errors import RolloutError
from rlpost.recipe.sections.rollout import VllmEngine


def explain_startup(
    error: BaseException, model_path: str, engine_settings: VllmEngine, max_model_len: int
) -> RolloutError:
    """The RolloutError to raise from `error`: vLLM's own words, shortened, and the fix."""
    words = " ".join(str(error).split())
    fix = _fix(words.lower(), engine_settings, max_model_len)
    return RolloutError(f"vLLM cannot start with the model {model_path!r}: {words[:300]} ... What to do: {fix}")


def _fix(words: str, engine_settings: VllmEngine, max_model_len: int) -> str:
    tokens = f"{max_model_len} tokens of prompt and completion"
    if "max_model_len" in words and ("derived" in words or "max_position_embeddings" in words):
        return (
            f"the model's context is shorter than {tokens}: lower `rollout.max_completion_tokens` or "
            "`data.max_prompt_tokens`."
        )
    if "kv cache" in words or "cache blocks" in words:
        return (
            f"the KV cache does not hold one sequence of {tokens}, or memory is short: on CPU change "
            f"`rollout.engine.kv_cache_gib` (now {engine_settings.kv_cache_gib:g}), on CUDA raise "
            f"`rollout.engine.memory_fraction` (now {engine_settings.memory_fraction:g}), or lower "
            "`rollout.max_completion_tokens`."
        )
    if "memory" in words:
        return (
            f"the device has too little free memory: lower `rollout.engine.memory_fraction` (now "
            f"{engine_settings.memory_fraction:g}), use `rollout.engine.dtype=bfloat16`, or free the memory that other "
            "processes hold."
        )
    if "architectures" in words or "not supported" in words or "does not recognize" in words:
        return "vLLM does not know this type of model: use `rollout.engine.type=transformers`."
    if "max_num_seqs" in words or "max_num_batched_tokens" in words:
        return f"lower `rollout.engine.max_sequences` (now {engine_settings.max_sequences})."
    return (
        "check `model.path` (weights, config.json and tokenizer must be there) and `rlpost doctor`; "
        "`rollout.engine.type=transformers` works without vLLM."
    )

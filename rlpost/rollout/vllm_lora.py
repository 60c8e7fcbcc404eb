"""Lets vLLM score whole sequences while it serves adapters.

vLLM lays adapters over the output layer row by row, with one row a sample. Where it reports the log-probs of prompts it asks
the same layer for one row a token, and ends its engine as soon as two sequences are scored at once (seen in 0.32, on a CPU).
rlpost sends no adapter for the output layer (`rlpost.recipe.rules.rollout`), so there is nothing to add.
"""

from __future__ import annotations

from typing import Any


class _NoAdapter:
    """In place of what adds adapters to logits."""

    def add_lora_logits(self, logits: Any, *_: Any, **__: Any) -> Any:
        return logits


def no_adapter_on_logits(worker: Any) -> None:
    """Changes the output layer of a vLLM worker that serves adapters; does nothing elsewhere."""
    from vllm.lora.layers import LogitsProcessorWithLoRA

    model: Any = getattr(getattr(worker, "model_runner", None), "model", None)
    if not callable(getattr(model, "modules", None)):
        return
    for module in model.modules():
        if isinstance(module, LogitsProcessorWithLoRA):
            module.punica_wrapper = _NoAdapter()

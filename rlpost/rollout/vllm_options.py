"""What the recipe hands on to vLLM as it is, the same in process and to servers."""

from __future__ import annotations

import json
from typing import Any

from rlpost.recipe.sections.rollout import VllmEngine


def passed_on(engine_settings: VllmEngine) -> dict[str, Any]:
    """vLLM's own options, by the names of its Python interface; those that have vLLM's default are left out."""
    options: dict[str, Any] = {}
    if engine_settings.kv_cache_dtype != "auto":
        options["kv_cache_dtype"] = engine_settings.kv_cache_dtype
    if engine_settings.quantization != "none":
        options["quantization"] = engine_settings.quantization
    if (guess := engine_settings.speculative) is not None:
        options["speculative_config"] = {
            "method": guess.method,
            "num_speculative_tokens": guess.tokens,
            "prompt_lookup_min": guess.shortest_match,
            "prompt_lookup_max": guess.longest_match,
        }
    return options


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Such options as arguments of a server's command line."""
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    return arguments

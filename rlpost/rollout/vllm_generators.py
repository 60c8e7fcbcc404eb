"""Keeps the seeds of prompts that vLLM reads in several pieces on a CPU.

A step of vLLM holds a limited number of tokens. A prompt that does not fit into what is left of one is read in pieces, and a
token that is sampled after any but the last is thrown away. For a request with a seed vLLM then sets its generator back, in a
way that only CUDA's generators know: on a CPU (seen in 0.32) that ends the engine. Here the generators of such requests are out
of sight while tokens are sampled, so there is nothing to set back, and the tokens are those of a prompt read at once.
"""

from __future__ import annotations

from typing import Any


def keep_generators(worker: Any) -> None:
    """Wraps the model runner of a vLLM worker on a CPU; does nothing elsewhere."""
    runner: Any = getattr(worker, "model_runner", None)
    parts = ("input_batch", "discard_request_mask", "sample_tokens")
    if getattr(getattr(runner, "device", None), "type", None) != "cpu" or not all(hasattr(runner, p) for p in parts):
        return
    sample_tokens = runner.sample_tokens

    def without_unfinished(*arguments: Any, **keywords: Any) -> Any:
        batch = runner.input_batch
        unfinished = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        held = {row: batch.generators.pop(row) for row in unfinished if row in batch.generators}
        try:
            return sample_tokens(*arguments, **keywords)
        finally:
            batch.generators.update(held)

    runner.sample_tokens = without_unfinished

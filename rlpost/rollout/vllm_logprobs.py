"""Has vLLM report log-probs of the whole distribution, also where top-k or top-p left tokens out.

vLLM's `logprobs_mode` gives log-probs before temperature (raw) or after top-k and top-p (processed), not those in between.
At a temperature other than 1 neither can be turned into them afterwards: the normaliser is not known. So the one place at
which the sampler has them, just before it truncates, is wrapped.
"""

from __future__ import annotations

from typing import Any


def report_whole_distribution(worker: Any) -> bool:
    """Wraps the sampler of a vLLM worker; whether its build is one of the two known (vLLM has two model runners)."""
    sampler: Any = getattr(getattr(worker, "model_runner", None), "sampler", None)
    if hasattr(sampler, "topk_topp_sampler"):
        _wrap_first_runner(sampler.topk_topp_sampler)
        return True
    if hasattr(sampler, "_sample_random"):
        _wrap_second_runner(sampler)
        return True
    return False


def _wrap_first_runner(truncating: Any) -> None:
    """`TopKTopPSampler.forward(logits, generators, k, p)` gives (tokens, log-probs)."""
    forward = truncating.forward

    def whole(logits: Any, generators: Any, k: Any, p: Any) -> tuple[Any, Any]:
        if k is None and p is None:
            return forward(logits, generators, k, p)
        logps = logits.float().log_softmax(dim=-1)  # before `forward`, which truncates in place
        tokens, reported = forward(logits, generators, k, p)
        return tokens, None if reported is None else logps

    truncating.forward = whole


def _wrap_second_runner(sampler: Any) -> None:
    """`Sampler._sample_random(logits, mapping, mapping_np, pos, top_k, top_p, ...)` gives (tokens, logits): log-probs are taken
    of these logits afterwards."""
    sample = sampler._sample_random

    def whole(
        logits: Any, mapping: Any, mapping_np: Any, pos: Any, top_k: Any, top_p: Any, *more: Any, **named: Any
    ) -> Any:
        if top_k is None and top_p is None:
            return sample(logits, mapping, mapping_np, pos, top_k, top_p, *more, **named)
        before = logits.clone()
        tokens, _truncated = sample(logits, mapping, mapping_np, pos, top_k, top_p, *more, **named)
        return tokens, before

    sampler._sample_random = whole

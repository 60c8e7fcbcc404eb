"""What is asked of a vLLM server for one sample or one scoring, and every check of what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlpost.experience import Completion
from rlpost.rollout.engine import SamplingRequest, SamplingSettings

_NEVER = -9999.0  # how vLLM writes a log-prob that is NaN or minus infinity


class BadReply(Exception):
    """A reply that cannot be what was asked for; it says what is wrong with it."""


def sampling_body(
    request: SamplingRequest, settings: SamplingSettings, ends: Sequence[int], *, request_id: str, salt: str
) -> dict[str, Any]:
    """The body of `/inference/v1/generate` for one sample.

    `salt` enters the hash of every cached prefix, so that one of other weights cannot be hit. Parameters that the learner
    knows nothing of are set to what switches them off: those left out would be taken from generation_config.json.
    """
    params = {
        "seed": request.seed,
        "max_tokens": settings.max_completion_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "stop": list(settings.stop) or None,
        "stop_token_ids": list(ends) or None,
        "include_stop_str_in_output": True,
        "logprobs": 0,
        "min_p": 0.0,
        "min_tokens": 0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    return {
        "request_id": request_id,
        "token_ids": list(request.token_ids),
        "sampling_params": params,
        "cache_salt": salt,
        "output_mode": "text",
    }


def scoring_body(sequence: Sequence[int], *, request_id: str, salt: str) -> dict[str, Any]:
    """The same for the log-probs of a sequence's own tokens. vLLM scores a prompt only while it samples one more token."""
    params = {
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
        "detokenize": False,
        "min_p": 0.0,
        "min_tokens": 0,
        "top_p": 1.0,
        "top_k": -1,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    return {"request_id": request_id, "token_ids": list(sequence), "sampling_params": params, "cache_salt": salt}


def read_sample(reply: Any, *, vocabulary: int, longest: int, versions: Sequence[str]) -> Completion:
    """The completion in a reply: at most `longest` tokens below `vocabulary`, sampled by weights among `versions`.

    `versions`: the weights that the server has held since it was asked, oldest first; several where weights may change under a
    running request. Raises BadReply for anything else.
    """
    choice = _choice(reply)
    tokens, logged = choice.get("token_ids"), choice.get("logprobs")
    content = logged.get("content") if isinstance(logged, Mapping) else None
    if not isinstance(tokens, list) or not isinstance(content, list) or not 0 < len(tokens) <= longest:
        raise BadReply(f"it holds no list of 1 to {longest} tokens with their log-probs")
    if len(tokens) != len(content):
        raise BadReply(f"it holds {len(tokens)} tokens and {len(content)} log-probs")
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise BadReply(f"token {token!r} is none of the {vocabulary} of the vocabulary")
    logprobs = tuple(_logprob(entry) for entry in content)
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length"):
        raise BadReply(f"it ended with {finish!r} after {len(tokens)} tokens")
    stretches = _stretches(choice.get("weight_versions"), len(tokens), versions)
    text = choice.get("text")
    if not isinstance(text, str):
        raise BadReply("it holds no text")
    return Completion(tuple(tokens), logprobs, text, finish, stretches)


def read_scores(reply: Any, sequence: Sequence[int], *, version: str) -> list[float]:
    """The n - 1 log-probs of tokens 1..n-1 of `sequence`. Raises BadReply."""
    choice = _choice(reply)
    entries = reply.get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(sequence):
        raise BadReply(f"it does not score {len(sequence)} tokens")
    _stretches(choice.get("weight_versions"), 1, (version,))
    scores = []
    for token, entry in zip(sequence[1:], entries[1:], strict=True):
        if not isinstance(entry, Mapping) or str(token) not in entry:
            raise BadReply(f"it has no log-prob of token {token}")
        scores.append(_logprob(entry[str(token)]))
    return scores


def _choice(reply: Any) -> Mapping[str, Any]:
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise BadReply("it holds not exactly one sample")
    return choices[0]


def _logprob(entry: Any) -> float:
    value = entry.get("logprob") if isinstance(entry, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadReply(f"log-prob {value!r} is no finite number")
    if not _NEVER < value <= 1e-4:  # rounding may leave it a little above 0
        raise BadReply(f"log-prob {value!r} is not that of a token that can be sampled")
    return float(value)


def _stretches(spans: Any, tokens: int, versions: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Of vLLM's word on which weights sampled which tokens, what `Completion.versions` holds. Raises BadReply."""
    if not isinstance(spans, list) or not all(isinstance(span, Mapping) for span in spans):
        raise BadReply("it does not say which weights sampled it")
    at, oldest, stretches = 0, 0, []
    for span in spans:
        if span.get("start") != at or type(span.get("end")) is not int or span["end"] <= at:
            raise BadReply(f"its weight versions {spans} do not cover its tokens")
        version = str(span.get("version"))
        if version not in versions[oldest:]:
            held = " or ".join(repr(held) for held in versions[oldest:])
            raise BadReply(f"it was sampled by weights {version!r}; the learner's are {held}")
        oldest = versions.index(version, oldest)
        stretches.append((int(version) if version.isdigit() else 0, span["end"] - at))
        at = span["end"]
    if at != tokens:
        raise BadReply(f"its weight versions cover {at} of {tokens} tokens")
    return tuple(stretches)

"""The probe: do learner and engine give the same tokens the same log-probs? If not, why not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rlpost.errors import RolloutError


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How far apart learner and engine are on the same tokens. Gaps are |learner - engine| in nats."""

    mean_gap: float  # NaN when a log-prob is not finite or there are no tokens
    max_gap: float
    tokens: int


def compare(learner_logps: Sequence[Sequence[float]], engine_logps: Sequence[Sequence[float]]) -> ProbeResult:
    """Compares two scorings of the same sequences, one log-prob a token (as `RolloutEngine.logprobs` returns them).

    Raises RolloutError when the two do not score the same number of tokens.
    """
    lengths = [len(row) for row in learner_logps], [len(row) for row in engine_logps]
    if lengths[0] != lengths[1]:
        raise RolloutError(
            f"The probe cannot compare: the learner scored sequences of {lengths[0]} tokens, the engine {lengths[1]}. "
            "Both must score tokens 1..n-1 of the same sequences; check how the probe's sequences are passed on."
        )
    gaps = [
        abs(a - b)
        for mine, its in zip(learner_logps, engine_logps, strict=True)
        for a, b in zip(mine, its, strict=True)
    ]
    if not gaps or not all(math.isfinite(gap) for gap in gaps):
        return ProbeResult(math.nan, math.nan, len(gaps))
    return ProbeResult(math.fsum(gaps) / len(gaps), max(gaps), len(gaps))


_REMEMBERED = 20
_JUMP = 4.0  # times the median of those remembered: 200 sound steps in float32 stayed below 1.3 times
_JUMP_FROM = 2e-5  # nats; below this a float32 engine is as near as it can be, and ratios mean nothing


def remember(earlier: list[ProbeResult], result: ProbeResult) -> None:
    """Adds a probe that passed to those that later ones are compared with."""
    earlier.append(result)
    del earlier[:-_REMEMBERED]


def check_jump(result: ProbeResult, earlier: Sequence[ProbeResult], *, step: int) -> None:
    """For engines in float32, whose gap is rounding alone and hardly changes: raises RolloutError where it is suddenly much
    larger than it was, although below the limit. Five earlier probes are needed."""
    if result.tokens == 0 or len(earlier) < 5 or result.mean_gap < _JUMP_FROM:
        return
    usual = statistics.median(one.mean_gap for one in earlier)
    if result.mean_gap > _JUMP * usual:
        raise RolloutError(
            f"Step {step}: learner and rollout engine agree less than before about the same tokens: the mean gap is "
            f"{result.mean_gap:.3g} nats, and its median over the last {len(earlier)} probes was {usual:.3g}. Nothing that the "
            "learner does changes that in float32, so some of what the engine sampled with is old: weights that a sync did not "
            "bring, or what they had left in its prefix cache. Resume from the last checkpoint; if it comes back, use "
            "`rollout.engine.type=transformers` and report it."
        )


def check(result: ProbeResult, max_mean_gap: float, *, step: int, earlier: ProbeResult | None = None) -> None:
    """Raises RolloutError, with the likely cause named, when the mean gap (nats) is above `max_mean_gap` or not finite.

    `earlier` is the last probe that passed, if there was one: it tells a sync that went wrong (fine before, bad now)
    from an engine that never agreed with the learner. A probe of no tokens says nothing and passes.
    """
    if result.tokens == 0 or result.mean_gap <= max_mean_gap:
        return
    if math.isnan(result.mean_gap):
        finding = f"some of the {result.tokens} probed log-probs are not finite"
        cause = (
            "the learner's weights are NaN or infinite, or the engine's precision overflows. Look at `optimizer/loss` and "
            "`optimizer/grad_norm` in metrics.jsonl; lower `learner.learning_rate`, or set `rollout.engine.dtype=bfloat16` "
            "where it is float16"
        )
    else:
        finding = (
            f"the mean gap is {result.mean_gap:.3g} nats (largest {result.max_gap:.3g}, {result.tokens} tokens), "
            f"the limit `rollout.probe.max_mean_gap` is {max_mean_gap:.3g}"
        )
        cause = _cause(earlier)
    raise RolloutError(
        f"Step {step}: learner and rollout engine disagree about the same tokens: {finding}. {_SHARED} {cause}."
    )


# What cannot be the cause is said too: it is what people look at first.
_SHARED = (
    "Both were given the same token ids, and both give log-probs at `rollout.temperature` over the whole vocabulary: chat "
    "template, temperature, top-k and top-p are not the cause."
)


def _cause(earlier: ProbeResult | None) -> str:
    if earlier is not None:
        return (
            f"The last probe before, after an earlier sync, passed with {earlier.mean_gap:.3g} nats, so likely the new weights "
            "did not reach the engine, or only some of them. Resume from the last checkpoint; if it comes back, use "
            "`rollout.engine.type=transformers`. If the gap has been growing step by step (`mismatch/mean_abs_gap` in "
            "metrics.jsonl), it is precision: try `rollout.engine.dtype=float32`"
        )
    return (
        "Since the start of this process no probe has passed, so look in this order: (1) precision: where "
        "`rollout.engine.dtype` is not float32, float32 should bring the gap below 0.01; (2) engine and learner compute this "
        "type of model differently (attention, positions, scaling of the logits): try the other `rollout.engine.type`, or "
        "`model.attention=eager`; (3) the engine holds other weights than the learner: see that `model.path` was not changed "
        "on disk since the start. Raise `rollout.probe.max_mean_gap` only for quantised engines"
    )

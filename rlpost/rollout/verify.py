"""Did the learner's last change reach the engine? A test across a sync, and how far apart the two may be by precision.

Why the level is not one number: float32 engines were measured 1e-5 nats from the learner, bfloat16 ones some 0.02. A limit wide
enough for both lets a float32 engine sample with a whole attention layer off. Why there is a slope, too: at a learning rate of
1e-6 a skipped sync leaves the two a few thousandths of a nat apart, which proves nothing by itself; that the learner's
log-probs have moved and the engine's have not, does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlpost.errors import RolloutError
from rlpost.policy.precision import autocast_of
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.recipe.sections.root import Recipe
from rlpost.rollout.probe import ProbeResult, compare

Precision = Literal["float32", "float16", "bfloat16", "quantised"]
LEVELS: dict[Precision, float] = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1, "quantised": 0.5}
"""Mean |learner - engine| in nats above which the engine is held to have other weights (`rollout.probe.max_mean_gap: auto`)."""

_MISSING = 0.02  # of the learner's change, beside what rounding can take away
_ROUNDING = 5  # times the root mean square of what rounding did before
_MOVED = 2e-5  # root mean square of the learner's change in nats, below which rounding is as large: nothing can be said

Sequences = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # prompt and completion
Pair = tuple[list[float], list[float]]  # log-probs of the same tokens by learner and engine


@dataclass(frozen=True, slots=True)
class Watched:
    """Completions and what both sides said of them while they held the same weights."""

    sequences: Sequences
    said: Pair | None  # None in 16 bits, where a step is no larger than rounding


@dataclass(frozen=True, slots=True)
class Slope:
    """How much of the learner's change of log-probs the engine shows: 1 after a sync, 0 when it was skipped."""

    value: float
    error: float  # standard error
    moved: float  # root mean square of the learner's change, in nats
    tokens: int
    rounding: float  # root mean square of learner - engine before, when both held the same weights
    missing: float  # root mean square of (engine's change - learner's change), in units of `moved`

    @property
    def telling(self) -> bool:
        """Whether the learner moved enough, over enough tokens, for the slope to mean something."""
        return self.tokens >= 16 and self.moved >= _MOVED

    @property
    def wrong(self) -> bool:
        """Whether some of the change is missing, or something else changed."""
        # Token by token: what one stale layer takes away need not show in the slope, which is an average.
        return self.telling and self.missing > _MISSING + _ROUNDING * self.rounding / self.moved


def slope(before: tuple[Sequence[float], Sequence[float]], after: tuple[Sequence[float], Sequence[float]]) -> Slope:
    """Least squares through the origin of the engine's change on the learner's; each argument is (learner, engine) in nats."""
    learner = [b - a for a, b in zip(before[0], after[0], strict=True)]
    engine = [b - a for a, b in zip(before[1], after[1], strict=True)]
    n, squares = len(learner), math.fsum(x * x for x in learner)
    if n < 2 or squares == 0:
        return Slope(math.nan, math.inf, 0.0, n, 0.0, math.nan)
    value = math.fsum(x * y for x, y in zip(learner, engine, strict=True)) / squares
    residual = math.fsum((y - value * x) ** 2 for x, y in zip(learner, engine, strict=True))
    rounding = math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(*before, strict=True)) / n)
    missing = math.sqrt(math.fsum((y - x) ** 2 for x, y in zip(learner, engine, strict=True)) / squares)
    return Slope(value, math.sqrt(residual / (n - 1) / squares), math.sqrt(squares / n), n, rounding, missing)


def check_sync(
    before: tuple[Sequence[float], Sequence[float]] | None,
    after: tuple[Sequence[float], Sequence[float]],
    *,
    limit: float,
    exact: bool,
    when: str,
) -> tuple[ProbeResult, Slope | None]:
    """What a sync did; `when` begins the message of an error. `exact`: both sides compute in float32, so that the slope is of
    weights and not of rounding. Raises RolloutError when engine and learner are more than `limit` nats apart in the mean, or
    the learner's last change did not arrive; the message says what was seen, and no more."""
    result = compare([after[0]], [after[1]])
    measured = None if before is None else slope(before, after)
    if measured is not None and exact and measured.wrong:
        raise RolloutError(
            f"{when}: the sync did not bring the learner's weights to the rollout engine: {_arrived(measured.value)} of "
            f"the learner's last change of log-probs has arrived on average (slope {measured.value:.3f} +- "
            f"{measured.error:.3f} over {measured.tokens} tokens; 1 after a sync, 0 when it is skipped), and the two "
            f"changes of a token differ by {measured.missing:.0%} of its size. The mean gap is {result.mean_gap:.3g} nats. "
            "Resume from the last checkpoint; if it comes back, use `rollout.engine.type=transformers` and report it."
        )
    if result.tokens and not result.mean_gap <= limit:
        moved = _moved_along(measured if exact else None)
        raise RolloutError(
            f"{when}: after the sync learner and rollout engine disagree about the same tokens: the mean gap is "
            f"{result.mean_gap:.3g} nats (largest {result.max_gap:.3g}, {result.tokens} tokens), the limit "
            f"`rollout.probe.max_mean_gap` is {limit:.3g}{moved}. The engine holds other weights than the "
            "learner, or computes this type of model otherwise: try the other `rollout.engine.type`, or "
            "`rollout.engine.dtype=float32`."
        )
    return result, measured


def precision(recipe: Recipe) -> Precision:
    """The coarsest of what learner and engine compute in. Decided already where the recipe says auto."""
    engine, model = recipe.rollout.engine, recipe.model
    if model.quantized:
        return "quantised"
    if isinstance(engine, VllmEngine) and engine.in_eight_bits:
        return "quantised"
    dtypes = {engine.dtype, model.dtype}
    if "bfloat16" in dtypes or autocast_of(model) == "bfloat16":
        return "bfloat16"
    return "float16" if "float16" in dtypes else "float32"


def level(wanted: float | Literal["auto"], of: Precision) -> float:
    """`rollout.probe.max_mean_gap` in nats."""
    return LEVELS[of] if wanted == "auto" else wanted


def _arrived(value: float) -> str:
    return "nothing" if abs(value) < 0.02 else f"{100 * value:.0f} %"


def _moved_along(measured: Slope | None) -> str:
    """What the slope adds to a gap that is too large."""
    if measured is None or not measured.telling:
        return ""
    return f", although the learner's last change did arrive (slope {measured.value:.3f}): the two differed before"

"""SAFE (arXiv 2602.04651): gate, PID, phases, penalties and brake as pure functions of numbers; a counter of crashes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Phase = Literal["WARMUP", "CLIMBING", "PLATEAU", "CONVERGED"]
PHASES: tuple[Phase, ...] = ("WARMUP", "CLIMBING", "PLATEAU", "CONVERGED")
Phases = tuple[float, float, float, float]


def entropy_gate(entropy: float, floor: float = 2.0, lowest: float = 0.5) -> float:
    """The published gate max(lowest, floor / (H + 0.1)), H in nats per token: falls with entropy."""
    return max(lowest, floor / (max(entropy, 0.0) + 0.1))


def relative_gate(entropy: float, reference: float, softness: float, limits: tuple[float, float]) -> float:
    """(1 + s) H_0 / (H + s H_0), cut to `limits`: 1 at the entropy H_0 of the start, falling with entropy.

    1 where there was no entropy at the start, and so no scale.
    """
    if reference <= 0:
        return 1.0
    scale = max(entropy, 0.0) + softness * reference
    # Where the smallest numbers underflow to 0, what is left is the gate at entropy 0.
    gate = (1 + softness) * reference / scale if scale else (1 + softness) / softness
    return min(max(gate, limits[0]), limits[1])


def published_phase(rewards: Sequence[float], window: int, climb: float, steady: float, above: float) -> Phase:
    """The published detector on all batch-mean rewards so far (the last two windows suffice).

    Between one and two windows it compares the window with itself, so it cannot say CLIMBING there: as published.
    """
    if len(rewards) < window:
        return "WARMUP"
    recent = rewards[-window:]
    older = rewards[-2 * window : -window] if len(rewards) >= 2 * window else recent
    if statistics.fmean(recent) > statistics.fmean(older) + climb:
        return "CLIMBING"
    return "CONVERGED" if statistics.pstdev(recent) < steady and statistics.fmean(recent) > above else "PLATEAU"


def relative_phase(
    rewards: Sequence[float], spread: float, best: float, window: int, *, climb: float, steady: float, within: float
) -> Phase:
    """The detector in units of the rewards' `spread`: the newer half of the last two windows against the older half.

    CONVERGED: steady, and at most `within` spreads below `best`, the best moving average so far. A reward that fell and
    stays low is thus PLATEAU (a tighter threshold), however steady it is.
    """
    if len(rewards) < window:
        return "WARMUP"
    known = rewards[-2 * window :]
    older, newer = known[: len(known) // 2], known[len(known) // 2 :]
    mean = statistics.fmean(newer)
    # Rounding must not decide where all rewards are equal; it grows with their size, not with their spread.
    tiny = 1e-9 * max(abs(mean), abs(best), spread)
    if mean - statistics.fmean(older) > climb * spread + tiny:
        return "CLIMBING"
    steady_now = statistics.pstdev(newer) <= steady * spread + tiny
    return "CONVERGED" if steady_now and mean >= best - within * spread - tiny else "PLATEAU"


def phase_factor(phase: Phase, factors: Phases) -> float:
    """phi: what the phase multiplies the threshold by."""
    return factors[PHASES.index(phase)]


@dataclass(frozen=True, slots=True)
class PidState:
    """Integral, last error and the change that led to it, of a PID loop."""

    integral: float = 0.0
    error: float = 0.0
    change: float = 0.0


def pid_terms(state: PidState, *, kp: float, ki: float, kd: float) -> dict[str, float]:
    """The proportional, integral and derivative term of the last output (before it was cut)."""
    return {"p": kp * state.error, "i": ki * state.integral, "d": kd * state.change}


def clamped_pid(
    state: PidState, error: float, *, kp: float, ki: float, kd: float, integral_limit: float
) -> tuple[PidState, float]:
    """The published PID: the integral is cut to +-limit. u = Kp e + Ki I + Kd (e - e_prev)."""
    integral = min(max(state.integral + error, -integral_limit), integral_limit)
    new = PidState(integral, error, error - state.error)
    return new, sum(pid_terms(new, kp=kp, ki=ki, kd=kd).values())


def conditional_pid(
    state: PidState, error: float, *, kp: float, ki: float, kd: float, leak: float, limit: float
) -> tuple[PidState, float]:
    """A PID whose output is cut to +-limit and whose integral, which leaks, does not wind up: while the output is cut, an
    error of the same sign is not integrated (anti-windup by conditional integration). |Ki I| <= limit."""

    def output(integral: float) -> float:
        return kp * error + ki * integral + kd * (error - state.error)

    integral = leak * state.integral + error
    raw = output(integral)
    if abs(raw) > limit and raw * error > 0:
        integral = leak * state.integral
    most = limit / ki if ki > 0 else math.inf
    integral = min(max(integral, -most), most)
    return PidState(integral, error, error - state.error), min(max(output(integral), -limit), limit)


def threshold_penalty(kl: float, threshold: float, weight: float, gate: float = 1.0) -> tuple[float, float]:
    """(penalty, its derivative by kl) of gate * weight * max(0, kl - threshold)^2."""
    excess = max(0.0, kl - threshold)
    return gate * weight * excess**2, 2 * gate * weight * excess


def momentum_penalty(kls: Sequence[float], window: int, weight: float) -> tuple[float, float]:
    """(penalty, its derivative by the newest KL) of weight * v^2 for v = (KL_t - KL_{t-window+1}) / window > 0, else 0."""
    if len(kls) < window:
        return 0.0, 0.0
    velocity = max(0.0, (kls[-1] - kls[-window]) / window)
    return weight * velocity**2, 2 * weight * velocity / window


def predicted_kl(kls: Sequence[float]) -> float:
    """KL after the coming step if it grows as in the last one; the newest where it did not grow; 0 for none."""
    if not kls:
        return 0.0
    return kls[-1] + max(0.0, kls[-1] - kls[-2]) if len(kls) > 1 else kls[-1]


def preview_brake(kls: Sequence[float], limit: float | None) -> float:
    """The share of the learning rate for the coming step: limit / prediction where the prediction exceeds the limit (the
    published, never called, hook), 1 elsewhere. A KL that falls is not braked: the step would bring it back."""
    growing = len(kls) > 1 and kls[-1] > kls[-2]
    predicted = predicted_kl(kls)
    return limit / predicted if limit is not None and growing and predicted > limit else 1.0


# A moving average of about 50 rollouts; a fall by 3 standard deviations, or by 0.1 in the reward's own unit.
CRASH_DECAY, CRASH_FACTOR, CRASH_FALL, CRASH_WAIT = 0.98, 3.0, 0.1, 20


@dataclass(frozen=True, slots=True)
class CrashState:
    """Counts two kinds of collapse of a rollout's mean reward, against the moving average of mean rewards (decay 0.98).

    A crash: it is more than 3 standard deviations (of mean rewards around that average) below the average. A fall: it is more
    than 0.1 below the average. Each is counted when it begins, and lasts until a mean reward is above its line again; one that
    lasts for a single rollout counts like one that never ends.
    """

    seen: int = 0
    average: float = 0.0
    variance: float = 0.0
    down: bool = False
    crashes: int = 0
    fallen: bool = False
    falls: int = 0

    def step(self, reward: float) -> CrashState:
        """The state after a rollout of mean reward `reward`; unchanged for NaN. Counts from the 20th rollout on."""
        if math.isnan(reward):
            return self
        if not self.seen:
            return CrashState(1, reward)
        gap, known = reward - self.average, self.seen >= CRASH_WAIT
        down = known and gap < -CRASH_FACTOR * math.sqrt(self.variance)
        fallen = known and gap < -CRASH_FALL
        share = max(1 - CRASH_DECAY, 1 / (self.seen + 1))  # a plain mean at first
        return CrashState(
            seen=self.seen + 1,
            average=self.average + share * gap,
            variance=(1 - share) * (self.variance + share * gap**2),
            down=down,
            crashes=self.crashes + (down and not self.down),
            fallen=fallen,
            falls=self.falls + (fallen and not self.fallen),
        )

    def metrics(self) -> dict[str, float]:
        """Counts so far, and per 1000 rollouts that were looked at."""
        looked_at = max(1, self.seen - CRASH_WAIT)
        return {
            "reward/crashed": float(self.down),
            "reward/crashes": float(self.crashes),
            "reward/crashes_per_1000": 1000 * self.crashes / looked_at,
            "reward/falls": float(self.falls),
            "reward/falls_per_1000": 1000 * self.falls / looked_at,
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> CrashState:
        return cls(**state)

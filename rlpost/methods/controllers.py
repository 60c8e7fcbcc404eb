"""Controllers of the KL penalty: pure state machines that turn what was seen of a step into the next coefficient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rlpost.methods.safe import (
    PHASES,
    Phase,
    PidState,
    clamped_pid,
    conditional_pid,
    entropy_gate,
    momentum_penalty,
    phase_factor,
    pid_terms,
    predicted_kl,
    preview_brake,
    published_phase,
    relative_gate,
    relative_phase,
    threshold_penalty,
)
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.critic import (
    AdaptiveKlController,
    AsymmetricPenalty,
    Controller,
    KlTerm,
    PublishedSafeController,
    SafeController,
)


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known when an optimizer step begins; NaN where nothing is. Over all processes."""

    kl: float  # mean over tokens, nats per token, to the reference: of the newest forward pass
    entropy: float  # mean over tokens, nats
    reward: float  # mean over the rollout's completions, raw; of a rollout's first step only, NaN in its other steps
    reward_std: float = math.nan  # over the same


@dataclass(frozen=True, slots=True)
class Decision:
    """What the coming optimizer step does about KL."""

    # The penalty is a function of KL's moving average, and both numbers are its derivative with respect to this step's KL.
    coefficient: float  # as if the average were this step's KL itself
    literal: float  # as the formula has it: times the share that this step's KL has in the average, which is small
    penalty: float  # the penalty's value: all that the released code adds to its loss
    step_scale: float = 1.0  # the brake's share of the learning rate
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdaptiveKlState:
    """The coefficient in force."""

    coefficient: float


@dataclass(frozen=True, slots=True)
class SafeState:
    """What SAFE's controllers remember between optimizer steps."""

    calls: int = 0
    kl_average: float | None = None
    reward_average: float | None = None
    best_average: float = -math.inf
    spread: float | None = None
    entropy_start: float = 0.0
    entropies: int = 0  # how many made `entropy_start`
    pid: PidState = field(default_factory=PidState)
    output: float = 0.0  # of the PID at the last known reward: it stands until there is another
    velocity: float = 0.0  # the same
    rewards: tuple[float, ...] = ()  # of the last two windows of rollouts
    kls: tuple[float, ...] = ()  # the last window


State = AdaptiveKlState | SafeState


def initial_state(settings: Controller) -> State:
    """The state before the first optimizer step."""
    match settings:
        case AdaptiveKlController():
            return AdaptiveKlState(settings.initial)
        case PublishedSafeController():
            return SafeState(kl_average=0.0)
        case SafeController():
            return SafeState()
        case _:
            raise unknown_choice("controller", settings)


def control(settings: Controller, state: State, seen: Observation) -> tuple[State, Decision]:
    """One call, at the beginning of an optimizer step: (state after it, what the step does). Pure."""
    match settings:
        case AdaptiveKlController():
            assert isinstance(state, AdaptiveKlState)
            return adaptive_kl(settings, state, seen)
        case PublishedSafeController():
            assert isinstance(state, SafeState)
            return published_safe(settings, state, seen)
        case SafeController():
            assert isinstance(state, SafeState)
            return scale_free_safe(settings, state, seen)
        case _:
            raise unknown_choice("controller", settings)


def adaptive_kl(
    settings: AdaptiveKlController, state: AdaptiveKlState, seen: Observation
) -> tuple[AdaptiveKlState, Decision]:
    """Proportional control in log space (arXiv 1909.08593, sec. 2.2): beta <- beta (1 + K clip(KL / target - 1, +-c))."""
    error = 0.0 if math.isnan(seen.kl) else min(max(seen.kl / settings.target - 1, -settings.clip), settings.clip)
    beta = state.coefficient * (1 + settings.gain * error)
    metrics = {
        "controller/kl": seen.kl,
        "controller/target": settings.target,
        "controller/error": error,
        "controller/coefficient": beta,
    }
    return AdaptiveKlState(beta), Decision(beta, beta, beta * seen.kl, metrics=_known(metrics))


def published_safe(
    settings: PublishedSafeController, state: SafeState, seen: Observation
) -> tuple[SafeState, Decision]:
    """SAFE as published: tau = clip((tau_0 + u_PID) phi(phase)), penalty = g lambda (KL_ema - tau)^2 where KL_ema > tau."""
    state = replace(_remember(state, seen, settings.window, _kl_window(settings)), calls=state.calls + 1)
    state = _average_kl(state, seen, settings.kl_decay)
    state, terms = _clamped_pid(settings, state, seen)
    phase = published_phase(state.rewards, settings.window, settings.climb, settings.steady, settings.converged_above)
    low, high = settings.threshold_limits
    threshold = min(max((settings.threshold + state.output) * phase_factor(phase, settings.phases), low), high)
    gate = 1.0 if math.isnan(seen.entropy) else entropy_gate(seen.entropy, settings.entropy_floor, settings.gate_min)
    penalty, slope = threshold_penalty(state.kl_average or 0.0, threshold, settings.weight, gate)
    more, more_slope = _asymmetric(settings.asymmetric, state.kls)
    decision = Decision(
        coefficient=slope + more_slope,
        literal=(1 - settings.kl_decay) * slope + more_slope,
        penalty=penalty + more,
        step_scale=preview_brake(state.kls, settings.brake),
        metrics=_watch(state, seen, phase, threshold, gate, terms),
    )
    return state, _reported(decision)


def scale_free_safe(settings: SafeController, state: SafeState, seen: Observation) -> tuple[SafeState, Decision]:
    """SAFE redesigned: rewards may be shifted and scaled without changing a decision; see docs/methods/safe.md."""
    # The moving average passes 1 - decay of a change of KL on, the first time all of it; growth is of KL itself.
    passed = 1.0 if state.kl_average is None else 1 - settings.kl_decay
    state = replace(_remember(state, seen, settings.window, settings.window), calls=state.calls + 1)
    state = _average_entropy(_average_kl(state, seen, settings.kl_decay), seen, settings.window)
    state, terms = _relative_pid(settings, state, seen)
    spread, best = state.spread or 0.0, state.best_average
    phase = relative_phase(
        state.rewards,
        spread,
        best,
        settings.window,
        climb=settings.climb,
        steady=settings.steady,
        within=settings.converged_within,
    )
    wanted = (1 + state.output) * phase_factor(phase, settings.phases)
    threshold = settings.threshold * min(max(wanted, settings.threshold_limits[0]), settings.threshold_limits[1])
    entropy = state.entropy_start if math.isnan(seen.entropy) else seen.entropy
    gate = relative_gate(entropy, state.entropy_start, settings.gate_softness, settings.gate_limits)
    strength = settings.weight * gate / settings.threshold
    excess = max(0.0, (state.kl_average or 0.0) - threshold)
    growth = max(0.0, state.kls[-1] - state.kls[0]) if len(state.kls) > 1 else 0.0
    coefficient = min(strength * (excess + settings.momentum * growth), settings.max_coefficient)
    through = strength * (passed * excess + settings.momentum * growth)
    decision = Decision(
        coefficient=coefficient,
        literal=min(through, settings.max_coefficient),
        penalty=strength * (excess**2 + settings.momentum * growth**2) / 2,
        step_scale=preview_brake(state.kls, settings.brake),
        metrics=_watch(state, seen, phase, threshold, gate, terms),
    )
    return state, _reported(decision)


def loss_coefficient(term: KlTerm, decision: Decision) -> float:
    """What multiplies d KL / d log pi in the loss."""
    match term:
        case "coefficient":
            return decision.coefficient
        case "literal":
            return decision.literal
        case "reward" | "released":
            return 0.0
        case _:
            raise unknown_choice("controller.term", term)


def reward_coefficient(term: KlTerm, decision: Decision) -> float:
    """What multiplies KL that is subtracted from the reward."""
    match term:
        case "reward":
            return decision.coefficient
        case "coefficient" | "literal" | "released":
            return 0.0
        case _:
            raise unknown_choice("controller.term", term)


class KlController:
    """A controller with its state, for the loop: one `step` at the beginning of every optimizer step."""

    def __init__(self, settings: Controller) -> None:
        self.settings = settings
        self.state = initial_state(settings)

    def step(self, seen: Observation) -> Decision:
        """Moves the state on. Give the same observation on all processes."""
        self.state, decision = control(self.settings, self.state, seen)
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for checkpoints."""
        return {"state": to_dict(self.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = from_dict(self.settings, state["state"])


def to_dict(state: State) -> dict[str, Any]:
    """A state as plain numbers, lists and dicts (JSON can hold it; -inf is written as None)."""
    values = asdict(state)
    return {k: list(v) if isinstance(v, tuple) else None if v == -math.inf else v for k, v in values.items()}


def from_dict(settings: Controller, values: Mapping[str, Any]) -> State:
    """The state that `to_dict` described. Raises ValueError where it is another controller's."""
    kind = type(initial_state(settings))
    if set(values) != {f.name for f in fields(kind)}:
        raise ValueError(f"this is not the state of a controller of type {settings.type}: {sorted(values)}")
    if kind is AdaptiveKlState:
        return AdaptiveKlState(**values)
    made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    made["best_average"] = -math.inf if made["best_average"] is None else made["best_average"]
    made["pid"] = PidState(**values["pid"])
    return SafeState(**made)


def _clamped_pid(
    settings: PublishedSafeController, state: SafeState, seen: Observation
) -> tuple[SafeState, dict[str, float]]:
    """(state with velocity and output, the output's terms). Without a new reward both stand; the first gives neither."""
    gains = {"kp": settings.kp, "ki": settings.ki, "kd": settings.kd}
    if math.isnan(seen.reward):
        return state, pid_terms(state.pid, **gains)
    if state.reward_average is None:
        return replace(state, reward_average=seen.reward), pid_terms(state.pid, **gains)
    velocity = (1 - settings.reward_decay) * (seen.reward - state.reward_average)
    error = velocity - settings.target_velocity
    pid, output = clamped_pid(state.pid, error, **gains, integral_limit=settings.integral_limit)
    average = state.reward_average + velocity
    return replace(state, pid=pid, output=output, velocity=velocity, reward_average=average), pid_terms(pid, **gains)


def _relative_pid(settings: SafeController, state: SafeState, seen: Observation) -> tuple[SafeState, dict[str, float]]:
    """(state with velocity, in spreads per rollout, and output; the output's terms before it is cut). Without a new reward
    both stand; before the second reward, or without a spread, both are 0."""
    gains = {"kp": settings.kp, "ki": settings.ki, "kd": settings.kd}
    if math.isnan(seen.reward):
        return state, pid_terms(state.pid, **gains)
    spread = state.spread
    if not math.isnan(seen.reward_std):
        keep = settings.spread_decay
        spread = seen.reward_std if spread is None else keep * spread + (1 - keep) * seen.reward_std
    velocity, output, pid = 0.0, 0.0, state.pid
    average = seen.reward if state.reward_average is None else state.reward_average
    change = (1 - settings.reward_decay) * (seen.reward - average)
    if state.reward_average is not None and spread:
        velocity = change / spread
        error = min(max(velocity - settings.target_velocity, -settings.error_limit), settings.error_limit)
        pid, output = conditional_pid(state.pid, error, **gains, leak=settings.leak, limit=settings.authority)
    average += change
    best = max(state.best_average, average)
    state = replace(state, spread=spread, reward_average=average, best_average=best, pid=pid)
    return replace(state, output=output, velocity=velocity), pid_terms(pid, **gains)


def _remember(state: SafeState, seen: Observation, reward_window: int, kl_window: int) -> SafeState:
    rewards = state.rewards if math.isnan(seen.reward) else (*state.rewards, seen.reward)[-2 * reward_window :]
    kls = state.kls if math.isnan(seen.kl) else (*state.kls, seen.kl)[-kl_window:]
    return replace(state, rewards=rewards, kls=kls)


def _kl_window(settings: PublishedSafeController) -> int:
    return settings.asymmetric.window if settings.asymmetric is not None else settings.window


def _average_kl(state: SafeState, seen: Observation, decay: float) -> SafeState:
    if math.isnan(seen.kl):
        return state
    old = state.kl_average
    return replace(state, kl_average=seen.kl if old is None else decay * old + (1 - decay) * seen.kl)


def _average_entropy(state: SafeState, seen: Observation, window: int) -> SafeState:
    """The mean of the first `window` entropies; after that it stands."""
    if math.isnan(seen.entropy) or state.entropies >= window:
        return state
    count = state.entropies + 1
    return replace(
        state, entropy_start=state.entropy_start + (seen.entropy - state.entropy_start) / count, entropies=count
    )


def _asymmetric(settings: AsymmetricPenalty | None, kls: tuple[float, ...]) -> tuple[float, float]:
    if settings is None or not kls:
        return 0.0, 0.0
    first, slope = threshold_penalty(kls[-1], settings.threshold, settings.weight)
    second, more = momentum_penalty(kls, settings.window, settings.momentum)
    return first + second, slope + more


def _watch(
    state: SafeState,
    seen: Observation,
    phase: Phase,
    threshold: float,
    gate: float,
    terms: dict[str, float],
) -> dict[str, float]:
    return {
        "controller/kl": seen.kl,
        "controller/kl_average": state.kl_average if state.kl_average is not None else math.nan,
        "controller/kl_predicted": predicted_kl(state.kls),
        "controller/threshold": threshold,
        "controller/gate": gate,
        "controller/phase": float(PHASES.index(phase)),
        "controller/velocity": state.velocity,
        "controller/pid": state.output,
        "controller/pid_integral": state.pid.integral,
        "controller/pid_error": state.pid.error,
        **{f"controller/pid_{name}": value for name, value in terms.items()},
    }


def _reported(decision: Decision) -> Decision:
    """With what was decided among the metrics."""
    more = {
        "controller/coefficient": decision.coefficient,
        "controller/penalty": decision.penalty,
        "controller/step_scale": decision.step_scale,
    }
    return replace(decision, metrics=_known({**decision.metrics, **more}))


def _known(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not math.isnan(value)}

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

    # Both are derivatives of the penalty with respect to this step's KL. The penalty is a function of a moving average of KL.
    coefficient: float  # the penalty's derivative with respect to its argument, as if that were this step's KL itself
    literal: float  # the same times the share that this step's KL has in the average: small, and what the formula says
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


def initial_state(section: Controller) -> State:
    """The state before the first optimizer step."""
    match section:
        case AdaptiveKlController():
            return AdaptiveKlState(section.initial)
        case PublishedSafeController():
            return SafeState(kl_average=0.0)
        case SafeController():
            return SafeState()
        case _:
            raise unknown_choice("controller", section)


def control(section: Controller, state: State, seen: Observation) -> tuple[State, Decision]:
    """One call, at the beginning of an optimizer step: (state after it, what the step does). Pure."""
    match section:
        case AdaptiveKlController():
            assert isinstance(state, AdaptiveKlState)
            return adaptive_kl(section, state, seen)
        case PublishedSafeController():
            assert isinstance(state, SafeState)
            return published_safe(section, state, seen)
        case SafeController():
            assert isinstance(state, SafeState)
            return scale_free_safe(section, state, seen)
        case _:
            raise unknown_choice("controller", section)


def adaptive_kl(
    section: AdaptiveKlController, state: AdaptiveKlState, seen: Observation
) -> tuple[AdaptiveKlState, Decision]:
    """Proportional control in log space (arXiv 1909.08593, sec. 2.2): beta <- beta (1 + K clip(KL / target - 1, +-c))."""
    error = 0.0 if math.isnan(seen.kl) else min(max(seen.kl / section.target - 1, -section.clip), section.clip)
    beta = state.coefficient * (1 + section.gain * error)
    metrics = {
        "controller/kl": seen.kl,
        "controller/target": section.target,
        "controller/error": error,
        "controller/coefficient": beta,
    }
    return AdaptiveKlState(beta), Decision(beta, beta, beta * seen.kl, metrics=_known(metrics))


def published_safe(section: PublishedSafeController, state: SafeState, seen: Observation) -> tuple[SafeState, Decision]:
    """SAFE as published: tau = clip((tau_0 + u_PID) phi(phase)), penalty = g lambda (KL_ema - tau)^2 where KL_ema > tau."""
    state = replace(_remember(state, seen, section.window, _kl_window(section)), calls=state.calls + 1)
    state = _average_kl(state, seen, section.kl_decay)
    state, terms = _clamped_pid(section, state, seen)
    phase = published_phase(state.rewards, section.window, section.climb, section.steady, section.converged_above)
    low, high = section.threshold_limits
    threshold = min(max((section.threshold + state.output) * phase_factor(phase, section.phases), low), high)
    gate = 1.0 if math.isnan(seen.entropy) else entropy_gate(seen.entropy, section.entropy_floor, section.gate_min)
    penalty, slope = threshold_penalty(state.kl_average or 0.0, threshold, section.weight, gate)
    more, more_slope = _asymmetric(section.asymmetric, state.kls)
    decision = Decision(
        coefficient=slope + more_slope,
        literal=(1 - section.kl_decay) * slope + more_slope,
        penalty=penalty + more,
        step_scale=preview_brake(state.kls, section.brake),
        metrics=_watch(state, seen, phase, threshold, gate, terms),
    )
    return state, _reported(decision)


def scale_free_safe(section: SafeController, state: SafeState, seen: Observation) -> tuple[SafeState, Decision]:
    """SAFE redesigned: rewards may be shifted and scaled without changing a decision; see docs/methods/safe.md."""
    # The moving average passes 1 - decay of a change of KL on, the first time all of it; growth is of KL itself.
    passed = 1.0 if state.kl_average is None else 1 - section.kl_decay
    state = replace(_remember(state, seen, section.window, section.window), calls=state.calls + 1)
    state = _average_entropy(_average_kl(state, seen, section.kl_decay), seen, section.window)
    state, terms = _relative_pid(section, state, seen)
    spread, best = state.spread or 0.0, state.best_average
    phase = relative_phase(
        state.rewards,
        spread,
        best,
        section.window,
        climb=section.climb,
        steady=section.steady,
        within=section.converged_within,
    )
    wanted = (1 + state.output) * phase_factor(phase, section.phases)
    threshold = section.threshold * min(max(wanted, section.threshold_limits[0]), section.threshold_limits[1])
    entropy = state.entropy_start if math.isnan(seen.entropy) else seen.entropy
    gate = relative_gate(entropy, state.entropy_start, section.gate_softness, section.gate_limits)
    strength = section.weight * gate / section.threshold
    excess = max(0.0, (state.kl_average or 0.0) - threshold)
    growth = max(0.0, state.kls[-1] - state.kls[0]) if len(state.kls) > 1 else 0.0
    coefficient = min(strength * (excess + section.momentum * growth), section.max_coefficient)
    through = strength * (passed * excess + section.momentum * growth)
    decision = Decision(
        coefficient=coefficient,
        literal=min(through, section.max_coefficient),
        penalty=strength * (excess**2 + section.momentum * growth**2) / 2,
        step_scale=preview_brake(state.kls, section.brake),
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

    def __init__(self, section: Controller) -> None:
        self.section = section
        self.state = initial_state(section)

    def step(self, seen: Observation) -> Decision:
        """Moves the state on. Give the same observation on all processes."""
        self.state, decision = control(self.section, self.state, seen)
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for checkpoints."""
        return {"state": to_dict(self.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = from_dict(self.section, state["state"])


def to_dict(state: State) -> dict[str, Any]:
    """A state as plain numbers, lists and dicts (JSON can hold it; -inf is written as None)."""
    fields = asdict(state)
    return {k: list(v) if isinstance(v, tuple) else None if v == -math.inf else v for k, v in fields.items()}


def from_dict(section: Controller, values: Mapping[str, Any]) -> State:
    """The state that `to_dict` described. Raises ValueError where it is another controller's."""
    kind = type(initial_state(section))
    if set(values) != {f.name for f in fields(kind)}:
        raise ValueError(f"this is not the state of a controller of type {section.type}: {sorted(values)}")
    if kind is AdaptiveKlState:
        return AdaptiveKlState(**values)
    made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    made["best_average"] = -math.inf if made["best_average"] is None else made["best_average"]
    made["pid"] = PidState(**values["pid"])
    return SafeState(**made)


def _clamped_pid(
    section: PublishedSafeController, state: SafeState, seen: Observation
) -> tuple[SafeState, dict[str, float]]:
    """(state with velocity and output, the output's terms). Without a new reward both stand; the first gives neither."""
    gains = {"kp": section.kp, "ki": section.ki, "kd": section.kd}
    if math.isnan(seen.reward):
        return state, pid_terms(state.pid, **gains)
    if state.reward_average is None:
        return replace(state, reward_average=seen.reward), pid_terms(state.pid, **gains)
    velocity = (1 - section.reward_decay) * (seen.reward - state.reward_average)
    error = velocity - section.target_velocity
    pid, output = clamped_pid(state.pid, error, **gains, integral_limit=section.integral_limit)
    average = state.reward_average + velocity
    return replace(state, pid=pid, output=output, velocity=velocity, reward_average=average), pid_terms(pid, **gains)


def _relative_pid(section: SafeController, state: SafeState, seen: Observation) -> tuple[SafeState, dict[str, float]]:
    """(state with velocity, in spreads per rollout, and output; the output's terms before it is cut). Without a new reward
    both stand; before the second reward, or without a spread, both are 0."""
    gains = {"kp": section.kp, "ki": section.ki, "kd": section.kd}
    if math.isnan(seen.reward):
        return state, pid_terms(state.pid, **gains)
    spread = state.spread
    if not math.isnan(seen.reward_std):
        keep = section.spread_decay
        spread = seen.reward_std if spread is None else keep * spread + (1 - keep) * seen.reward_std
    velocity, output, pid = 0.0, 0.0, state.pid
    average = seen.reward if state.reward_average is None else state.reward_average
    change = (1 - section.reward_decay) * (seen.reward - average)
    if state.reward_average is not None and spread:
        velocity = change / spread
        error = min(max(velocity - section.target_velocity, -section.error_limit), section.error_limit)
        pid, output = conditional_pid(state.pid, error, **gains, leak=section.leak, limit=section.authority)
    average += change
    best = max(state.best_average, average)
    state = replace(state, spread=spread, reward_average=average, best_average=best, pid=pid)
    return replace(state, output=output, velocity=velocity), pid_terms(pid, **gains)


def _remember(state: SafeState, seen: Observation, reward_window: int, kl_window: int) -> SafeState:
    rewards = state.rewards if math.isnan(seen.reward) else (*state.rewards, seen.reward)[-2 * reward_window :]
    kls = state.kls if math.isnan(seen.kl) else (*state.kls, seen.kl)[-kl_window:]
    return replace(state, rewards=rewards, kls=kls)


def _kl_window(section: PublishedSafeController) -> int:
    return section.asymmetric.window if section.asymmetric is not None else section.window


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


def _asymmetric(section: AsymmetricPenalty | None, kls: tuple[float, ...]) -> tuple[float, float]:
    if section is None or not kls:
        return 0.0, 0.0
    first, slope = threshold_penalty(kls[-1], section.threshold, section.weight)
    second, more = momentum_penalty(kls, section.window, section.momentum)
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

"""SAFE's controllers: fixed points of the published one, properties of the redesign, and the gradient of every KL term."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import CONTEXT, Case, method
from pydantic import TypeAdapter, ValidationError

from rlpost.gradient.kl import kl_estimate
from rlpost.gradient.loss import coefficient_loss
from rlpost.learner.actor_critic import ActorCritic
from rlpost.methods import compute_coefficients
from rlpost.methods.controllers import (
    AdaptiveKlState,
    Decision,
    KlController,
    Observation,
    SafeState,
    control,
    from_dict,
    initial_state,
    loss_coefficient,
    reward_coefficient,
    to_dict,
)
from rlpost.methods.ppo import estimate
from rlpost.methods.safe import (
    CrashState,
    PidState,
    clamped_pid,
    conditional_pid,
    entropy_gate,
    momentum_penalty,
    pid_terms,
    predicted_kl,
    preview_brake,
    published_phase,
    relative_gate,
    relative_phase,
    threshold_penalty,
)
from rlpost.recipe.sections.critic import (
    AdaptiveKlController,
    AsymmetricPenalty,
    Controller,
    CriticSection,
    PublishedSafeController,
    SafeController,
    describe_controller,
)

PUBLISHED, SCALE_FREE, ADAPTIVE = PublishedSafeController(), SafeController(), AdaptiveKlController()
NAN = math.nan


def noise(n: int, seed: int = 0) -> list[float]:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def drive(section, seen, state=None) -> list[Decision]:
    """The decisions on a sequence of observations."""
    state = initial_state(section) if state is None else state
    decisions = []
    for observation in seen:
        state, decision = control(section, state, observation)
        decisions.append(decision)
    return decisions


def rewards(values, *, kl=0.1, entropy=0.5, std=0.3):
    return [Observation(kl, entropy, r, std) for r in values]


# --- the published pieces ---------------------------------------------------------------------------------------------


def test_published_gate_values():
    for entropy, gate in (
        (0.05, 13.3333),
        (0.2, 6.6667),
        (0.5, 3.3333),
        (1.0, 1.8182),
        (1.9, 1.0),
        (2.0, 0.9524),
        (3.0, 0.6452),
        (5.0, 0.5),
    ):
        assert entropy_gate(entropy) == pytest.approx(gate, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 10), st.floats(0, 10), st.floats(0.01, 5))
def test_gates_fall_with_entropy(a, b, start):
    low, high = sorted((a, b))
    assert entropy_gate(low) >= entropy_gate(high)
    limits = SCALE_FREE.gate_limits
    assert relative_gate(low, start, 0.1, limits) >= relative_gate(high, start, 0.1, limits)
    assert relative_gate(start, start, 0.1, limits) == pytest.approx(1.0)
    # In units of the start's entropy, whatever that is.
    assert relative_gate(low * start, start, 0.1, limits) == pytest.approx(relative_gate(low, 1.0, 0.1, limits))


def test_published_phases():
    """safe.md section 7: call 49 is WARMUP, call 50 is not; between 50 and 99 CLIMBING cannot be said."""
    climbing = [0.01 * i for i in range(200)]
    phases = [published_phase(climbing[:n], 50, 0.01, 0.02, 0.7) for n in range(1, 200)]
    assert phases[48] == "WARMUP" and phases[49] != "WARMUP"
    assert set(phases[49:99]) == {"PLATEAU"} and set(phases[99:]) == {"CLIMBING"}
    assert published_phase([0.71] * 50, 50, 0.01, 0.02, 0.7) == "CONVERGED"
    assert published_phase([0.69] * 50, 50, 0.01, 0.02, 0.7) == "PLATEAU"  # the hard-coded reward scale
    assert published_phase([0.6, 0.9] * 25, 50, 0.01, 0.02, 0.7) == "PLATEAU"


def test_published_thresholds_by_phase():
    """Nominal tau 0.45, 0.36, 0.24, 0.30 in the four phases, up to what little the PID does."""
    warmup = drive(PUBLISHED, rewards([0.71] * 49))[-1].metrics
    converged = drive(PUBLISHED, rewards([0.71] * 50))[-1].metrics
    plateau = drive(PUBLISHED, rewards([0.3] * 50))[-1].metrics
    climbing = drive(PUBLISHED, rewards([0.0005 * i for i in range(120)]))[-1].metrics
    found = [m["controller/threshold"] for m in (warmup, climbing, plateau, converged)]
    assert found == pytest.approx([0.45, 0.36, 0.24, 0.30], abs=0.006)
    assert [m["controller/phase"] for m in (warmup, climbing, plateau, converged)] == [0, 1, 2, 3]


def test_published_pid_by_hand():
    """First call 0; second call with ema 0.5 and reward 0.7: velocity 0.01, e = 0.009."""
    first, second, third = drive(PUBLISHED, rewards([0.5, 0.7, 0.7]))
    assert first.metrics["controller/pid"] == 0.0 and first.metrics["controller/pid_integral"] == 0.0
    assert second.metrics["controller/velocity"] == pytest.approx(0.01)
    assert second.metrics["controller/pid"] == pytest.approx(0.3 * 0.009 + 0.01 * 0.009 + 0.05 * 0.009)
    error = 0.05 * (0.7 - 0.51) - 0.001
    expected = 0.3 * error + 0.01 * (0.009 + error) + 0.05 * (error - 0.009)
    assert third.metrics["controller/pid"] == pytest.approx(expected)


def test_published_pid_hardly_acts():
    """safe.md section 3.3: on a saturating reward curve the output stays in [-0.0138, +0.0013] and the integral ends at -1."""
    curve = [0.55 + 0.18 * (1 - math.exp(-i / 800)) + 0.03 * e for i, e in enumerate(noise(2000))]
    decisions = drive(PUBLISHED, [o for r in curve for o in rewards([r, r])])
    outputs = [d.metrics["controller/pid"] for d in decisions]
    assert min(outputs) > -0.016 and max(outputs) < 0.003
    assert decisions[-1].metrics["controller/pid_integral"] == -1.0
    thresholds = [d.metrics["controller/threshold"] for d in decisions]
    assert min(thresholds) > 0.22 and max(thresholds) < 0.46


def test_published_penalty_by_hand():
    assert threshold_penalty(0.55, 0.3, 0.1) == pytest.approx((0.1 * 0.25**2, 0.05))
    assert threshold_penalty(0.2, 0.3, 0.1) == (0.0, 0.0) and threshold_penalty(-5.0, 0.3, 0.1) == (0.0, 0.0)
    section = PublishedSafeController(kl_decay=0.0)
    (decision,) = drive(section, [Observation(0.7, 0.5, 0.6)])  # WARMUP: tau 0.45; gate 10/3
    assert decision.coefficient == pytest.approx(0.2 * (2 / 0.6) * 0.25)
    assert decision.penalty == pytest.approx(0.1 * (2 / 0.6) * 0.25**2)


def test_kl_average_starts_at_zero_as_published():
    decisions = drive(PUBLISHED, [Observation(1.0, 0.5, 0.5)] * 3)
    assert [d.metrics["controller/kl_average"] for d in decisions] == pytest.approx([0.1, 0.19, 0.271])
    assert drive(SCALE_FREE, [Observation(1.0, 0.5, 0.5)])[0].metrics["controller/kl_average"] == 1.0


def test_asymmetric_and_momentum_penalties_by_hand():
    """A jump of 0.5 in KL over the window gives 5e-4; the asymmetric part is 0.1 (KL - 0.3)^2."""
    kls = [0.1] * 49 + [0.6]
    assert momentum_penalty(kls, 50, 5.0) == pytest.approx((5e-4, 2 * 5 * 0.01 / 50))
    assert momentum_penalty(kls[1:], 50, 5.0) == (0.0, 0.0) and momentum_penalty(kls[::-1], 50, 5.0) == (0.0, 0.0)
    section = PublishedSafeController(asymmetric=AsymmetricPenalty(), weight=0.0)
    last = drive(section, [Observation(k, 0.5, 0.5) for k in kls])[-1]
    assert last.penalty == pytest.approx(0.1 * 0.3**2 + 5e-4)
    assert last.coefficient == pytest.approx(0.2 * 0.3 + 0.002) and last.literal == pytest.approx(last.coefficient)


def test_preview_brake():
    assert preview_brake([0.2, 0.6], 0.5) == pytest.approx(0.5 / 1.0)  # predicted 0.6 + 0.4
    assert predicted_kl([0.2, 0.6]) == pytest.approx(1.0) and predicted_kl([]) == 0.0 and predicted_kl([0.3]) == 0.3
    assert preview_brake([0.9, 0.6], 0.5) == 1.0  # falling: the step would bring it back
    assert preview_brake([0.1, 0.2], 0.5) == 1.0 and preview_brake([0.2, 0.6], None) == 1.0
    seen = [Observation(k, 0.5, 0.5, 0.2) for k in (0.2, 0.6)]
    for section in (PublishedSafeController(brake=0.5), SafeController(brake=0.5)):
        assert [d.step_scale for d in drive(section, seen)] == [1.0, pytest.approx(0.5)]
    assert drive(SCALE_FREE, seen)[-1].step_scale == 1.0


def test_a_crash_counts_although_the_reward_comes_back():
    """As docs/metrics.md says: `crashes` does not ask, `crashed` says whether it has come back."""
    state = CrashState()
    for reward in [*(0.7 + 0.01 * max(-2.0, min(2.0, e)) for e in noise(50)), 0.2]:
        state = state.step(reward)
    assert state.metrics()["reward/crashed"] == 1.0 and state.metrics()["reward/crashes"] == 1.0
    state = state.step(0.7)
    assert (
        state.metrics()["reward/crashed"] == 0.0
        and state.metrics()["reward/crashes"] == state.metrics()["reward/falls"] == 1
    )


def test_crashes_are_counted_once_each():
    """Three standard deviations below the moving average; and, apart from that, 0.1 in the reward's unit."""
    state = CrashState()
    steady = [0.7 + 0.01 * max(-2.0, min(2.0, e)) for e in noise(100)]
    for reward in steady:
        state = state.step(reward)
    assert state.crashes == state.falls == 0 and not state.down
    deviation = math.sqrt(state.variance)
    assert not state.step(state.average - 2.9 * deviation).down
    small = state.step(state.average - 3.1 * deviation)
    assert small.down and small.crashes == 1 and not small.fallen  # far less than 0.1
    for reward in (0.3, 0.29, NAN, 0.31):
        state = state.step(reward)
    assert state.crashes == state.falls == 1 and state.down and state.fallen
    for reward in [*steady, 0.3]:
        state = state.step(reward)
    assert state.crashes == state.falls == 2
    found = state.metrics()
    assert found["reward/crashes_per_1000"] == pytest.approx(1000 * 2 / (state.seen - 20))
    assert found["reward/crashed"] == 1.0 and found["reward/falls"] == 2.0
    assert CrashState().step(0.5).step(-100.0).crashes == 0  # too few rollouts to know the spread
    wide = CrashState()
    for e in noise(200):
        wide = wide.step(10 + 0.5 * e)
    assert wide.falls > 10 >= 5 * wide.crashes  # why falls are counted apart: the unit of a reward model is its own
    assert CrashState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


# --- one reward a rollout ---------------------------------------------------------------------------------------------


def several_updates(values, updates=8, **known):
    """What a controller sees of rollouts with so many optimizer steps each: the reward with the first of them."""
    return [o for r in values for o in rewards([r, *[NAN] * (updates - 1)], **known)]


@pytest.mark.parametrize("section", [SCALE_FREE, PUBLISHED], ids=lambda s: s.type)
def test_more_updates_of_a_rollout_do_not_change_what_rewards_say(section):
    """Velocity, PID and phase are those of one update a rollout, and stand until the next reward."""
    curve = [0.5 + 0.01 * i + 0.02 * e for i, e in enumerate(noise(70))]
    once = [d.metrics for d in drive(section, rewards(curve))]
    often = [d.metrics for d in drive(section, several_updates(curve))]
    for name in ("phase", "velocity", "pid", "pid_p", "pid_i", "pid_d", "pid_integral", "pid_error"):
        key = f"controller/{name}"
        for u in range(8):
            assert [m[key] for m in often[u::8]] == [m[key] for m in once], (name, u)
    assert any(m["controller/pid"] != 0 for m in once)


def test_a_steady_climb_is_seen_as_one_whatever_the_number_of_updates():
    """Fed once an update, each reward eight times over, the same climb looks like CONVERGED for most of the run."""
    values = [0.02 * i for i in range(100)]
    found = [d.metrics["controller/phase"] for d in drive(SCALE_FREE, several_updates(values, std=1.0))]
    assert found[8 * 30 :].count(1.0) == len(found[8 * 30 :])
    repeated = drive(SCALE_FREE, rewards([v for v in values for _ in range(8)], std=1.0))
    assert [d.metrics["controller/phase"] for d in repeated[8 * 30 :]].count(1.0) < 0.5 * len(found[8 * 30 :])


def test_pid_terms_add_up_to_the_output():
    for section in (SCALE_FREE, PUBLISHED):
        for decision in drive(section, rewards([0.5, 0.501, 0.5, 0.502], std=1.0))[1:]:
            m = decision.metrics
            parts = m["controller/pid_p"] + m["controller/pid_i"] + m["controller/pid_d"]
            assert m["controller/pid"] == pytest.approx(parts) and parts != 0
    assert pid_terms(PidState(2.0, 3.0, 5.0), kp=1.0, ki=10.0, kd=100.0) == {"p": 3.0, "i": 20.0, "d": 500.0}


# --- the redesign -----------------------------------------------------------------------------------------------------


def test_gains_act():
    """A reward that rises, or falls, by 2 % of its spread a step moves the threshold by over 10 %; the published PID by
    less than 1 %."""

    def last(section, slope):
        curve = rewards([slope * i for i in range(200)], std=1.0)
        return drive(section, curve)[-1].metrics

    section = replace_section(SCALE_FREE, phases=(1.0, 1.0, 1.0, 1.0))
    assert last(section, 0.02)["controller/threshold"] > 1.1 * section.threshold
    assert last(section, -0.02)["controller/threshold"] < 0.9 * section.threshold
    old = replace_section(PUBLISHED, phases=(1.0, 1.0, 1.0, 1.0))
    assert last(old, 0.001)["controller/threshold"] == pytest.approx(old.threshold, rel=0.01)


def replace_section(section, **changes):
    return type(section).model_validate({**section.model_dump(), **changes})


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-10, 10), st.integers(0, 1000))
def test_decisions_do_not_depend_on_the_rewards_scale(scale, shift, seed):
    curve = [0.01 * i + 0.2 * e for i, e in enumerate(noise(80, seed))]
    kls = [0.2 + 0.01 * i for i in range(80)]
    plain = drive(SCALE_FREE, [Observation(k, 0.5, r, 0.4) for k, r in zip(kls, curve, strict=True)])
    moved = drive(
        SCALE_FREE,
        [Observation(k, 0.5, scale * (r + shift), scale * 0.4) for k, r in zip(kls, curve, strict=True)],
    )
    assert [d.coefficient for d in moved] == pytest.approx([d.coefficient for d in plain], rel=1e-6, abs=1e-9)
    assert [d.metrics["controller/phase"] for d in moved] == [d.metrics["controller/phase"] for d in plain]


def test_relative_phases():
    def phase(values, spread=1.0, best=None):
        best = max(values) if best is None else best
        return relative_phase(values, spread, best, 25, climb=0.1, steady=0.5, within=0.25)

    assert phase([0.5] * 24) == "WARMUP"
    assert phase([0.02 * i for i in range(30)]) == "CLIMBING"  # already after one window, unlike the published one
    assert phase([0.5] * 60) == "CONVERGED" and phase([-3.0] * 60) == "CONVERGED"  # no absolute level
    assert phase([1.0] * 30 + [0.2] * 60, best=1.0) == "PLATEAU"  # fell, and stays low
    assert phase([0.0, 2.0] * 30, best=1.0) == "PLATEAU"  # swings
    assert phase([0.5] * 60, spread=0.0) == "CONVERGED"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=80))
def test_integral_and_output_are_bounded(errors):
    state, old = PidState(), PidState()
    for error in errors:
        state, output = conditional_pid(state, error, kp=10.0, ki=0.3, kd=2.0, leak=1.0, limit=0.5)
        assert abs(output) <= 0.5 and abs(0.3 * state.integral) <= 0.5 + 1e-12
        old, _ = clamped_pid(old, 30 * error, kp=0.3, ki=0.01, kd=0.05, integral_limit=1.0)
        assert abs(old.integral) <= 1.0


def test_a_saturated_output_recovers_at_once():
    """After 500 steps at the limit, two steps of the opposite error bring the output off it; a clamped integral as large
    as the limit allows would hold it there for many."""
    gains = {"kp": 1.0, "ki": 0.3, "kd": 0.0}
    state, winding = PidState(), PidState()
    for _ in range(500):
        state, output = conditional_pid(state, 0.1, **gains, leak=1.0, limit=0.5)
        winding, wound = clamped_pid(winding, 0.1, **gains, integral_limit=100.0)
    assert output == pytest.approx(0.5, abs=0.03) and wound > 0.5
    held = 0
    for step in range(200):
        state, output = conditional_pid(state, -0.1, **gains, leak=1.0, limit=0.5)
        winding, wound = clamped_pid(winding, -0.1, **gains, integral_limit=100.0)
        assert output < 0.5 - 0.02 * step or output <= 0
        held += wound >= 0.5
    assert held > 100 and output == pytest.approx(-0.5, abs=0.03)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 3), st.floats(0, 4), st.floats(-5, 5), st.floats(0, 2)), min_size=1, max_size=60)
)
def test_no_observation_breaks_a_controller(rows):
    for section in (SCALE_FREE, PUBLISHED, ADAPTIVE, replace_section(SCALE_FREE, brake=0.5)):
        for decision in drive(section, [Observation(*row) for row in rows]):
            assert 0 <= decision.coefficient < math.inf and 0 <= decision.literal <= decision.coefficient + 1e-12
            assert 0 < decision.step_scale <= 1
            if isinstance(section, SafeController):
                low, high = (section.threshold * x for x in section.threshold_limits)
                assert low - 1e-12 <= decision.metrics["controller/threshold"] <= high + 1e-12
                assert decision.coefficient <= section.max_coefficient


def test_unknown_observations_leave_a_controller_as_it_was():
    for section in (SCALE_FREE, PUBLISHED, ADAPTIVE):
        state, _ = control(section, initial_state(section), Observation(0.4, 0.5, 0.3, 0.2))
        after, decision = control(section, state, Observation(NAN, NAN, NAN, NAN))
        assert (after if isinstance(after, AdaptiveKlState) else replace(after, calls=state.calls)) == state
        assert not math.isnan(decision.coefficient)
        assert not any(math.isnan(value) for value in decision.metrics.values())


def test_low_kl_is_free_and_the_coefficient_rises_with_kl_and_falling_entropy():
    (free,) = drive(SCALE_FREE, [Observation(0.1, 0.5, 0.5, 0.2)])
    assert free.coefficient == 0.0 and free.penalty == 0.0
    coefficients = [drive(SCALE_FREE, [Observation(kl, 0.5, 0.5, 0.2)])[0].coefficient for kl in (0.5, 0.7, 1.0, 50.0)]
    assert coefficients == sorted(coefficients) and coefficients[-1] == SCALE_FREE.max_coefficient
    # tau = 0.45 in WARMUP: at KL 0.75 the excess is the base threshold, and the coefficient is `weight`.
    (at_one,) = drive(SCALE_FREE, [Observation(0.75, 0.5, 0.5, 0.2)])
    assert at_one.coefficient == pytest.approx(SCALE_FREE.weight)
    calm = [Observation(0.75, 0.5, 0.5, 0.2)] * 30
    collapsed, held = [drive(SCALE_FREE, [*calm, Observation(0.75, h, 0.5, 0.2)])[-1].coefficient for h in (0.05, 0.5)]
    assert collapsed > 3 * held > 0


def test_adaptive_kl_by_hand():
    """KL twice the target: error clipped to 0.2, beta grows by 2 %; half the target: shrinks by 2 %."""
    up, down = drive(ADAPTIVE, [Observation(0.1, 0.5, 0.5), Observation(0.025, 0.5, 0.5)])
    assert up.coefficient == pytest.approx(0.05 * 1.02) and down.coefficient == pytest.approx(0.05 * 1.02 * 0.98)
    (near,) = drive(ADAPTIVE, [Observation(0.055, 0.5, 0.5)])
    assert near.coefficient == pytest.approx(0.05 * (1 + 0.1 * 0.1))


@pytest.mark.parametrize("section", [SCALE_FREE, PUBLISHED, ADAPTIVE], ids=lambda s: s.type)
def test_controllers_resume_exactly(section):
    seen = [
        Observation(0.3 + 0.2 * k, 0.5 + 0.1 * h, r, 0.2)
        for k, h, r in zip(noise(90, 1), noise(90, 2), noise(90, 3), strict=True)
    ]
    whole = KlController(section)
    wanted = [whole.step(o) for o in seen]
    for cut in (0, 1, 40):
        first, second = KlController(section), KlController(section)
        for o in seen[:cut]:
            first.step(o)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.state == first.state
        assert [second.step(o) for o in seen[cut:]] == wanted[cut:]
    with pytest.raises(ValueError, match="another|not the state"):
        other = ADAPTIVE if section is not ADAPTIVE else SCALE_FREE
        from_dict(other, to_dict(initial_state(section)))


# --- the gradient of the KL term --------------------------------------------------------------------------------------


def kl_gradient(case: Case, section, decision: Decision, estimator: str) -> torch.Tensor:
    """What the controller's decision adds to the gradient of the step's loss, by the way that training takes."""
    view, counts = case.view(), case.counts()
    controlled = method(preset="ppo", kl={"estimator": estimator}, controller=section.model_dump(mode="json"))
    beta = ActorCritic.of(controlled).kl_coefficient(decision)
    context = replace(CONTEXT, kl_coefficient=beta)
    with_term = compute_coefficients(controlled, view, counts, context=context)
    without = compute_coefficients(method(preset="ppo", controller=None), view, counts, context=CONTEXT)
    logp, entropy = case.score()
    return case.gradient(coefficient_loss(with_term, logp, entropy) - coefficient_loss(without, logp, entropy))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kind", ["safe", "safe_published"])
@pytest.mark.parametrize("previous", [None, 0.9])
def test_kl_term_equals_autograd_in_every_mode(estimator, kind, previous):
    case = Case(2)
    logp, _ = case.score()
    kl = kl_estimate(estimator, logp, case.ref_logp).mean() + 1.0  # a constant, so that k1 too is above the threshold
    section = TypeAdapter(Controller).validate_python({"type": kind})
    state = initial_state(section)
    if previous is not None:
        state = replace(state, kl_average=previous)
    seen = Observation(float(kl.detach()), 0.4, 0.5, 0.2)
    after, decision = control(section, state, seen)
    threshold, gate = decision.metrics["controller/threshold"], decision.metrics["controller/gate"]
    weight = section.weight if kind == "safe_published" else section.weight / (2 * section.threshold)
    start = state.kl_average
    average = kl if start is None else section.kl_decay * start + (1 - section.kl_decay) * kl
    assert float(average.detach()) == pytest.approx(after.kl_average)
    excess = average - threshold
    assert float(excess.detach()) > 0 or (start == 0.0 and decision.coefficient == 0)
    literal = case.gradient(gate * weight * excess.clamp(min=0) ** 2)
    straight = case.gradient(2 * gate * weight * float(excess.detach().clamp(min=0)) * kl)
    found = {
        term: kl_gradient(case, replace_section(section, term=term), decision, estimator)
        for term in ("literal", "coefficient")
    }
    torch.testing.assert_close(found["literal"], literal, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found["coefficient"], straight, rtol=1e-9, atol=1e-13)
    if float(excess.detach()) > 0:
        assert literal.abs().sum() > 0 and straight.abs().sum() > 0
        share = 1.0 if start is None else 1 - section.kl_decay
        torch.testing.assert_close(found["literal"], share * found["coefficient"])


def test_released_term_has_no_gradient_and_a_penalty():
    section = PublishedSafeController(term="released", kl_decay=0.0)
    (decision,) = drive(section, [Observation(0.9, 0.4, 0.5)])
    assert decision.penalty > 0 and decision.coefficient > 0
    assert loss_coefficient("released", decision) == 0.0 == reward_coefficient("released", decision)
    for estimator in ("k1", "k2", "k3"):
        assert not kl_gradient(Case(2), section, decision, estimator).any()
    acting = replace_section(section, term="coefficient")
    assert kl_gradient(Case(2), acting, decision, "k3").any()  # the same decision


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_adaptive_kl_in_the_loss_equals_autograd(estimator):
    case, section = Case(2), replace_section(ADAPTIVE, term="coefficient")
    (decision,) = drive(section, [Observation(0.5, 0.4, 0.5, 0.2)])
    logp, _ = case.score()
    expected = case.gradient(decision.coefficient * kl_estimate(estimator, logp, case.ref_logp).mean())
    assert expected.abs().sum() > 0
    torch.testing.assert_close(kl_gradient(case, section, decision, estimator), expected, rtol=1e-9, atol=1e-13)
    # In the reward it is no business of the loss.
    assert not kl_gradient(case, ADAPTIVE, decision, estimator).any()


@pytest.mark.parametrize(("newest", "acts"), [(0.8, True), (0.2, False)])
def test_slopes_of_the_asymmetric_and_momentum_penalties_equal_autograd(newest, acts):
    extra = AsymmetricPenalty(threshold=0.3, weight=0.1, momentum=5.0, window=10)
    section = PublishedSafeController(asymmetric=extra, weight=0.0)
    before = [0.25 + 0.001 * i for i in range(9)]
    last = drive(section, [Observation(k, 0.5, 0.5) for k in (*before, newest)])[-1]
    kl = torch.tensor(newest, dtype=torch.float64, requires_grad=True)
    penalty = 0.1 * (kl - 0.3).clamp(min=0) ** 2 + 5.0 * ((kl - before[0]) / 10).clamp(min=0) ** 2
    penalty.backward()
    assert last.penalty == pytest.approx(float(penalty.detach()), rel=1e-12, abs=1e-15)
    assert last.coefficient == pytest.approx(float(kl.grad), rel=1e-12, abs=1e-15) and (last.coefficient > 0) is acts


def test_reward_shaping_has_the_gradient_of_the_kl():
    """One token from a categorical: E[(-c (log pi - log ref)) d log pi] is exactly d(-c KL(pi || ref))."""
    section = replace_section(SCALE_FREE, term="reward")
    (decision,) = drive(section, [Observation(0.9, 0.4, 0.5, 0.2)])
    c = reward_coefficient(section.term, decision)
    assert c > 0 and loss_coefficient(section.term, decision) == 0.0
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=g, dtype=torch.float64).requires_grad_()
    ref = torch.log_softmax(torch.randn(6, generator=g, dtype=torch.float64), -1)
    logp = torch.log_softmax(logits, -1)
    (expected,) = torch.autograd.grad(-c * (logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    # Six completions of one token, one for each outcome: what is added to their rewards, by the way that training takes.
    kl = kl_estimate("k1", logp.detach(), ref)
    nothing, each = torch.zeros(6, dtype=torch.float64), torch.arange(6)
    shaped = estimate(CriticSection(), nothing, nothing, each, kl=kl, kl_coefficient=c).advantage
    (found,) = torch.autograd.grad((logp.detach().exp() * shaped * logp).sum(), logits)
    torch.testing.assert_close(found, expected)
    assert expected.abs().sum() > 1e-3


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_sections_are_chosen_by_type_and_refuse_nonsense():
    adapter = TypeAdapter(Controller)
    assert isinstance(adapter.validate_python({"type": "safe"}), SafeController)
    assert isinstance(adapter.validate_python({"type": "safe_published", "term": "released"}), PublishedSafeController)
    with pytest.raises(ValidationError):
        adapter.validate_python({"type": "safe", "term": "released"})  # the redesign has no inert arm
    for changes in ({"threshold_limits": (2.0, 0.3)}, {"gate_limits": (5.0, 0.5)}, {"authority": 1.0}, {"window": 1}):
        with pytest.raises(ValidationError):
            SafeController(**changes)
    for section in (SCALE_FREE, PUBLISHED):
        with pytest.raises(ValidationError, match=r"controller\.brake .*controller\.term `reward`"):
            replace_section(section, term="reward", brake=0.5)
        assert replace_section(section, term="coefficient", brake=0.5).brake == 0.5
    for section in (SCALE_FREE, PUBLISHED, ADAPTIVE):
        assert describe_controller(section).startswith("controller: ")
        assert all(field.description for name, field in type(section).model_fields.items() if name != "type")


def test_controllers_refuse_slots_that_leave_them_without_samples():
    """Pairs tie the policy to its reference themselves; a gate replaces the samples whose KL and reward are followed."""
    demonstrations = {"type": "solve_rate"}
    for slots, word in (
        ({"preset": "dpo", "controller": {"type": "safe"}}, "pairs and controller"),
        ({"preset": "hpt", "controller": {"type": "adaptive_kl", "term": "coefficient"}}, "gate and controller"),
        ({"preset": "grpo", "gate": demonstrations, "controller": {"type": "safe"}}, "gate and controller"),
    ):
        with pytest.raises(ValidationError, match=word):
            method(**slots)
    assert method(preset="grpo", controller={"type": "safe"}).controller is not None


def test_states_are_frozen():
    with pytest.raises(AttributeError):
        SafeState().calls = 1

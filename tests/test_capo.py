"""CAPO: closed forms against autograd, the tracker, the limits, and the controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_cases import LENGTHS, VOCABULARY, WIDTH, Case, cut, method

import rlpost.methods.capo
from rlpost.gradient.curvature import Curvature, Limits, rank_correlation, sgd_curvature, shift_curvature
from rlpost.gradient.loss import coefficient_loss
from rlpost.gradient.metrics import merge, values
from rlpost.gradient.step import StepContext
from rlpost.methods import compute_coefficients
from rlpost.methods.capo import CurvatureTracker, make_tracker
from rlpost.methods.moments import MomentRows, RowMeans

LR = 0.02


def capo(thresholds=None, **mask):
    thresholds = thresholds or {"type": "fixed", "max_kl": 0.02, "max_objective": 0.1}
    return method(preset="capo", masks=[{"type": "curvature", "thresholds": thresholds, **mask}])


def tracker_of(section, dtype=torch.float64) -> CurvatureTracker:
    return CurvatureTracker(section.curvature, VOCABULARY, WIDTH, dtype=dtype)


def context(tracker=None, learning_rate=LR, **more) -> StepContext:
    return StepContext(learning_rate=learning_rate, optimizer_step=2, seed=5, curvature=tracker, **more)


def warm(tracker: CurvatureTracker, steps: int = 3) -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        gradient = torch.randn(VOCABULARY - 1, WIDTH, generator=g, dtype=torch.float64)
        tracker.moments.apply(torch.arange(VOCABULARY - 1), gradient)


def autograd_forms(case: Case, n: int, advantage: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(m_H, sampled m_F, exact m_F) of the head step `step` [V, d] at token n, from derivatives of the policy itself."""
    h, a, head = case.hidden[n], case.token[n], case.head.detach()
    logp = torch.log_softmax(head @ h, -1)

    def surrogate(w: torch.Tensor) -> torch.Tensor:  # A pi'(a) / pi(a): gradient A v h', Hessian A (v v' - F) (x) h h'
        return advantage * torch.exp(torch.log_softmax(w @ h, -1)[a] - logp[a])

    def log_ratio(w: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(w @ h, -1)[a]

    def divergence(w: torch.Tensor) -> torch.Tensor:
        return (logp.exp() * (logp - torch.log_softmax(w @ h, -1))).sum()

    def derivatives(f) -> tuple[torch.Tensor, torch.Tensor]:  # (f' . step, step . f'' . step)
        w = head.clone().requires_grad_()
        first = (torch.autograd.grad(f(w), w, create_graph=True)[0] * step).sum()
        return first.detach(), (torch.autograd.grad(first, w)[0] * step).sum()

    first, second = derivatives(surrogate)
    return first + 0.5 * second, 0.5 * derivatives(log_ratio)[0] ** 2, 0.5 * derivatives(divergence)[1]


def test_forms_of_a_given_step_against_autograd() -> None:
    case, g = Case(0), torch.Generator().manual_seed(2)
    p = torch.softmax(case.logits().detach(), -1)
    onehot = torch.arange(VOCABULARY) == case.token[:, None]
    advantage = case.advantage[case.sequence]
    for n in range(6):
        step = 0.1 * torch.randn(VOCABULARY, WIDTH, generator=g, dtype=torch.float64)
        u = (step @ case.hidden[n])[None]
        for kl in ("sampled", "exact"):
            got = shift_curvature(u, p[n : n + 1], onehot[n : n + 1], advantage[n : n + 1], kl, "taylor")
            objective, sampled, exact = autograd_forms(case, n, advantage[n], step)
            torch.testing.assert_close(got.objective[0], objective, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got.kl[0], sampled if kl == "sampled" else exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kl", ["sampled", "exact"])
def test_sgd_four_scalars_against_autograd(kl: str) -> None:
    case = Case(1)
    view, st = case.view(), case.statistics()
    got = sgd_curvature(view.logp, st.sum_p2, st.sum_p3, case.hidden.square().sum(1), view.advantage, LR, kl)
    p = torch.softmax(case.logits().detach(), -1)
    for n in range(view.logp.numel()):
        v = -p[n].clone()
        v[case.token[n]] += 1
        step = LR * view.advantage[n] * torch.outer(v, case.hidden[n])
        objective, sampled, exact = autograd_forms(case, n, view.advantage[n], step)
        torch.testing.assert_close(got.objective[n], objective, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.kl[n], sampled if kl == "sampled" else exact, rtol=1e-12, atol=1e-12)


def test_adam_step_against_a_real_optimizer() -> None:
    """The candidate step equals what torch's Adam would do to the head, given the same history of gradients."""
    case, section = Case(2), capo(kl="exact", top_k=VOCABULARY)
    tracker, g = tracker_of(section), torch.Generator().manual_seed(3)
    history = [torch.randn(VOCABULARY, WIDTH, generator=g, dtype=torch.float64) for _ in range(4)]
    for gradient in history:
        tracker.moments.apply(torch.arange(VOCABULARY), gradient)
    view = case.view()
    got = tracker.predict(view, context())
    p = torch.softmax(case.logits().detach(), -1)
    for n in range(5):
        head = torch.zeros(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([head], lr=LR)
        v = -p[n].clone()
        v[case.token[n]] += 1
        for gradient in [*history, view.advantage[n] * torch.outer(v, case.hidden[n])]:
            before = head.detach().clone()
            head.grad = -gradient
            optimizer.step()
        objective, _, exact = autograd_forms(case, n, view.advantage[n], head.detach() - before)
        torch.testing.assert_close(got.objective[n], objective, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got.kl[n], exact, rtol=1e-9, atol=1e-12)


def test_exact_form_is_the_realised_ratio_and_kl_and_taylor_errs_cubically() -> None:
    case = Case(3)
    view = case.view()
    errors = []
    for lr in (1e-2, 5e-3):
        exact = tracker_of(capo(form="exact", kl="exact", top_k=VOCABULARY)).predict(view, context(learning_rate=lr))
        taylor = tracker_of(capo(kl="exact", top_k=VOCABULARY)).predict(view, context(learning_rate=lr))
        errors.append(((exact.objective - taylor.objective).abs().max(), (exact.kl - taylor.kl).abs().max()))
        ratio = exact.objective / view.advantage + 1
        torch.testing.assert_close(ratio.log(), exact.shift, rtol=1e-9, atol=1e-12)
    for large, small in zip(*errors, strict=True):
        assert 6 < large / small < 10


def test_aligned_hidden_states_reproduce_the_logits() -> None:
    """Trap 1 of the released code: h must be the state that predicts the token."""
    case = Case(4)
    st = case.statistics()
    torch.testing.assert_close((st.hidden @ case.head.detach().T).gather(1, st.top_ids), st.top_logits)


def test_slope_scales_hidden_states() -> None:
    """A temperature T makes the logits W h / T: the same as hidden states h / T."""
    case, section = Case(4), capo(top_k=VOCABULARY)
    view = case.view()
    st = replace(view.statistics, hidden=view.statistics.hidden * 2)
    a = tracker_of(section).predict(view, context())
    b = tracker_of(section).predict(replace(view, statistics=st), context(logit_slope=0.5))
    torch.testing.assert_close(a.kl, b.kl)


@pytest.mark.parametrize("step", ["adam", "sgd"])
def test_chunk_size_changes_nothing(step: str, monkeypatch) -> None:
    case, found = Case(5), []
    for chunk, on_cpu in ((1, 16), (4, 16), (1000, 16), (1000, 1000), (1000, 5)):
        monkeypatch.setattr(rlpost.methods.capo, "CPU_CHUNK_TOKENS", on_cpu)
        section = capo(step=step, chunk_tokens=chunk, top_k=5)
        tracker = tracker_of(section)
        warm(tracker)
        view = case.view(statistics=case.statistics(5))
        coefficients = compute_coefficients(section, view, case.counts(), context=context(tracker))
        tracker.accumulate(view, coefficients, context(tracker))
        prediction = tracker.predict(view, context(tracker))
        tracker.finish_step(context(tracker))
        found.append(
            (coefficients.keep, prediction.kl, prediction.objective, *tracker.moments.rows(torch.arange(VOCABULARY)))
        )
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def loss_of(section, tracker, learning_rate=LR, case=None, **changes):
    case = case or Case(6)
    logp, entropy = case.score()
    coefficients = compute_coefficients(
        section, case.view(**changes), case.counts(), context=context(tracker, learning_rate)
    )
    loss = coefficient_loss(coefficients, logp, entropy)
    return loss, case.gradient(loss), coefficients


REINFORCE = {"preset": "grpo", "advantage": {"center": "none", "scale": "none"}}
REINFORCE |= {"ratio": {"level": "none"}, "clip": {"type": "none"}}
BASES = [("capo", {"preset": "grpo"}), ("dr_capo", {"preset": "dr_grpo"}), ("rein_capo", REINFORCE)]


@pytest.mark.parametrize(("preset", "base"), BASES)
def test_without_limits_it_is_bit_identical_to_its_base(preset: str, base: dict) -> None:
    for thresholds in ({"type": "fixed"}, {"type": "fixed", "max_kl": 1e30, "max_objective": 1e30}):
        section = method(preset=preset, masks=[{"type": "curvature", "thresholds": thresholds}])
        loss, gradient, _ = loss_of(section, tracker_of(section))
        base_loss, base_gradient, _ = loss_of(method(**base), None)
        assert torch.equal(loss, base_loss) and torch.equal(gradient, base_gradient)


@pytest.mark.parametrize("step", ["adam", "sgd"])
def test_learning_rate_zero_rejects_nothing(step: str) -> None:
    section = capo({"type": "fixed", "max_kl": 1e-12, "max_objective": 1e-12}, step=step)
    loss, gradient, coefficients = loss_of(section, tracker_of(section), learning_rate=0.0)
    base_loss, base_gradient, _ = loss_of(method(), None)
    assert coefficients.keep.all()
    assert torch.equal(loss, base_loss) and torch.equal(gradient, base_gradient)


def test_tiny_limits_reject_everything() -> None:
    section = capo({"type": "fixed", "max_kl": 1e-30})
    loss, gradient, coefficients = loss_of(section, tracker_of(section))
    assert not coefficients.keep.any()
    assert loss.item() == 0 and (gradient == 0).all()
    with pytest.raises(ValueError):
        capo({"type": "fixed", "max_kl": 0.0})  # null, not 0, switches a rule off


def test_rejected_tokens_are_the_ones_beyond_the_limits() -> None:
    for limits in ({"max_kl": 1e-4}, {"max_objective": 5e-3}, {"max_objective": 0.2, "min_objective": 5e-3}):
        section = capo({"type": "fixed", **limits})
        tracker = tracker_of(section)
        warm(tracker)
        _, _, coefficients = loss_of(section, tracker)
        found = tracker.predict(Case(6).view(), context(tracker))
        keep = found.kl < limits.get("max_kl", float("inf"))
        if "max_objective" in limits:
            low = limits.get("min_objective", -limits["max_objective"])
            keep &= (found.objective > low) & (found.objective < limits["max_objective"])
        assert torch.equal(coefficients.keep, keep)
        assert 0 < keep.sum() < keep.numel()


def test_a_prediction_at_a_limit_is_rejected() -> None:
    """-tau_H < m_H < tau_H and m_F < tau_F, all strict; NaN is outside of all limits."""
    objective = torch.tensor([-0.25, -0.2, 0.2, 0.25, torch.nan])
    found = Curvature(objective, objective.abs(), objective)
    limits = Limits(max_kl=0.25, max_objective=0.25, min_objective=-0.25)
    assert (
        limits.objective_rejects(found).tolist()
        == limits.kl_rejects(found).tolist()
        == [True, False, False, True, True]
    )


def test_zero_advantage_tokens_are_in_no_rate_and_not_rejected() -> None:
    case, section = Case(6), capo({"type": "fixed", "max_kl": 1e-30})
    tracker = tracker_of(section)
    warm(tracker)
    advantage = torch.where(case.sequence < 3, torch.zeros_like(case.old_logp), case.advantage[case.sequence])
    view = case.view(advantage=advantage)
    predicted = tracker.predict(view, context(tracker))
    assert (predicted.objective[advantage == 0] == 0).all() and (predicted.kl[advantage == 0] > 0).any()
    _, _, coefficients = loss_of(section, tracker, case=case, advantage=advantage)
    assert torch.equal(coefficients.keep, advantage == 0)
    assert coefficients.metrics["mask/curvature/rejected_share"].value() == 1.0
    assert coefficients.metrics["mask/curvature/rejected_share"].count == sum(LENGTHS[3:])


def test_moments_decay_in_float32() -> None:
    """Trap 3: in bfloat16 V * 0.999 rounds back to V."""
    moments = MomentRows(10, 2)
    ids = torch.tensor([3])
    moments.apply(ids, torch.ones(1, 2))
    _, before = moments.rows(ids)
    for _ in range(1000):
        moments.apply(ids, torch.zeros(1, 2))
    _, after = moments.rows(ids)
    assert after.dtype == torch.float32
    torch.testing.assert_close(after / before, torch.full((1, 2), 0.999**1000), rtol=1e-4, atol=0)


def test_unseen_rows_are_zero_and_the_unit_step_is_the_sign_step() -> None:
    moments = MomentRows(10, 3, dtype=torch.float64)
    assert all((x == 0).all() for x in moments.rows(torch.tensor([[1, 9]])))
    expected = {0: 1.0, 1: 0.74, 5: 0.52, 10: 0.48, 50: 0.71, 99: 0.98}
    hidden, slope = (
        torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64),
        torch.tensor([[0.5, -0.1]], dtype=torch.float64),
    )
    for t in range(100):
        if t in expected:
            assert moments.unit() == pytest.approx(expected[t], abs=6e-3)
            u = moments.candidate_shift(torch.tensor([[1, 9]]), slope, hidden, 0.01)
            assert (u / 0.01).tolist()[0] == pytest.approx([6 * moments.unit(), -6 * moments.unit()], rel=1e-5)
        moments.apply(torch.tensor([0]), torch.zeros(1, 3))


def test_row_means_over_occurrences_in_accepted_tokens() -> None:
    case, section = Case(7), capo({"type": "fixed", "max_kl": 0.02}, top_k=3)
    tracker = tracker_of(section)
    view = case.view(statistics=case.statistics(3))
    coefficients = compute_coefficients(section, view, case.counts(), context=context(tracker))
    assert 0 < coefficients.keep.sum() < coefficients.keep.numel()
    tracker.accumulate(view, coefficients, context(tracker))
    tracker.finish_step(context(tracker))
    sums, counts = torch.zeros(VOCABULARY, WIDTH, dtype=torch.float64), torch.zeros(VOCABULARY)
    st = view.statistics
    for n in coefficients.keep.nonzero().flatten().tolist():
        p = torch.softmax(st.top_logits[n], -1)
        for k, token in enumerate(st.top_ids[n].tolist()):
            slope = view.advantage[n] * (float(token == case.token[n]) - p[k])
            sums[token] += slope * case.hidden[n]
            counts[token] += 1
    first, second = tracker.moments.rows(torch.arange(VOCABULARY))
    mean = sums / counts.clamp(min=1)[:, None]
    torch.testing.assert_close(first, 0.1 * mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(second, 0.001 * mean**2, rtol=1e-12, atol=1e-14)
    assert tracker.moments.steps == 1


class TwoRanks:
    """An all-reduce over two trackers that are finished one after the other: first a dry run collects, then it sums."""

    def __init__(self, trackers: list[CurvatureTracker], step: StepContext) -> None:
        import threading

        self.barrier, self.slots, self.lock = threading.Barrier(2), {}, threading.Lock()
        threads = [threading.Thread(target=self.finish, args=(i, t, step)) for i, t in enumerate(trackers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
            assert not thread.is_alive()

    def finish(self, rank: int, tracker: CurvatureTracker, step: StepContext) -> None:
        def all_reduce(x: torch.Tensor) -> torch.Tensor:
            self.slots[rank] = x
            self.barrier.wait(timeout=10)
            total = self.slots[0] + self.slots[1]
            self.barrier.wait(timeout=10)
            return total

        tracker.finish_step(step, all_reduce)


@pytest.mark.parametrize(
    "thresholds", [{"type": "fixed", "max_kl": 0.02}, {"type": "calibrated", "steps": 2, "target": 0.3}]
)
def test_two_ranks_equal_one(thresholds: dict) -> None:
    case, section = Case(8), capo(thresholds, top_k=4)
    alone, ranks = tracker_of(section), [tracker_of(section), tracker_of(section)]
    for _ in range(3):
        view = case.view(statistics=case.statistics(4))
        whole = compute_coefficients(section, view, case.counts(), context=context(alone))
        alone.accumulate(view, whole, context(alone))
        for rank, keep in zip(ranks, ([0, 2, 4], [1, 3, 5]), strict=True):
            small, counts, places = cut(view, case.counts(), keep)
            part = compute_coefficients(section, small, counts, context=context(rank))
            assert torch.equal(part.keep, whole.keep[places])
            rank.accumulate(small, part, context(rank))
        alone.finish_step(context(alone))
        TwoRanks(ranks, context())
        for rank in ranks:
            for x, y in zip(
                rank.moments.rows(torch.arange(VOCABULARY)), alone.moments.rows(torch.arange(VOCABULARY)), strict=True
            ):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
            assert rank.limits() == alone.limits()


def test_state_dict_goes_on_exactly() -> None:
    import io

    case, section = Case(9), capo({"type": "calibrated", "steps": 3, "target": 0.3})

    def step(tracker: CurvatureTracker, seed: int) -> torch.Tensor:
        other = Case(seed)
        view = case.view(advantage=other.advantage[case.sequence])
        coefficients = compute_coefficients(section, view, case.counts(), context=context(tracker))
        tracker.accumulate(view, coefficients, context(tracker))
        tracker.finish_step(context(tracker))
        return coefficients.coefficient

    a = tracker_of(section)
    for seed in range(2):
        step(a, seed)
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b = tracker_of(section)
    b.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(2, 6):
        assert torch.equal(step(a, seed), step(b, seed))
    assert (step(a, 9) == 0).any()


def test_controls_reject_as_many_of_every_completion() -> None:
    case = Case(10)
    middle = float(tracker_of(capo()).predict(case.view(), context()).kl.median())
    match = {"type": "curvature", "thresholds": {"type": "fixed", "max_kl": middle}}
    real = capo(match["thresholds"])
    tracker = tracker_of(real)
    wanted = compute_coefficients(real, case.view(), case.counts(), context=context(tracker)).keep
    p = case.score()[0].detach().exp()
    for kind in ("random", "probability"):
        section = method(masks=[{"type": kind, "match": match}])
        result = compute_coefficients(section, case.view(), case.counts(), context=context(tracker))
        for i in range(len(LENGTHS)):
            at = case.sequence == i
            assert result.keep[at].sum() == wanted[at].sum()
            if kind == "probability" and 0 < result.keep[at].sum() < at.sum():
                assert p[at][~result.keep[at]].max() <= p[at][result.keep[at]].min()
        assert result.metrics[f"mask/{kind}/rejected_share"] == result.metrics["mask/curvature/predicted_share"]
        for which, at in (("rejected", ~result.keep), ("kept", result.keep)):  # of its own tokens, not the mask's
            found = result.metrics[f"mask/{kind}/probability_{which}"].value()
            assert found == pytest.approx(float(p[at].mean()), rel=1e-12)
    steps = [
        compute_coefficients(
            method(masks=[{"type": "random", "match": match}]), case.view(), case.counts(),
            context=StepContext(learning_rate=LR, optimizer_step=step, seed=5, curvature=tracker),
        ).keep
        for step in range(8)
    ]  # fmt: skip
    assert any(not torch.equal(steps[0], other) for other in steps[1:])


@pytest.mark.parametrize("mask", [{"type": "random", "rate": 0.4}, {"type": "probability", "below": 0.15}])
def test_controls_of_a_fixed_rate_say_how_likely_their_tokens_were(mask: dict) -> None:
    case = Case(10)
    result = compute_coefficients(method(masks=[mask]), case.view(), case.counts(), context=context())
    p = case.score()[0].detach().exp()
    for which, at in (("rejected", ~result.keep), ("kept", result.keep)):
        assert result.metrics[f"mask/{mask['type']}/probability_{which}"].value() == pytest.approx(float(p[at].mean()))


def test_metrics_merge_over_micro_batches() -> None:
    case, section = Case(11), capo()
    tracker, view = tracker_of(section), case.view()
    whole = compute_coefficients(section, view, case.counts(), context=context(tracker)).metrics
    parts = [
        compute_coefficients(section, *cut(view, case.counts(), keep)[:2], context=context(tracker)).metrics
        for keep in ([0, 1], [2, 3, 4, 5])
    ]
    a, b = values(whole), values(merge(parts))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=1e-12), name
    for name in ("kl_p50", "objective_p99", "shift_p90", "rejected_by_kl", "probability_kept", "max_kl"):
        assert f"mask/curvature/{name}" in a
    predicted = tracker.predict(view, context(tracker))
    assert a["mask/curvature/kl_p50"] == pytest.approx(
        float(predicted.kl.quantile(0.5, interpolation="lower")), rel=0.08
    )


def test_rank_correlation() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert rank_correlation(x, x**3) == pytest.approx(1.0)
    assert rank_correlation(x, -x) == pytest.approx(-1.0)
    ties = torch.tensor([1.0, 2.0, 2.0, 4.0, 3.0])
    assert rank_correlation(x, ties) == pytest.approx(0.8720816)
    assert rank_correlation(x, torch.ones(5)) != rank_correlation(x, torch.ones(5))  # NaN


def test_prediction_ranks_what_a_real_step_does() -> None:
    """Item 8 of the test list, on a toy: a real Adam step of the head moves log-probs as predicted, in rank, when one
    token drives it."""
    case, section = Case(12), capo(top_k=VOCABULARY)
    predicted = tracker_of(section).predict(case.view(), context(learning_rate=1e-3)).shift
    realised = []
    for n in range(predicted.numel()):
        head = case.head.detach().clone().requires_grad_()
        logp = torch.log_softmax(case.hidden[n] @ head.T, -1)[case.token[n]]
        (-case.advantage[case.sequence[n]] * logp).backward()
        torch.optim.Adam([head], lr=1e-3).step()
        realised.append(torch.log_softmax(case.hidden[n] @ head.T, -1)[case.token[n]].detach() - logp.detach())
    assert rank_correlation(predicted, torch.stack(realised)) > 0.99


def test_missing_inputs_are_named() -> None:
    case, section = Case(13), capo()
    with pytest.raises(ValueError, match="make_tracker"):
        compute_coefficients(section, case.view(), case.counts(), context=context())
    with pytest.raises(ValueError, match="statistics"):
        compute_coefficients(section, case.view(statistics=None), case.counts(), context=context(tracker_of(section)))
    assert make_tracker(method(), 5, 3) is None and make_tracker(section, 5, 3) is not None


def test_row_means_of_nothing() -> None:
    ids, means = RowMeans(5, 2, torch.float32, "cpu").total(None)
    assert ids.numel() == 0 and means.shape == (0, 2)

"""CAPO's calibrated limits: the target rate where steps are largest, with real time steps, over a whole schedule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from method_cases import VOCABULARY, WIDTH, Case, method

from rlpost.gradient.metrics import log_bins, upper_edge
from rlpost.gradient.step import StepContext
from rlpost.gradient.types import Counts, HeadStatistics, TokenView
from rlpost.learner.optimizer import later_rates, learning_rate
from rlpost.methods import compute_coefficients
from rlpost.methods.calibration import BINS, joint_limits
from rlpost.methods.capo import CurvatureTracker
from rlpost.recipe.sections.learner import LearnerSection
from rlpost.recipe.sections.masks import CurvatureMask
from rlpost.tracking.advice import advise

FULL_SIZE = LearnerSection(rollouts=100, learning_rate=1.5e-5, schedule="cosine", warmup_steps=10)
TOKENS, IDS, WIDE, GROUP, LENGTH = 960, 200, 16, 8, 4


class Rollouts:
    """A fixed policy on fresh hidden states, in completions of LENGTH tokens, GROUP to a prompt, with rewards 0 or 1."""

    def __init__(self, seed: int = 0) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.head = 0.7 * torch.randn(IDS, WIDE, generator=self.g)
        self.scale = torch.linspace(0.3, 2.0, WIDE)

    def advantages(self) -> torch.Tensor:
        hard = torch.rand(TOKENS // LENGTH // GROUP, 1, generator=self.g)
        reward = (torch.rand(hard.shape[0], GROUP, generator=self.g) < hard).float()
        centred = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        return centred.flatten()

    def view(self, advantages: torch.Tensor | None = None) -> TokenView:
        hidden = torch.randn(TOKENS, WIDE, generator=self.g) * self.scale + 0.3
        logq = torch.log_softmax(hidden @ self.head.T, -1)
        token = torch.multinomial(logq.exp(), 1, generator=self.g)[:, 0]
        top, ids = logq.topk(20)
        missing = ~(ids == token[:, None]).any(1)
        ids[missing, -1] = token[missing]
        logp = logq.gather(1, token[:, None])[:, 0]
        sequence = torch.arange(TOKENS) // LENGTH
        advantages, completions = self.advantages() if advantages is None else advantages, TOKENS // LENGTH
        none = torch.zeros(completions, dtype=torch.bool)
        p = logq.exp()
        statistics = HeadStatistics(hidden, (p**2).sum(1), (p**3).sum(1), ids, logq.gather(1, ids))
        return TokenView(
            logp=logp, entropy=-logp, old_logp=logp, sampler_logp=logp, advantage=advantages[sequence], sequence=sequence,
            prompt=torch.arange(completions) // GROUP, truncated=none, demonstration=none, statistics=statistics,
            token=token, token_index=torch.arange(TOKENS),
        )  # fmt: skip


def rejected(mask: CurvatureMask, section: LearnerSection) -> list[float]:
    """The rejection rate of every optimizer step of a run."""
    rollouts, slots = Rollouts(), method(masks=[mask.model_dump()])
    tracker, rates = CurvatureTracker(mask, IDS, WIDE), []
    counts = Counts(TOKENS, TOKENS // LENGTH, TOKENS // LENGTH // GROUP)
    for step in range(section.rollouts):
        view, rate = rollouts.view(), learning_rate(section, step)
        context = StepContext(rate, step, later_rates=later_rates(section, step), curvature=tracker)
        coefficients = compute_coefficients(slots, view, counts, context=context)
        rates.append(coefficients.metrics["mask/curvature/rejected_share"].value())
        tracker.accumulate(view, coefficients, context)
        tracker.finish_step(context)
    assert tracker.moments.steps == (section.rollouts if mask.step == "adam" else 0)
    return rates


def mean_of_five(rates: list[float]) -> list[float]:
    return [sum(rates[i : i + 5]) / 5 for i in range(len(rates) - 4)]


@pytest.mark.thorough
@pytest.mark.parametrize("rules", [("kl",), ("objective",), ("kl", "objective")])
@pytest.mark.parametrize("step", ["adam", "sgd"])
def test_the_full_size_schedule_rejects_the_target_at_its_peak_and_less_later(rules: tuple, step: str) -> None:
    """The default: 10 steps observed, 8 %. Single steps scatter by what their few groups' advantages are."""
    mask = CurvatureMask.model_validate({"step": step, "thresholds": {"type": "calibrated", "rules": rules}})
    rates = rejected(mask, FULL_SIZE)
    assert rates[:10] == [0.0] * 10
    assert 0.5 * 0.08 < max(rates) < 2.0 * 0.08
    smooth = mean_of_five(rates[10:])
    assert 0.6 * 0.08 < max(smooth) < 1.4 * 0.08
    assert smooth.index(max(smooth)) < 40
    assert sum(rates[60:]) / 40 < 0.02 and rates[-1] == 0.0


@pytest.mark.thorough
def test_a_constant_rate_reaches_the_target_when_adams_correction_has_grown() -> None:
    section = LearnerSection(rollouts=60, learning_rate=1e-4)
    rates = rejected(CurvatureMask.model_validate({}), section)
    assert max(mean_of_five(rates[10:25])) < max(mean_of_five(rates[40:]))
    assert 0.5 * 0.08 < max(mean_of_five(rates[40:])) < 1.5 * 0.08


def test_two_rules_share_the_target() -> None:
    """Half each where no token breaks both, the whole where every token that breaks one breaks the other."""
    x = torch.linspace(0.01, 1.0, 4000, dtype=torch.float64)

    def limits(kl: torch.Tensor, objective: torch.Tensor):
        counts = torch.bincount(log_bins(kl) * BINS + log_bins(objective), minlength=BINS * BINS).double()
        return joint_limits(counts.view(BINS, BINS), 0.1, ("kl", "objective"))

    for other in (x, x.flip(0), x[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]):
        found = limits(x, other)
        share = ((x >= found.max_kl) | (other >= found.max_objective)).double().mean()
        assert share == pytest.approx(0.1, abs=0.015)
        assert (x >= found.max_kl).sum() == pytest.approx(int((other >= found.max_objective).sum()), abs=40)
    nothing = limits(x, torch.zeros_like(x))
    assert nothing.max_objective == math.inf and nothing.rules == 1
    assert (x >= nothing.max_kl).double().mean() == pytest.approx(0.1, abs=0.01)
    assert upper_edge(0) == 0.0


def test_steps_without_anything_to_observe_do_not_count() -> None:
    mask = CurvatureMask.model_validate({"thresholds": {"type": "calibrated", "steps": 2, "target": 0.3}})
    case, section = Case(0), method(masks=[mask.model_dump()])
    tracker = CurvatureTracker(mask, VOCABULARY, WIDTH, dtype=torch.float64)
    context = StepContext(0.01, 0, later_rates=(0.01,) * 9, curvature=tracker)

    def step(view: TokenView | None) -> float:
        if view is not None:
            coefficients = compute_coefficients(section, view, case.counts(), context=context)
            tracker.accumulate(view, coefficients, context)
        tracker.finish_step(context)
        return tracker.report()["mask/curvature/steps_to_observe"]

    dead = case.view(advantage=torch.zeros_like(case.old_logp))
    assert [step(dead), step(None), step(case.view()), step(dead)] == [2, 2, 1, 1] and tracker.calibrating
    assert step(case.view()) == 0 and not tracker.calibrating
    assert tracker.report()["mask/curvature/limits"] == 2
    assert tracker.limits().rules == 2


def test_a_rank_that_sees_nothing_follows_the_one_that_does() -> None:
    mask = CurvatureMask.model_validate({"thresholds": {"type": "calibrated", "steps": 1}})
    tracker = CurvatureTracker(mask, VOCABULARY, WIDTH)
    other = torch.zeros(BINS * BINS, dtype=torch.float64)
    other[300 * BINS + 400] = 5.0
    tracker.finish_step(
        StepContext(0.01, 0, curvature=tracker), lambda x: x + other if x.numel() == other.numel() else x
    )
    assert not tracker.calibrating and tracker.report()["mask/curvature/limits"] == 2


def test_a_mask_that_is_silently_off_is_said() -> None:
    head = "mask/curvature"
    row = {"kind": "train", f"{head}/limits": 0.0, f"{head}/steps_to_observe": 0.0}
    assert [one.id for one in advise([row])] == ["curvature-no-limit"]
    assert advise([{**row, f"{head}/limits": 2.0}]) == []
    waiting = [{**row, f"{head}/steps_to_observe": 4.0}] * 10
    assert [one.id for one in advise(waiting)] == ["curvature-unseen"]
    assert advise(waiting[:9]) == []
    assert advise([{**row, f"{head}/steps_to_observe": 10.0 - i} for i in range(10)]) == []


def test_predictions_of_large_models_fit_the_histogram() -> None:
    """|s| / learning rate is about |h|_1, some 10^4 in a 7B model: limits are found at any such scale."""
    case, mask = (
        Case(1),
        CurvatureMask.model_validate({"thresholds": {"type": "calibrated", "steps": 1, "target": 0.3}}),
    )
    section, found = method(masks=[mask.model_dump()]), []
    for factor in (1.0, 1e4):
        tracker = CurvatureTracker(mask, VOCABULARY, WIDTH, dtype=torch.float64)
        context = StepContext(1e-2 / factor, 0, later_rates=(1e-2 / factor,), curvature=tracker)
        st = case.statistics()
        view = case.view(statistics=replace(st, hidden=st.hidden * factor))
        tracker.accumulate(view, compute_coefficients(section, view, case.counts(), context=context), context)
        tracker.finish_step(context)
        found.append(tracker.limits().max_kl)
    assert found[0] == pytest.approx(found[1], rel=0.1) and found[0] < math.inf

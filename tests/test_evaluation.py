"""Evaluation: pass@k, verdicts, greedy and sampled runs with a fake engine and scorer."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.errors import DataError, RecipeError
from rlpost.evaluation.accuracy import evaluate, evaluation_rows, pass_at_k, select_prompts, summarise, verdict
from rlpost.experience import Completion, Group, Outcome, Prompt, Score
from rlpost.recipe.sections.learner import EvaluationSection
from rlpost.recipe.sections.rollout import RolloutSection

RIGHT, WRONG = Score(Outcome.SCORED, 1.0), Score(Outcome.SCORED, 0.0)
CRASHED, ABSENT = Score(Outcome.CRASHED, detail="ZeroDivisionError"), Score(Outcome.NOT_APPLICABLE)


def prompts(count):
    return [Prompt(f"p/{i}", (), f"question {i}", (i,)) for i in range(count)]


def completion(text="yes", length=3, finish="stop"):
    return Completion(tuple(range(length)), (0.0,) * length, text, finish)


class FakeEngine:
    """Answers with the request's seed, so that tests see which requests were made."""

    name = "fake"

    def __init__(self):
        self.requests, self.settings = [], None

    def sample(self, requests, settings):
        self.requests += requests
        self.settings = settings
        return [completion(f"{request.token_ids[0]}:{request.seed}") for request in requests]


class FakeScorer:
    """Right where `rule(prompt index, sample index)` says so."""

    def __init__(self, rule):
        self.rule = rule

    def score(self, groups):
        return [
            Group(
                group.prompt,
                group.completions,
                tuple(self.rule(group.prompt.token_ids[0], i) for i in range(len(group.completions))),
            )
            for group in groups
        ]


def run(rule, section, count=8, **options):
    engine = FakeEngine()
    arguments = {"seed": 0, "weights": (1.0,), "accuracy_rewards": (True,)} | options
    result = evaluate(engine, FakeScorer(rule), prompts(count), section, RolloutSection(), **arguments)
    return engine, result


@given(n=st.integers(1, 9), data=st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_values():
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(5, 5, 5) == 1.0 and pass_at_k(5, 0, 5) == 0.0
    assert pass_at_k(5000, 1, 2500) == pytest.approx(0.5)  # binomials far beyond floating point
    for n, c, k in ((2, 1, 3), (2, 3, 1), (2, 1, 0), (2, -1, 1)):
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k(n, c, k)


def test_verdicts():
    assert verdict((RIGHT, WRONG), (True, False), 1.0) is True
    assert verdict((WRONG, RIGHT), (True, False), 1.0) is False  # a format reward does not make an answer right
    assert verdict((RIGHT, CRASHED), (True, False), 1.0) is True
    assert verdict((CRASHED, RIGHT), (True, True), 1.0) is None
    assert verdict((ABSENT, RIGHT), (True, True), 1.0) is True  # another task's verifier does not apply
    assert verdict((ABSENT, RIGHT), (True, False), 1.0) is None
    tenths = tuple(Score(Outcome.SCORED, 0.1) for _ in range(10))
    assert verdict(tenths, (True,) * 10, 1.0) is True
    assert verdict(tenths[:9], (True,) * 9, 1.0) is False
    assert verdict(tenths[:9], (True,) * 9, 0.9) is True


def test_one_sample_is_greedy_with_the_binomial_error():
    engine, result = run(lambda p, i: (RIGHT if p < 6 else WRONG,), EvaluationSection())
    assert engine.settings.temperature == 0.0
    assert engine.settings.max_completion_tokens == RolloutSection().max_completion_tokens
    assert result.accuracy == 0.75 and result.pass_at_k == {1: 0.75} and result.reward == 0.75
    assert result.accuracy_stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 8))


def test_several_samples_are_sampled_at_the_evaluations_temperature():
    section = EvaluationSection(samples=4, k=(1, 2, 4), temperature=0.6)
    engine, result = run(lambda p, i: (RIGHT if i < p else WRONG,), section, count=4)  # 0, 1, 2, 3 right of 4
    assert engine.settings.temperature == 0.6
    assert len({request.seed for request in engine.requests}) == len(engine.requests) == 16
    assert result.accuracy == pytest.approx(6 / 16)
    assert result.pass_at_k[1] == pytest.approx(6 / 16)
    assert result.pass_at_k[2] == pytest.approx((0 + 1 / 2 + 5 / 6 + 1) / 4)
    assert result.pass_at_k[4] == pytest.approx(3 / 4)
    assert result.accuracy_stderr == pytest.approx(math.sqrt(5 / 64 / 4))  # variance of 0, 1/4, 2/4, 3/4


def test_failed_scores_are_counted_and_never_wrong():
    def rule(p, i):
        return (CRASHED, ABSENT) if p == 0 else (ABSENT, RIGHT) if p == 1 else (RIGHT if p < 5 else WRONG, RIGHT)

    _, result = run(rule, EvaluationSection(), weights=(1.0, 0.5), accuracy_rewards=(True, False))
    assert (result.failed, result.not_applicable) == (1, 1)
    assert result.accuracy == pytest.approx(3 / 6)
    assert result.pass_at_k[1] == pytest.approx(3 / 6)
    assert result.reward == pytest.approx((0.5 + 3 * 1.5 + 3 * 0.5) / 7)  # the crashed one has none


def test_hangs_with_a_score_are_wrong_and_counted_apart():
    hung = Score(Outcome.HUNG, 0.0, "no answer in 1 s")
    _, result = run(lambda p, i: (hung,) if p < 2 else (RIGHT,), EvaluationSection())
    assert result.accuracy == pytest.approx(6 / 8) and result.failed == 0
    assert result.metrics()["eval/hung"] == 2.0
    _, none = run(lambda p, i: (RIGHT,), EvaluationSection())
    assert "eval/hung" not in none.metrics()


def test_pass_at_k_leaves_out_prompts_with_fewer_known_verdicts():
    section = EvaluationSection(samples=2, k=(1, 2))
    _, result = run(lambda p, i: (CRASHED if p == 0 and i == 0 else RIGHT if i == 1 else WRONG,), section, count=2)
    assert result.accuracy == pytest.approx((1 + 0.5) / 2)
    assert result.pass_at_k == {1: 0.75, 2: 1.0}


def test_when_everything_fails_no_accuracy_is_reported():
    _, result = run(lambda p, i: (CRASHED,), EvaluationSection())
    assert math.isnan(result.accuracy) and result.failed == 8
    metrics = result.metrics()
    assert "eval/accuracy" not in metrics and "eval/reward" not in metrics and "eval/pass@1" not in metrics
    assert metrics["eval/failed"] == 8.0 and metrics["eval/prompts"] == 8.0


def test_truncation_and_length():
    groups = [
        Group(prompt, (completion(length=n, finish=finish),), ((RIGHT,),))
        for prompt, n, finish in zip(prompts(4), (2, 4, 6, 8), ("stop", "stop", "stop", "length"))
    ]
    result = summarise(groups, EvaluationSection(), weights=(1.0,), accuracy_rewards=(True,))
    assert (result.truncated, result.mean_length) == (0.25, 5.0)
    assert result.metrics()["eval/truncated"] == 0.25


def test_samples_do_not_depend_on_the_number_of_processes():
    section = EvaluationSection(prompts=7, samples=2, k=(1,))
    rule = lambda p, i: (RIGHT if (p + i) % 3 else WRONG,)  # noqa: E731
    _, alone = run(rule, section, count=20)
    shares = []
    for rank in range(3):
        run(rule, section, count=20, rank=rank, world_size=3, gather=lambda groups: shares.append(groups) or groups)
    everything = [group for share in shares for group in share]
    for rank in range(3):
        _, result = run(rule, section, count=20, rank=rank, world_size=3, gather=lambda groups: everything)
        assert result == alone


def test_prompts_are_spread_and_the_same_for_every_seed():
    chosen = select_prompts(prompts(1000), 50)
    assert chosen == select_prompts(prompts(1000), 50)
    places = [prompt.token_ids[0] for prompt in chosen]
    assert places == sorted(set(places)) and len(places) == 50
    assert places[0] < 150 and places[-1] > 850
    assert select_prompts(prompts(3), 5) == prompts(3)


def test_rows_to_save_are_json():
    section = EvaluationSection(samples=2)
    _, result = run(lambda p, i: (CRASHED if i else RIGHT,), section, count=2)
    rows = evaluation_rows(result, ["math"])
    assert json.loads(json.dumps(rows)) == rows
    assert [(row["prompt_id"], row["sample"], row["right"]) for row in rows] == [
        ("p/0", 0, True), ("p/0", 1, None), ("p/1", 0, True), ("p/1", 1, None)]  # fmt: skip
    assert rows[1]["rewards"] == {"math": {"value": None, "outcome": "crashed", "detail": "ZeroDivisionError"}}
    assert rows[0]["finish"] == "stop" and rows[0]["tokens"] == 3 and rows[0]["prompt"] == "question 0"


def test_errors():
    rule = lambda p, i: (RIGHT,)  # noqa: E731
    with pytest.raises(DataError, match=r"no held-out prompts.*data\.held_out"):
        run(rule, EvaluationSection(), count=0)
    with pytest.raises(RecipeError, match="None of the `rewards`"):
        run(rule, EvaluationSection(), accuracy_rewards=(False,))
    with pytest.raises(RecipeError, match=r"pass@4, but evaluation\.samples is 2"):
        run(rule, EvaluationSection.model_construct(samples=2, k=(1, 4)))

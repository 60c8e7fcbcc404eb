"""The doctor: each advice comes when it should, and a healthy run gets none."""

from __future__ import annotations

import math

import pytest

from rlpost.recipe.sections.method import MethodSection
from rlpost.recipe.sections.presets import preset_names
from rlpost.recipe.sections.reward import RewardModelSection, RewardSection, reward_ceiling
from rlpost.tracking.advice import Doctor, advise

HEALTHY = {
    "kind": "train",
    "reward/mean": 0.5,
    "reward/std": 0.3,
    "reward/zero_variance_share": 0.3,
    "completions/truncated_share": 0.1,
    "policy/entropy": 0.6,
    "policy/clip_fraction": 0.02,
    "mismatch/mean_abs_gap": 0.01,
    "optimizer/grad_norm": 0.5,
    "scores/failed_share": 0.0,
}


def rows(count=8, last=1, **changes):
    """Healthy rows, of which the last so many have the changes."""
    made = [{**HEALTHY, "step": step} for step in range(1, count + 1)]
    for row in made[-last:]:
        row.update({key.replace("__", "/"): value for key, value in changes.items()})
    return made


def ids(made, **keywords):
    return [one.id for one in advise(made, **keywords)]


def test_a_healthy_run_gets_none():
    assert ids(rows(40)) == [] and ids([]) == [] and ids(rows(1)) == []


@pytest.mark.parametrize(
    ("expected", "last", "changes"),
    [
        ("all-truncated", 5, {"completions__truncated_share": 1.0}),
        ("zero-variance", 5, {"reward__zero_variance_share": 0.9}),
        ("entropy-collapse", 5, {"policy__entropy": 0.02}),
        ("clip-saturated", 5, {"policy__clip_fraction": 0.4}),
        ("sampler-gap", 5, {"mismatch__mean_abs_gap": 0.3}),
        ("grad-exploding", 1, {"optimizer__grad_norm": 40.0}),
        ("grad-nonfinite", 1, {"optimizer__grad_norm": None}),
        ("reward-nan", 1, {"reward__mean": None}),
        ("scores-failed", 1, {"scores__failed_share": 0.2}),
        ("learner-waits", 5, {"time__step": 10.0, "time__wait": 4.0, "time__beside_rollout": 9.0}),
        ("sampling-waits", 5, {"time__step": 10.0, "time__wait": 0.1, "time__beside_rollout": 3.0}),
        ("reward-ceiling", 5, {"reward__mean": 0.99, "reward__zero_variance_share": 0.9}),
    ],
)
def test_each_trouble_gets_its_advice_and_no_other(expected, last, changes):
    found = advise(rows(8, last, **changes))
    assert [one.id for one in found] == [expected]
    assert "\n" not in found[0].text and len(found[0].text) > 40


@pytest.mark.parametrize(
    "changes",
    [
        {"completions__truncated_share": 1.0},
        {"reward__zero_variance_share": 1.0},
        {"policy__entropy": 0.01},
        {"policy__clip_fraction": 0.9},
        {"mismatch__mean_abs_gap": 0.3},
        {"reward__mean": 1.0},
        {"optimizer__grad_norm": 3.0},
    ],
)
def test_one_odd_step_is_no_tendency(changes):
    assert ids(rows(8, 1, **changes)) == []


def test_too_few_steps_say_nothing_about_tendencies():
    assert ids(rows(4, 4, completions__truncated_share=1.0, reward__zero_variance_share=1.0)) == []


def test_zero_variance_at_zero_reward_is_not_the_ceiling():
    assert ids(rows(8, 5, reward__mean=0.0, reward__zero_variance_share=1.0)) == ["zero-variance"]


def test_the_ceiling_depends_on_the_weights():
    made = rows(8, 5, reward__mean=1.0, reward__zero_variance_share=0.7)
    assert ids(made) == ["reward-ceiling"] and ids(made, reward_ceiling=2.0) == []


def test_a_critic_learns_from_groups_of_equal_rewards():
    assert ids(rows(8, 5, reward__zero_variance_share=1.0, critic__value_mean=0.4)) == []


def test_a_reward_without_a_limit_has_no_ceiling():
    made = rows(8, 5, reward__mean=12.0, reward__zero_variance_share=0.7)
    assert ids(made) == ["reward-ceiling"] and ids(made, reward_ceiling=math.inf) == []
    assert reward_ceiling([RewardSection(function="a", weight=2), RewardSection(function="b", weight=-1)]) == 2
    assert reward_ceiling([RewardSection(function="a"), RewardModelSection(path="b")]) == math.inf


def test_failed_scores_are_counted_by_kind():
    made = rows(3, 1, scores__failed_share=0.25, scores__math__timed_out=12, scores__math__scored=36)
    assert "math/timed_out: 12" in advise(made)[0].text


def test_low_entropy_from_the_start_is_no_collapse():
    assert ids(rows(8, 8, policy__entropy=0.02)) == []


def test_steps_without_signal_do_not_make_the_next_one_explode():
    made = rows(12, 12, optimizer__grad_norm=0.0)
    made[-1]["optimizer/grad_norm"] = 0.5
    assert ids(made) == []


def test_evaluation_rows_are_ignored():
    made = rows(8, 8, completions__truncated_share=1.0)
    mixed = [item for row in made for item in (row, {"step": row["step"], "kind": "eval", "eval/accuracy": 1.0})]
    assert ids(mixed) == ["all-truncated"]


def test_a_share_of_failures_that_grows_is_told_again():
    doctor = Doctor()
    shares = [0.06, 0.1, 0.06, 0.3, 0.25, 0.9, 0.1]
    told = [
        s for s in shares for one in doctor.observe(rows(1, 0, scores__failed_share=s)[0]) if one.id == "scores-failed"
    ]
    assert told == [0.06, 0.3, 0.9]


def test_the_doctor_says_everything_once_and_remembers_the_runs_start():
    doctor = Doctor()
    said = [one.id for row in rows(200, 100, policy__entropy=0.05) for one in doctor.observe(row)]
    assert said == ["entropy-collapse"]


# ---- advice and the method


def of(preset, made, **slots):
    return {one.id: one.text for one in advise(made, method=MethodSection.model_validate({"preset": preset, **slots}))}


@pytest.mark.parametrize("preset", preset_names())
def test_a_healthy_run_of_any_method_gets_no_advice(preset):
    assert of(preset, rows(60)) == {}


# What a healthy run of the method may look like, besides HEALTHY: None takes a number away.
LIKE = {
    "gspo": {"policy__clip_fraction": 0.4},  # limits of 3e-4 clip a share that is large for others
    "rloo": {"policy__clip_fraction": None},
    "reinforce_pp": {"reward__zero_variance_share": None, "reward__mean": 0.97},
    "ppo": {"reward__zero_variance_share": None, "critic__value_mean": 0.4, "reward__mean": 0.97},
    "ghpo": {"reward__mean": 0.97, "reward__zero_variance_share": 0.6, "guidance__hinted_share": 0.5},
    "hpt": {"reward__zero_variance_share": None},  # every prompt of the step goes to its solution
    "sft": {"reward__mean": None, "policy__entropy": None, "mismatch__mean_abs_gap": None},
}


@pytest.mark.parametrize("preset", LIKE)
def test_what_is_healthy_for_a_method_gets_no_advice(preset):
    made = rows(60, 50, **LIKE[preset])
    if preset == "sft":
        for row in made:
            row.pop("reward/mean")
    assert of(preset, made) == {}


def test_a_gates_steps_of_rl_and_sft_take_turns():
    made = rows(40)
    for i, row in enumerate(made):
        row["optimizer/grad_norm"] = 3.0 if i % 7 == 3 else 0.05
    made[-1]["optimizer/grad_norm"] = 3.0
    assert of("hpt", made) == {} and list(of("grpo", made)) == ["grad-exploding"]
    made[-1]["optimizer/grad_norm"] = 40.0
    assert list(of("hpt", made)) == ["grad-exploding"]


TROUBLE = {
    "zero-variance": {"reward__zero_variance_share": 0.9},
    "entropy-collapse": {"policy__entropy": 0.02},
    "clip-saturated": {"policy__clip_fraction": 0.7},
    "sampler-gap": {"mismatch__mean_abs_gap": 0.3},
    "grad-exploding": {"optimizer__grad_norm": 60.0},
}


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("preset", preset_names())
def test_advice_names_nothing_that_the_method_refuses_or_has_already(preset, trouble):
    """Every `method.` key or mask that is advised can be set for the method, and is not in force already."""
    section = MethodSection.model_validate({"preset": preset})
    text = of(preset, rows(20, 1 if trouble == "grad-exploding" else 5, **TROUBLE[trouble])).get(trouble, "")
    if section.pairs is not None:
        assert not any(word in text for word in ("method.clip", "method.entropy", "method.kl", "mask", "guidance"))
    if section.guidance is not None:
        assert "guidance" not in text
    if section.curvature is not None:
        assert "CAPO" not in text
    if section.kl_place is not None:
        assert "method.kl" not in text
    if section.clip.type != "ppo":
        assert "clip-higher" not in text
    if section.clip.type == "cispo" and trouble == "clip-saturated":
        assert "thrown away" not in text and "weight cut" in text


def test_rewards_above_one_have_no_ceiling_of_one():
    made = rows(8, 8, reward__mean=1.0, reward__zero_variance_share=0.7, reward__max=3.0)
    assert ids(made) == []


def test_a_method_without_groups_is_at_the_ceiling_when_all_is_solved():
    made = rows(8, 8, reward__mean=0.995, reward__zero_variance_share=None)
    assert list(of("ppo", made)) == ["reward-ceiling"]


def test_a_method_with_an_off_policy_mask_is_not_told_to_add_one():
    made = rows(8, 5, mismatch__mean_abs_gap=0.3)
    assert "off_policy" in of("grpo", made)["sampler-gap"]
    assert "off_policy" not in of("grpo", made, masks=[{"type": "off_policy"}])["sampler-gap"]


def test_who_waits_is_told_by_how_much_the_other_side_should_grow():
    made = rows(8, 8, time__step=10.0, time__wait=4.0, time__beside_rollout=8.5, time__beside_score=0.5)
    [found] = advise(made)
    assert "waited 40%" in found.text and "1.5 times those it has now" in found.text
    # Several rollouts at once are each slow, and say nothing of how busy the engine was: nor does one that is balanced.
    assert ids(rows(8, 8, time__step=10.0, time__wait=1.0, time__beside_rollout=8.5)) == []
    assert ids(rows(8, 8, time__step=10.0, time__wait=0.0)) == []

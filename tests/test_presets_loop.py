"""Every preset trains from a recipe, through the real loop; CAPO's masks reject, report and survive a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from conftest import rows, weights

from rlpost.recipe.sections.presets import preset_names

pytestmark = pytest.mark.engine


def run(recipe: Path, *overrides: str):
    from rlpost.recipe.load import load_recipe
    from rlpost.run.loop import train

    return train(load_recipe(recipe, overrides))


@pytest.mark.parametrize("preset", [name for name in preset_names() if name not in ("dpo", "rpo")])
def test_preset_trains(preset, tmp_path, write_recipe) -> None:
    changes = {"learner.rollouts": 2, "evaluation.prompts": 0, "data.max_demonstration_tokens": 120}
    changes |= {"data.max_prompt_tokens": 200}  # GHPO's hints make prompts longer
    # The tiny model's completions hardly ever end: DAPO's overlong filtering would leave nothing.
    result = run(write_recipe(tmp_path, changes), f"method.preset={preset}", "method.overlong.filter=false")
    found = rows(result.run_dir)
    assert [row["step"] for row in found] == [1, 2]
    assert all(math.isfinite(row["optimizer/loss"]) and row["optimizer/skipped"] == 0 for row in found)
    assert any(row["optimizer/grad_norm"] > 0 for row in found)


CURVATURE = "{type: curvature, verify_every: 1, thresholds: {type: fixed, max_kl: 0.001}}"


def test_capo_rejects_reports_and_resumes(tmp_path, write_recipe) -> None:
    changes = {"learner.rollouts": 6, "evaluation.prompts": 0, "checkpoint.every": 3, "checkpoint.keep": 9}
    recipe = write_recipe(tmp_path, changes)
    capo = ("method.preset=capo", f"method.masks=[{CURVATURE}]")
    straight = run(recipe, *capo, "name=straight")
    found = rows(straight.run_dir)
    assert any(0 < row["mask/curvature/rejected_share"] < 1 for row in found)
    assert any("mask/curvature/rank_correlation_shift" in row for row in found)
    assert all(key in found[-1] for key in ("mask/curvature/kl_mean", "mask/curvature/max_kl"))
    again = run(recipe, *capo, "name=again", f"resume={straight.run_dir}/checkpoints/step_000003")
    assert rows(again.run_dir) == found[3:]
    one, two = weights(straight.checkpoint), weights(again.checkpoint)
    assert all(one[name].equal(two[name]) for name in one)


def test_capo_calibrates_before_it_rejects(tmp_path, write_recipe) -> None:
    recipe = write_recipe(tmp_path, {"learner.rollouts": 4, "evaluation.prompts": 0})
    calibrated = "{type: curvature, thresholds: {type: calibrated, steps: 2}}"
    found = rows(run(recipe, "method.preset=capo", f"method.masks=[{calibrated}]").run_dir)
    assert [row["mask/curvature/rejected_share"] for row in found[:2]] == [0.0, 0.0]
    assert ["mask/curvature/max_kl" in row for row in found] == [False, False, True, True]


def test_capo_as_it_comes_rejects_about_its_target_at_the_peak_and_then_less(tmp_path, write_recipe) -> None:
    """The preset alone, in a real run: 8 % where learning rate times Adam's correction is largest, to the end of the run."""
    changes = {
        "learner.rollouts": 36, "learner.learning_rate": 1e-3, "learner.schedule": "cosine", "learner.warmup_steps": 4,
        "rollout.prompts_per_step": 6, "rollout.completions_per_prompt": 8, "evaluation.prompts": 0, "data.train.size": 300,
    }  # fmt: skip
    result = run(write_recipe(tmp_path, changes), "method.preset=capo")
    found = rows(result.run_dir)
    rates = [row.get("mask/curvature/rejected_share", 0.0) for row in found]
    observed = next(i for i, row in enumerate(found) if row["mask/curvature/steps_to_observe"] == 0) + 1
    assert observed >= 10 and not any(rates[:observed])
    smooth = [sum(rates[i : i + 5]) / 5 for i in range(observed, 32)]
    assert 0.5 * 0.08 < max(smooth) < 1.5 * 0.08
    assert smooth[-1] < 0.5 * max(smooth)
    timed = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["time/mask_ms"] > 0 and 0 < row["time/mask_share"] < 1 for row in timed)
    assert all(row["time/mask_ms"] < 1000 * row["time/update"] for row in timed)


def test_stop_after_ends_early_on_the_schedule_of_all_steps(tmp_path, write_recipe) -> None:
    changes = {"learner.rollouts": 5, "learner.schedule": "cosine", "evaluation.prompts": 0}
    recipe = write_recipe(tmp_path, changes)
    whole = rows(run(recipe, "name=whole").run_dir)
    result = run(recipe, "name=stopped", "learner.stop_after=2")
    assert result.optimizer_steps == 2 and not result.interrupted and rows(result.run_dir) == whole[:2]
    assert run(recipe, "name=stopped", "learner.stop_after=2", "resume=auto").optimizer_steps == 2
    run(recipe, "name=stopped", "learner.stop_after=3", "resume=auto")
    assert rows(result.run_dir) == whole[:3]


@pytest.mark.parametrize("kind", ["random", "probability"])
def test_controls_reject_as_many_as_the_mask(kind, tmp_path, write_recipe) -> None:
    recipe = write_recipe(tmp_path, {"learner.rollouts": 4, "evaluation.prompts": 0})
    result = run(recipe, "method.preset=grpo", f"method.masks=[{{type: {kind}, match: {CURVATURE}}}]")
    for row in rows(result.run_dir):
        assert row[f"mask/{kind}/rejected_share"] == pytest.approx(row["mask/curvature/predicted_share"])


def test_dynamic_sampling_replaces_groups_of_equal_rewards(tmp_path, write_recipe) -> None:
    reward = "import zlib\ndef reward(prompts, completions, **columns):\n" + (
        "    flat = zlib.crc32(prompts[0][-1]['content'].encode()) % 2\n"
        "    return [0.0 if flat else zlib.crc32(c[-1]['content'].encode()) % 7 / 7 for c in completions]\n"
    )
    recipe = write_recipe(tmp_path, {"learner.rollouts": 3, "evaluation.prompts": 0}, reward)
    result = run(recipe, "method.preset=dapo", "method.dynamic_sampling.max_rounds=20", "method.overlong.filter=false")
    found = rows(result.run_dir)
    assert sum(row["dynamic_sampling/replaced"] for row in found) > 0
    assert all(row["reward/zero_variance_share"] == 0 for row in found)

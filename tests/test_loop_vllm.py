"""The main job with the real vLLM engine, on a tiny model in float32."""

from __future__ import annotations

import pytest
from conftest import rows

pytestmark = pytest.mark.engine


def test_two_rollouts_with_vllm(write_recipe, children, tmp_path):
    pytest.importorskip("vllm")
    changes = {
        "rollout.engine": {"type": "vllm", "dtype": "float32", "kv_cache_gib": 0.25, "max_sequences": 16},
        "rollout.probe": {"max_mean_gap": 1e-3},  # float32 on both sides: a tight limit, checked on every rollout
        "learner.rollouts": 2,
        "learner.minibatches": 2,
    }
    code, printed = children.run(write_recipe(tmp_path, changes), timeout=400)
    assert code == 0, printed
    found = rows(tmp_path / "run", "train")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all(row["optimizer/grad_norm"] > 0 for row in found)
    assert found[2]["mismatch/mean_abs_gap"] < 1e-4, "the engine samples with the weights of the step before"
    assert found[2]["mismatch/mean_abs_gap"] < abs(found[1]["policy/kl_old"])


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_two_processes_with_vllm_learn_what_one_does(write_recipe, children, tmp_path):
    pytest.importorskip("vllm")
    changes = {
        "rollout.engine": {"type": "vllm", "dtype": "float32", "kv_cache_gib": 0.25, "max_sequences": 16},
        "rollout.prompts_per_step": 4,
        "rollout.probe": {"max_mean_gap": 1e-3},
        "learner.rollouts": 2,
        "learner.learning_rate": 1e-4,
        "evaluation.prompts": 0,
    }
    found = {}
    for launch in ("cpu.yaml", "cpu2.yaml"):
        recipe = write_recipe(tmp_path / launch, changes)
        code, printed = children.run(recipe, launch=launch, timeout=900)
        assert code == 0, printed
        found[launch] = rows(tmp_path / launch / "run", "train")
    one, two = found.values()
    assert len(one) == len(two) == 2
    assert two[0]["optimizer/grad_norm"] == pytest.approx(one[0]["optimizer/grad_norm"], rel=1e-4)
    assert [row["reward/mean"] for row in two] == pytest.approx([row["reward/mean"] for row in one])
    assert all(row["mismatch/mean_abs_gap"] < 1e-4 for row in two), "both engines hold the learner's weights"

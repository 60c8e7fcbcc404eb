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
        "learner.steps": 2,
        "learner.minibatches": 2,
    }
    code, printed = children.run(write_recipe(tmp_path, changes), timeout=400)
    assert code == 0, printed
    found = rows(tmp_path / "run", "train")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all(row["optimizer/grad_norm"] > 0 for row in found)
    assert found[2]["mismatch/mean_abs_gap"] < 1e-4, "the engine samples with the weights of the step before"
    assert found[2]["mismatch/mean_abs_gap"] < abs(found[1]["policy/kl_old"])

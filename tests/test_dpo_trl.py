"""One DPO step against TRL's DPOTrainer on the same pairs, in float32."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.engine  # importing TRL's trainer takes long


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sigmoid + sft", "smoothed", "chat messages"])
def test_same_step_as_trl(tmp_path_factory, name):
    from benchmarks.models import make_tiny
    from benchmarks.trl_dpo_parity import TOLERANCE, compare, make_policy, write_pairs

    folder = tmp_path_factory.mktemp("parity")
    reference = str(make_tiny(folder / "reference"))
    policy = make_policy(reference, folder / "policy")
    pairs = write_pairs(folder / "pairs.jsonl", [f"w{i}" for i in range(3, 200)], 8)
    found = compare(name, policy, reference, pairs, "sorted" if name == "ipo" else "tree")
    assert found.holds(TOLERANCE), found

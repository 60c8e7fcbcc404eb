"""The optimizer's state on the host under ZeRO-3, in two processes, against ZeRO-3 that holds it itself: bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import rows, weights
from offload_worker import RELAY, combinations

WORKER = Path(__file__).with_name("offload_worker.py")


def compared(tiny_model, folder: Path, steps: int, mode: str, deadline_s: int) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DEADLINE": str(deadline_s)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), tiny_model, str(folder), str(steps), mode],
        env=env,
        capture_output=True,
        text=True,
        timeout=deadline_s + 60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text())


def check(results: dict, *, every: bool) -> None:
    assert all(results.pop("from the start"))
    for name, result in results.items():
        assert result["skipped"][3] == 1.0 and sum(result["skipped"]) == 1.0  # the step with a NaN
        assert list(result["found"]) == [f"{o}, {b}" for o, b in combinations(name, every)]
        for case, processes in result["found"].items():
            for found in processes:
                assert found.pop("pieces") > (500 if "small" in case else 1)
                assert found.pop("metrics") and not found.pop("state"), (name, case)
                assert all(found.values()), (name, case, found)


@pytest.mark.engine
def test_losses_norms_skips_and_states_are_those_of_plain_zero3_to_the_bit(tiny_model, tmp_path):
    """Float32, bfloat16, and a critic's second parameter group; several micro-batches, a NaN, clipping, a changing rate, an
    adversary's order and lanes that run at once; checkpoints both ways in the middle, with other pieces and modes."""
    check(compared(tiny_model, tmp_path, 8, "short", 540), every=False)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(5500)
def test_every_way_under_every_backend(tiny_model, tmp_path):
    check(compared(tiny_model, tmp_path, 8, "every", 5400), every=True)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(5500)
def test_two_hundred_steps_handed_on_from_way_to_way(tiny_model, tmp_path):
    """Float32 and bfloat16, several micro-batches, two parameter groups, another rate in every step, steps with a NaN, parked
    before every step; checkpoints go from plain ZeRO-3 to ours and back, with other pieces and ways."""
    results = compared(tiny_model, tmp_path, 200, "relay", 5400)
    assert list(results) == ["float32", "bfloat16"]
    for result in results.values():
        assert result["steps"] == 200 and result["skipped"] == [3, 67, 131, 195] and result["rates"] > 190
        assert result["groups"] == 2 and result["micro_batches"][1] >= 3
        assert [(leg["way"], leg["backend"]) for leg in result["legs"]] == list(RELAY)
        for leg in result["legs"]:
            for found in leg["processes"]:
                assert found["metrics"] and not found["state"], leg


@pytest.mark.engine
@pytest.mark.slow
def test_a_run_with_its_state_on_the_host_is_the_run_without(write_recipe, children, tmp_path):
    """Two processes under launch/cpu-zero3.yaml, whole and interrupted, offload switched on for the second half alone."""
    changes = {"rollout.prompts_per_step": 4, "learner.rollouts": 4, "learner.minibatches": 2, "checkpoint.every": 4}
    offload = "learner.offload={type: interleaved, piece_size: 2000}"
    runs = {"without": [()], "with": [(offload,)], "half": [("learner.stop_after=2",), (offload, "resume=auto")]}
    for name, starts in runs.items():
        recipe = write_recipe(tmp_path / name, changes)
        for overrides in starts:
            code, printed = children.run(recipe, *overrides, launch="cpu-zero3.yaml", timeout=600)
            assert code == 0, printed
    wanted = tmp_path / "without" / "run"
    for name in ("with", "half"):
        found = tmp_path / name / "run"
        assert rows(found, "train") == rows(wanted, "train")
        last = ("checkpoints", "step_000008")
        first, second = (weights(run.joinpath(*last)) for run in (wanted, found))
        assert all(torch.equal(second[key], value) for key, value in first.items())

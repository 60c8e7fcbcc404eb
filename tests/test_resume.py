"""Killed or stopped and taken up again equals never stopped: every metric, every weight, bit for bit."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time

import pytest
import torch
from conftest import REWARD, rows, weights

from rlpost.cli import main
from rlpost.loop import train
from rlpost.recipe.load import load_recipe

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]

CHANGES = {"learner.steps": 3, "learner.minibatches": 2, "learner.epochs": 2, "checkpoint.every": 1}

# Optimizer steps 5 to 8 belong to the second rollout, so a kill at 6 or 7 falls into the middle of it.
KILL = """
import os, signal
def killing(place, name, at):
    original, calls = getattr(place, name), []
    def wrapped(*arguments, **keywords):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)
    setattr(place, name, wrapped)
"""
PLACES = {
    "before_optimizer_step_7": "from rlpost.learner.learner import DataParallelLearner as place\nkilling(place, 'step', 7)",
    "step_6_recorded_but_not_saved": "from rlpost.learner.checkpoint import CheckpointStore as place\n"
    "killing(place, 'write', 6)",
    "checkpoint_6_half_written": "import rlpost.learner.checkpoint as place\nkilling(place, '_write_manifest', 6)",
    "while_scoring_the_third_rollout": "from rlpost.scoring.scorer import Scorer as place\nkilling(place, 'score', 4)",
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, write_recipe, one_thread):
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(load_recipe(write_recipe(folder, CHANGES)))
    return folder / "run"


def assert_same(run, reference, step):
    assert rows(run) == rows(reference)
    for name in ("completions",):
        mine, theirs = ({f.name: f.read_text() for f in (path / name).iterdir()} for path in (run, reference))
        assert mine == theirs
    got, expected = (weights(path / "checkpoints" / f"step_{step:06d}") for path in (run, reference))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_as_if_nothing_had_been(place, unbroken, write_recipe, children, tmp_path):
    recipe = write_recipe(tmp_path, CHANGES)
    code, printed = children.run(recipe, before=KILL + PLACES[place])
    assert code == -signal.SIGKILL, printed
    recorded = [row["step"] for row in rows(tmp_path / "run", "train")]
    assert recorded == list(range(1, recorded[-1] + 1)) and 6 <= recorded[-1] <= 8
    train(load_recipe(recipe, ["resume=auto"]))
    assert_same(tmp_path / "run", unbroken, 12)
    leftovers = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not leftovers, "what a killed run left half written is cleared away"


def test_a_run_killed_before_its_first_checkpoint_starts_anew(unbroken, write_recipe, children, tmp_path):
    recipe = write_recipe(tmp_path, CHANGES)
    code, _ = children.run(recipe, before=KILL + PLACES["step_6_recorded_but_not_saved"].replace("6)", "1)"))
    assert code == -signal.SIGKILL
    train(load_recipe(recipe, ["resume=auto"]))
    assert_same(tmp_path / "run", unbroken, 12)


def test_resuming_from_an_earlier_checkpoint_leaves_no_later_one_to_stumble_over(unbroken, write_recipe, tmp_path):
    recipe = write_recipe(tmp_path, {**CHANGES, "checkpoint.keep": 20})
    train(load_recipe(recipe))
    run = tmp_path / "run"
    train(load_recipe(recipe, [f"resume={run}/checkpoints/step_000005", "learner.steps=2"]))
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 9))
    train(load_recipe(recipe, ["resume=auto"]))
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 13))
    got, expected = (weights(path / "checkpoints" / "step_000012") for path in (run, unbroken))
    assert all(torch.equal(got[name], value) for name, value in expected.items())


SLOW = REWARD.replace("    texts =", "    import time\n    time.sleep(0.05)\n    texts =")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_says_how_to_go_on_and_the_run_goes_on(number, write_recipe, children, tmp_path):
    changes = {"learner.steps": 8, "learner.minibatches": 2, "evaluation.prompts": 0}
    reference = write_recipe(tmp_path / "reference", changes)
    train(load_recipe(reference))
    recipe = write_recipe(tmp_path / "stopped", changes, SLOW)
    run = tmp_path / "stopped" / "run"
    child = children.start(recipe, "learner.steps=8")
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 2:
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0]
        time.sleep(0.02)
    os.kill(child.pid, number)
    printed, _ = child.communicate(timeout=120)
    assert child.returncode == 130, printed
    assert "Traceback" not in printed
    done = len(rows(run))
    assert 2 <= done < 16
    command = [sys.executable, "-m", "rlpost", str(recipe), "learner.steps=8", "resume=auto"]
    assert shlex.join(command) in printed and f"after optimizer step {done}" in printed
    (tmp_path / "stopped" / "graded.py").write_text(REWARD)
    train(load_recipe(recipe, ["resume=auto"]))
    assert rows(run) == rows(tmp_path / "reference" / "run")
    got, expected = (weights(tmp_path / f / "run/checkpoints/step_000016") for f in ("stopped", "reference"))
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_a_damaged_checkpoint_is_named(unbroken, write_recipe, tmp_path, capsys):
    recipe = write_recipe(tmp_path, CHANGES)
    train(load_recipe(recipe, ["learner.steps=1"]))
    file = tmp_path / "run" / "checkpoints" / "step_000004" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(SystemExit) as caught:
        main([str(recipe), "resume=auto"])
    assert caught.value.code == 3
    assert str(file) in capsys.readouterr().err


def test_another_number_of_processes_cannot_take_up_half_a_rollout(write_recipe, tmp_path, capsys):
    recipe = write_recipe(tmp_path, CHANGES)
    train(load_recipe(recipe, ["learner.steps=1", "checkpoint.keep=4"]))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000003"
    state = checkpoint / "trainer" / "state.json"
    state.write_text(state.read_text().replace('"world": 1', '"world": 2'))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    from rlpost.learner.checkpoint import _sha256

    manifest["files"]["trainer/state.json"] = {"bytes": state.stat().st_size, "sha256": _sha256(state)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) as caught:
        main([str(recipe), f"resume={checkpoint}"])
    assert caught.value.code == 3
    assert "saved by 2 processes in the middle of a rollout" in capsys.readouterr().err

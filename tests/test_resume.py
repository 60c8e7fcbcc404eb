"""Killed or stopped and taken up again equals never stopped: every metric, every weight, bit for bit."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import REWARD, rows, weights

from rlpost.cli import main
from rlpost.recipe.load import load_recipe
from rlpost.run.conclude import command as rlpost_command
from rlpost.run.loop import train

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]

CHANGES = {"learner.rollouts": 3, "learner.minibatches": 2, "learner.epochs": 2, "checkpoint.every": 1}

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
    # The first manifest is that of the trial at the run's start, which is thrown away.
    "checkpoint_6_half_written": "import rlpost.learner.checkpoint as place\nkilling(place, '_write_manifest', 7)",
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


@pytest.mark.parametrize(
    ("change", "key", "values"),
    [
        ("learner.minibatches=1", "learner.minibatches", "=2, in the middle of a rollout"),
        ("learner.epochs=1", "learner.epochs", "=2, in the middle of a rollout"),
        ("method.kl.coefficient=0.1", "method.kl.coefficient", "=0.0, in the middle of a rollout"),
        ("rollout.temperature=0.3", "rollout.temperature", "=1.0, in the middle of a rollout"),
        ("rollout.top_k=5", "rollout.top_k", "=-1, in the middle of a rollout"),
        ("rewards.0.weight=2", "rewards.0.weight", "=1.0, in the middle of a rollout"),
        ("method.advantage.scale=none", "method.advantage.scale", '="group_std", in the middle of a rollout'),
        ("seed=1", "seed", "=0, and the recipe now has"),
        ("method.preset=ppo", "method.critic", "=null, and the recipe now has"),
        ("method.preset=capo", "method.masks", '"step": "adam"'),
        ("model.lora={rank: 4}", "model.lora", '"rank": 4'),
    ],
)
def test_a_resumed_run_refuses_what_was_saved_otherwise(change, key, values, half_way, capsys):
    recipe, run = half_way
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as caught:
        main([str(recipe), f"resume={run}/checkpoints/step_000003", change])
    said = capsys.readouterr().err
    assert caught.value.code == 3, said
    assert f"{key}=" in said and values in said and f"Set {key} back to" in said, said
    assert (run / "metrics.jsonl").read_bytes() == before, "refused before anything was cut off"


def test_between_rollouts_the_cut_of_a_rollout_may_change(half_way):
    recipe, run = half_way
    changes = ["learner.minibatches=1", "learner.epochs=1", "method.kl.coefficient=0.1", "learner.rollouts=2"]
    train(load_recipe(recipe, [f"resume={run}/checkpoints/step_000004", *changes]))
    assert [row["step"] for row in rows(run, "train")] == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def half_way(tmp_path_factory, write_recipe, one_thread):
    """A run with checkpoints 3 (in the middle of the first rollout) and 4 (at its end): (recipe, run)."""
    folder = tmp_path_factory.mktemp("half_way")
    recipe = write_recipe(folder, {**CHANGES, "learner.rollouts": 1, "checkpoint.keep": 9, "evaluation.prompts": 0})
    train(load_recipe(recipe))
    return recipe, folder / "run"


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
    train(load_recipe(recipe, [f"resume={run}/checkpoints/step_000005", "learner.rollouts=2"]))
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 9))
    train(load_recipe(recipe, ["resume=auto"]))
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 13))
    got, expected = (weights(path / "checkpoints" / "step_000012") for path in (run, unbroken))
    assert all(torch.equal(got[name], value) for name, value in expected.items())


SLOW = REWARD.replace("    texts =", "    import time\n    time.sleep(0.05)\n    texts =")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_says_how_to_go_on_and_the_run_goes_on(number, write_recipe, children, tmp_path):
    changes = {"learner.rollouts": 8, "learner.minibatches": 2, "evaluation.prompts": 0}
    reference = write_recipe(tmp_path / "reference", changes)
    train(load_recipe(reference))
    recipe = write_recipe(tmp_path / "stopped", changes, SLOW)
    run = tmp_path / "stopped" / "run"
    child = children.start(recipe, "learner.rollouts=8")
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 2:
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0]
        time.sleep(0.02)
    os.kill(child.pid, number)
    printed, _ = child.communicate(timeout=120)
    assert child.returncode == 130, printed
    assert "Traceback" not in printed
    assert (
        f"not drawn (tracking.report=false); {rlpost_command()} report {run}" in printed
        and not (run / "report").exists()
    )
    done = len(rows(run))
    assert 2 <= done < 16
    command = [sys.executable, "-m", "rlpost", str(recipe), "learner.rollouts=8", "resume=auto"]
    assert shlex.join(command) in printed and f"after optimizer step {done}" in printed
    (tmp_path / "stopped" / "graded.py").write_text(REWARD)
    train(load_recipe(recipe, ["resume=auto"]))
    assert rows(run) == rows(tmp_path / "reference" / "run")
    got, expected = (weights(tmp_path / f / "run/checkpoints/step_000016") for f in ("stopped", "reference"))
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "script",
    [pytest.param(True, id="launch/run.sh"), pytest.param(False, id="accelerate launch", marks=pytest.mark.slow)],
)
def test_ctrl_c_in_a_terminal_reaches_launcher_and_run_alike(script, write_recipe, children, tmp_path):
    recipe = write_recipe(tmp_path, {"learner.rollouts": 500, "evaluation.prompts": 0}, SLOW)
    run = tmp_path / "run"
    child = children.start(recipe, "learner.learning_rate=1e-4", launch="cpu.yaml", script=script)
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 2:
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0]
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)
    code = child.wait(timeout=240)
    saved_at_the_end = list(run.glob("checkpoints/*/manifest.json"))
    printed, _ = child.communicate(timeout=240)  # of the run too, which plain accelerate does not wait for
    command = "accelerate launch --quiet --config_file launch/cpu.yaml -m rlpost"
    if script:
        assert code == 130 and saved_at_the_end and "Traceback" not in printed, printed
        command = "launch/run.sh launch/cpu.yaml"
    said = printed.partition(f"Stopped after optimizer step {len(rows(run))} and saved. To go on:")[2]
    assert f"{command} {recipe} learner.learning_rate=1e-4 resume=auto" in said, printed
    assert list(run.glob("checkpoints/*/manifest.json"))


def test_ctrl_c_before_the_first_step_says_that_nothing_is_saved(write_recipe, children, tmp_path):
    recipe = write_recipe(tmp_path, {"evaluation.prompts": 0})
    before = (
        "import os, signal, rlpost.run.checks as place\n"
        "place.load_prompts = lambda *_: os.kill(os.getpid(), signal.SIGINT)"
    )
    code, printed = children.run(recipe, before=before)
    assert code == 130 and "Traceback" not in printed, printed
    assert "nothing has been saved yet. Run the same command to start again." in printed


def test_a_damaged_checkpoint_is_named(unbroken, write_recipe, tmp_path, capsys):
    recipe = write_recipe(tmp_path, CHANGES)
    train(load_recipe(recipe, ["learner.rollouts=1"]))
    file = tmp_path / "run" / "checkpoints" / "step_000004" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(SystemExit) as caught:
        main([str(recipe), "resume=auto"])
    assert caught.value.code == 3
    assert str(file) in capsys.readouterr().err


def test_a_terminal_that_is_closed_saves_and_the_run_goes_on(write_recipe, tmp_path):
    """As when a laptop is shut or an SSH session ends: SIGHUP, and a terminal that answers every word with an error."""
    changes = {"learner.rollouts": 8, "evaluation.prompts": 0}
    recipe, run = write_recipe(tmp_path, changes, SLOW), tmp_path / "run"
    ours, theirs = pty.openpty()

    def own_terminal():
        signal.signal(
            signal.SIGHUP, signal.SIG_DFL
        )  # whoever runs these tests under `nohup` hands on that it is ignored
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    child = subprocess.Popen(
        [sys.executable, "-m", "rlpost", str(recipe)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=own_terminal,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(rows(run)) < 2:
            assert child.poll() is None and time.monotonic() < deadline
            if select.select([ours], [], [], 0.02)[0]:
                os.read(ours, 2**16)  # a terminal that nobody reads holds its writers
        os.close(ours)
        assert child.wait(timeout=120) == 130
    finally:
        child.kill()
        child.wait()
    done = len(rows(run))
    assert 2 <= done < 8
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    (tmp_path / "graded.py").write_text(REWARD)
    train(load_recipe(recipe, ["resume=auto"]))
    assert len(rows(run, "train")) == 8

"""Checkpoints on disk: atomic, verified, kept in number, written in the background, and never lost to a SIGKILL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import rows, weights

from rlpost.cli import main
from rlpost.errors import CheckpointError
from rlpost.learner.checkpoint import CheckpointStore, file_writer, verify
from rlpost.learner.process import Processes
from rlpost.recipe.load import load_recipe
from rlpost.run.loop import train

WORKER = Path(__file__).with_name("kill_worker.py")


def write(store, step, text="weights"):
    return store.write(
        step,
        lambda folder: (folder / "weights.dat").write_text(text) and None,
        lambda folder: torch.save(text, folder / "trainer" / "rank_0.pt"),
    )


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", 2, Processes())


@pytest.fixture
def background(tmp_path):
    made = CheckpointStore(tmp_path / "checkpoints", 2, Processes(), asynchronous=True)
    yield made
    made.close()


def test_only_the_newest_are_kept(store):
    for step in (1, 2, 10):
        verify(write(store, step))
    assert [path.name for path in sorted(store.folder.iterdir())] == ["step_000002", "step_000010"]
    assert store.latest() == store.path(10)


def test_a_checkpoint_without_its_manifest_does_not_count(store):
    write(store, 1)
    (write(store, 2) / "manifest.json").unlink()
    assert store.latest() == store.path(1)
    with pytest.raises(CheckpointError, match="not a complete rlpost checkpoint"):
        verify(store.path(2))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_named(damage, store):
    path = write(store, 1)
    file = path / "trainer" / "rank_0.pt"
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:] if damage == "flip" else content[:-1])
    with pytest.raises(CheckpointError, match=r"rank_0\.pt is missing or differs"):
        verify(path)


def test_what_a_killed_run_left_is_cleared_away_and_a_checkpoint_between_two_renames_put_back(store):
    write(store, 1)
    write(store, 2).rename(store.folder / ".replaced_step_000002")  # killed just before the new one took its place
    (store.folder / ".writing_step_000002" / "trainer").mkdir(parents=True)
    assert store.latest() == store.path(1)
    store.recover()
    assert store.latest() == store.path(2)
    verify(store.path(2))
    assert not list(store.folder.glob(".*"))


def test_a_background_write_lets_the_run_go_on_and_is_waited_for(background):
    gate = threading.Event()
    background.write(1, lambda folder: None, lambda folder: gate.wait(30) and None)
    assert background.latest() is None, "not complete, so not there"
    gate.set()
    background.wait()
    assert background.latest() == background.path(1)
    write(background, 2)
    write(background, 3)  # waits for 2
    verify(background.path(2))
    background.wait()
    verify(background.path(3))


def test_an_error_of_a_background_write_comes_with_the_next_save_and_nothing_is_lost(background):
    write(background, 1)

    def fail(folder):
        raise OSError(28, "No space left on device")

    background.write(2, lambda folder: None, fail)
    with pytest.raises(CheckpointError, match="no space left on the disk.*last complete checkpoint is .*step_000001"):
        write(background, 3)
    assert background.latest() == background.path(1)
    write(background, 4)
    background.wait()
    assert background.latest() == background.path(4)


def test_a_snapshot_is_what_was_there_when_it_was_taken(tmp_path):
    value = {"tensor": torch.zeros(3), "count": [1]}
    later = file_writer({"a.pt": value}, snapshot=True)
    value["tensor"] += 1
    value["count"].append(2)
    later(tmp_path)
    found = torch.load(tmp_path / "a.pt")
    assert torch.equal(found["tensor"], torch.zeros(3)) and found["count"] == [1]


CHANGES = {"learner.rollouts": 3, "learner.minibatches": 2, "learner.epochs": 2, "checkpoint.every": 1}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, write_recipe, one_thread):
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(load_recipe(write_recipe(folder, CHANGES)))
    return folder / "run"


def assert_same(run, reference):
    assert rows(run) == rows(reference)
    got, expected = (weights(max((path / "checkpoints").glob("step_*"))) for path in (run, reference))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.engine
def test_written_in_the_background_is_the_same_run(unbroken, write_recipe, one_thread, tmp_path):
    recipe = write_recipe(tmp_path, {**CHANGES, "checkpoint.asynchronous": True})
    train(load_recipe(recipe))
    assert_same(tmp_path / "run", unbroken)
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (11, 12):
        verify(checkpoints / f"step_{step:06d}")
    train(load_recipe(recipe, [f"resume={checkpoints}/step_000011"]))
    assert_same(tmp_path / "run", unbroken)


def assert_tidy(run):
    """Nothing that a killed run was in the middle of is left."""
    left = [path.name for folder in (run, run / "checkpoints", run / "completions") for path in folder.glob(".*")]
    assert [name for name in left if name != ".lock"] == []


def killed_again_and_again(recipe, kills, longest, seed):
    """What kill_worker.py did."""
    run = recipe.parent / "run"
    done = subprocess.run(
        [sys.executable, str(WORKER), str(recipe), str(run / "checkpoints"), str(kills), str(longest), str(seed)],
        capture_output=True,
        text=True,
        timeout=3000,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["last"] == 0, done.stdout + done.stderr
    return found


@pytest.mark.engine
@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_three_random_moments(asynchronous, unbroken, write_recipe, tmp_path):
    """Of this seed: late in the run, then while that is taken up again, then among the steps."""
    recipe = write_recipe(tmp_path, {**CHANGES, "checkpoint.asynchronous": asynchronous})
    found = killed_again_and_again(recipe, 3, 0.8, 103)
    assert found["kills"] == 3 and found["in_start_up"] == 1, found
    assert_same(tmp_path / "run", unbroken)
    assert_tidy(tmp_path / "run")


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments(write_recipe, one_thread, tmp_path):
    changes = {**CHANGES, "learner.rollouts": 12}
    train(load_recipe(write_recipe(tmp_path / "straight", changes)))
    recipe = write_recipe(tmp_path / "killed", changes)
    found = killed_again_and_again(recipe, 20, 1.0, 3)
    print(found)
    assert found["kills"] == 20 and min(found["half_written"], found["from_earlier"]) > 0, found
    assert 4 < found["in_start_up"] < 16, found
    assert_same(tmp_path / "killed" / "run", tmp_path / "straight" / "run")
    assert_tidy(tmp_path / "killed" / "run")


def assert_refused(recipe, run, said, capsys):
    """One process, from the checkpoint after the first of two minibatches."""
    before = rows(run), sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.raises(SystemExit) as caught:
        main([str(recipe), f"resume={run}/checkpoints/step_000001"])
    assert caught.value.code == 3 and said in capsys.readouterr().err
    assert (rows(run), sorted(path.name for path in (run / "checkpoints").iterdir())) == before


@pytest.mark.engine
def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(
    write_recipe, children, one_thread, tmp_path, capsys
):
    """At a rollout's end; in the middle of one it is refused, and nothing is touched."""
    changes = {
        "rollout.prompts_per_step": 4,
        "learner.rollouts": 2,
        "learner.minibatches": 2,
        "learner.learning_rate": 1e-4,
        "checkpoint.every": 1,
        "checkpoint.keep": 9,
    }
    straight = write_recipe(tmp_path / "straight", changes)
    train(load_recipe(straight))
    expected = tmp_path / "straight" / "run"
    for name, first, second in (("grow", None, "cpu2.yaml"), ("shrink", "cpu2.yaml", None)):
        recipe = write_recipe(tmp_path / name, changes)
        run = tmp_path / name / "run"
        for launch, resume in ((first, "never"), (second, f"{run}/checkpoints/step_000002")):
            if launch is None and resume != "never":
                assert_refused(recipe, run, "saved by 2 processes in the middle of a rollout", capsys)
            if launch is None:
                train(load_recipe(recipe, [f"resume={resume}"]))
                continue
            code, printed = children.run(recipe, f"resume={resume}", launch=launch)
            assert code == 0, printed
        for row, theirs in zip(rows(run), rows(expected), strict=True):
            for key in ("optimizer/loss", "optimizer/grad_norm", "reward/mean"):
                assert row.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-5), (row["step"], key)
        got, wanted = (weights(path / "checkpoints" / "step_000004") for path in (run, expected))
        assert all((got[key] - value).abs().max() < 1e-5 for key, value in wanted.items())

"""Steps that are not finite, disks that are full, and errors that several processes share."""

from __future__ import annotations

import errno
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import rows, weights

import rlpost.learner.checkpoint as checkpoint_module
import rlpost.learner.update as update_module
from rlpost import errors
from rlpost.errors import CheckpointError, RewardError, TrainingError
from rlpost.learner.checkpoint import CheckpointStore, verify
from rlpost.learner.process import Processes
from rlpost.loop import train
from rlpost.recipe.load import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def spoilt(monkeypatch):
    """`spoilt(3, 4)`: the loss of optimizer steps 3 and 4 (from 1) is NaN."""

    def spoil(*steps):
        calls, original = [], update_module.coefficient_loss

        def loss(*arguments):
            calls.append(1)
            value = original(*arguments)
            return value * math.nan if len(calls) in steps else value

        monkeypatch.setattr(update_module, "coefficient_loss", loss)

    return spoil


CHANGES = {"learner.steps": 6, "learner.skip_nonfinite": 2, "checkpoint.every": 1, "evaluation.prompts": 0}


def test_a_step_that_is_not_finite_is_skipped_and_counted(spoilt, write_recipe, tmp_path):
    spoilt(2, 4)
    train(load_recipe(write_recipe(tmp_path, {**CHANGES, "learner.steps": 4, "checkpoint.keep": 9})))
    found = rows(tmp_path / "run", "train")
    assert [row["optimizer/skipped"] for row in found] == [0, 1, 0, 1]
    assert [row["optimizer/skipped_total"] for row in found] == [0, 1, 1, 2]
    assert [row["optimizer/loss"] is None for row in found] == [False, True, False, True]
    at = {step: weights(tmp_path / "run" / "checkpoints" / f"step_{step:06d}") for step in (1, 2, 3, 4)}
    same = {(a, b): all(torch.equal(at[a][name], at[b][name]) for name in at[a]) for a, b in ((1, 2), (2, 3), (3, 4))}
    assert same == {(1, 2): True, (2, 3): False, (3, 4): True}
    assert all(value.isfinite().all() for value in at[4].values())


def test_too_many_in_a_row_stop_the_run_with_its_checkpoint_intact(spoilt, write_recipe, tmp_path):
    spoilt(2, 4, 5)
    with pytest.raises(TrainingError, match=r"2 optimizer steps in a row .*weights are those of step 3"):
        train(load_recipe(write_recipe(tmp_path, CHANGES)))
    latest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert latest.name == "step_000004"
    verify(latest)
    assert all(value.isfinite().all() for value in weights(latest).values())


def test_the_curvature_mask_forgets_a_step_that_was_skipped(spoilt, write_recipe, tmp_path):
    spoilt(3)
    changes = {**CHANGES, "learner.steps": 5, "method.preset": "capo"}
    train(load_recipe(write_recipe(tmp_path, changes)))
    found = rows(tmp_path / "run", "train")
    assert [row["optimizer/skipped"] for row in found] == [0, 0, 1, 0, 0]
    assert all(value is not None for key, value in found[-1].items() if key.startswith("mask/")), found[-1]
    state = torch.load(tmp_path / "run/checkpoints/step_000005/trainer/rank_0.pt", weights_only=False)
    moments = state["method"]["curvature"]["moments"]
    assert moments["steps"] == 4 and moments["first"].isfinite().all() and moments["second"].isfinite().all()


def test_a_full_disk_at_a_checkpoint(monkeypatch, write_recipe, tmp_path):
    original = checkpoint_module._write_manifest

    def full(folder: Path) -> None:
        if folder.name.endswith("3"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(folder)

    monkeypatch.setattr(checkpoint_module, "_write_manifest", full)
    with pytest.raises(
        CheckpointError, match=r"step_000003 could not be written: no space left.*step_000002"
    ) as caught:
        train(load_recipe(write_recipe(tmp_path, CHANGES)))
    assert caught.value.exit_code == 3
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step_000001", "step_000002"], "nothing saved before was touched, nothing half written is left"


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MB. Needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def test_a_disk_that_is_really_full(small_disk, write_recipe, tmp_path):
    changes = {**CHANGES, "output_dir": str(small_disk), "checkpoint.keep": 9}
    recipe = load_recipe(write_recipe(tmp_path, changes))
    with pytest.raises((CheckpointError, TrainingError), match=r"[Nn]o space left|disk full"):
        train(recipe)
    store = CheckpointStore(small_disk / "run" / "checkpoints", 9, Processes())
    latest = store.latest()
    assert latest is not None
    verify(latest)
    assert not list((small_disk / "run" / "checkpoints").glob(".writing*"))
    shutil.rmtree(store.path(1))
    train(load_recipe(recipe.path, ["resume=auto", "checkpoint.keep=1", f"learner.steps={int(latest.name[-6:]) + 1}"]))


class Two(Processes):
    """This process as one of two, the other of which met `problem`."""

    def __init__(self, rank, problem=None):
        self.rank, self.world, self.problem = rank, 2, problem

    def gather(self, value):
        return [value, self.problem] if self.rank == 0 else [self.problem, value]


def test_an_error_of_another_process_is_raised_by_the_main_one():
    with pytest.raises(RewardError, match="over there"):
        Two(0, RewardError("over there")).together(lambda: 1)
    assert Two(0).together(lambda: 1) == 1


def test_the_other_processes_leave_quietly_with_its_exit_code_when_it_has_spoken(monkeypatch):
    slept = []
    monkeypatch.setattr("rlpost.learner.process.time.sleep", slept.append)
    with pytest.raises(SystemExit) as caught:
        Two(1).together(lambda: (_ for _ in ()).throw(CheckpointError("mine")))
    assert caught.value.code == 3 and slept == [errors.LAST_WORD_S]

"""Steps that are not finite, disks that are full, and errors that several processes share."""

from __future__ import annotations

import errno
import math
import os
import shutil
import subprocess
from contextlib import contextmanager
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
from rlpost.recipe.load import load_recipe
from rlpost.run.loop import train

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]


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


def test_the_critics_gradient_is_clipped_apart_and_the_brake_scales_both_rates(tiny_model):
    from rlpost.learner.learner import DataParallelLearner
    from rlpost.policy.critic import make_critic
    from rlpost.policy.model import load_policy
    from rlpost.recipe.sections.critic import CriticSection
    from rlpost.recipe.sections.learner import LearnerSection
    from rlpost.recipe.sections.model import ModelSection

    model = ModelSection(path=tiny_model, autocast="none")
    policy = load_policy(model, tiny_model)
    critic = CriticSection(max_grad_norm=2e-3, learning_rate=1e-2)
    policy.critic = make_critic(critic, model, tiny_model, policy.config.hidden_size)
    learner = DataParallelLearner(policy, LearnerSection(max_grad_norm=1e-2, learning_rate=1e-3), Processes())
    of_critic, all_ = list(policy.critic.parameters()), list(policy.parameters())
    of_actor = [p for p in all_ if not any(p is q for q in of_critic)]
    before = [p.detach().clone() for p in all_]
    for p in all_:
        p.grad = torch.ones_like(p)
    report = learner.step(0, scale=0.5)
    assert report.grad_norm == pytest.approx(math.sqrt(sum(p.numel() for p in of_actor)), rel=1e-5)
    for part, limit, rate in ((of_actor, 1e-2, 5e-4), (of_critic, 2e-3, 5e-3)):
        moments = [learner._optimizer.state[p]["exp_avg"] / 0.1 for p in part]
        assert math.sqrt(sum(float(m.square().sum()) for m in moments)) == pytest.approx(limit, rel=1e-4)
        moved = max(float((p - b).abs().max()) for p, b in zip(all_, before, strict=True) if any(p is q for q in part))
        assert moved == pytest.approx(rate, rel=1e-2)  # Adam's first step is the rate itself
    assert report.learning_rate == 5e-4


def test_a_critic_has_its_own_rate_even_where_the_policys_is_zero(tiny_model):
    from rlpost.learner.learner import DataParallelLearner
    from rlpost.policy.critic import make_critic
    from rlpost.policy.model import load_policy
    from rlpost.recipe.sections.critic import CriticSection
    from rlpost.recipe.sections.learner import LearnerSection
    from rlpost.recipe.sections.model import ModelSection

    model = ModelSection(path=tiny_model, autocast="none")
    for of_policy, of_critic, expected in ((0.0, 1e-2, 5e-3), (1e-3, 0.0, 0.0), (1e-3, None, 5e-4), (0.0, None, 0.0)):
        policy = load_policy(model, tiny_model)
        critic = CriticSection(learning_rate=of_critic)
        policy.critic = make_critic(critic, model, tiny_model, policy.config.hidden_size)
        section = LearnerSection(learning_rate=of_policy, steps=4, warmup_steps=2)
        learner = DataParallelLearner(policy, section, Processes())
        before = [p.detach().clone() for p in policy.critic.parameters()]
        for p in policy.parameters():
            p.grad = torch.ones_like(p)
        assert learner.step(0).learning_rate == of_policy / 2
        after = policy.critic.parameters()
        moved = max(float((p - b).abs().max()) for p, b in zip(after, before, strict=True))
        assert moved == pytest.approx(expected, rel=1e-2), (of_policy, of_critic)


CHANGES = {"learner.rollouts": 6, "learner.skip_nonfinite": 2, "checkpoint.every": 1, "evaluation.prompts": 0}


def test_a_step_that_is_not_finite_is_skipped_and_counted(spoilt, write_recipe, tmp_path):
    spoilt(2, 4)
    train(load_recipe(write_recipe(tmp_path, {**CHANGES, "learner.rollouts": 4, "checkpoint.keep": 9})))
    found = rows(tmp_path / "run", "train")
    assert [row["optimizer/skipped"] for row in found] == [0, 1, 0, 1]
    assert [row["optimizer/skipped_total"] for row in found] == [0, 1, 1, 2]
    assert [row["optimizer/loss"] is None for row in found] == [False, True, False, True]
    at = {step: weights(tmp_path / "run" / "checkpoints" / f"step_{step:06d}") for step in (1, 2, 3, 4)}
    same = {(a, b): all(torch.equal(at[a][name], at[b][name]) for name in at[a]) for a, b in ((1, 2), (2, 3), (3, 4))}
    assert same == {(1, 2): True, (2, 3): False, (3, 4): True}
    assert all(value.isfinite().all() for value in at[4].values())


def test_a_loss_that_is_not_finite_skips_the_step_though_its_gradient_is(monkeypatch, write_recipe, tmp_path):
    original = update_module.coefficient_loss
    monkeypatch.setattr(update_module, "coefficient_loss", lambda *arguments: original(*arguments) - math.inf)
    train(load_recipe(write_recipe(tmp_path, {**CHANGES, "learner.rollouts": 1})))
    (row,) = rows(tmp_path / "run", "train")
    assert row["optimizer/skipped"] == 1 and row.get("optimizer/loss") is None


def test_skipped_steps_in_a_row_are_counted_across_a_restart(spoilt, write_recipe, tmp_path):
    spoilt(2, 3, 4)
    recipe = write_recipe(tmp_path, {**CHANGES, "learner.skip_nonfinite": 3})
    train(load_recipe(recipe, ["learner.rollouts=3"]))
    spoilt(1)
    with pytest.raises(TrainingError, match="3 optimizer steps in a row"):
        train(load_recipe(recipe, ["resume=auto"]))
    assert [row["optimizer/skipped"] for row in rows(tmp_path / "run", "train")] == [0, 1, 1, 1], "the last is written"


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
    changes = {**CHANGES, "learner.rollouts": 5, "method.preset": "capo"}
    train(load_recipe(write_recipe(tmp_path, changes)))
    found = rows(tmp_path / "run", "train")
    assert [row["optimizer/skipped"] for row in found] == [0, 0, 1, 0, 0]
    assert all(value is not None for key, value in found[-1].items() if key.startswith("mask/")), found[-1]
    state = torch.load(tmp_path / "run/checkpoints/step_000005/trainer/rank_0.pt", weights_only=False)
    moments = state["method"]["curvature"]["moments"]
    assert moments["steps"] == 4 and moments["first"].isfinite().all() and moments["second"].isfinite().all()


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "no space left on the disk"), (errno.EROFS, "the file system is read-only")],
    ids=["full", "read_only"],
)
def test_a_disk_that_fails_at_a_checkpoint(number, said, monkeypatch, write_recipe, tmp_path):
    original = checkpoint_module._write_manifest

    def failing(folder: Path) -> None:
        if folder.name.endswith("3"):
            raise OSError(number, os.strerror(number))
        original(folder)

    monkeypatch.setattr(checkpoint_module, "_write_manifest", failing)
    with pytest.raises(CheckpointError, match=rf"step_000003 could not be written: {said}.*step_000002") as caught:
        train(load_recipe(write_recipe(tmp_path, CHANGES)))
    assert caught.value.exit_code == 3
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    kept = ["step_000001", "step_000002", "weights_step_000003"]
    assert left == kept, (
        "nothing saved before was touched, nothing half written is left, and the weights alone are there"
    )


def test_metrics_that_cannot_be_written_any_more(monkeypatch, write_recipe, tmp_path):
    original, metrics = Path.open, tmp_path / "run" / "metrics.jsonl"

    def read_only(self, mode="r", *arguments, **keywords):
        if self == metrics and mode == "a" and len(rows(tmp_path / "run")) == 2:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return original(self, mode, *arguments, **keywords)

    metrics.parent.mkdir()
    metrics.touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", read_only)
        with pytest.raises(TrainingError, match=r"metrics\.jsonl: the file system is read-only.*resume=auto") as caught:
            train(load_recipe(write_recipe(tmp_path, CHANGES)))
    assert caught.value.exit_code == 4
    train(load_recipe(tmp_path / "recipe.yaml", ["resume=auto", "learner.rollouts=3"]))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]


@contextmanager
def file_system(place, size):
    """A real one, at `place`. Needs root."""
    place.mkdir(parents=True)
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.fixture
def small_disk(tmp_path):
    with file_system(tmp_path / "disk", "4m") as place:
        yield place


@pytest.fixture
def checkpoint_disk(tmp_path):
    """The run's folder of checkpoints is a file system of its own: the run's lock, open for writing, is not on it."""
    with file_system(tmp_path / "run" / "checkpoints", "64m") as place:
        yield place


def remount(place, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def test_a_disk_that_really_becomes_read_only_in_the_middle_of_a_run(
    checkpoint_disk, monkeypatch, write_recipe, tmp_path
):
    original = CheckpointStore._start

    def start(self, staging):
        if staging.name.endswith("3"):
            remount(checkpoint_disk, "ro")
        original(self, staging)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_start", start)
        said = r"step_000003 could not be written: the file system is read-only\. The last .* is .*step_000002"
        with pytest.raises(CheckpointError, match=said):
            train(load_recipe(write_recipe(tmp_path, CHANGES)))
    assert sorted(path.name for path in checkpoint_disk.iterdir()) == ["step_000001", "step_000002"]
    verify(checkpoint_disk / "step_000002")
    remount(checkpoint_disk, "rw")
    train(load_recipe(tmp_path / "recipe.yaml", ["resume=auto"]))
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]


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
    train(
        load_recipe(recipe.path, ["resume=auto", "checkpoint.keep=1", f"learner.rollouts={int(latest.name[-6:]) + 1}"])
    )


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

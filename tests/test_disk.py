"""Disks that are full, folders that vanish, and several runs in one folder: with the system's own errors."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from test_learner import CHANGES

from rlpost.errors import CheckpointError, TrainingError, in_words, system_error
from rlpost.learner.checkpoint import CheckpointStore, file_writer
from rlpost.recipe.load import load_recipe
from rlpost.run.loop import Loop, train
from rlpost.source.reference import save_tensors
from rlpost.tracking.metrics import MetricsWriter, write_atomically
from rlpost.tracking.rundir import RunDirectory

LARGER = "the file is larger than"


@contextmanager
def files_up_to(size):
    """Every file of this process that grows beyond `size` bytes meets an error, as on a full disk, from the system itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def by_safetensors(folder):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(10**5)}, folder / "a.safetensors")


def by_transformers(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=2000)).save_pretrained(folder)


WRITERS = {
    "torch": lambda folder: file_writer({"a.pt": torch.zeros(10**5)}, snapshot=False)(folder),
    "torch, small tensors": lambda folder: file_writer({"a.pt": list(torch.zeros(900, 99))}, snapshot=False)(folder),
    "torch, copied before": lambda folder: file_writer({"a.pt": torch.zeros(10**5)}, snapshot=True)(folder),
    "safetensors": by_safetensors,
    "transformers": by_transformers,
    "python": lambda folder: (folder / "a").write_bytes(b"0" * 10**5),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_systems_error_is_known_behind_every_writer(writer, tmp_path):
    with files_up_to(50_000), pytest.raises(Exception) as caught:  # noqa: B017, PT011 - of whatever class
        WRITERS[writer](tmp_path)
    error = system_error(caught.value)
    assert error is not None and error.errno == errno.EFBIG and in_words(error).startswith(LARGER)
    assert CheckpointStore._guarded(lambda: (_ for _ in ()).throw(caught.value)).startswith(LARGER)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT, errno.ENAMETOOLONG]
)
def test_the_words_for_an_error_come_from_its_number_wherever_it_stands(number):
    plain = OSError(number, "in some language")
    told = in_words(plain)
    wrapped = RuntimeError("a library's own words")
    wrapped.__cause__ = ValueError()
    wrapped.__cause__.__context__ = plain
    assert in_words(system_error(wrapped)) == told
    assert system_error(RuntimeError("No space left, it says")) is None  # words alone prove nothing
    rust = system_error(Exception(f"I/O error: whatever (os error {number})"))
    assert rust is not None and rust.errno == number


def test_metrics_and_other_files_that_cannot_grow_end_the_run_and_a_cache_does_not(tmp_path):
    with files_up_to(100):
        with pytest.raises(TrainingError, match=LARGER):
            MetricsWriter(tmp_path / "metrics.jsonl").append(1, {f"a/{i}": 0.5 for i in range(20)})
        with pytest.raises(TrainingError, match=LARGER):
            write_atomically(tmp_path / "page.html", "x" * 1000)
        assert "os error" in (save_tensors(tmp_path / "a.safetensors", a=torch.zeros(1000)) or "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.mark.thorough
def test_where_only_the_weights_fit_they_are_saved_and_the_reason_is_the_systems(write_recipe, tmp_path):
    plain = train(load_recipe(write_recipe(tmp_path / "plain", CHANGES)))
    saved = plain.checkpoint
    weights, state = (saved / name for name in ("model.safetensors", "trainer/optimizer.pt"))
    limit = (weights.stat().st_size + state.stat().st_size) // 2
    assert weights.stat().st_size < limit < state.stat().st_size
    with files_up_to(limit), pytest.raises(CheckpointError, match=f"could not be written: {LARGER}") as caught:
        train(load_recipe(write_recipe(tmp_path / "full", CHANGES)))
    folder = tmp_path / "full" / "run" / "checkpoints" / "weights_step_000001"
    assert str(folder) in " ".join(caught.value.__notes__) and (folder / "model.safetensors").is_file()


@pytest.mark.thorough
def test_a_checkpoint_that_could_not_be_written_ends_the_run_before_its_first_step(write_recipe, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, {**CHANGES, "checkpoint.every": 0})
    original = CheckpointStore._start

    def small(self, staging):
        original(self, staging)
        (staging / "trainer").rmdir()
        (staging / "trainer").symlink_to("/dev/full/nowhere")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_start", small)
        with pytest.raises(CheckpointError, match="to try"):
            train(load_recipe(recipe))
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not list((tmp_path / "run" / "checkpoints").iterdir())
    shutil.rmtree(tmp_path / "run")
    tried, real = [], CheckpointStore.try_out
    monkeypatch.setattr(CheckpointStore, "try_out", lambda self, write: tried.append(1) or real(self, write))
    result = train(load_recipe(recipe))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [result.checkpoint.name]
    train(load_recipe(recipe, ["resume=auto"]))
    assert tried == [1]  # one that goes on has a checkpoint


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_folder_that_vanishes_under_a_run_ends_it(how, write_recipe, tmp_path, monkeypatch):
    folder, original = tmp_path / "run", Loop.step

    def step(self, buffer):
        original(self, buffer)
        if self.state.optimizer_step != 2:
            return
        shutil.rmtree(folder) if how == "removed" else folder.rename(tmp_path / "elsewhere")
        if how == "replaced":
            RunDirectory.open(folder, fresh=True).close()
            (folder / "metrics.jsonl").write_text("of another run\n")

    monkeypatch.setattr(Loop, "step", step)
    with pytest.raises((TrainingError, CheckpointError), match="was removed, moved or replaced"):
        train(load_recipe(write_recipe(tmp_path, {**CHANGES, "checkpoint.every": 0})))
    assert (folder / "metrics.jsonl").exists() == (how == "replaced")
    if how == "replaced":
        assert (folder / "metrics.jsonl").read_text() == "of another run\n"
        assert not [*(folder / "completions").iterdir(), *(folder / "checkpoints").glob("step_*")]


OPEN = """
import sys, time
from rlpost.errors import RlpostError
from rlpost.tracking import rundir
rundir.LOCK_WAIT_S = 0.2
print("ready", flush=True)
sys.stdin.readline()
try:
    run = rundir.RunDirectory.open(sys.argv[1], fresh=True)
except RlpostError as error:
    print("refused" if "is in use by process" in str(error) else error, flush=True)
else:
    print("holds", flush=True)
    sys.stdin.readline()
"""


def test_of_runs_that_begin_at_once_in_one_folder_one_holds_it(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", OPEN, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    runs = [subprocess.Popen(command, **pipes) for _ in range(3)]
    try:
        assert [run.stdout.readline() for run in runs] == ["ready\n"] * 3
        for run in runs:
            run.stdin.write("go\n")
            run.stdin.flush()
        assert sorted(run.stdout.readline() for run in runs) == ["holds\n", "refused\n", "refused\n"]
    finally:
        for run in runs:
            run.kill()
            run.communicate(timeout=60)
    RunDirectory.open(tmp_path / "run", fresh=True).close()  # what held it is gone


def test_a_store_makes_no_runs_folder_that_is_gone(tmp_path):
    from rlpost.learner.process import Processes

    store = CheckpointStore(tmp_path / "gone" / "checkpoints", 1, Processes())
    with pytest.raises(CheckpointError, match="its folder does not exist any more"):
        store.write(1, lambda folder: None, lambda folder: None)
    assert not Path(tmp_path / "gone").exists()

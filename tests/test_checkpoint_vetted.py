"""A checkpoint of somebody else's cannot run a program: what its pickles name is looked at before they are loaded."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from rlpost.errors import CheckpointError
from rlpost.experience import Completion, Demonstration, Group, Outcome, Prompt, Score, without_columns
from rlpost.learner.checkpoint import MANIFEST, verify
from rlpost.learner.rng import rng_state
from rlpost.learner.vetted import refuse_code
from rlpost.recipe.load import load_recipe
from rlpost.run.loop import train
from rlpost.source.collects import Collected
from rlpost.teaching.teacher import Teaching


class Calls:
    """Pickled as a call of anything."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def listed(folder) -> None:
    """A manifest that vouches for whatever lies in the folder, as an attacker writes it."""
    files = {
        f.relative_to(folder).as_posix(): {
            "bytes": f.stat().st_size,
            "sha256": hashlib.sha256(f.read_bytes()).hexdigest(),
        }
        for f in folder.rglob("*")
        if f.is_file() and f.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": files}))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint's folder, as far as `verify` looks at one."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "config.json").write_text("{}")
    torch.save({"w": torch.zeros(2)}, tmp_path / "trainer" / "optimizer.pt")
    listed(tmp_path)
    verify(tmp_path)
    return tmp_path


def marker(folder):
    return folder / "it-ran"


ATTACKS = {
    "os.system": lambda path: Calls(os.system, f"touch {path}"),
    "eval": lambda path: Calls(eval, f"open({str(path)!r}, 'w')"),
    "builtins.getattr": lambda path: Calls(getattr, "", "join"),
    "a module of rlpost that runs": lambda path: "rlpost.__main__",
    "a class of rlpost that is no noun": lambda path: Calls(random.Random, 3),
    "deep in a tensor's dictionary": lambda path: {"a": [torch.zeros(1), {"b": Calls(os.system, f"touch {path}")}]},
}


@pytest.mark.parametrize("name", ["os.system", "eval", "builtins.getattr", "deep in a tensor's dictionary"])
def test_a_pickle_that_names_a_function_is_refused_before_it_is_loaded(checkpoint, name):
    torch.save({"rng": ATTACKS[name](marker(checkpoint))}, checkpoint / "trainer" / "rank_0.pt")
    listed(checkpoint)
    with pytest.raises(CheckpointError, match=r"rank_0\.pt would call .*run a program on your machine.*model\.path="):
        verify(checkpoint)
    assert not marker(checkpoint).exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_plain_pickle_under_the_name_of_a_tensor_file_is_refused(checkpoint, protocol):
    payload = pickle.dumps(Calls(os.system, f"touch {marker(checkpoint)}"), protocol=protocol)
    (checkpoint / "trainer" / "rank_0.pt").write_bytes(payload)
    listed(checkpoint)
    with pytest.raises(CheckpointError, match=r"rank_0\.pt is not a file as rlpost saves it"):
        verify(checkpoint)
    with zipfile.ZipFile(checkpoint / "trainer" / "rank_0.pt", "w") as archive:  # and as torch packs one
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    listed(checkpoint)
    with pytest.raises(CheckpointError, match=r"rank_0\.pt (is not a file as rlpost saves it|would call)"):
        verify(checkpoint)
    assert not marker(checkpoint).exists()


def name_only(module: str, name: str) -> bytes:
    """A pickle that names something and calls nothing: enough for an import to run."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."


@pytest.mark.parametrize(
    ("module", "name"),
    [("rlpost.__main__", "main"), ("rlpost.cli", "main"), ("rlpost.run.loop", "Loop"), ("rlpost.methods", "no_such")],
)
def test_only_what_is_saved_may_be_named_of_rlpost(tmp_path, module, name):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", name_only(module, name))
        archive.writestr("x/version", "3\n")
    with pytest.raises(CheckpointError, match=f"would call {module}.{name}"):
        refuse_code(tmp_path)


def test_a_file_that_is_added_or_a_manifest_that_lists_nothing_is_refused(checkpoint):
    torch.save({}, checkpoint / "trainer" / "rank_1.pt")
    with pytest.raises(CheckpointError, match=r"trainer/rank_1\.pt is not in its manifest\.json"):
        verify(checkpoint)
    (checkpoint / "trainer" / "rank_1.pt").unlink()
    (checkpoint / "notes.txt").write_text("somebody's own")
    verify(checkpoint)
    for file in (checkpoint / "trainer" / "optimizer.pt", checkpoint / "config.json"):
        file.unlink()
    (checkpoint / MANIFEST).write_text(json.dumps({"version": 1, "files": {}}))
    with pytest.raises(CheckpointError, match="lists no files"):
        verify(checkpoint)


def test_what_a_run_saves_is_loaded(checkpoint):
    """Generators, and groups whose data had columns of any class."""
    columns = {"when": datetime.date(2026, 1, 1), "answer": np.float64(3.0)}
    bare = Prompt("p", ({"role": "user", "content": "?"},), "?", (1, 2), columns, Demonstration("3"))
    hinted = Prompt("p", (), "?", (1, 2, 3), columns, origin=bare)
    score = Score(Outcome.SCORED, 1.0)
    group = without_columns(Group(hinted, (Completion((1,), (-0.5,), "a", "stop", ((3, 1),)),), ((score,),)))
    assert group.prompt.columns == {} and group.prompt.bare.columns == {}
    own = {"rng": rng_state(), "ahead": [(3, Collected(Teaching([group]), 3, (1, 2)))]}
    torch.save(own, checkpoint / "trainer" / "rank_0.pt")
    listed(checkpoint)
    verify(checkpoint)
    loaded = torch.load(checkpoint / "trainer" / "rank_0.pt", weights_only=False)
    assert loaded["ahead"] == own["ahead"]
    assert loaded["ahead"][0][1].teaching.groups[0].completions[0].versions == ((3, 1),)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "change", [{"seed": 7}, {"data.train": {"type": "arithmetic", "size": 40, "high": 7}}, {"method.preset": "ppo"}]
)
def test_a_refused_resume_changes_nothing(write_recipe, tmp_path, change):
    """Not even what was written after the checkpoint that it names."""
    settings = {"learner.rollouts": 3, "checkpoint.every": 1, "checkpoint.keep": 5}
    train(load_recipe(write_recipe(tmp_path, settings)))
    run = tmp_path / "run"

    def lies() -> dict[str, bytes]:
        return {str(f): f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name != ".lock"}

    before = lies()
    first = run / "checkpoints" / "step_000001"
    with pytest.raises(CheckpointError):
        train(load_recipe(write_recipe(tmp_path, settings | change | {"resume": str(first)})))
    assert lies() == before

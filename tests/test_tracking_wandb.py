"""W&B through the real package, without a server."""

from __future__ import annotations

import json
import struct

import pytest

from rlpost.experience import Completion, Group, Outcome, Prompt, Score
from rlpost.recipe.sections.learner import WandbSection
from rlpost.tracking import wandb as tracking_wandb
from rlpost.tracking.completions import ScoredRollout, records
from rlpost.tracking.rundir import RunDirectory
from rlpost.tracking.wandb import WandbTracker


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """No key from the machine, no server, and settings files that are this test's own."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    import wandb

    wandb.teardown()


@pytest.fixture
def run(tmp_path):
    with RunDirectory.open(tmp_path / "run", fresh=True) as run:
        yield run


def sample():
    completion = Completion((1, 2), (0.0, 0.0), "seven", "stop")
    group = Group(Prompt("p/1", (), "3 + 4?", (1,)), (completion,), ((Score(Outcome.TIMED_OUT),),))
    return records(1, ScoredRollout([group], [[float("nan")]], ("math",)))


def stored_records(data):
    """The records of a .wandb file: a LevelDB log (blocks of 32 KiB; crc, length, type) behind a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def history(run):
    """All history rows of the run's offline files, oldest first."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(run.wandb.glob("offline-run-*/run-*.wandb")):
        for data in stored_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return found


@pytest.mark.engine
def test_offline_run_and_resume_under_the_same_id_without_repeated_rows(run):
    notes = []
    first = WandbTracker(run, WandbSection(mode="offline"), {"learner": {"rollouts": 3}}, notes.append)
    assert first.active, notes
    for step in (1, 2):
        first.log({"step": step, "kind": "train", "reward/mean": step / 2, "policy/entropy": None}, kind="train")
    first.log({"step": 2, "kind": "eval", "eval/accuracy": 0.5}, kind="eval")
    first.log_completions(1, sample())
    first.finish()
    assert not first.active

    second = WandbTracker(run, WandbSection(mode="offline"), {}, notes.append)
    assert second.id == first.id
    for step in (2, 3):  # resumed from a checkpoint after step 1
        second.log({"step": step, "kind": "train", "reward/mean": step / 2}, kind="train")
    second.finish()
    assert notes == []
    rows = history(run)
    assert [row["step"] for row in rows if "reward/mean" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [2]
    assert any("completions/samples" in key for row in rows for key in row)
    assert all("policy/entropy" not in row for row in rows)
    (table,) = run.wandb.glob("offline-run-*/files/media/table/completions/*.json")
    assert "timed_out" in table.read_text() and "seven" in table.read_text()


@pytest.mark.engine
def test_online_without_a_key_goes_on_off_line_and_says_so_once(run):
    notes = []
    tracker = WandbTracker(run, WandbSection(mode="online"), {}, notes.append)
    assert tracker.active and len(notes) == 1
    assert "not logged in" in notes[0] and "wandb sync" in notes[0] and str(run.path) in notes[0]
    tracker.log({"step": 1, "kind": "train", "reward/mean": 1.0}, kind="train")
    tracker.finish()
    assert [row["step"] for row in history(run)] == [1]


@pytest.mark.engine
def test_online_without_a_network_goes_on_off_line(run, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking_wandb, "INIT_TIMEOUT_S", 3.0)
    notes = []
    tracker = WandbTracker(run, WandbSection(mode="online"), {}, notes.append)
    assert tracker.active and "not reachable" in notes[0]
    tracker.log({"step": 1, "kind": "train", "reward/mean": 1.0}, kind="train")
    tracker.finish()
    assert [row["step"] for row in history(run)] == [1]


def test_disabled_does_nothing(run):
    notes = []
    tracker = WandbTracker(run, WandbSection(mode="disabled"), {}, notes.append)
    tracker.log({"step": 1, "reward/mean": 1.0}, kind="train")
    tracker.log_completions(1, sample())
    tracker.finish()
    assert not tracker.active and notes == [] and not run.wandb.exists()


def test_the_environment_wins_over_the_recipe(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not WandbTracker(run, WandbSection(mode="offline"), {}, print).active


def test_a_failure_of_wandb_never_reaches_the_loop(run, monkeypatch):
    import wandb

    def broken(**_):
        raise RuntimeError("no disk\nsecond line")

    monkeypatch.setattr(wandb, "init", broken)
    notes = []
    tracker = WandbTracker(run, WandbSection(mode="offline"), {}, notes.append)
    assert not tracker.active and len(notes) == 1 and "no disk" in notes[0] and "\n" not in notes[0]
    tracker.log({"step": 1, "reward/mean": 1.0}, kind="train")
    tracker.finish()


def test_a_failing_log_switches_wandb_off_once(run):
    class Broken:
        def log(self, row):
            raise OSError("gone")

    notes = []
    tracker = WandbTracker(run, WandbSection(mode="disabled"), {}, notes.append)
    tracker._run = Broken()
    for step in (1, 2, 3):
        tracker.log({"step": step, "reward/mean": 1.0}, kind="train")
    assert len(notes) == 1 and "gone" in notes[0]

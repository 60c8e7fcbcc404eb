"""The run directory, metrics, completions, console and tracker."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from rlpost.errors import RlpostError, TrainingError
from rlpost.experience import Completion, Group, Outcome, Prompt, Score
from rlpost.recipe.sections.learner import LearnerSection, TrackingSection, WandbSection
from rlpost.recipe.sections.reward import RewardSection
from rlpost.tracking.completions import (
    ScoredRollout,
    completion_files,
    pick_sample,
    read_completions,
    records,
    write_completions,
)
from rlpost.tracking.console import PlainConsole, in_words, make_console, one_line, printable
from rlpost.tracking.metrics import MetricsWriter, read_metrics
from rlpost.tracking.rundir import RunDirectory
from rlpost.tracking.tracker import Tracker


class FakeRecipe(SimpleNamespace):
    def model_dump(self, *, mode):
        return {"name": "fake", "learner": self.learner.model_dump(mode=mode)}


def make_recipe(*, wandb="disabled", steps=10, minibatches=1, show=10):
    return FakeRecipe(
        learner=LearnerSection(steps=steps, minibatches=minibatches),
        tracking=TrackingSection(wandb=WandbSection(mode=wandb), show_completion_every=show),
        rewards=(RewardSection(function="math"), RewardSection(function="format", weight=0.2)),
    )


def make_rollout(text="It is 7."):
    prompt = Prompt("source/3", (), "What is 3 + 4?", (1, 2, 3))
    completions = (
        Completion((4, 5), (-0.1, -0.2), text, "stop"),
        Completion((4, 5, 6), (-0.1, -0.2, -0.3), "hmm", "length"),
    )
    scores = (
        (Score(Outcome.SCORED, 1.0), Score(Outcome.SCORED, 0.5)),
        (Score(Outcome.TIMED_OUT, None, "10 s"), Score(Outcome.NOT_APPLICABLE)),
    )
    group = Group(prompt, completions, scores)
    return ScoredRollout([group], [[1.1, math.nan]], ("math", "format"), [[0.5, 0.0]])


# --- run directory -------------------------------------------------------------------------------------------------


def test_open_makes_the_folders_and_can_be_opened_again_after_close(tmp_path):
    path = tmp_path / "runs" / "a"
    with RunDirectory.open(path, fresh=True) as run:
        assert run.name == "a"
        assert run.completions.is_dir() and run.checkpoints.is_dir()
    RunDirectory.open(path, fresh=True).close()


def test_a_live_runs_directory_is_refused_naming_the_holder(tmp_path):
    code = (
        "import sys, pathlib\nfrom rlpost.tracking.rundir import RunDirectory\n"
        f"run = RunDirectory.open({str(tmp_path / 'a')!r}, fresh=True)\nprint('held', flush=True)\nsys.stdin.read()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RlpostError) as refused:
            RunDirectory.open(tmp_path / "a", fresh=False)
        assert str(holder.pid) in str(refused.value) and socket.gethostname() in str(refused.value)
        assert str(tmp_path / "a") in str(refused.value)
        holder.kill()
        holder.wait()
        RunDirectory.open(tmp_path / "a", fresh=False).close()  # a killed run's lock goes with it
    finally:
        holder.kill()
        holder.wait()


def test_a_fresh_run_in_a_used_directory_is_refused_with_three_ways_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RlpostError) as refused:
        RunDirectory.open(tmp_path, fresh=True)
    for way in ("resume=auto", "name=", "overwrite=true"):
        assert way in str(refused.value)
    RunDirectory.open(tmp_path, fresh=False).close()  # the refusal gave the lock back


def test_checkpoints_alone_also_count_as_a_run(tmp_path):
    (tmp_path / "checkpoints" / "step_3").mkdir(parents=True)
    with pytest.raises(RlpostError, match="checkpoints/"):
        RunDirectory.open(tmp_path, fresh=True)


def test_overwrite_removes_the_earlier_run_and_nothing_else(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "checkpoints" / "step_3").mkdir(parents=True)
    (tmp_path / "my_notes.txt").write_text("keep me")
    with RunDirectory.open(tmp_path, fresh=True, overwrite=True) as run:
        assert not run.metrics.exists() and not any(run.checkpoints.iterdir())
        assert (tmp_path / "my_notes.txt").read_text() == "keep me"


def test_an_impossible_path_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RlpostError, match="file/run"):
        RunDirectory.open(tmp_path / "file" / "run", fresh=True)


def test_a_full_disk_is_refused_by_name(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RlpostError, match="no space left on the disk") as refused:
        RunDirectory.open(tmp_path / "run", fresh=True)
    assert str(tmp_path / "run") in str(refused.value)
    monkeypatch.undo()
    RunDirectory.open(tmp_path / "run", fresh=True).close()


def test_truncate_after_keeps_exactly_what_the_checkpoint_knows(tmp_path):
    with RunDirectory.open(tmp_path, fresh=True) as run:
        writer = MetricsWriter(run.metrics)
        writer.append(0, {"eval/accuracy": 0.1}, kind="eval")
        for step in range(1, 7):
            writer.append(step, {"reward/mean": step / 7})
            if step % 2:  # a rollout feeds two optimizer steps
                write_completions(run.completions, step, records(step, make_rollout()))
            if step == 4:
                before = run.metrics.read_bytes()
        run.truncate_after(4)
        assert run.metrics.read_bytes() == before
        assert [file.name for file in completion_files(run.completions)] == ["step_000001.jsonl", "step_000003.jsonl"]
        writer.forget()
        assert [json.loads(line)["step"] for line in (tmp_path / "abandoned_metrics.jsonl").open()] == [5, 6]
        assert (tmp_path / "abandoned_completions" / "step_000005.jsonl").is_file()
        assert writer.append(5, {"reward/mean": 5 / 7})["step"] == 5
        assert [row["step"] for row in read_metrics(run.metrics)] == [0, 1, 2, 3, 4, 5]
        run.truncate_after(-1)
        assert read_metrics(run.metrics) == [] and completion_files(run.completions) == []


# --- metrics -------------------------------------------------------------------------------------------------------


def test_not_finite_numbers_become_null_and_tensors_numbers(tmp_path):
    import torch

    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.append(1, {"a": math.nan, "b": math.inf, "c": torch.tensor(0.5), "d": 3, "e": None})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "kind": "train", "a": None, "b": None, "c": 0.5, "d": 3, "e": None,
    }  # fmt: skip


def test_a_row_is_on_disk_as_soon_as_it_is_appended_and_never_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.append(1, {"x": 1.0})
    assert len(read_metrics(path)) == 1
    writer.append(1, {"x": 1.0})
    writer.append(1, {"eval/accuracy": 1.0}, kind="eval")
    MetricsWriter(path).append(1, {"x": 1.0})
    assert [row["kind"] for row in read_metrics(path)] == ["train", "eval"]
    assert [row["kind"] for row in read_metrics(path, kind="eval")] == ["eval"]


@pytest.mark.parametrize("tail", ['{"step": 2, "x"', "{", '{"step": 2}'])
def test_a_partial_last_line_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train"}\n' + tail)
    assert [row["step"] for row in read_metrics(path)] == [1]
    MetricsWriter(path).append(2, {"x": 2.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_opening_a_killed_runs_directory_drops_the_partial_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n{"st')
    with RunDirectory.open(tmp_path, fresh=False) as run:
        assert run.metrics.read_text().endswith('"train"}\n')


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(RlpostError, match="line 2"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_metrics_that_cannot_be_written_stop_the_run(tmp_path):
    with pytest.raises(TrainingError, match="gone"):
        MetricsWriter(tmp_path / "gone" / "metrics.jsonl").append(1, {})


# --- completions ---------------------------------------------------------------------------------------------------


def test_completions_come_back_as_written(tmp_path):
    # U+2028 ends a line for str.splitlines, and a lone surrogate is what a cut byte-level token decodes to.
    found = records(12, make_rollout("line\u2028break \udcff \u00fc\n</script>"))
    path = write_completions(tmp_path, 12, found)
    assert path.name == "step_000012.jsonl"
    assert read_completions(path) == found
    first, second = found
    assert first.reward == 1.1 and first.advantage == 0.5 and first.tokens == 2 and first.finish == "stop"
    assert first.scores["math"].value == 1.0
    assert second.reward is None and second.scores["math"].outcome == "timed_out"
    assert second.scores["math"].detail == "10 s" and second.scores["format"].outcome == "not_applicable"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing temporary is left


def test_methods_without_scores_and_advantages_can_be_recorded():
    group = Group(Prompt("p", (), "q", ()), (Completion((1,), (0.0,), "a", "stop"),))
    (record,) = records(1, ScoredRollout([group], [[math.nan]], ("math",)))
    assert record.scores == {} and record.advantage is None and record.reward is None


def test_the_shown_sample_varies_and_is_reproducible():
    found = records(1, make_rollout())
    assert {pick_sample(found, step).sample for step in range(4)} == {0, 1}
    assert pick_sample(found, 3) == pick_sample(found, 3)
    assert pick_sample([], 3) is None


# --- console -------------------------------------------------------------------------------------------------------

ROW = {
    "step": 3, "kind": "train", "reward/mean": 0.5, "completions/length_mean": 212.4, "optimizer/loss": None,
    "optimizer/grad_norm": 0.41, "time/step": 8.0, "time/rollout": 6.0, "time/update": 2.0,
}  # fmt: skip


def test_plain_output_is_one_line_a_step_without_control_characters():
    stream = io.StringIO()
    console = make_console(10, stream=stream)
    assert isinstance(console, PlainConsole)
    console.step(ROW)
    assert stream.getvalue() == (
        "step 3/10 | reward 0.500 | length 212 | loss nan | grad 0.41 | 8.0 s (rollout 75% update 25%) | 56 s left\n"
    )


def test_a_stream_that_knows_only_ascii_gets_ascii():
    raw = io.BytesIO()
    console = PlainConsole(10, io.TextIOWrapper(raw, encoding="ascii"))
    console.note("smørrebrød")
    assert raw.getvalue() == b"sm?rrebr?d\n"


def test_a_completion_cannot_drive_the_terminal():
    assert "\x1b" not in printable("\x1b[2J\x07 hi") and printable("a\nb") == "a\nb"
    assert "\x1b" not in one_line("\x1b]0;title\x07")


def test_the_live_console_shows_everything_and_treats_markup_as_text():
    from rich.console import Console as RichConsole

    from rlpost.tracking.advice import Advice
    from rlpost.tracking.console import LiveConsole

    stream = io.StringIO()
    console = LiveConsole(10, RichConsole(file=stream, force_terminal=True, width=100, _environ={}))
    console.step(ROW)
    console.evaluation({"step": 3, "kind": "eval", "eval/accuracy": 0.25})
    console.advice(Advice("some-id", "do this"))
    console.sample(records(3, make_rollout("[bold]x[/bold] [/oops]"))[0])
    console.close()
    shown = stream.getvalue()
    for text in ("3/10", "accuracy 0.25", "some-id", "[bold]x[/bold] [/oops]", "reward"):
        assert text in shown


def test_durations_in_words():
    assert [in_words(s) for s in (12, 89, 600, 3600 * 3 + 300)] == ["12 s", "89 s", "10 min", "3 h 05 min"]


# --- tracker -------------------------------------------------------------------------------------------------------


def drive(run, recipe, steps, **keywords):
    stream = io.StringIO()
    tracker = Tracker(run, recipe, is_main=True, console=PlainConsole(10, stream), **keywords)
    for step in steps:
        tracker.step(step, {"reward/mean": step / 10, "time/step": 1.0 * step}, make_rollout() if step % 2 else None)
        if step == 4:
            tracker.evaluation(step, {"accuracy": 0.5, "pass@1": 0.5})
    return tracker, stream


def test_the_tracker_fans_out(tmp_path):
    with RunDirectory.open(tmp_path, fresh=True) as run:
        tracker, stream = drive(run, make_recipe(steps=5, minibatches=2), range(1, 7))
        tracker.sync()
        tracker.close("finished")
        rows = read_metrics(run.metrics)
        assert [(row["kind"], row["step"]) for row in rows] == [
            ("train", 1), ("train", 2), ("train", 3), ("train", 4), ("eval", 4), ("train", 5), ("train", 6),
        ]  # fmt: skip
        assert rows[4]["eval/accuracy"] == 0.5
        assert len(completion_files(run.completions)) == 3
        assert "learner" in run.recipe.read_text()
    assert "step 6/10" in stream.getvalue() and "eval at step 4: accuracy 0.5" in stream.getvalue()
    assert stream.getvalue().count("sample of step") == 1  # rollouts 0, 10, 20, ...
    assert "run finished" in stream.getvalue()


def test_killed_and_resumed_equals_never_stopped(tmp_path):
    recipe = make_recipe(minibatches=2)
    with RunDirectory.open(tmp_path / "a", fresh=True) as whole:
        drive(whole, recipe, range(1, 9))[0].close("finished")
    with RunDirectory.open(tmp_path / "b", fresh=True) as killed:
        drive(killed, recipe, range(1, 7))
        with killed.metrics.open("a") as file:
            file.write('{"step": 7, "rew')
    with RunDirectory.open(tmp_path / "b", fresh=False) as resumed:
        resumed.truncate_after(3)
        drive(resumed, recipe, range(4, 9))[0].close("finished")
    assert resumed.metrics.read_bytes() == whole.metrics.read_bytes()
    for one, other in zip(completion_files(whole.completions), completion_files(resumed.completions), strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes()


def test_other_processes_write_nothing(tmp_path):
    tracker = Tracker(RunDirectory.at(tmp_path), make_recipe(), is_main=False)
    tracker.step(1, {"reward/mean": 1.0}, make_rollout())
    tracker.evaluation(1, {"accuracy": 1.0})
    tracker.note("x")
    tracker.sync()
    tracker.close("finished")
    assert list(tmp_path.iterdir()) == []


def test_advice_is_given_once_and_in_the_console(tmp_path):
    stream = io.StringIO()
    with RunDirectory.open(tmp_path, fresh=True) as run:
        tracker = Tracker(run, make_recipe(), is_main=True, console=PlainConsole(10, stream))
        for step in range(1, 10):
            tracker.step(step, {"completions/truncated_share": 1.0})
        tracker.close("finished")
    assert stream.getvalue().count("advice [all-truncated]") == 1


def test_a_closed_terminal_does_not_end_the_run(tmp_path):
    stream = io.StringIO()
    with RunDirectory.open(tmp_path, fresh=True) as run:
        tracker = Tracker(run, make_recipe(), is_main=True, console=PlainConsole(10, stream))
        stream.close()
        tracker.step(1, {"reward/mean": 1.0}, make_rollout())
        tracker.close("stopped")
        assert len(read_metrics(run.metrics)) == 1

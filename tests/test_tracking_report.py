"""The report: one page that needs nothing else, from metrics of any length."""

from __future__ import annotations

import math
import re

import pytest

from rlpost.errors import RlpostError
from rlpost.experience import Completion, Group, Outcome, Prompt, Score
from rlpost.tracking.completions import ScoredRollout, records, write_completions
from rlpost.tracking.figures import extra_groups, smooth
from rlpost.tracking.metrics import MetricsWriter, read_metrics
from rlpost.tracking.report import summarize, write_report
from rlpost.tracking.rundir import RunDirectory

HOSTILE = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }} <img src=http://example.invalid/a.png>"


def make_run(path, steps, *, everything=True):
    with RunDirectory.open(path, fresh=True) as run:
        run.write_recipe({"name": "fake", "note": HOSTILE})
        writer = MetricsWriter(run.metrics)
        if everything:
            writer.append(0, {"eval/accuracy": 0.25, "eval/pass@4": 0.5}, kind="eval")
        for step in range(1, steps + 1):
            metrics = {"reward/mean": step / 100, "completions/length_mean": 100.0 + step}
            if everything:
                metrics |= {
                    "policy/entropy": math.nan if step == 2 else 0.5,
                    "policy/kl_reference": 0.01 * step,
                    "time/rollout": 2.0,
                    "time/update": 1.0,
                    "time/step": 3.5,
                    "tokens/completion": 350,
                    "mask/curvature/kept_share": 0.9,
                    "guidance/prompts": step,
                }
            writer.append(step, metrics)
        if everything:
            writer.append(steps, {"eval/accuracy": 0.75, "eval/pass@4": 0.8}, kind="eval")
            prompt = Prompt("p/1", (), HOSTILE, (1,))
            scores = ((Score(Outcome.SCORED, 1.0),), (Score(Outcome.CRASHED, None, HOSTILE),))
            group = Group(prompt, (Completion((1,), (0.0,), HOSTILE, "stop"),) * 2, scores)
            rollout = ScoredRollout([group], [[1.0, math.nan]], ("<b>math</b>",), [[1.0, 0.0]])
            write_completions(run.completions, 1, records(1, rollout))
    return run


def test_the_page_is_self_contained_and_escapes_everything(tmp_path):
    run = make_run(tmp_path / "run<1>", 20)
    page_path = write_report(run.path)
    assert page_path == run.path / "report" / "index.html"
    page = page_path.read_text()
    assert (
        "<script" not in page and "<b>math" not in page and "<img src=http" not in page and "<title>run<1>" not in page
    )
    assert "&lt;script&gt;" in page and "{{ 7 * 7 }}" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 9 and all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert "http" not in re.sub(r"http://example.invalid|http-equiv", "", page)
    assert {one.name for one in page_path.parent.glob("*.png")} == {
        "reward.png", "accuracy.png", "length.png", "entropy.png", "kl.png", "time.png",
        "group_mask.png", "group_guidance.png", "group_tokens.png",
    }  # fmt: skip
    for text in ("crashed", "0.750", "from 0.250", "100", "unknown"):
        assert text in page


@pytest.mark.parametrize(("steps", "everything"), [(1, False), (1, True), (3, True)])
def test_short_and_partial_metrics_make_a_page(tmp_path, steps, everything):
    run = make_run(tmp_path / "run", steps, everything=everything)
    page = write_report(run.path).read_text()
    assert "data:image/png" in page and "Reward" in page


def test_an_evaluation_alone_makes_a_page(tmp_path):
    MetricsWriter(tmp_path / "metrics.jsonl").append(0, {"eval/accuracy": 0.5}, kind="eval")
    assert "0.500" in write_report(tmp_path).read_text()


def test_writing_it_again_leaves_no_old_pictures(tmp_path):
    run = make_run(tmp_path / "run", 3)
    write_report(run.path)
    run.truncate_after(0)
    write_report(run.path)
    assert [one.name for one in (run.path / "report").glob("*.png")] == ["accuracy.png"]


def test_no_metrics_and_no_directory_are_clear_errors(tmp_path):
    with pytest.raises(RlpostError, match="no metrics yet"):
        write_report(tmp_path)
    with pytest.raises(RlpostError, match="no run directory"):
        write_report(tmp_path / "nowhere")


def test_summary_numbers(tmp_path):
    run = make_run(tmp_path / "run", 20)
    numbers = {one.name: one.value for one in summarize(read_metrics(run.metrics))}
    assert numbers["optimizer steps"] == "20"
    assert numbers["reward"] == "0.155"  # the mean of steps 11..20, over 100
    assert numbers["training time"] == "70 s"
    assert numbers["completion tokens per s"] == "100"


def test_metrics_with_a_picture_of_their_own_are_not_drawn_twice():
    rows = [{"step": 1, "kind": "train", "reward/mean": 1.0, "time/step": 1.0, "mask/a": 1.0, "mask/b": None, "x": 2.0}]
    assert extra_groups(rows) == {"mask": ["mask/a"]}


def test_smoothing_keeps_constants_and_length():
    assert smooth([2.0] * 50) == [2.0] * 50
    assert smooth([1.0]) == [1.0] and smooth([]) == []
    assert smooth([0.0, 3.0, 0.0]) == [1.5, 1.0, 1.5]


def test_the_callers_matplotlib_settings_are_left_alone(tmp_path):
    import matplotlib

    before = matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.grid"]
    write_report(make_run(tmp_path / "run", 2).path)
    assert (matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.grid"]) == before


def test_the_pages_advice_knows_the_recipes_weights(tmp_path):
    for name, weight in (("low", 1.0), ("high", 2.0)):
        with RunDirectory.open(tmp_path / name, fresh=True) as run:
            run.write_recipe({"rewards": [{"function": "math", "weight": weight}]})
            writer = MetricsWriter(run.metrics)
            for step in range(1, 7):
                writer.append(step, {"reward/mean": 1.0, "reward/zero_variance_share": 0.7})
    assert "reward-ceiling" in write_report(tmp_path / "low").read_text()
    assert "reward-ceiling" not in write_report(tmp_path / "high").read_text()

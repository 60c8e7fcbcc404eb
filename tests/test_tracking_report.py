"""The report: one page that needs nothing else, from metrics of any length."""

from __future__ import annotations

import math
import re

import pytest

from rlpost.errors import RlpostError
from rlpost.experience import Completion, Group, Outcome, Prompt, Score
from rlpost.tracking.completions import ScoredRollout, records, write_completions
from rlpost.tracking.figures import draw_all, extra_groups, smooth
from rlpost.tracking.metrics import MetricsWriter, read_metrics
from rlpost.tracking.report import summarize, write_report
from rlpost.tracking.rundir import RunDirectory
from rlpost.tracking.timeline import Span, Timeline, last_rollouts, read_timeline

HOSTILE = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }} <img src=http://example.invalid/a.png>"

pytestmark = pytest.mark.thorough


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
    later = [{"step": step, "kind": "train", "mask/a": 1.0} for step in (2, 3)]
    rows[0]["sync/gap"] = 0.1  # of the last sync alone, say: a point is no curve
    assert extra_groups(rows + later) == {"mask": ["mask/a"]}


def controlled(steps: int) -> list[dict]:
    """Rows of a SAFE controller's decisions on a reward that climbs and levels out, two updates a rollout."""
    from rlpost.methods.controllers import KlController, Observation
    from rlpost.recipe.sections.critic import SafeController

    controller, rows = KlController(SafeController(window=10)), []
    for step in range(1, steps + 1):
        reward = 1 - math.exp(-step / 40) + 0.02 * math.sin(step)
        seen = Observation(0.004 * step, 0.9 * math.exp(-step / 90), math.nan if step % 2 == 0 else reward, 0.3)
        rows.append({"step": step, "kind": "train", **controller.step(seen).metrics})
    return rows


def test_the_controller_has_one_picture(tmp_path, monkeypatch):
    """All its parts are on it: KL against the threshold over bands of phases, gate, coefficient, penalty, PID terms."""
    from matplotlib.figure import Figure

    drawn: dict[str, Figure] = {}
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **o: (drawn.update({path.name: self}), save(self, path, **o))
    )
    rows = controlled(240)
    pictures = {one.path.name: one.title for one in draw_all(rows, tmp_path)}
    assert pictures["controller.png"] == "KL controller" and (tmp_path / "controller.png").stat().st_size > 20_000
    panels = {axes.get_title(loc="left"): axes for axes in drawn["controller.png"].axes}
    assert len(panels) == 5
    top = panels["KL to the reference and its threshold"]
    lines = {line.get_label(): list(line.get_ydata()) for line in top.lines}
    assert lines["threshold"] == [row["controller/threshold"] for row in rows]
    assert lines["KL"][-1] == pytest.approx(0.96)
    phases = [row["controller/phase"] for row in rows]
    changes = sum(a != b for a, b in zip(phases, phases[1:], strict=False))
    assert changes >= 2 and all(len(axes.patches) == changes + 1 for axes in panels.values())
    assert {"warmup", "climbing", "converged"} <= {patch.get_label() for patch in top.patches}
    pid = {line.get_label(): list(line.get_ydata()) for line in panels["PID on the reward's velocity"].lines}
    assert set(pid) == {"P", "I", "D", "output"} and pid["output"] == [row["controller/pid"] for row in rows]
    # What is on it is not drawn a second time as small multiples; the rest of the group is.
    left = extra_groups(rows)["controller"]
    assert "controller/step_scale" in left and not {"controller/kl", "controller/pid_i", "controller/gate"} & set(left)


def test_an_adaptive_controllers_picture_has_its_target(tmp_path):
    row = {"kind": "train", "controller/kl": 0.1, "controller/target": 0.05, "controller/coefficient": 0.05}
    pictures = draw_all([{"step": step, **row} for step in (1, 2, 3)], tmp_path)
    assert [one.path.name for one in pictures] == ["controller.png"]


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
    with RunDirectory.open(tmp_path / "model", fresh=True) as run:
        run.write_recipe({"rewards": [{"type": "model", "path": "judge", "weight": 1.0}]})
        writer = MetricsWriter(run.metrics)
        for step in range(1, 7):
            writer.append(step, {"reward/mean": 1.0, "reward/zero_variance_share": 0.7})
    assert "reward-ceiling" not in write_report(tmp_path / "model").read_text()
    assert "reward-ceiling" in write_report(tmp_path / "low").read_text()
    assert "reward-ceiling" not in write_report(tmp_path / "high").read_text()


def solution_rows(**changes):
    """Metrics of a run with guidance and a gate; None leaves a key out."""
    found = []
    for step in range(1, 13):
        row = {
            "kind": "train",
            "step": step,
            "guidance/hard_share": 0.5,
            "guidance/unsolved_share": 0.1,
            "guidance/solved_level_1": math.nan if step == 3 else 0.5,
            "guidance/solved_level_2": 0.3,
            "guidance/accuracy_without_hints": step / 20,
            "guidance/accuracy_trained": step / 20 + 0.2,
            "gate/sft_share": 0.1,
            "time/guide": 3.0,
            "time/rollout": 1.0,
            "time/step": 5.0,
        } | changes
        found.append({key: value for key, value in row.items() if value is not None})
    return found


def drawn(rows, monkeypatch, tmp_path):
    """The axes of the solutions' picture, by title."""
    from matplotlib import pyplot

    seen = {}
    original = pyplot.close

    def look(figure):
        seen.update({axes.get_title(loc="left"): axes for axes in figure.axes})
        return original(figure)

    monkeypatch.setattr(pyplot, "close", look)
    pictures = draw_all(rows, tmp_path)
    return seen, [picture.path.name for picture in pictures]


def test_accuracy_with_and_without_hints_in_one_picture(tmp_path, monkeypatch):
    seen, files = drawn(solution_rows(), monkeypatch, tmp_path)
    assert "solutions.png" in files and (tmp_path / "solutions.png").stat().st_size > 10_000
    names = [text.get_text() for text in seen["Right answers"].get_legend().get_texts()]
    assert names == ["first samples, without hints", "samples trained on, hints included"]
    below = seen["Prompts that no first sample solved"]
    names = {text.get_text() for text in below.get_legend().get_texts()}
    assert names == {"solved at hint 1", "solved at hint 2", "unsolved", "learned by SFT"}
    tops = [collection.get_paths()[0].vertices[:, 1].max() for collection in below.collections]
    assert tops == pytest.approx([0.25, 0.4, 0.5]), "shares of all prompts, one above the other"


def test_a_gate_alone_and_neither(tmp_path, monkeypatch):
    rows = [{k: v for k, v in row.items() if not k.startswith("guidance/")} for row in solution_rows()]
    seen, files = drawn(rows, monkeypatch, tmp_path)
    assert "solutions.png" in files and "Prompts learned from their solution" in seen
    assert "solutions.png" not in [p.path.name for p in draw_all(rows[:0], tmp_path)]


def test_the_time_of_guidance_is_named(tmp_path, monkeypatch):
    from rlpost.tracking.console import time_split

    rows = solution_rows()
    assert "guide 60%" in time_split(rows[0])
    seen, _ = drawn(rows, monkeypatch, tmp_path)
    legend = [text.get_text() for text in seen["Where the time goes"].get_legend().get_texts()]
    assert "guide (60%)" in legend and "other (20%)" in legend


def a_run_ahead(begin: float, rollouts: int) -> list[Span]:
    """Two seconds of learning and one of sampling a rollout, at once."""
    spans = []
    for n in range(rollouts):
        at = begin + 2.5 * n
        spans += [Span("rollouts", "rollout", at + 0.5, at + 1.5), Span("rollouts", "score", at + 1.5, at + 1.6)]
        spans += [Span("learner", "update", at, at + 2), Span("learner", "sync", at + 2, at + 2.4)]
    return spans


def test_the_timeline_is_written_by_both_sides_and_read_from_its_end(tmp_path):
    timeline = Timeline(tmp_path / "timeline.jsonl")
    for span in a_run_ahead(1e9, 3):
        timeline.of(span.side)(span.phase, span.start, span.end)
    with (tmp_path / "timeline.jsonl").open("a") as file:
        file.write('{"side": "learner", "pha')  # killed while it was written
    assert read_timeline(tmp_path / "timeline.jsonl") == a_run_ahead(1e9, 3)
    Timeline().of("learner")("update", 0.0, 1.0)  # another process of the run
    assert read_timeline(tmp_path / "none") == []


def test_the_picture_of_the_timeline_shows_the_last_rollouts_of_both_sides(tmp_path):
    spans = a_run_ahead(1e9, 10)
    shown = last_rollouts(spans, 2)
    assert {span.side for span in shown} == {"learner", "rollouts"}
    assert max(span.end for span in shown) - min(span.start for span in shown) == pytest.approx(4.9)
    assert sum(span.phase == "update" for span in shown) == 2
    assert last_rollouts(spans[:4], 2) == []
    again = [Span("learner", "sync", 2e9, 2e9 + 1), *a_run_ahead(2e9 + 1, 3)]  # stopped, and taken up much later
    assert min(span.start for span in last_rollouts([*spans, *again], 8)) >= 2e9
    titles = [one.title for one in draw_all([{"step": 1, "reward/mean": 0.5}], tmp_path, spans)]
    assert "Who works when (the last rollouts)" in titles
    assert (tmp_path / "timeline.png").stat().st_size > 5000

"""`rlpost report`: pictures of a run and one self-contained HTML page, from what lies in its run directory."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlpost.errors import RlpostError
from rlpost.recipe.sections.method import MethodSection
from rlpost.tracking.advice import Doctor
from rlpost.tracking.columns import Columns
from rlpost.tracking.completions import CompletionRecord, completion_files, read_completions
from rlpost.tracking.console import in_words
from rlpost.tracking.figures import draw_columns
from rlpost.tracking.metrics import MetricRow, iter_metrics, write_atomically
from rlpost.tracking.rundir import RunDirectory
from rlpost.tracking.timeline import read_timeline

SAMPLES = 12
TAIL = 10
"""Numbers "at the end" are means of this many last optimizer steps."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A summary number: what it is, its value, and a remark under it."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Hint:
    """A line of the doctor's advice and the step that called for it."""

    step: int
    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture as the page embeds it."""

    title: str
    data_uri: str


def write_report(run_dir: Path | str) -> Path:
    """Draws the run's metrics into `<run_dir>/report/` and writes `report/index.html`, whose path is returned.

    The page needs no other file and no network. Works while the run goes on, and with metrics of any length.
    Raises RlpostError when there is no such directory, or no metrics in it.
    """
    run = RunDirectory.at(run_dir)
    if not run.path.is_dir():
        raise RlpostError(
            f"There is no run directory {run.path}. Name one that a training run has written (runs/<name>)."
        )
    train, held_out, hints = _read(run)
    if not len(train) and not len(held_out):
        raise RlpostError(
            f"{run.metrics} holds no metrics yet, so there is nothing to report. A run writes its first line after its "
            "first evaluation or optimizer step: wait for it, or look at the run's output for why it never got there."
        )
    for old in run.report.glob("*.png"):
        old.unlink()
    pictures = draw_columns(train, held_out, run.report, read_timeline(run.timeline))
    page = _template().render(
        name=run.name,
        summary=_summary(train, held_out),
        hints=hints,
        images=[Image(one.title, _data_uri(one.path)) for one in pictures],
        samples=_samples(run.completions),
        recipe=run.recipe.read_text(encoding="utf-8") if run.recipe.exists() else "",
    )
    path = run.report / "index.html"
    write_atomically(path, page)
    return path


def _read(run: RunDirectory) -> tuple[Columns, Columns, list[Hint]]:
    """Training rows, evaluations, and the advice of the run's doctor, read in one pass."""
    doctor = Doctor(reward_ceiling=_reward_ceiling(run), method=_method(run))
    held_out, hints = list[MetricRow](), list[Hint]()

    def trained() -> Iterator[MetricRow]:
        for row in iter_metrics(run.metrics):
            hints.extend(Hint(int(row["step"]), one.id, one.text) for one in doctor.observe(row))
            if row.get("kind", "train") == "train":
                yield row
            elif row["kind"] == "eval":
                held_out.append(row)

    return Columns.of(trained()), Columns.of(held_out), hints


def summarize(rows: Sequence[MetricRow]) -> list[Figure]:
    """The numbers at the head of the page."""
    train = Columns.of(row for row in rows if row.get("kind", "train") == "train")
    return _summary(train, Columns.of(row for row in rows if row.get("kind") == "eval"))


def _summary(train: Columns, held_out: Columns) -> list[Figure]:
    figures = [Figure("optimizer steps", str(train.steps.max(initial=0)))]
    _, accuracy = held_out.series("eval/accuracy")
    if accuracy:
        remark = f"from {accuracy[0]:.3f}; best {max(accuracy):.3f}" if len(accuracy) > 1 else ""
        figures.append(Figure("held-out accuracy", f"{accuracy[-1]:.3f}", remark))
    for name, key, form in (("reward", "reward/mean", ".3f"), ("length, tokens", "completions/length_mean", ".0f")):
        _, values = train.series(key)
        if values:
            start, end = _mean(values[:TAIL]), _mean(values[-TAIL:])
            remark = f"from {start:{form}}" if len(values) > TAIL else ""
            figures.append(Figure(name, f"{end:{form}}", remark))
    figures += _speed(train)
    return figures


def _speed(train: Columns) -> list[Figure]:
    _, durations = train.series("time/step")
    if not durations:
        return []
    figures = [Figure("training time", in_words(sum(durations)), f"{_mean(durations):.1f} s per step")]
    _, tokens = train.having("time/step").series("tokens/completion")
    if tokens:
        figures.append(
            Figure("completion tokens per s", f"{sum(tokens) / max(sum(durations), 1e-9):.0f}", "all phases")
        )
    _, useful = train.series("tokens/useful")
    _, padded = train.series("tokens/padded")
    if useful and padded and sum(padded):
        figures.append(Figure("useful positions", f"{sum(useful) / sum(padded):.0%}", "of all computed in updates"))
    return figures


def _reward_ceiling(run: RunDirectory) -> float:
    """As `reward_ceiling` of the recipe; 1 when there is no recipe that says."""
    import yaml

    try:
        recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
        if any(reward.get("type") == "model" for reward in recipe["rewards"]):
            return math.inf
        return sum(max(float(reward["weight"]), 0.0) for reward in recipe["rewards"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return 1.0


def _method(run: RunDirectory) -> MethodSection | None:
    """The run's method; None when there is no recipe that says, or one that this version cannot read."""
    import yaml

    try:
        return MethodSection.model_validate(yaml.safe_load(run.recipe.read_text(encoding="utf-8"))["method"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, RlpostError):
        return None


def _samples(folder: Path) -> list[CompletionRecord]:
    """A few completions each from the run's first, middle and last rollout."""
    files = completion_files(folder) if folder.is_dir() else []
    places = sorted({0, len(files) // 2, len(files) - 1}) if files else []
    samples: list[CompletionRecord] = []
    for place in places:
        one = read_completions(files[place])
        each = SAMPLES // len(places)
        samples += one[:: max(1, len(one) // each)][:each]
    return samples


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _template():  # type: ignore[no-untyped-def]  # noqa: ANN202 - jinja2 is imported only where a page is made
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rlpost.tracking", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")

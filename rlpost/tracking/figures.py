"""The report's pictures: matplotlib figures of metric rows, written as PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.tracking.metrics import MetricRow, number

# Okabe and Ito's palette: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#777777",
)  # fmt: skip
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
PHASES = ("rollout", "score", "update", "sync", "checkpoint", "eval")
PANELS_PER_ROW = 3
_OWN_FIGURE = ("time/", "eval/", "reward/mean", "completions/length_mean", "policy/entropy", "policy/kl_reference")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 130,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """One PNG of the report."""

    path: Path
    title: str


@dataclass(frozen=True, slots=True)
class Line:
    """A picture of one metric over optimizer steps."""

    file: str
    key: str
    title: str
    unit: str
    color: str


LINES = (
    Line("reward", "reward/mean", "Reward", "mean reward", BLUE),
    Line("length", "completions/length_mean", "Completion length", "tokens", ORANGE),
    Line("entropy", "policy/entropy", "Policy entropy", "nats per token", GREEN),
    Line("kl", "policy/kl_reference", "KL to the reference policy", "nats per token", PURPLE),
)


def draw_all(rows: Sequence[MetricRow], folder: Path) -> list[Picture]:
    """Draws every picture for which there is data into `folder`, in the order in which the page shows them."""
    train = [row for row in rows if row.get("kind", "train") == "train"]
    held_out = [row for row in rows if row.get("kind") == "eval"]
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [_draw_line(line, train, folder) for line in LINES[:1]]
    pictures.append(_draw_accuracy(held_out, folder))
    pictures.append(_draw_pairs(train, held_out, folder))
    pictures += [_draw_line(line, train, folder) for line in LINES[1:]]
    pictures.append(_draw_time(train, folder))
    pictures += [_draw_group(group, keys, train, folder) for group, keys in extra_groups(train).items()]
    return [picture for picture in pictures if picture is not None]


def extra_groups(rows: Sequence[MetricRow]) -> dict[str, list[str]]:
    """The metric keys that have no picture of their own, by the part before the first slash."""
    groups: dict[str, list[str]] = {}
    for key in sorted({key for row in rows for key in row if "/" in key}):
        if not key.startswith(_OWN_FIGURE) and any(number(row, key) is not None for row in rows):
            groups.setdefault(key.split("/", 1)[0], []).append(key)
    return groups


def series(rows: Sequence[MetricRow], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, without the rows that lack it."""
    pairs = [(int(row["step"]), value) for row in rows if (value := number(row, key)) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smooth(values: Sequence[float]) -> list[float]:
    """A centred moving mean over about a tenth of the run, over what there is of its window at both ends."""
    reach = max(1, round(len(values) / 20))
    smoothed = []
    for i in range(len(values)):
        window = values[max(0, i - reach) : i + reach + 1]
        smoothed.append(math.fsum(window) / len(window))
    return smoothed


def _draw_line(line: Line, rows: Sequence[MetricRow], folder: Path) -> Picture | None:
    steps, values = series(rows, line.key)
    if not steps:
        return None

    def draw(axes: Any) -> None:
        _curve(axes, steps, values, line.color, labels=True)
        axes.set_ylabel(line.unit)

    return _single(folder / f"{line.file}.png", line.title, draw)


def _draw_accuracy(rows: Sequence[MetricRow], folder: Path) -> Picture | None:
    keys = sorted({key for row in rows for key in row if key == "eval/accuracy" or "@" in key})
    found = [(key, *series(rows, key)) for key in keys]
    # pass@1 of greedy decoding is the accuracy: one curve is enough.
    found = [one for i, one in enumerate(found) if one[1] and all(one[1:] != other[1:] for other in found[:i])]
    if not found:
        return None

    def draw(axes: Any) -> None:
        for (key, steps, values), color in zip(found, PALETTE * len(found), strict=False):
            label = key.removeprefix("eval/")
            axes.plot(steps, values, marker="o", markersize=5, color=color, linewidth=2, label=label)
            if len(found) == 1:
                for step, value in zip(steps[:1] + steps[1:][-1:], values[:1] + values[1:][-1:], strict=True):
                    axes.annotate(f"{value:.2f}", (step, value), xytext=(0, 7), textcoords="offset points", ha="center")
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("share of prompts")
        if len(found) > 1:
            axes.legend(loc="lower right", ncols=min(4, len(found)))

    return _single(folder / "accuracy.png", "Held-out accuracy", draw)


def _draw_pairs(train: Sequence[MetricRow], held_out: Sequence[MetricRow], folder: Path) -> Picture | None:
    """The over-optimisation curve of preference training: the mean log-prob of chosen responses (RPO's figures 1 and 4)."""
    steps, values = series(train, "pairs/chosen_logp")
    if not steps:
        return None
    sides = (("chosen", BLUE), ("rejected", RED))
    found = [(side, color, *series(held_out, f"eval/{side}_logp")) for side, color in sides]

    def draw(axes: Any) -> None:
        _curve(axes, steps, values, SKY, labels=False)
        axes.lines[-1].set_label("chosen, training batches")
        for side, color, where, numbers in found:
            if where:
                axes.plot(where, numbers, marker="o", markersize=5, color=color, linewidth=2, label=f"{side}, held out")
        axes.set_ylabel("nats per response")
        axes.legend(loc="best", fontsize=9)

    return _single(folder / "chosen_logp.png", "Log-prob of chosen responses", draw)


def _draw_time(rows: Sequence[MetricRow], folder: Path) -> Picture | None:
    rows = [row for row in rows if any(number(row, f"time/{phase}") is not None for phase in PHASES)]
    if not rows:
        return None
    steps = [int(row["step"]) for row in rows]
    layers = {phase: [number(row, f"time/{phase}") or 0.0 for row in rows] for phase in PHASES}
    layers = {phase: values for phase, values in layers.items() if any(values)}
    known = [sum(values[i] for values in layers.values()) for i in range(len(rows))]
    other = [max(0.0, (number(row, "time/step") or 0.0) - known[i]) for i, row in enumerate(rows)]

    def draw(axes: Any) -> None:
        base = [0.0] * len(rows)
        colors = dict(zip(PHASES, PALETTE, strict=True)) | {"other": "#BBBBBB"}
        total = (math.fsum(known) + math.fsum(other)) or 1.0
        for phase, values in (layers | ({"other": other} if sum(other) > 0.01 * sum(known) else {})).items():
            label = f"{phase} ({math.fsum(values) / total:.0%})"
            axes.bar(steps, values, bottom=base, width=1.0, color=colors[phase], label=label, linewidth=0)
            base = [b + v for b, v in zip(base, values, strict=True)]
        axes.set_ylabel("seconds per step")
        axes.set_ylim(0, max(base) * 1.05 or 1)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)

    return _single(folder / "time.png", "Where the time goes", draw)


def _draw_group(group: str, keys: Sequence[str], rows: Sequence[MetricRow], folder: Path) -> Picture | None:
    """Small multiples: one little panel per metric of a group."""
    columns = min(PANELS_PER_ROW, max(2, len(keys)))
    lines = math.ceil(len(keys) / columns)
    with _pyplot() as plt:
        figure, grid = plt.subplots(lines, columns, figsize=(9, 2.3 * lines), squeeze=False, layout="constrained")
        panels = [axes for line in grid for axes in line]
        for key, axes, color in zip(keys, panels, PALETTE * len(panels), strict=False):
            steps, values = series(rows, key)
            _curve(axes, steps, values, color, labels=False)
            axes.set_title(key.removeprefix(f"{group}/"), fontsize=9, fontweight="normal")
            axes.tick_params(labelsize=8)
            axes.set_ylabel(_unit(key), fontsize=8)
        for axes in panels[len(keys) :]:
            axes.set_visible(False)
        for axes in panels[max(0, len(keys) - columns) : len(keys)]:
            axes.set_xlabel("optimizer step", fontsize=8)
        path = folder / f"group_{_file_name(group)}.png"
        figure.savefig(path)
        plt.close(figure)
    return Picture(path, f"{group}/")


def _single(path: Path, title: str, draw: Callable[[Any], None]) -> Picture:
    with _pyplot() as plt:
        figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
        draw(axes)
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        _whole_steps(axes)
        figure.savefig(path)
        plt.close(figure)
    return Picture(path, title)


def _curve(axes: Any, steps: Sequence[int], values: Sequence[float], color: str, *, labels: bool) -> None:
    """Every step faintly and a moving mean over it; few steps are drawn as points."""
    if len(steps) < 8:
        axes.plot(steps, values, color=color, marker="o", markersize=4, linewidth=1.5)
    else:
        axes.plot(steps, values, color=color, alpha=0.35, linewidth=1, label="each step" if labels else None)
        axes.plot(steps, smooth(values), color=color, linewidth=2.2, label="moving mean" if labels else None)
        if labels:
            axes.legend(loc="best", ncols=2, fontsize=9)
    _whole_steps(axes)


def _whole_steps(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02)


def _unit(key: str) -> str:
    """The unit of a metric, by the naming rules of metric keys; "" when they do not tell."""
    if key.endswith(("_share", "_fraction")):
        return "share"
    if key.startswith("tokens/") or "length" in key:
        return "tokens"
    return "nats" if key.endswith(("entropy", "_gap")) or "/kl" in key else ""


def _file_name(group: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in group)


class _pyplot:
    """pyplot without a display, in the report's style, leaving the caller's settings as they were."""

    def __enter__(self) -> Any:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        self._context = pyplot.rc_context(_STYLE)
        self._context.__enter__()
        return pyplot

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

"""The report's pictures: matplotlib figures of metric rows, written as PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlpost.tracking.columns import DRAWN, Columns, highest, thinned
from rlpost.tracking.metrics import MetricRow
from rlpost.tracking.timeline import Span, last_rollouts

# Okabe and Ito's palette: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#777777",
)  # fmt: skip
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
PHASES = ("rollout", "score", "guide", "update", "sync", "probe", "checkpoint", "eval", "wait")
PHASE_COLORS = dict(zip(PHASES, (BLUE, ORANGE, YELLOW, GREEN, PURPLE, GREY, SKY, RED, "#DDCC99"), strict=True)) | {
    "other": "#BBBBBB"
}
PANELS_PER_ROW = 3
_BARS = 200
_OWN_FIGURE = (
    *("time/", "eval/", "reward/mean", "completions/length_mean", "policy/entropy", "policy/kl_reference"),
    *(f"controller/{name}" for name in ("kl", "threshold", "target", "phase", "gate", "coefficient", "penalty", "pid")),
)
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


def draw_all(rows: Sequence[MetricRow], folder: Path, spans: Sequence[Span] = ()) -> list[Picture]:
    """Draws every picture for which there is data into `folder`, in the order in which the page shows them. `spans`: of the
    run's timeline."""
    train = Columns.of(row for row in rows if row.get("kind", "train") == "train")
    return draw_columns(train, Columns.of(row for row in rows if row.get("kind") == "eval"), folder, spans)


def draw_columns(train: Columns, held_out: Columns, folder: Path, spans: Sequence[Span] = ()) -> list[Picture]:
    """As `draw_all`, of rows that were read as columns."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [_draw_line(line, train, folder) for line in LINES[:1]]
    pictures.append(_draw_accuracy(held_out, folder))
    pictures.append(_draw_pairs(train, held_out, folder))
    pictures.append(_draw_solutions(train, folder))
    pictures += [_draw_line(line, train, folder) for line in LINES[1:]]
    pictures.append(_draw_controller(train, folder))
    pictures.append(_draw_time(train, folder))
    pictures.append(_draw_timeline(last_rollouts(spans, 4), folder))
    pictures += [_draw_group(group, keys, train, folder) for group, keys in grouped(train).items()]
    return [picture for picture in pictures if picture is not None]


def extra_groups(rows: Sequence[MetricRow]) -> dict[str, list[str]]:
    """The metric keys that have no picture of their own, by the part before the first slash. One value in several steps makes
    no picture."""
    return grouped(Columns.of(rows))


def grouped(rows: Columns) -> dict[str, list[str]]:
    """As `extra_groups`, of columns."""
    groups: dict[str, list[str]] = {}
    for key in rows.keys:
        if "/" in key and not key.startswith(_OWN_FIGURE) and rows.known(key) >= min(2, len(rows)):
            groups.setdefault(key.split("/", 1)[0], []).append(key)
    return groups


def smooth(values: Sequence[float]) -> list[float]:
    """A centred moving mean over about a tenth of the run, over what there is of its window at both ends."""
    if not len(values):
        return []
    reach = max(1, round(len(values) / 20))
    # Sums up to every value, in which a window is one difference: with the longest float there is, so that nothing shows of it.
    sums = np.concatenate(([0], np.cumsum(np.asarray(values, dtype=np.longdouble))))
    places = np.arange(len(values))
    first, after = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return ((sums[after] - sums[first]) / (after - first)).astype(np.float64).tolist()


# The controller's phases, in the order of `rlpost.methods.safe.PHASES`.
_BANDS = (("WARMUP", GREY), ("CLIMBING", GREEN), ("PLATEAU", ORANGE), ("CONVERGED", SKY))
Curve = tuple[str, str, str, dict[str, Any]]  # metric, label, colour, options of the line


def _draw_controller(rows: Columns, folder: Path) -> Picture | None:
    """What a KL controller saw and did: KL against its threshold over the phases, the gate, the penalty, the PID."""
    faint, dashed = {"linewidth": 1, "alpha": 0.6}, {"linestyle": "--", "linewidth": 1.8}
    panels: tuple[tuple[str, str, tuple[Curve, ...]], ...] = (
        (
            "KL to the reference and its threshold",
            "nats per token",
            (
                ("controller/kl", "KL", PURPLE, faint),
                ("controller/kl_average", "moving average", PURPLE, {"linewidth": 2.2}),
                ("controller/threshold", "threshold", RED, dashed),
                ("controller/target", "target", RED, dashed),
            ),
        ),
        ("Entropy gate", "factor", (("controller/gate", "gate", GREEN, {}),)),
        ("Coefficient of KL", "coefficient", (("controller/coefficient", "coefficient", BLUE, {"linewidth": 2}),)),
        ("Penalty", "penalty", (("controller/penalty", "penalty", ORANGE, {}),)),
        (
            "PID on the reward's velocity",
            "change of threshold",
            (
                ("controller/pid_p", "P", ORANGE, faint),
                ("controller/pid_i", "I", GREEN, faint),
                ("controller/pid_d", "D", SKY, faint),
                ("controller/pid", "output", BLUE, {"linewidth": 2}),
            ),
        ),
    )
    shown = [(title, unit, [c for c in curves if rows.series(c[0])[0]]) for title, unit, curves in panels]
    shown = [panel for panel in shown if panel[2]]
    if not shown:
        return None
    path = folder / "controller.png"
    with _pyplot() as plt:
        figure, grid = plt.subplots(
            len(shown), 1, figsize=(9, 0.8 + 1.7 * len(shown)), sharex=True, squeeze=False, layout="constrained"
        )
        for (title, unit, curves), (axes,) in zip(shown, grid, strict=True):
            _phase_bands(axes, rows, named=axes is grid[0][0])
            for key, label, color, options in curves:
                steps, values = rows.series(key)
                marker = "o" if len(steps) < 8 else None
                axes.plot(*thinned(steps, values), color=color, label=label, marker=marker, markersize=4, **options)
            axes.set_title(title, fontsize=10)
            axes.set_ylabel(unit, fontsize=9)
            if len(axes.get_legend_handles_labels()[0]) > 1:
                axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
            _whole_steps(axes)
        grid[-1][0].set_xlabel("optimizer step")
        figure.savefig(path)
        plt.close(figure)
    return Picture(path, "KL controller")


def _phase_bands(axes: Any, rows: Columns, *, named: bool) -> None:
    """Colours the background by the controller's phase; `named`: with an entry each in the legend."""
    steps, phases = rows.series("controller/phase")
    if not steps:
        return
    ends = [*steps[1:], *(step + 1 for step in steps[-1:])]
    starts = [i for i, phase in enumerate(phases) if i == 0 or phase != phases[i - 1]]
    told: set[str] = set() if named else {name for name, _ in _BANDS}
    for first, after in zip(starts, [*starts[1:], len(phases)], strict=True):
        name, color = _BANDS[int(phases[first])]
        label = None if name in told else name.lower()
        axes.axvspan(steps[first] - 0.5, ends[after - 1] - 0.5, color=color, alpha=0.15, linewidth=0, label=label)
        told.add(name)


def _draw_line(line: Line, rows: Columns, folder: Path) -> Picture | None:
    steps, values = rows.series(line.key)
    if not steps:
        return None

    tail_steps, tail = rows.series(f"{line.key}_p95")

    def draw(axes: Any) -> None:
        _curve(axes, steps, values, line.color, labels=True)
        if tail:
            axes.plot(*thinned(tail_steps, tail), color=GREY, linewidth=1, linestyle=":", label="95 % of tokens below")
            axes.legend(loc="best", ncols=3, fontsize=9)
        axes.set_ylabel(line.unit)

    return _single(folder / f"{line.file}.png", line.title, draw)


def _draw_accuracy(rows: Columns, folder: Path) -> Picture | None:
    keys = [key for key in rows.keys if key == "eval/accuracy" or "@" in key]
    curves = [(key, *rows.series(key)) for key in keys]
    # pass@1 of greedy decoding is the accuracy: one curve is enough.
    curves = [one for i, one in enumerate(curves) if one[1] and all(one[1:] != other[1:] for other in curves[:i])]
    if not curves:
        return None

    def draw(axes: Any) -> None:
        for (key, steps, values), color in zip(curves, PALETTE * len(curves), strict=False):
            label = key.removeprefix("eval/")
            axes.plot(*thinned(steps, values), marker="o", markersize=5, color=color, linewidth=2, label=label)
            if len(curves) == 1:
                for step, value in zip(steps[:1] + steps[1:][-1:], values[:1] + values[1:][-1:], strict=True):
                    axes.annotate(f"{value:.2f}", (step, value), xytext=(0, 7), textcoords="offset points", ha="center")
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("share of prompts")
        if len(curves) > 1:
            axes.legend(loc="lower right", ncols=min(4, len(curves)))

    return _single(folder / "accuracy.png", "Held-out accuracy", draw)


def _draw_pairs(train: Columns, held_out: Columns, folder: Path) -> Picture | None:
    """The over-optimisation curve of preference training: the mean log-prob of chosen responses (RPO's figures 1 and 4), of
    training batches and held-out pairs, and under it the margin that grows meanwhile."""
    above_curves = [
        (train, "pairs/chosen_logp", "chosen, training batches", SKY),
        (held_out, "eval/chosen_logp", "chosen, held out", BLUE),
        (held_out, "eval/rejected_logp", "rejected, held out", RED),
    ]
    below_curves = [(train, "pairs/margin", "training batches", SKY), (held_out, "eval/margin", "held out", BLUE)]
    if not train.known("pairs/chosen_logp"):
        return None
    with _pyplot() as plt:
        figure, (above, below) = plt.subplots(
            2, 1, figsize=(9, 5.2), sharex=True, layout="constrained", height_ratios=(3, 2)
        )
        for axes, curves in ((above, above_curves), (below, below_curves)):
            for rows, key, label, color in curves:
                steps, values = rows.series(key)
                if steps and rows is train:
                    _curve(axes, steps, values, color, labels=False)
                    axes.lines[-1].set_label(label)
                elif steps:
                    axes.plot(*thinned(steps, values), marker="o", markersize=5, color=color, linewidth=2, label=label)
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
        above.set_title("Log-prob of chosen responses")
        above.set_ylabel("nats per response")
        below.axhline(0, color=GREY, linewidth=1)
        below.set_title("Margin between chosen and rejected")
        below.set_ylabel("beta h")
        below.set_xlabel("optimizer step")
        figure.savefig(folder / "chosen_logp.png")
        plt.close(figure)
    return Picture(folder / "chosen_logp.png", "Log-prob of chosen responses")


def _draw_solutions(rows: Columns, folder: Path) -> Picture | None:
    """Learning from solutions: accuracy with and without hints, and what became of the prompts that nothing solved."""
    curves = [
        ("guidance/accuracy_without_hints", "first samples, without hints", BLUE),
        ("guidance/accuracy_trained", "samples trained on, hints included", ORANGE),
    ]
    if not any(rows.series(key)[0] for key, _, _ in curves):
        curves = [("gate/solve_rate", "samples", BLUE)]
    guided = rows.having("guidance/hard_share", "gate/sft_share")
    if not len(guided):
        return None
    shown = [(label, color, *guided.series(key)) for key, label, color in curves]
    with _pyplot() as plt:
        figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.2), sharex=True, layout="constrained")
        for label, color, steps, values in shown:
            if steps:
                _curve(above, steps, values, color, labels=False)
                above.lines[-1].set_label(label)
        above.set_title("Right answers")
        above.set_ylabel("share of completions")
        _stack_levels(below, guided)
        below.set_title(
            "Prompts that no first sample solved" if len(curves) > 1 else "Prompts learned from their solution"
        )
        below.set_ylabel("share of prompts")
        below.set_xlabel("optimizer step")
        for axes in (above, below):
            axes.set_ylim(0, 1.02)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, reverse=axes is below)
        figure.savefig(folder / "solutions.png")
        plt.close(figure)
    return Picture(folder / "solutions.png", "Learning from solutions")


def _stack_levels(axes: Any, rows: Columns) -> None:
    """Shares of all prompts: solved at each hint, one above the other, then unsolved; and learned from the solution."""
    hard = np.nan_to_num(rows.numbers("guidance/hard_share"))
    keys = [key for key in rows.keys if key.startswith("guidance/solved_level_")]
    layers = {f"solved at hint {key.rsplit('_', 1)[1]}": np.nan_to_num(rows.numbers(key)) * hard for key in keys}
    if keys:
        layers["unsolved"] = np.nan_to_num(rows.numbers("guidance/unsolved_share"))
        colors = [*(PALETTE[2:] * len(keys))[: len(keys)], "#BBBBBB"]
        some = slice(None, None, max(1, len(rows) // DRAWN))  # means over a tenth of the run have no peaks to be lost
        smoothed = [smooth(layer.tolist())[some] for layer in layers.values()]
        axes.stackplot(rows.steps[some].tolist(), *smoothed, labels=list(layers), colors=colors, alpha=0.8, linewidth=0)
    where, shares = rows.series("gate/sft_share")
    if where:
        axes.plot(*thinned(where, smooth(shares)), color="black", linewidth=1.8, linestyle="--", label="learned by SFT")
    _whole_steps(axes)


def _draw_time(rows: Columns, folder: Path) -> Picture | None:
    rows = rows.having(*(f"time/{phase}" for phase in PHASES))
    if not len(rows):
        return None
    layers = {phase: np.nan_to_num(rows.numbers(f"time/{phase}")) for phase in PHASES}
    layers = {phase: values for phase, values in layers.items() if values.any()}
    known = np.sum(list(layers.values()), axis=0) if layers else np.zeros(len(rows))
    other = np.maximum(0.0, np.nan_to_num(rows.numbers("time/step")) - known)
    shown = highest(known + other)  # of very many steps the slowest of each handful
    total = math.fsum(known) + math.fsum(other) or 1.0
    if other.sum() > 0.01 * known.sum():
        layers["other"] = other

    def draw(axes: Any) -> None:
        base = np.zeros(len(shown))
        steps = rows.steps[shown]
        for phase, values in layers.items():
            label = f"{phase} ({math.fsum(values) / total:.0%})"
            colored: dict[str, Any] = {"color": PHASE_COLORS[phase], "label": label, "linewidth": 0}
            if len(shown) <= _BARS:
                axes.bar(steps, values[shown], bottom=base, width=1.0, **colored)
            else:  # bars without gaps are one shape, which is drawn a hundred times as fast
                axes.fill_between(steps, base, base + values[shown], step="mid", **colored)
            base = base + values[shown]
        axes.set_ylabel("seconds per step")
        axes.set_ylim(0, base.max() * 1.05 or 1)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)

    title = "Where the time goes" + (" (the slowest steps)" if len(shown) < len(rows) else "")
    return _single(folder / "time.png", title, draw)


def _draw_timeline(spans: Sequence[Span], folder: Path) -> Picture | None:
    """Who was busy with what, second by second: the learner, and below it what was sampled at the same time."""
    if not spans:
        return None
    sides = sorted({span.side for span in spans}, key=lambda side: (side != "learner", side))
    begin = min(span.start for span in spans)
    with _pyplot() as plt:
        figure, axes = plt.subplots(figsize=(9, 1.4 + 0.5 * len(sides)), layout="constrained")
        shown = [phase for phase in PHASE_COLORS if any(_shown(span) == phase for span in spans)]
        for phase in shown:
            for row, side in enumerate(sides):
                bars = [(s.start - begin, s.end - s.start) for s in spans if s.side == side and _shown(s) == phase]
                axes.broken_barh(bars, (row - 0.35, 0.7), color=PHASE_COLORS[phase], label=phase, linewidth=0)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each phase once
        axes.legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.set_yticks(range(len(sides)), sides)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds")
        axes.set_title("Who works when (the last rollouts)")
        path = folder / "timeline.png"
        figure.savefig(path)
        plt.close(figure)
    return Picture(path, "Who works when (the last rollouts)")


def _shown(span: Span) -> str:
    return span.phase if span.phase in PHASES else "other"


def _draw_group(group: str, keys: Sequence[str], rows: Columns, folder: Path) -> Picture | None:
    """Small multiples: one little panel per metric of a group."""
    columns = min(PANELS_PER_ROW, max(2, len(keys)))
    lines = math.ceil(len(keys) / columns)
    with _pyplot() as plt:
        figure, grid = plt.subplots(lines, columns, figsize=(9, 2.3 * lines), squeeze=False, layout="constrained")
        panels = [axes for line in grid for axes in line]
        for key, axes, color in zip(keys, panels, PALETTE * len(panels), strict=False):
            steps, values = rows.series(key)
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
        name, mean = ("each step", "moving mean") if labels else (None, None)
        axes.plot(*thinned(steps, values), color=color, alpha=0.35, linewidth=1, label=name)
        axes.plot(*thinned(steps, smooth(values)), color=color, linewidth=2.2, label=mean)
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

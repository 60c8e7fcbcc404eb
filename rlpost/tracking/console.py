"""What the user sees while a run goes: a live panel on a terminal, one line per step anywhere else."""

from __future__ import annotations

import sys
from collections import deque
from statistics import fmean
from typing import IO, Protocol

from rich.console import Console as RichConsole
from rich.console import Group as Stack
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlpost.errors import printable
from rlpost.tracking.advice import Advice
from rlpost.tracking.completions import CompletionRecord
from rlpost.tracking.metrics import MetricRow, number

PHASES = ("rollout", "score", "guide", "update", "sync", "wait")
SAMPLE_CHARACTERS = 1200
_FIELDS = (
    ("reward", "reward/mean", ".3f"),
    ("length", "completions/length_mean", ".0f"),
    ("loss", "optimizer/loss", ".4g"),
    ("pair loss", "pairs/loss", ".4f"),
    ("pair accuracy", "pairs/accuracy", ".2f"),
    ("margin", "pairs/margin", ".3g"),
    ("grad", "optimizer/grad_norm", ".3g"),
)


class Console(Protocol):
    """How a run is shown."""

    def step(self, row: MetricRow) -> None:
        """Shows a training row."""
        ...

    def evaluation(self, row: MetricRow) -> None:
        """Shows an evaluation row."""
        ...

    def sample(self, record: CompletionRecord) -> None:
        """Shows one sampled completion."""
        ...

    def note(self, text: str) -> None:
        """Shows one line of plain information."""
        ...

    def advice(self, advice: Advice) -> None:
        """Shows one line of advice."""
        ...

    def close(self) -> None:
        """Gives the terminal back."""
        ...


def make_console(total_steps: int, *, live: bool = True, stream: IO[str] | None = None) -> Console:
    """The live console on a terminal when `live`, else plain lines. `stream`: stdout by default."""
    stream = stream or sys.stdout
    terminal = RichConsole(file=stream)
    # rich also knows dumb terminals and notebooks, where moving the cursor does not work.
    if live and stream.isatty() and terminal.is_terminal and not terminal.is_dumb_terminal:
        return LiveConsole(total_steps, terminal)
    return PlainConsole(total_steps, stream)


class Clock:
    """Estimates the time left from the last steps' durations."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._durations: deque[float] = deque(maxlen=20)

    def left(self, row: MetricRow) -> str:
        """Takes the next row; the time left in words, "" when not known."""
        duration = number(row, "time/step")
        if duration is not None:
            self._durations.append(duration)
        remaining = self._total - int(row["step"])
        return in_words(fmean(self._durations) * remaining) if self._durations and remaining > 0 else ""


class PlainConsole:
    """One line per step, no control characters: for logs, CI and notebooks."""

    def __init__(self, total_steps: int, stream: IO[str]) -> None:
        self._total = total_steps
        self._stream = stream
        self._clock = Clock(total_steps)

    def step(self, row: MetricRow) -> None:
        parts = [f"step {row['step']}/{self._total}", *(f"{name} {value}" for name, value in fields(row))]
        if (split := time_split(row)) != "":
            parts.append(split)
        if (left := self._clock.left(row)) != "":
            parts.append(f"{left} left")
        self._print(" | ".join(parts))

    def evaluation(self, row: MetricRow) -> None:
        self._print(f"eval at step {row['step']}: {eval_line(row)}")

    def sample(self, record: CompletionRecord) -> None:
        lines = [
            sample_title(record),
            f"  prompt: {one_line(record.prompt)}",
            f"  answer: {one_line(record.completion)}",
        ]
        self._print("\n".join(lines))

    def note(self, text: str) -> None:
        self._print(text)

    def advice(self, advice: Advice) -> None:
        self._print(f"advice [{advice.id}]: {advice.text}")

    def close(self) -> None:
        self._stream.flush()

    def _print(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


class LiveConsole:
    """A progress bar and the last step's numbers at the bottom of the terminal; notes and samples scroll above it."""

    def __init__(self, total_steps: int, console: RichConsole) -> None:
        self._total = total_steps
        self._console = console
        self._clock = Clock(total_steps)
        self._accuracy = ""
        self._last: tuple[MetricRow, str] | None = None
        self._live = Live(Text("waiting for the first step", style="dim"), console=console, refresh_per_second=4)
        self._live.start()

    def step(self, row: MetricRow) -> None:
        self._last = (row, self._clock.left(row))
        self._live.update(self._panel(*self._last))

    def evaluation(self, row: MetricRow) -> None:
        accuracy = number(row, "eval/accuracy")
        if accuracy is not None:
            self._accuracy = f"{accuracy:.3f} (step {row['step']})"
            if self._last is not None:
                self._live.update(self._panel(*self._last))
        self._console.print(Text(f"eval at step {row['step']}: {eval_line(row)}", style="bold"))

    def sample(self, record: CompletionRecord) -> None:
        body = Text.assemble((one_line(record.prompt), "dim"), "\n", printable(record.completion)[:SAMPLE_CHARACTERS])
        self._console.print(Panel(body, title=Text(sample_title(record)), title_align="left", border_style="blue"))

    def note(self, text: str) -> None:
        self._console.print(Text(printable(text)))

    def advice(self, advice: Advice) -> None:
        self._console.print(Text(f"advice [{advice.id}]: {advice.text}", style="yellow"))

    def close(self) -> None:
        self._live.stop()

    def _panel(self, row: MetricRow, left: str) -> Stack:
        step = int(row["step"])
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(f"step {step}/{self._total}", style="bold"),
            ProgressBar(total=self._total, completed=step, width=30),
            Text(f"{left} left" if left else "", style="cyan"),
        )
        numbers = list(fields(row))
        if self._accuracy:
            numbers.insert(1, ("held-out accuracy", self._accuracy))
        body = Text("   ").join(Text.assemble((name, "dim"), " ", (value, "bold")) for name, value in numbers)
        return Stack(head, body, Text(time_split(row), style="dim"))


def fields(row: MetricRow) -> list[tuple[str, str]]:
    """The row's main numbers, named and formatted; "nan" for a number that is not finite."""
    shown = []
    for name, key, form in _FIELDS:
        if key in row:
            value = number(row, key)
            shown.append((name, "nan" if value is None else format(value, form)))
    return shown


def time_split(row: MetricRow) -> str:
    """Such as `8.2 s (rollout 71% score 2% update 25% sync 2%)`; "" when there are no times."""
    step = number(row, "time/step")
    if not step:
        return ""
    shares = [f"{p} {value / step:.0%}" for p in PHASES if (value := number(row, f"time/{p}")) is not None]
    return f"{step:.1f} s" + (f" ({' '.join(shares)})" if shares else "")


def eval_line(row: MetricRow) -> str:
    """The `eval/` numbers of a row in one line."""
    values = {key.removeprefix("eval/"): number(row, key) for key in row if key.startswith("eval/")}
    return ", ".join(f"{key} {'nan' if value is None else format(value, '.3g')}" for key, value in values.items())


def sample_title(record: CompletionRecord) -> str:
    """Which completion it is, and what became of it."""
    reward = "unknown" if record.reward is None else f"{record.reward:.3f}"
    cut = ", cut at the limit" if record.finish == "length" else ""
    return printable(f"sample of step {record.step}, {record.prompt_id}: reward {reward}, {record.tokens} tokens{cut}")


def one_line(text: str, limit: int = 300) -> str:
    """The text on one line, shortened in the middle, so that question and answer stay in sight."""
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-limit // 2 :]}"


def in_words(seconds: float) -> str:
    """A duration as `40 s`, `12 min` or `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"

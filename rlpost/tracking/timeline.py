"""`timeline.jsonl`: when each phase of a run began and ended, of the learner and of what is sampled beside it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_READ_BYTES = 2**20  # from the file's end: far more than a picture shows


@dataclass(frozen=True, slots=True)
class Span:
    """One phase, once."""

    side: str  # who was busy: the learner, or rollouts beside it
    phase: str
    start: float  # seconds since 1970
    end: float


class Timeline:
    """Writes spans, from any thread. Without a path it writes nothing: one process of a run writes for all."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    def of(self, side: str) -> Callable[[str, float, float], None]:
        """What takes (phase, start, end) of one side."""

        def record(phase: str, start: float, end: float) -> None:
            if self._path is None:
                return
            line = json.dumps(asdict(Span(side, phase, round(start, 4), round(end, 4)))) + "\n"
            # A picture is not worth a run: where the disk is full, metrics and checkpoints say so.
            with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                file.write(line)

        return record


def read_timeline(path: Path) -> list[Span]:
    """The last spans of a run, as they were written; [] when there are none. Lines that are no spans are left out."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _READ_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    spans = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            spans.append(Span(**json.loads(line)))
    return spans


def last_rollouts(spans: Sequence[Span], number: int) -> list[Span]:
    """The spans of the last `number` syncs of the learner and what went before each, cut where they reach beyond. A run that
    was stopped and taken up begins with a sync: nothing from before it is shown, so the picture has no pause in it."""
    syncs: list[Span] = []
    updated = True
    for span in spans:
        if span.side == "learner" and span.phase == "update":
            updated = True
        elif span.side == "learner" and span.phase == "sync":
            syncs = [*syncs, span] if updated else [span]
            updated = False
    if len(syncs) < 2:
        return []
    first, last = syncs[max(0, len(syncs) - 1 - number)].end, syncs[-1].end
    return [
        Span(span.side, span.phase, max(span.start, first), min(span.end, last))
        for span in spans
        if span.end > first and span.start < last
    ]

"""How long updates are predicted to take, held against how long they take, and the machine's rates as corrected by that."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlpost.offload.plan import Predicted
from rlpost.offload.simulate import Rates

NAME = "offload.json"
"""In a run's folder."""
RECENT = 16


@dataclass(slots=True)
class Forecast:
    """What is predicted for one process's updates. Logs nothing itself: `observe` gives the metrics of an update.

    One way of updating tells one number, its time, and that corrects all rates by one factor: a machine that is twice as slow
    at everything takes twice as long. Which of the rates was wrong it cannot tell.
    """

    predicted: Predicted  # by `rates`
    rates: Rates  # as calibrated, or as an earlier start left them
    machine: dict[str, Any]
    file: Path | None = None  # where rates are kept; None: by another process
    earlier: int = 0  # updates that have corrected `rates` before this start
    updates: int = 0
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def factor(self) -> float:
        """By how much updates are slower than `rates` have it."""
        return statistics.median(self._recent) / self.predicted.seconds if self._recent else 1.0

    @property
    def refitted(self) -> Rates:
        return self.rates.slower(self.factor)

    def observe(self, seconds: float) -> dict[str, float]:
        """Metrics of an update that took so long; the next prediction knows of it, unless it was the first, which allocates."""
        metrics = {"offload/predicted_s": self.predicted.seconds * self.factor, "offload/measured_s": seconds}
        self.updates += 1
        if self.updates > 1:
            self._recent.append(seconds)
            if self.updates & (self.updates - 1) == 0 or self.updates % RECENT == 0:  # 2, 4, 8, 16, 32, 48, ...
                self.save()
        return metrics

    def save(self) -> None:
        """Keeps the rates for later starts and for `rlpost plan`. Where they cannot be written the run goes on: a full disk is
        said by what must be saved."""
        if self.file is None:
            return
        kept = {
            "machine": self.machine,
            "rates": asdict(self.refitted),
            "rates_at_start": asdict(self.rates),
            "way": self.predicted.way.name,
            "updates": self.earlier + self.updates,
            "slower_than_at_start": self.factor,
        }
        part = self.file.with_suffix(f".{os.getpid()}.part")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(kept, indent=1) + "\n")
            part.replace(self.file)


@dataclass(frozen=True, slots=True)
class Kept:
    """Rates that a run left in its folder."""

    rates: Rates
    machine: dict[str, Any]
    updates: int  # by which they were corrected


def read(folder: Path) -> Kept | None:
    """The rates that were kept in a run's folder; None where there are none that can be read."""
    try:
        found = json.loads((folder / NAME).read_text())
        return Kept(Rates(**found["rates"]), dict(found["machine"]), int(found["updates"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None

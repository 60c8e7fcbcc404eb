"""Saves a run: a checkpoint where that can be written, else at least the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlpost.errors import CheckpointError
from rlpost.run.rescue import rescue_alone, rescue_together
from rlpost.run.state import save_checkpoint, try_saving_state

if TYPE_CHECKING:
    from rlpost.run.parts import Parts
    from rlpost.run.state import RunState
    from rlpost.source.source import Source


class Saver:
    """Writes the run's checkpoints, each optimizer step once."""

    def __init__(self, parts: Parts, source: Source) -> None:
        self.parts, self.source = parts, source
        self.saved_step: int | None = None  # the optimizer step of the newest checkpoint
        self._rescued = False

    def try_out(self, state: RunState) -> None:
        """At the start of a run that has no checkpoint yet: whether one can be written."""
        if self.saved_step is None:
            self.parts.phase("checkpoint", lambda: try_saving_state(self.parts, state, self.source))

    def save(self, state: RunState) -> None:
        """A checkpoint of the current optimizer step, unless there is one."""
        if self.saved_step == state.optimizer_step:
            return
        with self.parts.phases.watch("record"):
            self.parts.tracker.sync()  # a checkpoint must not outlive the metrics of the steps before it
        self._or_weights(state, lambda: save_checkpoint(self.parts, state, self.source))
        self.saved_step = state.optimizer_step

    def wait(self, state: RunState) -> None:
        """Waits for a checkpoint that is written in the background."""
        self._or_weights(state, self.parts.store.wait)

    def _or_weights(self, state: RunState, action: Callable[[], object]) -> None:
        """Runs `action`; where it cannot write a checkpoint, on all processes alike, the weights alone are saved."""
        try:
            self.parts.phase("checkpoint", action)
        except (CheckpointError, SystemExit) as error:
            self._rescued = True
            if said := rescue_together(self.parts, state):
                error.add_note(said)
            raise

    def rescue(self, state: RunState) -> str:
        """What to say of the weights at an error that ends the run, after saving them where no checkpoint has them."""
        return "" if self._rescued else rescue_alone(self.parts, state, self.saved_step)

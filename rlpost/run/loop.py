"""The loop: a rollout from the source, optimizer steps on it, new weights to the engine; evaluated, saved and reported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlpost.learner.curvature_step import mask_share
from rlpost.learner.watch import Interrupt
from rlpost.run.assemble import assemble
from rlpost.run.emptiness import watch_rows
from rlpost.run.result import RunResult, end_run, finished_before
from rlpost.run.saving import Saver
from rlpost.run.state import RunState, bookmark, load_checkpoint
from rlpost.run.sync_probe import SyncProbe
from rlpost.source.factory import make_source

if TYPE_CHECKING:
    from rlpost.learner.buffer import RolloutBuffer
    from rlpost.recipe.load import LoadedRecipe
    from rlpost.run.parts import Parts
    from rlpost.source.source import Source


def train(loaded: LoadedRecipe) -> RunResult:
    """Runs a recipe from its start, or from a checkpoint, to its end. Ctrl-C saves and returns."""
    parts = assemble(loaded)
    loop: Loop | None = None
    try:
        with Interrupt() as interrupt:
            loop = Loop(parts, make_source(parts), interrupt)
            return loop.run()
    except BaseException as error:
        if loop is not None and isinstance(error, Exception) and (said := loop.saver.rescue(loop.state)):
            error.add_note(said)
        parts.close(f"failed: {type(error).__name__}")
        raise


class Loop:
    """One run. What must survive is in `state` and `source`; everything else is rebuilt from the recipe."""

    def __init__(self, parts: Parts, source: Source, interrupt: Interrupt) -> None:
        self.parts, self.source, self.interrupt = parts, source, interrupt
        self.state = RunState()
        self.saver = Saver(parts, source)
        self.probe = SyncProbe(parts)

    def run(self) -> RunResult:
        """To the last rollout, or to the step at which the run is asked to stop."""
        parts, recipe = self.parts, self.parts.recipe
        if parts.resume_from is not None:
            self.state = load_checkpoint(parts.resume_from, parts, self.source)
            parts.optimizer_step = self.saver.saved_step = self.state.optimizer_step
            if (result := finished_before(parts, self.state)) is not None:
                return result
        self.saver.try_out(self.state)
        parts.phase("sync", self.sync)
        if recipe.evaluation.at_start and self.state.accuracy_before is None and parts.held_out:
            self.state.accuracy_before = self.evaluate()
        interrupted = self.stop_asked()
        while not interrupted and self.state.rollout < recipe.learner.planned_rollouts:
            interrupted = self.rollout()
        self.saver.save(self.state)  # before anything else that can go wrong
        after, failed = None, None
        if not interrupted and recipe.evaluation.at_end and parts.held_out:
            after, failed = self.evaluate_at_end()
        self.saver.wait(self.state)
        return end_run(parts, self.state, after, interrupted=interrupted, failed=failed)

    def rollout(self) -> bool:
        """One rollout and its optimizer steps. Returns whether the run is to stop now."""
        if self.state.buffer is None and not self.draw():
            return True
        buffer, every = self.state.buffer, self.parts.recipe.checkpoint.every
        assert buffer is not None
        while self.state.buffer is not None:
            self.step(buffer)
            if buffer.updates_done == self.parts.recipe.learner.steps_per_rollout:
                self.end_rollout()
            if every and self.state.optimizer_step % every == 0:
                self.saver.save(self.state)
            if self.stop_asked():
                return True
        return False

    def draw(self) -> bool:
        """The next rollout. Where a stop was asked meanwhile it is forgotten, to be drawn again on resume: returns False."""
        go_back = bookmark(self.source, self.parts.updater.actor_critic)
        buffer = self.source.next(self.state.rollout)
        if self.stop_asked():
            go_back()
            return False
        watch_rows(self.parts, self.state, buffer)
        self.state.watched = self.parts.phase("probe", lambda: self.probe.before(buffer))
        self.source.ahead(self.state.rollout)
        self.state.buffer = buffer
        return True

    def step(self, buffer: RolloutBuffer) -> None:
        """One optimizer step, and its row in metrics.jsonl."""
        parts, first = self.parts, buffer.updates_done == 0
        metrics = parts.phase("update", lambda: parts.updater.update(buffer, self.state.optimizer_step))
        metrics |= self.state.count_step(skipped=bool(metrics["optimizer/skipped"]))
        parts.optimizer_step = self.state.optimizer_step
        if buffer.updates_done == parts.recipe.learner.steps_per_rollout:
            self.source.settle()
            parts.phase("sync", self.sync)
            metrics |= parts.phase("probe", lambda: self.probe.after(self.state))
        seconds = parts.phases.take()
        row = {"rollout": float(buffer.step), **buffer.metrics, **metrics, **mask_share(metrics, seconds), **seconds}
        record = self.source.record(buffer) if first else None
        parts.recorded(lambda: parts.tracker.step(self.state.optimizer_step, row, record))
        if (error := self.state.too_many_skipped(parts)) is not None:
            parts.processes.fail(error)

    def end_rollout(self) -> None:
        """The policy is what the next rollout will be sampled from."""
        self.state.buffer = None
        self.state.rollout += 1
        every, last = self.parts.recipe.evaluation.every, self.parts.recipe.learner.planned_rollouts
        if every and self.state.rollout % every == 0 and self.state.rollout < last and self.parts.held_out:
            self.evaluate()

    def sync(self) -> None:
        """The learner's weights into the engine, in place."""
        self.parts.engine.load_weights(self.parts.weights_to_send(), self.state.optimizer_step)

    def evaluate(self) -> float:
        """Held-out accuracy, recorded."""
        accuracy, metrics = self.parts.phase("eval", self.source.evaluate)
        self.parts.phases.take()
        step, tracker = self.state.optimizer_step, self.parts.tracker
        self.parts.recorded(lambda: tracker.evaluation(step, metrics))
        return accuracy

    def evaluate_at_end(self) -> tuple[float | None, Exception | None]:
        """The last accuracy, or what went wrong with it: the run is saved, and what is left of its end is done."""
        try:
            return self.evaluate(), None
        except Exception as error:
            error.add_note(
                f"This was the evaluation at the end; all {self.state.optimizer_step} optimizer steps are made and saved "
                f"({self.parts.store.latest()}). Start the same command again with resume=auto to make up for it."
            )
            return None, error

    def stop_asked(self) -> bool:
        """Whether any process was asked to stop."""
        return self.parts.processes.any(self.interrupt.requested)

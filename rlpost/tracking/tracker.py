"""The one object through which the loop reports: it fans out to files, W&B, console and doctor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

from rlpost.recipe.secrets import conceal
from rlpost.recipe.sections.learner import LearnerSection, TrackingSection
from rlpost.recipe.sections.reward import Reward, reward_ceiling
from rlpost.tracking.advice import Advice, Doctor
from rlpost.tracking.completions import ScoredRollout, pick_sample, records, write_completions
from rlpost.tracking.console import Console, make_console
from rlpost.tracking.metrics import MetricsWriter
from rlpost.tracking.rundir import RunDirectory
from rlpost.tracking.wandb import WandbTracker

Status = Literal["finished", "stopped", "failed"]


class TrackedRecipe(Protocol):
    """The parts of a recipe that tracking reads."""

    @property
    def learner(self) -> LearnerSection: ...

    @property
    def tracking(self) -> TrackingSection: ...

    @property
    def rewards(self) -> Sequence[Reward]: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class Tracker:
    """Records a run. On all processes but the main one every call does nothing.

    Make it after `run.truncate_after` on resume. Files that cannot be written raise TrainingError (the run would leave
    no trace); W&B and the console never raise.
    """

    def __init__(
        self, run: RunDirectory, recipe: TrackedRecipe, *, is_main: bool, console: Console | None = None
    ) -> None:
        self._is_main = is_main
        if not is_main:
            return
        learner, tracking = recipe.learner, recipe.tracking
        self._run = run
        self._steps_per_rollout = learner.steps_per_rollout
        self._show_every = tracking.show_completion_every
        self._metrics = MetricsWriter(run.metrics)
        self._doctor = Doctor(reward_ceiling=reward_ceiling(recipe.rewards), method=getattr(recipe, "method", None))
        for row in self._metrics.history(run.abandoned_metrics):
            self._doctor.observe(row)
        config = conceal(recipe.model_dump(mode="json"))
        run.write_recipe(config)
        total = learner.planned_rollouts * self._steps_per_rollout
        self._console: Console | None = None
        self._early_notes: list[str] = []
        # W&B first: it may take half a minute to find out that there is no network, and it writes to the terminal.
        self._wandb = WandbTracker(run, tracking.wandb, config, self.note)
        self._console = console or make_console(total, live=tracking.console)
        for text in self._early_notes:
            self.note(text)

    def step(self, step: int, metrics: Mapping[str, float], rollout: ScoredRollout | None = None) -> None:
        """Reports optimizer step `step` (the first is 1).

        `rollout` is given with the first optimizer step that a rollout feeds, and only then: it is written to
        `completions/step_<step>.jsonl`.
        """
        if not self._is_main:
            return
        self._run.check_held()
        sampled = records(step, rollout) if rollout is not None else []
        if sampled:
            write_completions(self._run.completions, step, sampled)
        row = self._metrics.append(step, metrics, kind="train")
        self._wandb.log(row, kind="train")
        self._show(lambda console: console.step(row))
        for advice in self._doctor.observe(row):
            self._show(partial(_show_advice, advice))
        rollout_number = (step - 1) // self._steps_per_rollout
        if sampled and self._show_every and rollout_number % self._show_every == 0:
            self._wandb.log_completions(step, sampled)
            sample = pick_sample(sampled, step)
            if sample is not None:
                self._show(lambda console: console.sample(sample))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports an evaluation of the policy as it is after optimizer step `step` (0: before the first).

        Keys without a slash get the prefix `eval/`.
        """
        if not self._is_main:
            return
        self._run.check_held()
        named = {key if "/" in key else f"eval/{key}": value for key, value in metrics.items()}
        row = self._metrics.append(step, named, kind="eval")
        self._wandb.log(row, kind="eval")
        self._show(lambda console: console.evaluation(row))

    def note(self, text: str) -> None:
        """Shows one line to the user."""
        if not self._is_main:
            return
        if self._console is None:
            self._early_notes.append(text)
        self._show(lambda console: console.note(text))

    def sync(self) -> None:
        """Forces the metrics to disk; call it before a checkpoint is written."""
        if self._is_main:
            self._run.check_held()
            self._metrics.sync()

    def close(self, status: Status) -> None:
        """Ends W&B's run and gives the terminal back."""
        if not self._is_main:
            return
        self._wandb.finish(exit_code=1 if status == "failed" else 0)
        self.note(f"run {status}: {self._run.path}")
        self._show(lambda console: console.close())
        self._is_main = False

    def _show(self, action: Callable[[Console], None]) -> None:
        """Whatever happens to the terminal (closed, a broken pipe) must not end the run."""
        if self._console is None:
            return
        try:
            action(self._console)
        except (OSError, ValueError):
            self._console = None
            self._early_notes.clear()


def _show_advice(advice: Advice, console: Console) -> None:
    console.advice(advice)

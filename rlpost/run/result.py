"""How a run ended, and whether one that is taken up had ended before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.tracking.metrics import number, read_metrics

if TYPE_CHECKING:
    from rlpost.run.parts import Parts
    from rlpost.run.state import RunState


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    run_dir: Path
    optimizer_steps: int
    interrupted: bool
    accuracy_before: float | None
    accuracy_after: float | None
    checkpoint: Path | None
    failed: Exception | None = None  # what went wrong after everything had been learned and saved


def end_run(
    parts: Parts,
    state: RunState,
    accuracy_after: float | None,
    *,
    interrupted: bool,
    failed: Exception | None = None,
) -> RunResult:
    """Ends all parts and says what came of the run."""
    result = RunResult(
        run_dir=parts.run.path,
        optimizer_steps=state.optimizer_step,
        interrupted=interrupted,
        accuracy_before=state.accuracy_before,
        accuracy_after=accuracy_after,
        checkpoint=parts.store.latest(),
        failed=failed,
    )
    parts.close("interrupted" if interrupted else "finished" if failed is None else "failed")
    return result


def finished_before(parts: Parts, state: RunState) -> RunResult | None:
    """The end of a run that is taken up although it has made all its rollouts, and the evaluation after them; it is said."""
    recipe = parts.recipe
    if state.rollout < recipe.learner.planned_rollouts:
        return None
    rows = read_metrics(parts.run.metrics, "eval") if parts.processes.is_main else []
    final = [number(row, "eval/accuracy") for row in rows if row["step"] == state.optimizer_step]
    final = parts.processes.gather(final)[0]
    if not final and recipe.evaluation.at_end and parts.held_out:
        return None
    key = "rollouts" if recipe.learner.stop_after is None else "stop_after"
    parts.tracker.note(
        f"This run is finished: it took its {recipe.learner.planned_rollouts} rollouts before. Nothing was done. Raise "
        f"learner.{key} to go on with it, or start another under a new name."
    )
    return end_run(parts, state, final[-1] if final else None, interrupted=False)

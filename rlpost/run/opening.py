"""Opens a run's folder, and finds the checkpoint to go on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlpost.errors import CheckpointError
from rlpost.learner.checkpoint import CheckpointStore
from rlpost.learner.factory import check_launch
from rlpost.learner.process import Processes
from rlpost.learner.resume import check_changes, counters_or_offer
from rlpost.recipe.sections.root import Recipe
from rlpost.run.state import check_world
from rlpost.tracking.rundir import RunDirectory


def open_run(
    recipe: Recipe, processes: Processes, check: Callable[[Path | None], None]
) -> tuple[RunDirectory, Path | None]:
    """The run's folder, locked by the main process, and the checkpoint to go on from. `check` raises for a checkpoint that the
    data cannot go on from. What was written after it is cut off last: a run that is refused has changed nothing."""
    fresh = recipe.resume == "never"

    def open_on_main() -> tuple[RunDirectory, Path | None]:
        if not processes.is_main:
            return RunDirectory.at(recipe.run_dir), None
        run = RunDirectory.open(recipe.run_dir, fresh=fresh, overwrite=recipe.overwrite)
        try:
            resume_from = find_checkpoint(recipe, run, processes)
            if not fresh:
                step = check_resume(resume_from, recipe, processes) if resume_from is not None else -1
                check(resume_from)
                # In this order: killed in between, the run goes on from a checkpoint whose metrics are all there.
                CheckpointStore(run.checkpoints, recipe.checkpoint.keep, processes).set_aside_after(step)
                run.truncate_after(step)
        except BaseException:
            run.close()
            raise
        return run, resume_from

    run, earlier = processes.together(open_on_main)
    return run, processes.gather(earlier)[0]


def find_checkpoint(recipe: Recipe, run: RunDirectory, processes: Processes) -> Path | None:
    """The checkpoint that `resume` means."""
    if recipe.resume == "never":
        return None
    store = CheckpointStore(run.checkpoints, recipe.checkpoint.keep, processes)
    store.recover()
    if recipe.resume == "auto":
        return store.newest()
    path = Path(recipe.resume).expanduser()
    if not path.is_dir():
        raise CheckpointError(
            f"resume: there is no folder {path}. Name a folder such as {run.checkpoints}/step_000010, or use resume=auto."
        )
    return path


def check_resume(path: Path, recipe: Recipe, processes: Processes) -> int:
    """The optimizer step of a checkpoint that recipe and launch can go on from. Raises CheckpointError."""
    counters = counters_or_offer(path)
    check_changes(path, counters, recipe)
    check_world(path, counters["world"], processes.world, in_rollout=counters["in_rollout"])
    check_launch(path, counters["world"], processes)
    return counters["optimizer_step"]

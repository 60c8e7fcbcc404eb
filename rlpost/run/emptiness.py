"""Steps without a single row to learn from: one is worth a line, a run of them ends the run with the cause named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlpost.errors import TrainingError
from rlpost.methods.hpt import needs_samples

if TYPE_CHECKING:
    from rlpost.learner.buffer import RolloutBuffer
    from rlpost.recipe.sections.root import Recipe
    from rlpost.run.parts import Parts
    from rlpost.run.state import RunState

LIMIT = 3
"""So many rollouts in a row without a row to learn from end the run."""


def watch_rows(parts: Parts, state: RunState, buffer: RolloutBuffer) -> None:
    """Takes note of whether the rollout in `buffer` has anything to learn from; collective. Raises TrainingError.

    Groups whose completions all earned the same do have rows: that nothing comes of them is the reward's doing, and the
    advice's business (`tracking/advice.py`). So is a rollout that was sampled and gave no pair.
    """
    if sum(parts.processes.gather(rows_in(buffer))):
        state.empty_in_a_row = 0
        return
    sampled = needs_samples(parts.recipe.method.gate, state.rollout)
    what = "No pair could be made of what was sampled" if sampled else _no_solution(parts)
    if sampled:
        parts.tracker.note(f"Rollout {state.rollout + 1} has nothing to learn from: {what}.")
        return
    state.empty_in_a_row += 1
    parts.tracker.note(f"Rollout {state.rollout + 1} has not a single row to learn from: {what}.")
    if state.empty_in_a_row >= min(LIMIT, _taught_rollouts(parts.recipe)):
        parts.processes.fail(
            TrainingError(
                f"{state.empty_in_a_row} rollouts in a row had not a single row to learn from, so the weights are still those "
                f"of the beginning or of before: {what}. Raise data.max_demonstration_tokens, give more prompts with a worked "
                "solution, or take more of them a step (rollout.prompts_per_step)."
            )
        )


def _taught_rollouts(recipe: Recipe) -> int:
    """How many rollouts of the run are learned from solutions alone."""
    own = getattr(recipe.method.gate, "rollouts", None)
    return recipe.learner.planned_rollouts if own is None else min(own, recipe.learner.planned_rollouts)


def rows_in(buffer: RolloutBuffer) -> int:
    """How many completions and demonstrations of this process there are to learn from."""
    return sum(len(group.completions) for group in buffer.groups) + sum(
        row is not None for row in buffer.demonstrations or ()
    )


def _no_solution(parts: Parts) -> str:
    recipe = parts.recipe
    return (
        f"none of its {recipe.rollout.prompts_per_step} prompts has a worked solution of at most {recipe.demonstration_limit} "
        "tokens (data.max_demonstration_tokens) that fits the model's context behind the question"
    )

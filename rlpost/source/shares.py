"""Which of a rollout's prompts belong to which process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlpost.learner.process import Processes
    from rlpost.recipe.sections.root import Recipe


def own_places(recipe: Recipe, processes: Processes) -> list[int]:
    """Which of the rollout's P prompts are this process's: of every minibatch an equal part, so that minibatches hold the
    same prompts whatever the number of processes."""
    per_minibatch = recipe.rollout.prompts_per_step // recipe.learner.minibatches
    share = per_minibatch // processes.world
    starts = [m * per_minibatch + processes.rank * share for m in range(recipe.learner.minibatches)]
    return [start + i for start in starts for i in range(share)]

"""`rlpost plan`: where completions are sampled, what that takes, and which places fit other machines."""

from __future__ import annotations

from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.recipe.sections.root import Recipe


def describe_places(recipe: Recipe, processes: int) -> tuple[str, ...]:
    """Lines for `processes` learner processes; none for a recipe that samples nothing."""
    if not recipe.samples:
        return ()
    engine = recipe.rollout.engine
    learners = _many(processes, "learner process", "learner processes")
    if not isinstance(engine, VllmEngine):
        return (f"{learners}, each sampling with transformers; sampling and learning take turns",)
    each = _many(engine.tensor_parallel * engine.replicas, "card")
    each += f" (tensor_parallel {engine.tensor_parallel} x replicas {engine.replicas})"
    match engine.where:
        case "colocated":
            first = f"{learners}, vLLM inside each and on its device; sampling and learning take turns"
            other = (
                "another way to use these cards: some for learners, the others for workers (rollout.engine.where=worker, "
                "devices) with rollout.staleness=1, so that both sides work at once: see docs/rollouts.md"
            )
            return (first, other) if processes > 1 else (first,)
        case "worker":
            on = "the learner's cores on a CPU, or cards that devices names"
            on = f"cores {list(engine.cores)}" if engine.cores else on
            on = f"cards {list(engine.devices)} of each node, {each} for each worker" if engine.devices else on
            first = f"{learners}, a vLLM worker beside each, on {on}"
        case "server":
            servers = _many(len(engine.urls), "vLLM server")
            first = f"{learners}, and {servers} for all of them, on CUDA with {each} each"
        case _:
            raise unknown_choice("rollout.engine.where", engine.where)
    return (first, *_overlap(recipe))


def _overlap(recipe: Recipe) -> tuple[str, ...]:
    lag = recipe.rollout.staleness
    if lag == 0:
        return ("rollout.staleness=0: one side waits while the other works; with 1 both work at once",)
    waits = "new weights reach samples under way" if recipe.rollout.in_flight else "a sync waits for samples under way"
    steps = _many(lag * recipe.learner.steps_per_rollout, "optimizer step")
    return (
        f"samples are {_many(lag, 'rollout')} old at the most, {steps}; {waits}",
        "how many cards for each side: as their seconds for a rollout are to each other. Begin with as many for sampling as "
        "for learning; the run's advice then says which side waits, and by how much the other should grow",
    )


def _many(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"

"""How much room a run's checkpoints take on disk, counted from the model's size before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from rlpost.recipe.plan.memory import GIB, ModelSize, bytes_per_number, find_model_size, trained_parameters
from rlpost.recipe.sections.root import Recipe

MIB = 2**20


@dataclass(frozen=True, slots=True)
class CheckpointRoom:
    """Bytes of one checkpoint, and how many of them lie on the disk at once at the most."""

    weights: int
    state: int  # the optimizer's, and a critic's
    at_once: int

    @property
    def each(self) -> int:
        """One checkpoint."""
        return self.weights + self.state

    @property
    def most(self) -> int:
        """As many as lie there at once: a new one stands before the oldest is removed."""
        return self.each * self.at_once

    def __str__(self) -> str:
        several = f", up to {self.at_once} of them at once: {in_units(self.most)}" if self.at_once > 1 else ""
        return (
            f"a checkpoint takes {in_units(self.each)} (weights {in_units(self.weights)}, optimizer {in_units(self.state)})"
            f"{several}"
        )


def checkpoint_room(recipe: Recipe, size: ModelSize, *, zero_stage: int = 0) -> CheckpointRoom:
    """What the checkpoints of a run take, all processes together. `zero_stage`: DeepSpeed's; 0: without it."""
    trained, width = trained_parameters(recipe, size), bytes_per_number(recipe.model.dtype)
    adapters = recipe.model.lora is not None  # peft keeps them in float32
    weights = 4 * trained if adapters else width * size.parameters
    # AdamW's two moments have the weights' precision; ZeRO saves moments and a copy of the weights in float32.
    state = trained * (12 if zero_stage else 2 * (4 if adapters else width))
    state += _critic(recipe, size, width)
    saves = 1 if not recipe.checkpoint.every else recipe.optimizer_steps // recipe.checkpoint.every + 1
    return CheckpointRoom(weights, state, min(recipe.checkpoint.keep + 1, saves))


def _critic(recipe: Recipe, policy: ModelSize, width: int) -> int:
    """A critic of its own: weights and moments. A head on the policy's trunk is too small to count."""
    critic = recipe.method.critic
    if critic is None or critic.model != "separate":
        return 0
    size: ModelSize | None = policy
    if critic.path is not None:
        size, _ = find_model_size(recipe.model.model_copy(update={"path": critic.path}))
    return 0 if size is None else 3 * width * size.parameters


def in_units(size: int) -> str:
    """Bytes as a reader takes them in."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"

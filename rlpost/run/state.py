"""What a run needs to go on as if it had never stopped, and how it is saved and taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlpost.errors import CheckpointError, TrainingError
from rlpost.experience import without_columns
from rlpost.learner.buffer import RolloutBuffer
from rlpost.learner.checkpoint import file_writer
from rlpost.learner.rng import rng_state, set_rng_state
from rlpost.recipe.secrets import dump

if TYPE_CHECKING:
    from rlpost.learner.actor_critic import ActorCritic
    from rlpost.rollout.verify import Watched
    from rlpost.run.parts import Parts
    from rlpost.source.source import Source


@dataclass(slots=True)
class RunState:
    """Where a run stands. Model, optimizer, generators and the source's state are saved beside it."""

    rollout: int = 0  # rollouts completely learned from
    optimizer_step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    buffer: RolloutBuffer | None = None  # a rollout of which some optimizer steps are still to be taken
    watched: Watched | None = None  # what the probe compares with after the rollout's last optimizer step
    accuracy_before: float | None = None
    empty_in_a_row: int = 0  # rollouts without a single row to learn from

    def count_step(self, *, skipped: bool) -> dict[str, float]:
        """Takes note of an optimizer step, and of whether its loss or gradient was not finite; a metric."""
        self.optimizer_step += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.skipped_steps += skipped
        return {"optimizer/skipped_total": float(self.skipped_steps)}

    def too_many_skipped(self, parts: Parts) -> TrainingError | None:
        """The error of a run that takes only skipped steps."""
        limit = parts.recipe.learner.skip_nonfinite
        if self.skipped_in_a_row < limit:
            return None
        return TrainingError(
            f"The loss or its gradient was not finite in {limit} optimizer steps in a row (learner.skip_nonfinite); "
            f"each was skipped, the weights are those of step {self.optimizer_step - limit}. "
            f"The last checkpoint is {parts.store.latest() or 'none'}. Lower learner.learning_rate, look at the rewards in "
            f"{parts.run.metrics}, or use model.dtype=float32; then start again with resume=auto."
        )


COUNTERS = tuple(name for name in RunState.__dataclass_fields__ if name not in ("buffer", "watched"))


def save_checkpoint(parts: Parts, state: RunState, source: Source) -> Path:
    """Writes checkpoint `state.optimizer_step`; collective over all processes. Raises CheckpointError.

    With `checkpoint.asynchronous` everything is copied into memory here and written while the run goes on.
    """
    learner, processes, later = parts.learner, parts.processes, parts.store.asynchronous
    weights = learner.full_state_dict(copy=later)
    own: dict[str, Any] = {"rng": rng_state(), "buffer": state.buffer, "watched": state.watched}
    own |= {"method": parts.updater.state_dict(), "ahead": source.own_state()}
    if state.buffer is not None:
        own["buffer"] = replace(state.buffer, groups=tuple(map(without_columns, state.buffer.groups)))
    write_own = file_writer({f"rank_{processes.rank}.pt": own, **learner.own_state()}, snapshot=later)
    write_trainer = file_writer(learner.shared_state() if processes.is_main else {}, snapshot=later)
    counters = {name: getattr(state, name) for name in COUNTERS} | source.state_dict()
    counters |= {"world": processes.world, "in_rollout": state.buffer is not None}
    counters["recipe"] = dump(parts.recipe)  # what a resumed run is compared with
    counters_text = json.dumps(counters, indent=1)

    def write_shared(folder: Path) -> None:
        learner.policy.save(folder, parts.tokenizer, state_dict=weights)
        write_trainer(folder / "trainer")
        (folder / "trainer" / "state.json").write_text(counters_text)

    return parts.store.write(state.optimizer_step, write_shared, lambda folder: write_own(folder / "trainer"))


def try_saving_state(parts: Parts, state: RunState, source: Source) -> None:
    """Writes and removes what a checkpoint has beside weights and optimizer state; collective. Raises CheckpointError."""
    own: dict[str, Any] = {"rng": rng_state(), "buffer": state.buffer, "watched": state.watched}
    own |= {"method": parts.updater.state_dict(), "ahead": source.own_state()}
    write = file_writer({f"rank_{parts.processes.rank}.pt": own}, snapshot=False)
    counters = json.dumps(source.state_dict() | {"recipe": dump(parts.recipe)})

    def write_own(folder: Path) -> None:
        write(folder / "trainer")
        if parts.processes.is_main:
            (folder / "trainer" / "state.json").write_text(counters)

    parts.store.try_out(write_own)


def load_checkpoint(path: Path, parts: Parts, source: Source) -> RunState:
    """Takes up the run saved in `path`: optimizer, generators, rollout in progress. The model's weights were loaded
    from the same folder when the policy was built.

    Raises CheckpointError when the folder is damaged, or was saved by another number of processes in the middle of a
    rollout.
    """
    counters = json.loads((path / "trainer" / "state.json").read_text())
    world, in_rollout = counters.pop("world"), counters.pop("in_rollout")
    for name in ("recipe", "shape"):  # looked at before a model was loaded, by `check_changes`
        counters.pop(name, None)
    parts.processes.together(lambda: check_world(path, world, parts.processes.world, in_rollout=in_rollout))
    parts.learner.load(path, world=world)
    state = RunState(**{name: counters.pop(name) for name in COUNTERS if name in counters})
    source.load_state_dict(counters)
    # Buffers are the run's own nouns, so they are unpickled; what the file names was looked at before (`learner.vetted`).
    rank = parts.processes.rank if world == parts.processes.world else 0
    own = torch.load(path / "trainer" / f"rank_{rank}.pt", weights_only=False, map_location="cpu")
    set_rng_state(own["rng"])
    parts.updater.load_state_dict(own["method"])
    state.buffer, state.watched = own["buffer"], own.get("watched")
    if world == parts.processes.world:
        source.load_own_state(own.get("ahead"))
    if state.buffer is not None and not all(hasattr(state.buffer, name) for name in state.buffer.__dataclass_fields__):
        raise CheckpointError(
            f"{path} holds a rollout in progress that another version of rlpost saved. Resume with that version up to a "
            f"rollout's end, or begin a new run from its weights with model.path={path}."
        )
    return state


def bookmark(source: Source, actor_critic: ActorCritic | None) -> Callable[[], None]:
    """Called before a rollout is drawn. Gives a function that goes back to where the run stands now: source, and what a
    critic's whitening and a controller keep of the rewards of every rollout."""
    source_back = source.bookmark()
    critic = None if actor_critic is None else actor_critic.state_dict()

    def go_back() -> None:
        source_back()
        if actor_critic is not None and critic is not None:
            actor_critic.load_state_dict(critic)

    return go_back


def check_world(path: Path, world: int, now: int, *, in_rollout: bool) -> None:
    """Whether `now` processes can take up what `world` saved."""
    if world != now and in_rollout:
        raise CheckpointError(
            f"{path} was saved by {world} processes in the middle of a rollout; {now} cannot take it up, because each "
            f"process holds its own part. Start {world} processes, or resume from a checkpoint at a rollout's end (a "
            f"checkpoint.every that is a multiple of minibatches x epochs makes all of them such)."
        )

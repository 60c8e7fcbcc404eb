"""What a run needs to go on as if it had never stopped, and how it is saved and taken up again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlpost.errors import CheckpointError
from rlpost.learner.buffer import RolloutBuffer
from rlpost.learner.checkpoint import file_writer, verify
from rlpost.learner.rng import rng_state, set_rng_state
from rlpost.learner.shape import run_shape

if TYPE_CHECKING:
    from rlpost.run.assemble import Parts


@dataclass(slots=True)
class RunState:
    """Where a run stands. Model, optimizer and generators are saved beside it."""

    rollout: int = 0  # rollouts completely learned from
    optimizer_step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    sampler: dict[str, Any] | None = None  # of the prompt sampler, after the rollout in `buffer`
    buffer: RolloutBuffer | None = None  # a rollout of which some optimizer steps are still to be taken
    accuracy_before: float | None = None
    hint_levels: dict[str, int] = field(default_factory=dict)  # by prompt id: GHPO's memory of hard prompts
    crashes: dict[str, Any] = field(default_factory=dict)  # of the reward: a `CrashState` as plain numbers


def save_checkpoint(parts: Parts, state: RunState) -> Path:
    """Writes checkpoint `state.optimizer_step`; collective over all processes. Raises CheckpointError.

    With `checkpoint.asynchronous` everything is copied into memory here and written while the run goes on.
    """
    learner, processes, later = parts.learner, parts.processes, parts.store.asynchronous
    weights = learner.full_state_dict(copy=later)
    own = {"rng": rng_state(), "buffer": state.buffer, "method": parts.updater.state_dict()}
    write_own = file_writer({f"rank_{processes.rank}.pt": own, **learner.own_state()}, snapshot=later)
    write_trainer = file_writer(learner.shared_state() if processes.is_main else {}, snapshot=later)
    counters = {k: v for k, v in asdict_shallow(state).items() if k != "buffer"}
    counters |= {"world": processes.world, "in_rollout": state.buffer is not None, "recipe": parts.recipe.name}
    counters["shape"] = run_shape(parts.recipe)
    counters_text = json.dumps(counters, indent=1)

    def write_shared(folder: Path) -> None:
        learner.policy.save(folder, parts.tokenizer, state_dict=weights)
        write_trainer(folder / "trainer")
        (folder / "trainer" / "state.json").write_text(counters_text)

    return parts.store.write(state.optimizer_step, write_shared, lambda folder: write_own(folder / "trainer"))


def load_checkpoint(path: Path, parts: Parts) -> RunState:
    """Takes up the run saved in `path`: optimizer, generators, rollout in progress. The model's weights were loaded
    from the same folder when the policy was built.

    Raises CheckpointError when the folder is damaged, or was saved by another number of processes in the middle of a
    rollout.
    """
    counters = json.loads((path / "trainer" / "state.json").read_text())
    world, in_rollout = counters.pop("world"), counters.pop("in_rollout")
    for name in ("recipe", "shape"):  # looked at before a model was loaded, by `check_shape`
        counters.pop(name, None)
    parts.processes.together(lambda: check_world(path, world, parts.processes.world, in_rollout=in_rollout))
    parts.learner.load(path, world=world)
    state = RunState(**counters)
    # Buffers are the run's own nouns, so they are unpickled; the manifest has shown that they are what was saved.
    rank = parts.processes.rank if world == parts.processes.world else 0
    own = torch.load(path / "trainer" / f"rank_{rank}.pt", weights_only=False, map_location="cpu")
    set_rng_state(own["rng"])
    parts.updater.load_state_dict(own["method"])
    state.buffer = own["buffer"]
    if state.buffer is not None and not all(hasattr(state.buffer, name) for name in state.buffer.__dataclass_fields__):
        raise CheckpointError(
            f"{path} holds a rollout in progress that another version of rlpost saved. Resume with that version up to a "
            f"rollout's end, or begin a new run from its weights with model.path={path}."
        )
    if state.sampler is not None:
        parts.sampler.load_state_dict(state.sampler)
    return state


def check_world(path: Path, world: int, now: int, *, in_rollout: bool) -> None:
    """Whether `now` processes can take up what `world` saved."""
    if world != now and in_rollout:
        raise CheckpointError(
            f"{path} was saved by {world} processes in the middle of a rollout; {now} cannot take it up, because each "
            f"process holds its own part. Start {world} processes, or resume from a checkpoint at a rollout's end (a "
            f"checkpoint.every that is a multiple of minibatches x epochs makes all of them such)."
        )


def asdict_shallow(state: RunState) -> dict[str, Any]:
    """The fields as they are; `dataclasses.asdict` would copy tensors."""
    return {name: getattr(state, name) for name in state.__dataclass_fields__}


def read_counters(path: Path) -> dict[str, Any]:
    """`trainer/state.json` of a verified checkpoint. Raises CheckpointError when it is not one of a training run."""
    verify(path)
    try:
        return json.loads((path / "trainer" / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} has no readable trainer/state.json ({error}): it cannot be resumed.") from error

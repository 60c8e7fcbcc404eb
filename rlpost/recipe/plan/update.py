"""Where the optimizer's state lies, how long an update is predicted to take that way and others, and what `auto` takes."""

from __future__ import annotations

import os
from dataclasses import replace

from rlpost.offload.forecast import read
from rlpost.offload.plan import PARKED, RESIDENT, Kind, Predicted, Room, Way, choose, predict, section_of, way_of, ways
from rlpost.offload.simulate import Rates
from rlpost.recipe.plan.memory import GIB, STATE, ModelSize, estimate, trained_parameters
from rlpost.recipe.sections.offload import AutoOffload, Offload
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.recipe.sections.root import Recipe

REFERENCE = Rates(up=55e9, down=55e9, memory=95e9, gpu_adam=90e9, cpu_adam=2.5e9, cast=10e9)
"""One process's share of a node of four H100 (24 cores a process), as `benchmarks/offload_model.py` finds it from a published
sweep."""
SPARE = 0.08
"""The share of an accelerator's memory that nothing is planned for: CUDA's context, fragments, what libraries take."""
SHARES = (0.0, 0.1, 0.25, 0.5)
"""Resident shares that `auto` tries."""


def describe_update(recipe: Recipe, size: ModelSize | None, processes: int, zero_stage: int) -> tuple[str, ...]:
    """Lines for a recipe with `learner.offload`; none for others, and none where the model's size is not known."""
    offload = recipe.learner.offload
    if offload is None or size is None or zero_stage != 3:
        return ()
    own, auto = -(-trained_parameters(recipe, size) // processes), isinstance(offload, AutoOffload)
    kept = read(recipe.run_dir)
    rates = REFERENCE if kept is None else kept.rates
    kind = kind_of(recipe, offload, serial=kept is not None and not kept.machine.get("gpu"))
    room, limit = _room_of_plan(recipe, size, processes)
    fastest, predictions = choose(
        own, rates, kind, room, among=candidates(recipe, offload), updates=recipe.learner.steps_per_rollout
    )
    if auto and fastest is None:
        return (no_room(room, predictions),)
    mine = fastest if auto and fastest is not None else predict(own, _asked(offload), rates, kind)
    source = (
        "predicted for a node of four H100 (not measured here, and not this machine):"
        if kept is None
        else f"predicted by what {recipe.run_dir} measured of its machine (corrected by {kept.updates} updates):"
    )
    lines = [
        *((f"auto would take: {mine.way.name} ({limit}; a run measures its machine first)",) if auto else ()),
        f"p, m and v of {own / 1e6:,.1f} M parameters a process: {mine.host / GIB:.2f} GiB of pinned memory on the host",
        f"on the accelerator: {mine.accelerator / GIB:.2f} GiB (sums of gradients in float32, what is staged, and state), in "
        f"place of {16 * own / GIB:.2f} GiB without offload",
        source,
        *(f"  {_line(one)}" for one in _shown(mine, predictions)),
    ]
    if not auto and fastest is not None and fastest.seconds < 0.95 * mine.seconds:
        there = "there" if kept is None else "on that machine"
        keys = _keys(fastest.way)
        lines.append(f"{there} {fastest.way.name} would be {mine.seconds / fastest.seconds:.2f} times as fast: {keys}")
    return tuple(lines)


def kind_of(recipe: Recipe, offload: Offload, *, serial: bool) -> Kind:
    """What an update's bytes depend on. DeepSpeed adds bfloat16 gradients up in float32 (`zero_config`)."""
    weights = 4 if recipe.model.dtype == "float32" else 2
    return Kind(offload.piece_size, 4, weights, park=offload.park, serial=serial)


def candidates(recipe: Recipe, offload: Offload) -> list[Way]:
    """The ways that are compared: for `auto` all that it may take, else those whose state is at home on the host."""
    if not isinstance(offload, AutoOffload):
        return ways()
    in_turn = offload.park and recipe.samples and recipe.rollout.staleness == 0
    return [RESIDENT, *([PARKED] if in_turn else []), *ways(4, SHARES)]


def accelerator_and_host() -> tuple[float | None, float]:
    """Bytes of this process's accelerator (None: there is none here), and its share of the host's memory that is free."""
    import psutil
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = psutil.virtual_memory().available / local
    return (torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None), host


def room_for(
    recipe: Recipe, size: ModelSize | None, processes: int, accelerator: float | None, host: float
) -> tuple[Room, str]:
    """What an update may take of memories of so many bytes, and that in words.

    On the accelerator: what all else leaves over that `estimate` counts. Without an accelerator the host is it, and one number
    limits both.
    """
    offload = recipe.learner.offload
    asked = offload if isinstance(offload, AutoOffload) else AutoOffload()
    room = Room(host=host if asked.host_gib is None else asked.host_gib * GIB)
    total = host if accelerator is None else (1 - SPARE) * accelerator
    engine = recipe.rollout.engine
    lines = [] if size is None else estimate(recipe, size, processes=processes, zero_stage=3)
    sampling = sum(line.bytes for line in lines if line.what.startswith("rollout engine"))
    if accelerator is not None and isinstance(engine, VllmEngine) and engine.where == "colocated" and recipe.samples:
        sampling = int(engine.memory_fraction * accelerator)
    sleeps = isinstance(engine, VllmEngine) and engine.sleep and accelerator is not None
    others = sum(
        line.bytes for line in lines if line.what not in STATE and not line.what.startswith("rollout engine")
    ) + (0 if sleeps else sampling)
    stays = sum(line.bytes for line in lines if line.what in ("weights", "gradients")) if not asked.park else 0
    free = total - others if asked.accelerator_gib is None else asked.accelerator_gib * GIB
    room = replace(room, accelerator=free, sampling=total - sampling - stays)
    return room, f"room for {_gib(room.accelerator)} on the accelerator and {_gib(room.host)} on the host"


def _room_of_plan(recipe: Recipe, size: ModelSize, processes: int) -> tuple[Room, str]:
    """The room of this machine if it has a GPU; another one is not the machine that the run will have."""
    accelerator, host = accelerator_and_host()
    if accelerator is not None:
        return room_for(recipe, size, processes, accelerator, host)
    offload = recipe.learner.offload
    asked = offload if isinstance(offload, AutoOffload) else AutoOffload()
    limits = [float("inf") if gib is None else gib * GIB for gib in (asked.accelerator_gib, asked.host_gib)]
    return Room(*limits), "there is no GPU here, so only accelerator_gib and host_gib are limits"


def no_room(room: Room, predictions: list[Predicted]) -> str:
    """That no way fits, with the one that comes nearest and the keys that lower what it takes."""
    least = min(
        predictions, key=lambda one: max(0.0, one.accelerator - room.accelerator) + max(0.0, one.host - room.host)
    )
    return (
        f"learner.offload.type=auto: no way fits into {_gib(room.accelerator)} of the accelerator and {_gib(room.host)} of the "
        f"host a process. Nearest is {least.way.name}, with {_gib(least.accelerator)} and {_gib(least.host)}. Start more "
        "processes, lower learner.offload.piece_size or what else takes memory (`rlpost plan`), or set "
        "learner.offload.accelerator_gib and host_gib where more is free than is counted"
    )


def _gib(size: float) -> str:
    return f"{max(0.0, size) / GIB:.2f} GiB"


def _asked(offload: Offload) -> Way:
    return way_of(section_of(Way(1, 1), offload) if isinstance(offload, AutoOffload) else offload)


def _shown(mine: Predicted, predictions: list[Predicted]) -> list[Predicted]:
    """The recipe's own way, the fastest, all on one side or the other, and what was published."""
    wanted = {predictions[0].way, *ways(1), Way(1, 2), RESIDENT, PARKED} - {mine.way}
    shown = [mine, *(one for one in predictions if one.way in wanted)]
    return sorted(shown, key=lambda one: one.seconds)


def _line(one: Predicted) -> str:
    moving = f" (and {one.moving:.3f} s a rollout on the way to the host and back)" if one.moving else ""
    return f"{one.seconds:8.3f} s an update: {one.way.name}{moving}"


def _keys(way: Way) -> str:
    if way.gpu_of == way.every:
        return "learner.offload.type=streamed"
    return f"learner.offload.type=interleaved, gpu_of={way.gpu_of}, every={way.every}"

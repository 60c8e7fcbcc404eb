"""Settles where the optimizer's state lies (`learner.offload`): measures the machine, and for `auto` takes the fastest way."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rlpost.errors import RecipeError
from rlpost.learner.process import Processes
from rlpost.offload.arithmetic import make_arithmetic
from rlpost.offload.calibrate import ELEMENTS, calibrate
from rlpost.offload.forecast import NAME, Forecast, read
from rlpost.offload.plan import Predicted, Room, Way, choose, predict, section_of, way_of
from rlpost.offload.simulate import Rates
from rlpost.policy.model import Policy
from rlpost.recipe.plan.memory import find_model_size, trained_parameters
from rlpost.recipe.plan.update import REFERENCE, accelerator_and_host, candidates, kind_of, no_room, room_for
from rlpost.recipe.sections.learner import LearnerSection
from rlpost.recipe.sections.offload import AutoOffload
from rlpost.recipe.sections.root import Recipe


def refuse_without_room(recipe: Recipe, processes: Processes) -> None:
    """Raises RecipeError, before a model is loaded, where no way of `learner.offload.type=auto` fits into this machine."""
    offload = recipe.learner.offload
    size, _ = find_model_size(recipe.model)
    if not isinstance(offload, AutoOffload) or size is None:
        return
    own = -(-trained_parameters(recipe, size) // processes.world)
    room, _ = room_for(recipe, size, processes.world, *accelerator_and_host())
    # What fits does not depend on rates, so any will do.
    kind, among = kind_of(recipe, offload, serial=True), candidates(recipe, offload)
    best, found = choose(own, REFERENCE, kind, room, among=among)
    if best is None:
        raise RecipeError(no_room(room, found))


def settle(
    recipe: Recipe, policy: Policy, processes: Processes, folder: Path
) -> tuple[LearnerSection, Forecast | None, tuple[str, ...]]:
    """The learner's section with a way that is settled, the forecast of its updates, and notes for the user.

    `folder` keeps what was measured: a run that goes on does not measure again on the same machine. Any other way gives the
    same results, so a resumed run may take one. Collective. Raises RecipeError where none fits.
    """
    section = recipe.learner
    offload = section.offload
    if offload is None:
        return section, None, ()
    trained = [p for p in policy.parameters() if p.requires_grad]
    own = -(-sum(p.numel() for p in trained) // processes.world)
    machine = _machine(processes, offload.arithmetic)
    rates, earlier = _rates(recipe, processes, folder, machine, own, trained[0].dtype)
    kind = kind_of(recipe, offload, serial=processes.device.type != "cuda")
    notes: list[str] = []
    if isinstance(offload, AutoOffload):
        size, _ = find_model_size(recipe.model)
        room, limit = _together(processes, *room_for(recipe, size, processes.world, *accelerator_and_host()))
        best, found = choose(
            own, rates, kind, room, among=candidates(recipe, offload), updates=section.steps_per_rollout
        )
        if best is None:
            processes.fail(RecipeError(no_room(room, found)))  # all know of it
        notes.append(_why(best, found, room, limit))
        offload = section_of(best.way, offload)
        section = section.model_copy(update={"offload": offload})
    predicted = predict(own, way_of(offload), rates, kind)
    source = (
        "rates measured now" if earlier is None else f"what this run measured before (corrected by {earlier} updates)"
    )
    notes.append(
        f"learner.offload: an update is predicted to take {predicted.seconds:.3g} s, by {source}: {_said(rates)}"
    )
    if threads := _one_thread(processes, way_of(offload)):
        notes.append(threads)
    forecast = Forecast(predicted, rates, machine, folder / NAME if processes.is_main else None, earlier or 0)
    forecast.save()
    return section, forecast, tuple(notes)


def _one_thread(processes: Processes, way: Way) -> str | None:
    """A line where the CPU's share of the updates would run on one core of several: launchers set OMP_NUM_THREADS to 1."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // local
    if processes.device.type != "cuda" or way.gpu_of == way.every or torch.get_num_threads() > 1 or cores < 2:
        return None
    return (
        f"learner.offload: the CPU's share of an update runs on one core, and there are {cores} for each process. Start with "
        f"OMP_NUM_THREADS={cores}"
    )


def _rates(
    recipe: Recipe, processes: Processes, folder: Path, machine: dict[str, Any], own: int, weights: torch.dtype
) -> tuple[Rates, int | None]:
    """The slowest process's rates, and how many updates have corrected them; None: they were measured now."""
    offload = recipe.learner.offload
    assert offload is not None
    kept = processes.gather(read(folder) if processes.is_main else None)[0]
    if kept is not None and kept.machine == machine:
        return kept.rates, kept.updates
    arithmetic, _ = make_arithmetic(offload.arithmetic, processes.device)
    # A piece's size, where pieces are small enough to stay in the processor's caches; never so many that it takes long.
    elements = max(64, min(ELEMENTS, own, offload.piece_size))
    processes.barrier()  # all at once, as in an update
    mine = calibrate(processes.device, arithmetic, weights=weights, elements=elements)
    everyone = [asdict(rates) for rates in processes.gather(mine)]
    return Rates(**{name: min(rates[name] for rates in everyone) for name in everyone[0]}), None


def _machine(processes: Processes, arithmetic: str) -> dict[str, Any]:
    """What rates depend on. The main process's word counts."""
    cuda = processes.device.type == "cuda"
    own = {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else "",
        "processes": processes.world,
        "torch": torch.__version__,
        "arithmetic": arithmetic,
    }
    return processes.gather(own)[0]


def _together(processes: Processes, room: Room, limit: str) -> tuple[Room, str]:
    """The room of the process that has least of each."""
    everyone = [asdict(one) for one in processes.gather(room)]
    least = Room(**{name: min(one[name] for one in everyone) for name in everyone[0]})
    return least, processes.gather(limit)[0]


def _why(best: Predicted, found: list[Predicted], room: Room, limit: str) -> str:
    faster = [one for one in found if one.seconds < best.seconds and not room.holds(one)]
    fits = [one for one in found if room.holds(one) and one is not best]
    said = f"learner.offload.type=auto: {best.way.name}, the fastest of {len(found)} ways in {limit} a process"
    if fits:
        said += f"; next is {fits[0].way.name} with {fits[0].seconds:.3g} s an update, this way {best.seconds:.3g} s"
    if faster:
        said += f"; {faster[0].way.name} would be faster and does not fit"
    return said


def _said(rates: Rates) -> str:
    names = {"up": "GB/s up", "down": "GB/s down", "memory": "GB/s of the host's memory"}
    links = ", ".join(f"{getattr(rates, name) / 1e9:.3g} {said}" for name, said in names.items())
    adam = f"{rates.cpu_adam / 1e9:.3g} on the CPU, {rates.gpu_adam / 1e9:.3g} on the accelerator"
    return f"{links}; AdamW in G parameters a second: {adam}"

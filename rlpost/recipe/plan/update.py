"""`rlpost plan`: where the optimizer's state lies, and how long an update is predicted to take that way and others."""

from __future__ import annotations

from rlpost.offload.plan import Predicted, Way, choose, predict, ways
from rlpost.offload.simulate import Rates
from rlpost.recipe.plan.memory import GIB, ModelSize, trained_parameters
from rlpost.recipe.sections.root import Recipe

REFERENCE = Rates(up=55e9, down=55e9, memory=95e9, gpu_adam=90e9, cpu_adam=2.5e9, cast=10e9)
"""One process's share of a node of four H100 (24 cores a process), as `benchmarks/offload_model.py` finds it from a published
sweep."""


def describe_update(recipe: Recipe, size: ModelSize | None, processes: int, zero_stage: int) -> tuple[str, ...]:
    """Lines for a recipe with `learner.offload`; none for others, and none where the model's size is not known."""
    offload = recipe.learner.offload
    if offload is None or size is None or zero_stage != 3:
        return ()
    own = -(-trained_parameters(recipe, size) // processes)
    asked = Way(offload.gpu_of, offload.every)
    mine = predict(own, asked, REFERENCE, piece_size=offload.piece_size)
    fastest, predictions = choose(
        own, REFERENCE, piece_size=offload.piece_size, accelerator=float("inf"), host=float("inf")
    )
    lines = [
        f"p, m and v of {own / 1e6:,.1f} M parameters a process lie on the host: {mine.host / GIB:.2f} GiB of pinned memory",
        f"on the accelerator: {mine.accelerator / GIB:.2f} GiB (sums of gradients in float32, and what is staged), in place of "
        f"{16 * own / GIB:.2f} GiB without offload",
        "predicted for a node of four H100 (not measured here, and not this machine):",
        *(f"  {_line(one)}" for one in _shown(mine, predictions)),
    ]
    if fastest is not None and fastest.seconds < 0.95 * mine.seconds:
        lines.append(
            f"there {fastest.way.name} would be {mine.seconds / fastest.seconds:.2f} times as fast: {_keys(fastest.way)}"
        )
    return tuple(lines)


def _shown(mine: Predicted, predictions: list[Predicted]) -> list[Predicted]:
    """The recipe's own way, the fastest, all on one side or the other, and what was published."""
    wanted = {mine.way, predictions[0].way, *ways(1), Way(1, 2)}
    return [one for one in predictions if one.way in wanted]


def _line(one: Predicted) -> str:
    return f"{one.seconds:8.3f} s an update: {one.way.name}"


def _keys(way: Way) -> str:
    if way.gpu_of == way.every:
        return "learner.offload.type=streamed"
    return f"learner.offload.type=interleaved, gpu_of={way.gpu_of}, every={way.every}"

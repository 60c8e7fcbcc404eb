"""Which way of updating is the fastest on a machine of given rates, and what each takes of its memories.

Nothing here is measured: times are those of `rlpost.offload.simulate`, memories are sums. Every way gives the same results, so
a wrong prediction costs time and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rlpost.offload.layout import Piece, cut
from rlpost.offload.program import Op, Parts, build_update
from rlpost.offload.simulate import Load, Rates, Timeline, load_of, simulate

PIECES = 48
"""Pieces of a simulated update, at the most: more change little but how long the simulation takes."""
STAGING, RING = 2, 2


class Nothing:
    """Actions that do nothing, for programs that are simulated."""

    def fetch(self, piece: Piece, slot: int) -> Parts:
        return ()

    step_on_gpu = flush = gradients_down = step_on_cpu = cast = weights_up = step_and_cast_on_cpu = fetch

    def step_resident(self, piece: Piece) -> Parts:
        return ()


@dataclass(frozen=True, slots=True)
class Way:
    """Of every `every` pieces `gpu_of` pass through the accelerator, the CPU updates the others; a share stays resident."""

    gpu_of: int
    every: int
    resident: float = 0.0

    @property
    def name(self) -> str:
        through = {0: "all by the CPU", self.every: "all through the accelerator"}
        said = through.get(self.gpu_of, f"{self.gpu_of} of {self.every} through the accelerator")
        return said + (f", {self.resident:.0%} resident" if self.resident else "")


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a way takes, of one process."""

    way: Way
    seconds: float
    accelerator: int  # bytes: gradients, staging, and what is resident
    host: int  # bytes: p, m, v of what is not resident, and the rings


def ways(largest: int = 6, shares: Iterable[float] = (0.0,)) -> list[Way]:
    """All patterns p of q with q up to `largest`, each ratio once, with each resident share."""
    ratios = {(0, 1), (1, 1)}
    for every in range(2, largest + 1):
        ratios |= {(p, every) for p in range(1, every) if not any(p * b == a * every for a, b in ratios)}
    return [Way(p, q, share) for share in shares for p, q in sorted(ratios, key=lambda r: (r[0] / r[1], r[1]))]


def timeline(
    parameters: int,
    way: Way,
    rates: Rates,
    *,
    pieces: int = PIECES,
    fused: bool = False,
    load: Callable[[Op], Load] | None = None,
) -> Timeline:
    """When each operation of an update of so many parameters runs."""
    layout = cut([parameters], [0], -(-parameters // pieces), gpu_of=way.gpu_of, every=way.every, resident=way.resident)
    program = build_update(layout, Nothing(), sets=STAGING, ring=RING, fused=fused)
    return simulate(program, rates, load)


def predict(parameters: int, way: Way, rates: Rates, *, piece_size: int, gradient_bytes: int = 4) -> Predicted:
    """The seconds and bytes that an update of `parameters` by one process takes. Where interleaving gains nothing, it shows."""
    pieces = max(1, min(PIECES, -(-parameters // piece_size)))
    resident = int(way.resident * parameters)
    piece = min(piece_size, parameters)
    staged = STAGING * 12 * piece if way.gpu_of else 0
    rings = RING * (gradient_bytes + 2) * piece if way.gpu_of < way.every else 0

    def load(op: Op) -> Load:
        return load_of(op, rates, gradient_bytes=gradient_bytes)

    return Predicted(
        way,
        timeline(parameters, way, rates, pieces=pieces, load=load).total,
        accelerator=gradient_bytes * parameters + staged + 12 * resident,
        host=12 * (parameters - resident) + rings,
    )


def choose(
    parameters: int,
    rates: Rates,
    *,
    piece_size: int,
    accelerator: float,
    host: float,
    among: Sequence[Way] | None = None,
) -> tuple[Predicted | None, list[Predicted]]:
    """(the fastest way that fits into so many bytes of both memories, all ways from the fastest on); None: none fits."""
    predictions = [predict(parameters, way, rates, piece_size=piece_size) for way in among or ways()]
    predictions.sort(key=lambda one: (one.seconds, one.accelerator))
    return next((one for one in predictions if one.accelerator <= accelerator and one.host <= host), None), predictions

"""Which way of updating is the fastest on a machine of given rates, and what each takes of its memories.

Nothing here is measured: times are those of `rlpost.offload.simulate`, memories are sums. Every way gives the same results, so
a wrong prediction costs time and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rlpost.offload.layout import Piece, cut
from rlpost.offload.program import Op, Parts, Program, build_update
from rlpost.offload.simulate import Load, Rates, Timeline, load_of, simulate
from rlpost.recipe.sections.offload import (
    AutoOffload,
    InterleavedOffload,
    ParkedOffload,
    ResidentOffload,
    SettledOffload,
    StreamedOffload,
)

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
    """Of every `every` pieces `gpu_of` pass through the accelerator, the CPU updates the others; a share stays resident, where
    it is all and `parked`, only between two rollouts."""

    gpu_of: int
    every: int
    resident: float = 0.0
    parked: bool = False

    @property
    def name(self) -> str:
        if self.resident == 1.0:
            return "on the accelerator, on the host while sampling" if self.parked else "on the accelerator"
        through = {0: "all by the CPU", self.every: "all through the accelerator"}
        said = through.get(self.gpu_of, f"{self.gpu_of} of {self.every} through the accelerator")
        return said + (f", {self.resident:.0%} resident" if self.resident else "")


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a way takes, of one process."""

    way: Way
    seconds: float
    accelerator: int  # bytes: gradients, staging, and what is resident
    host: int  # bytes: p, m, v, where they are at home there or parked, and the rings
    sampling: int = 0  # bytes of the state that stay on the accelerator while completions are sampled
    moving: float = 0.0  # seconds a rollout: state on its way to the host and back

    def per_update(self, updates: int) -> float:
        """Seconds an update, where a rollout has so many of them."""
        return self.seconds + self.moving / updates


RESIDENT, PARKED = Way(1, 1, 1.0), Way(1, 1, 1.0, parked=True)


def way_of(offload: SettledOffload) -> Way:
    """The way that a section of a recipe asks for."""
    return Way(offload.gpu_of, offload.every, offload.resident, parked=offload.parks_state)


def section_of(way: Way, asked: AutoOffload) -> SettledOffload:
    """The section that asks for a way; what else it says is as in `asked`."""
    shared = {"piece_size": asked.piece_size, "park": asked.park, "arithmetic": asked.arithmetic}
    if way.resident == 1.0:
        return ParkedOffload(**shared) if way.parked else ResidentOffload(**shared)
    if way.gpu_of == way.every and not way.resident:
        return StreamedOffload(**shared)
    return InterleavedOffload(gpu_of=way.gpu_of, every=way.every, resident=way.resident, **shared)


def ways(largest: int = 6, shares: Iterable[float] = (0.0,)) -> list[Way]:
    """All patterns p of q with q up to `largest`, each ratio once, with each resident share."""
    ratios = {(0, 1), (1, 1)}
    for every in range(2, largest + 1):
        ratios |= {(p, every) for p in range(1, every) if not any(p * b == a * every for a, b in ratios)}
    return [Way(p, q, share) for share in shares for p, q in sorted(ratios, key=lambda r: (r[0] / r[1], r[1]))]


def program_of(parameters: int, way: Way, *, pieces: int = PIECES, fused: bool = False) -> Program:
    """An update of so many parameters, of operations that do nothing."""
    found = cut([parameters], [0], -(-parameters // pieces), gpu_of=way.gpu_of, every=way.every, resident=way.resident)
    return build_update(found, Nothing(), sets=STAGING, ring=RING, fused=fused)


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
    return simulate(program_of(parameters, way, pieces=pieces, fused=fused), rates, load)


@dataclass(frozen=True, slots=True)
class Kind:
    """What the bytes and seconds of an update depend on beside its way."""

    piece_size: int
    gradient_bytes: int = 4  # of an element on the accelerator
    weight_bytes: int = 2
    park: bool = True  # whether a resident share leaves the accelerator while completions are sampled
    serial: bool = False  # without an accelerator: one operation after the other, by the same cores


def predict(parameters: int, way: Way, rates: Rates, kind: Kind) -> Predicted:
    """What an update of `parameters` by one process takes. A machine without a gain from interleaving shows it here."""
    pieces = max(1, min(PIECES, -(-parameters // kind.piece_size)))
    resident = int(way.resident * parameters)
    piece = min(kind.piece_size, parameters)
    all_resident = way.resident == 1.0
    staged = STAGING * 12 * piece if way.gpu_of and not all_resident else 0
    width = kind.gradient_bytes + kind.weight_bytes
    rings = RING * width * piece if way.gpu_of < way.every and not all_resident else 0

    def load(op: Op) -> Load:
        return load_of(op, rates, gradient_bytes=kind.gradient_bytes, weight_bytes=kind.weight_bytes)

    program = program_of(parameters, way, pieces=pieces)
    # On the host they stay at home: a resident share has a copy on the accelerator, and all that is resident none on the host.
    at_home = 0 if all_resident and not way.parked else 12 * parameters
    leaves = way.parked or (kind.park and not all_resident)
    return Predicted(
        way,
        sum(load(op).seconds for op in program.ops) if kind.serial else simulate(program, rates, load).total,
        accelerator=kind.gradient_bytes * parameters + staged + 12 * resident,
        host=at_home + rings,
        sampling=0 if leaves else 12 * resident,
        moving=12 * resident * (1 / rates.down + 1 / rates.up) if leaves else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that an update may take of one process's memories, and its state while completions are sampled."""

    accelerator: float = float("inf")
    host: float = float("inf")
    sampling: float = float("inf")

    def holds(self, one: Predicted) -> bool:
        return one.accelerator <= self.accelerator and one.host <= self.host and one.sampling <= self.sampling


def choose(
    parameters: int,
    rates: Rates,
    kind: Kind,
    room: Room,
    *,
    among: Sequence[Way] | None = None,
    updates: int = 1,
) -> tuple[Predicted | None, list[Predicted]]:
    """(the fastest way that fits, all ways from the fastest on); None: none fits. `updates`: of a rollout."""
    predictions = [predict(parameters, way, rates, kind) for way in among or ways()]
    predictions.sort(key=lambda one: (one.per_update(updates), one.accelerator))
    return next((one for one in predictions if room.holds(one)), None), predictions

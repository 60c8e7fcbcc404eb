"""An update as a program: operations on lanes, what each reads and writes, and what each waits for.

The same program is run (`rlpost.offload.backends`), checked for races (`rlpost.offload.races`) and mutated by tests. It knows
no tensor: what an operation does it is given as `parts`, calls that something else may run between.

The method is that of Deep Optimizer States (Maurya et al., Middleware 2024): pieces of the state that lies on the host are
fetched, updated on the accelerator and flushed, while the CPU updates others. Gradients stay on the accelerator, unlike there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, get_args

from rlpost.offload.layout import Piece

Lane = Literal["gpu", "fetch", "flush", "up", "down", "cpu", "cast"]
LANES: tuple[Lane, ...] = get_args(Lane)
HOST: frozenset[Lane] = frozenset({"cpu", "cast"})
"""Lanes of host threads; the others are streams of the accelerator. Copies have four: on one stream a direction a small copy
that waits for the CPU would hold up the large ones behind it."""

Parts = Sequence[Callable[[], None]]


class Use(NamedTuple):
    """Elements `start` to `stop` of a buffer."""

    buffer: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. A lane runs its operations in order; `after` are the others that it waits for, by number."""

    lane: Lane
    name: str
    piece: int
    reads: tuple[Use, ...]
    writes: tuple[Use, ...]
    after: tuple[int, ...]
    parts: Parts


@dataclass(slots=True)
class Program:
    """Operations in the order in which they are issued: an operation waits for earlier ones only."""

    ops: list[Op] = field(default_factory=list)

    def add(
        self,
        lane: Lane,
        name: str,
        piece: int,
        *,
        reads: Iterable[Use],
        writes: Iterable[Use],
        after: Iterable[int | None],
        parts: Parts,
    ) -> int:
        """The operation's number. None among `after`: nothing to wait for."""
        waits = tuple(sorted({number for number in after if number is not None}))
        self.ops.append(Op(lane, name, piece, tuple(reads), tuple(writes), waits, parts))
        return len(self.ops) - 1

    def without(self, op: int, event: int) -> Program:
        """The program in which operation `op` does not wait for operation `event`; for tests."""
        after = tuple(number for number in self.ops[op].after if number != event)
        return Program([replace(o, after=after) if i == op else o for i, o in enumerate(self.ops)])


class Actions(Protocol):
    """What the operations do. `slot` counts staging sets on the accelerator, or ring buffers on the host."""

    def fetch(self, piece: Piece, slot: int) -> Parts:
        """p, m, v of the piece, host -> staging."""
        ...

    def step_on_gpu(self, piece: Piece, slot: int) -> Parts:
        """AdamW on the staged piece with the accelerator's gradients, and its weights from that."""
        ...

    def flush(self, piece: Piece, slot: int) -> Parts:
        """p, m, v of the piece, staging -> host."""
        ...

    def gradients_down(self, piece: Piece, slot: int) -> Parts:
        """Gradients of the piece, accelerator -> host ring."""
        ...

    def step_on_cpu(self, piece: Piece, slot: int) -> Parts:
        """AdamW on the piece where it lies, with the ring's gradients."""
        ...

    def cast(self, piece: Piece, slot: int) -> Parts:
        """p of the piece in the weights' precision, into the host's other ring."""
        ...

    def weights_up(self, piece: Piece, slot: int) -> Parts:
        """Weights of the piece, host ring -> accelerator."""
        ...


class Order:
    """Builds the program of an update; keeps which operation freed each slot last."""

    def __init__(self, pieces: Sequence[Piece], actions: Actions, *, sets: int, ring: int) -> None:
        self.program = Program()
        self._pieces, self._actions = pieces, actions
        self._staging: list[int | None] = [None] * sets
        self._gradients: list[int | None] = [None] * ring
        self._weights: list[int | None] = [None] * ring
        self._on_gpu = self._on_cpu = 0

    def add(self, number: int) -> None:
        piece = self._pieces[number]
        if piece.on_gpu:
            self._through_the_gpu(number, piece)
        else:
            self._on_the_cpu(number, piece)

    def _through_the_gpu(self, number: int, piece: Piece) -> None:
        slot = self._on_gpu % len(self._staging)
        self._on_gpu += 1
        a, b, actions, add = piece.start, piece.stop, self._actions, self.program.add
        home, staged = [Use(name, a, b) for name in ("p", "m", "v")], [Use(f"staging {slot}", 0, piece.size)]
        gradients, weights = Use("gradients", a, b), Use("weights", a, b)
        free = (self._staging[slot],)  # the flush of the piece that was staged there before
        fetch = add("fetch", "fetch", number, reads=home, writes=staged, after=free, parts=actions.fetch(piece, slot))
        step = add(
            "gpu",
            "step",
            number,
            reads=(*staged, gradients),
            writes=(*staged, weights),
            after=(fetch,),
            parts=actions.step_on_gpu(piece, slot),
        )
        flush = add(
            "flush", "flush", number, reads=staged, writes=home, after=(step,), parts=actions.flush(piece, slot)
        )
        self._staging[slot] = flush

    def _on_the_cpu(self, number: int, piece: Piece) -> None:
        slot = self._on_cpu % len(self._gradients)
        self._on_cpu += 1
        a, b, actions, add = piece.start, piece.stop, self._actions, self.program.add
        home = [Use(name, a, b) for name in ("p", "m", "v")]
        received, narrow = [Use(f"host gradients {slot}", 0, piece.size)], [Use(f"host weights {slot}", 0, piece.size)]
        down = add(
            "down",
            "gradients",
            number,
            reads=[Use("gradients", a, b)],
            writes=received,
            after=(self._gradients[slot],),
            parts=actions.gradients_down(piece, slot),
        )
        step = add(
            "cpu",
            "step",
            number,
            reads=(*home, *received),
            writes=home,
            after=(down,),
            parts=actions.step_on_cpu(piece, slot),
        )
        cast = add(
            "cast",
            "cast",
            number,
            reads=home[:1],
            writes=narrow,
            after=(step, self._weights[slot]),
            parts=actions.cast(piece, slot),
        )
        up = add(
            "up",
            "weights",
            number,
            reads=narrow,
            writes=[Use("weights", a, b)],
            after=(cast,),
            parts=actions.weights_up(piece, slot),
        )
        self._gradients[slot], self._weights[slot] = step, up


def build_update(pieces: Sequence[Piece], actions: Actions, *, sets: int = 2, ring: int = 2) -> Program:
    """The program of one update. It begins and ends with nothing under way: backends wait for every lane.

    `sets`: pieces that may be staged on the accelerator at once; `ring`: pieces of gradients and of weights on the host.
    """
    order = Order(pieces, actions, sets=sets, ring=ring)
    for number in range(len(pieces)):
        order.add(number)
    return order.program

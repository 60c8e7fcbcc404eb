"""An update as a program: operations on lanes, what each reads and writes, and what each waits for.

The same program is run (`rlpost.offload.backends`), checked for races and gaps (`rlpost.offload.races`), simulated
(`rlpost.offload.simulate`) and mutated by tests. It knows no tensor: what an operation does it is given as `parts`, calls that
something else may run between.

The method is that of Deep Optimizer States (Maurya et al., Middleware 2024): pieces of the state that lies on the host are
fetched, updated on the accelerator and flushed, while the CPU updates others. Gradients stay on the accelerator, unlike there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

from rlpost.offload.layout import Piece

Lane = Literal["gpu", "fetch", "flush", "up", "down", "cpu", "cast"]
LANES: tuple[Lane, ...] = get_args(Lane)
HOST: frozenset[Lane] = frozenset({"cpu", "cast"})
"""Lanes of host threads; the others are streams of the accelerator. Copies have four: on one stream a direction a small copy
that waits for the CPU would hold up the large ones behind it."""

STATE = ("p", "m", "v", "weights")
"""Buffers that an update must have written once, from end to end: float32 master weights and moments, and the model's weights.
All have one index space, that of the flat vectors, and so has `gradients`."""

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
    piece: int  # its number; -1: of no piece
    reads: tuple[Use, ...]
    writes: tuple[Use, ...]
    after: tuple[int, ...]
    parts: Parts
    size: int = 0  # elements


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
        size: int = 0,
    ) -> int:
        """The operation's number. None among `after`: nothing to wait for."""
        waits = tuple(sorted({number for number in after if number is not None}))
        self.ops.append(Op(lane, name, piece, tuple(reads), tuple(writes), waits, parts, size))
        return len(self.ops) - 1

    def without(self, op: int, event: int) -> Program:
        """The program in which operation `op` does not wait for operation `event`; for tests."""
        after = tuple(number for number in self.ops[op].after if number != event)
        return Program([replace(o, after=after) if i == op else o for i, o in enumerate(self.ops)])

    def writers(self, buffer: str, start: int, stop: int) -> list[int]:
        """The operations that write any of the elements; who waits for all of them reads what the update made of these."""
        return [
            number
            for number, op in enumerate(self.ops)
            if any(use.buffer == buffer and use.start < stop and start < use.stop for use in op.writes)
        ]


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


@runtime_checkable
class ResidentActions(Actions, Protocol):
    """Actions that can also update pieces whose state stays on the accelerator."""

    def step_resident(self, piece: Piece) -> Parts:
        """AdamW on the piece where it lies on the accelerator, and its weights from that."""
        ...


@runtime_checkable
class FusedActions(Actions, Protocol):
    """Actions whose AdamW on the CPU writes the weights in the same pass: p is not read from memory a second time, which is 4
    bytes of 40 an element that such a piece moves through it (with 16-bit weights and 32-bit gradients)."""

    def step_and_cast_on_cpu(self, piece: Piece, slot: int) -> Parts:
        """AdamW on the piece where it lies, with the ring's gradients, and its weights into the host's other ring."""
        ...


class Order:
    """Builds the program of one update or of several in a row: keeps what freed each slot last, and what made each piece's
    state and all weights what they are."""

    def __init__(self, pieces: Sequence[Piece], *, sets: int, ring: int, fused: bool = False) -> None:
        if sets < 1 or ring < 1:
            raise ValueError(f"{sets} staging sets and rings of {ring}: each needs one at least")
        self.program = Program()
        self._pieces, self._fused = pieces, fused
        self._staging: list[int | None] = [None] * sets
        self._gradients: list[int | None] = [None] * ring
        self._weights: list[int | None] = [None] * ring
        self._on_gpu = self._on_cpu = 0
        self._home: dict[int, int] = {}  # piece -> the operation after which its state on the host may be used again
        self._backward: int | None = None
        self._last_up: int | None = None

    def backward(self, parts: Parts) -> int:
        """Whatever reads all weights and leaves new gradients, on the lane of the accelerator's computations."""
        n = max(piece.stop for piece in self._pieces)
        # Weights that the accelerator writes itself are written on this lane; of the others the last comes up last.
        self._backward = self.program.add(
            "gpu",
            "backward",
            -1,
            reads=[Use("weights", 0, n)],
            writes=[Use("gradients", 0, n)],
            after=(self._last_up,),
            parts=parts,
            size=n,
        )
        return self._backward

    def update(self, actions: Actions) -> None:
        """Adds one update of all pieces. Raises TypeError for actions that have no step for resident pieces, or no fused one,
        where it is needed."""
        numbered = list(enumerate(self._pieces))
        for number, piece in numbered:  # first: they wait for nothing, and run while the first fetch is under way
            if piece.where == "resident":
                self._resident(number, piece, actions)
        for number, piece in numbered:
            if piece.where == "gpu":
                self._through_the_gpu(number, piece, actions)
            elif piece.where == "cpu":
                self._on_the_cpu(number, piece, actions)

    def _resident(self, number: int, piece: Piece, actions: Actions) -> None:
        if not isinstance(actions, ResidentActions):
            raise TypeError(f"piece {number} is resident, and {type(actions).__name__} has no step for such pieces")
        state, gradients, weights = _uses(piece)
        self.program.add(
            "gpu",
            "step",
            number,
            reads=(*state, gradients),
            writes=(*state, weights),
            after=(),
            parts=actions.step_resident(piece),
            size=piece.size,
        )

    def _through_the_gpu(self, number: int, piece: Piece, actions: Actions) -> None:
        slot = self._on_gpu % len(self._staging)
        self._on_gpu += 1
        (state, gradients, weights), staged = _uses(piece), [Use(f"staging {slot}", 0, piece.size)]
        fetch = self.program.add(
            "fetch",
            "fetch",
            number,
            reads=state,
            writes=staged,
            after=(
                self._staging[slot],
                self._home.get(number),
            ),  # flushes: of who was staged there, and of the step before
            parts=actions.fetch(piece, slot),
            size=piece.size,
        )
        step = self.program.add(
            "gpu",
            "step",
            number,
            reads=(*staged, gradients),
            writes=(*staged, weights),
            after=(fetch,),
            parts=actions.step_on_gpu(piece, slot),
            size=piece.size,
        )
        self._staging[slot] = self._home[number] = self.program.add(
            "flush",
            "flush",
            number,
            reads=staged,
            writes=state,
            after=(step,),
            parts=actions.flush(piece, slot),
            size=piece.size,
        )

    def _on_the_cpu(self, number: int, piece: Piece, actions: Actions) -> None:
        slot = self._on_cpu % len(self._gradients)
        self._on_cpu += 1
        _, gradients, weights = _uses(piece)
        down = self.program.add(
            "down",
            "gradients",
            number,
            reads=[gradients],
            writes=[Use(f"host gradients {slot}", 0, piece.size)],
            after=(self._gradients[slot], self._backward),
            parts=actions.gradients_down(piece, slot),
            size=piece.size,
        )
        make = self._step_and_cast if self._fused else self._step_then_cast
        step, cast = make(number, piece, actions, slot, down)
        up = self.program.add(
            "up",
            "weights",
            number,
            reads=[Use(f"host weights {slot}", 0, piece.size)],
            writes=[weights],
            after=(cast,),
            parts=actions.weights_up(piece, slot),
            size=piece.size,
        )
        self._gradients[slot], self._weights[slot], self._last_up = step, up, up
        self._home[number] = cast  # it reads p: the next update's step must not be before it

    def _step_then_cast(self, number: int, piece: Piece, actions: Actions, slot: int, down: int) -> tuple[int, int]:
        """The operation after which the ring's gradients are free, and the one after which its weights are there."""
        state, _, _ = _uses(piece)
        step = self.program.add(
            "cpu",
            "step",
            number,
            reads=(*state, Use(f"host gradients {slot}", 0, piece.size)),
            writes=state,
            after=(down, self._home.get(number)),
            parts=actions.step_on_cpu(piece, slot),
            size=piece.size,
        )
        cast = self.program.add(
            "cast",
            "cast",
            number,
            reads=state[:1],
            writes=[Use(f"host weights {slot}", 0, piece.size)],
            after=(step, self._weights[slot]),
            parts=actions.cast(piece, slot),
            size=piece.size,
        )
        return step, cast

    def _step_and_cast(self, number: int, piece: Piece, actions: Actions, slot: int, down: int) -> tuple[int, int]:
        """As `_step_then_cast`, in one operation."""
        if not isinstance(actions, FusedActions):
            raise TypeError(f"{type(actions).__name__} has no step that writes weights in the same pass")
        state, _, _ = _uses(piece)
        both = self.program.add(
            "cpu",
            "step and cast",
            number,
            reads=(*state, Use(f"host gradients {slot}", 0, piece.size)),
            writes=(*state, Use(f"host weights {slot}", 0, piece.size)),
            after=(down, self._home.get(number), self._weights[slot]),
            parts=actions.step_and_cast_on_cpu(piece, slot),
            size=piece.size,
        )
        return both, both


def _uses(piece: Piece) -> tuple[list[Use], Use, Use]:
    """The piece's p, m and v; its gradients; its weights."""
    a, b = piece.start, piece.stop
    return [Use(name, a, b) for name in ("p", "m", "v")], Use("gradients", a, b), Use("weights", a, b)


def build_update(
    pieces: Sequence[Piece], actions: Actions, *, sets: int = 2, ring: int = 2, fused: bool = False
) -> Program:
    """The program of one update. It begins and ends with nothing under way: backends wait for every lane.

    `sets`: pieces that may be staged on the accelerator at once, so `sets` - 1 are fetched ahead of the one that is updated;
    `ring`: pieces of gradients and of weights on the host; `fused`: AdamW on the CPU writes the weights itself, and there is no
    cast. Raises ValueError for less than one set or ring buffer, and TypeError for actions that have no step for resident
    pieces, or no fused one, where it is needed.
    """
    order = Order(pieces, sets=sets, ring=ring, fused=fused)
    order.update(actions)
    return order.program


def build_updates(
    pieces: Sequence[Piece],
    steps: Sequence[tuple[Actions, Parts]],
    *,
    sets: int = 2,
    ring: int = 2,
    fused: bool = False,
) -> Program:
    """The program of several steps in a row, each a backward pass (the parts) and then an update (by its actions), in which
    nothing waits for the end of an update but what needs its results: flushes go on under the next backward pass, and fetches
    for the next update may come before it. Raises as `build_update` does."""
    order = Order(pieces, sets=sets, ring=ring, fused=fused)
    for actions, backward in steps:
        order.backward(backward)
        order.update(actions)
    return order.program

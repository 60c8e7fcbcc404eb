"""The tensors of an update: flat host state, staging, rings, and AdamW on a piece of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlpost.offload.arithmetic import Arithmetic, Hyper, OwnArithmetic, Step, TorchArithmetic
from rlpost.offload.backends import CudaDevice, run_in_order, run_on_lanes
from rlpost.offload.layout import UNIT, Piece
from rlpost.offload.program import Parts, Program, build_update
from rlpost.offload.races import races

_PORTABLE = 1  # cudaHostRegisterPortable: for every CUDA context of the process


@dataclass(slots=True)
class FlatState:
    """What a process holds, each a vector of its N elements in one order."""

    p: Tensor  # float32 master weights; they and the moments lie on the host, or all on the accelerator (see `Update`)
    m: Tensor  # float32 first moments
    v: Tensor  # float32 second moments
    weights: Tensor  # on the accelerator, in the model's precision
    gradients: Tensor  # on the accelerator, in the precision in which micro-batches are added up


@dataclass(slots=True)
class StepSetting:
    """What is another in every step."""

    number: int = 1  # of the step, from 1
    factor: float = 1.0  # for gradients: of the loss scale and of clipping together
    groups: Sequence[dict[str, Any]] = field(default_factory=list)  # torch's parameter groups


class Update:
    """The program of an update with its buffers; built once, run at every step.

    The arithmetic is torch's fused AdamW on both sides, or another one that is given. On a CPU the bits are those of one call
    on the whole vector, whatever the pieces, where they are updated, and the order. torch's kernel for CUDA may round otherwise
    than the CPU's, so there the bits depend on which pieces are updated where.

    Resident pieces are updated on the accelerator without a copy over the link. Where all are resident, `state` itself may lie
    there. Where some are, each has its own copy there, which is the newest between updates: `bring_home` writes it to the host,
    where checkpoints look for it, and `take_up` reads it from there.
    """

    def __init__(
        self,
        state: FlatState,
        pieces: Sequence[Piece],
        *,
        sets: int = 2,
        ring: int = 2,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        """Raises RuntimeError if the program's result would depend on timing, which is a defect."""
        self._arithmetic = arithmetic or TorchArithmetic()
        self.state, self.pieces, self.step = state, pieces, StepSetting()
        self._cuda = state.weights.is_cuda
        on_gpu = max((piece.size for piece in pieces if piece.on_gpu), default=0)
        on_cpu = max((piece.size for piece in pieces if piece.where == "cpu"), default=0)
        device = state.weights.device
        self._residents = [piece for piece in pieces if piece.where == "resident"]
        self._abroad: list[Tensor] = []  # p, m, v of all resident pieces, end to end, where they do not lie in `state`
        self._at: dict[int, int] = {}  # a resident piece's start -> where it begins there
        if len(self._residents) < len(pieces):
            self._at = dict(zip((r.start for r in self._residents), _starts(self._residents), strict=True))
            self._abroad = [torch.empty(sum(r.size + UNIT for r in self._residents), device=device) for _ in range(3)]
            self.take_up()
        self._staging = [[torch.empty(on_gpu, device=device) for _ in range(3)] for _ in range(sets)]
        self._gradients = [host_vector(on_cpu, state.gradients.dtype, pinned=self._cuda) for _ in range(ring)]
        self._weights = [host_vector(on_cpu, state.weights.dtype, pinned=self._cuda) for _ in range(ring)]
        self.program: Program = build_update(pieces, self, sets=sets, ring=ring)
        if conflicts := races(self.program):
            raise RuntimeError(
                f"the update's program has {len(conflicts)} races, the first is {conflicts[0]}: report this"
            )

    def run(self, step: StepSetting) -> None:
        """One optimizer step; done when it returns."""
        self.step = step
        if self._cuda:
            run_on_lanes(self.program, CudaDevice())
        else:
            run_in_order(self.program)  # all lanes are the same cores

    def bring_home(self) -> None:
        """The host's state becomes the newest, that of resident pieces too."""
        for piece in self._residents if self._abroad else ():
            for home, there in zip(self._home(piece), self._resident(piece), strict=True):
                home.copy_(there)

    def take_up(self) -> None:
        """Resident pieces become what the host's state says."""
        for piece in self._residents if self._abroad else ():
            for home, there in zip(self._home(piece), self._resident(piece), strict=True):
                there.copy_(home)

    @property
    def abroad(self) -> Sequence[Tensor]:
        """The accelerator's own copies of what is resident."""
        return self._abroad

    def step_resident(self, piece: Piece) -> Parts:
        return self._step_on_accelerator(piece, *self._resident(piece))

    def fetch(self, piece: Piece, slot: int) -> Parts:
        return _copies(zip(self._staged(piece, slot), self._home(piece), strict=True))

    def step_on_gpu(self, piece: Piece, slot: int) -> Parts:
        return self._step_on_accelerator(piece, *self._staged(piece, slot))

    def _step_on_accelerator(self, piece: Piece, p: Tensor, m: Tensor, v: Tensor) -> Parts:
        gradients, weights = (x[piece.start : piece.stop] for x in (self.state.gradients, self.state.weights))
        if isinstance(self._arithmetic, OwnArithmetic):  # which writes them in the same pass
            return [lambda: self._adamw(piece, p, m, v, gradients, weights)]
        return [lambda: self._adamw(piece, p, m, v, gradients), lambda: _copy(weights, p)]

    def flush(self, piece: Piece, slot: int) -> Parts:
        return _copies(zip(self._home(piece), self._staged(piece, slot), strict=True))

    def gradients_down(self, piece: Piece, slot: int) -> Parts:
        return _copies([(self._gradients[slot][: piece.size], self.state.gradients[piece.start : piece.stop])])

    def step_on_cpu(self, piece: Piece, slot: int) -> Parts:
        p, m, v = self._home(piece)
        gradients = self._gradients[slot][: piece.size]
        return [lambda: self._adamw(piece, p, m, v, gradients)]

    def cast(self, piece: Piece, slot: int) -> Parts:
        return _copies([(self._weights[slot][: piece.size], self.state.p[piece.start : piece.stop])])

    def weights_up(self, piece: Piece, slot: int) -> Parts:
        return _copies([(self.state.weights[piece.start : piece.stop], self._weights[slot][: piece.size])])

    def _home(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        part, state = slice(piece.start, piece.stop), self.state
        return state.p[part], state.m[part], state.v[part]

    def _resident(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        if not self._abroad:
            return self._home(piece)
        at = self._at[piece.start]
        p, m, v = (x[at : at + piece.size] for x in self._abroad)
        return p, m, v

    def _staged(self, piece: Piece, slot: int) -> tuple[Tensor, Tensor, Tensor]:
        p, m, v = (x[: piece.size] for x in self._staging[slot])
        return p, m, v

    def _adamw(
        self, piece: Piece, p: Tensor, m: Tensor, v: Tensor, gradients: Tensor, weights: Tensor | None = None
    ) -> None:
        """One step in place. The gradients are left as they are; `weights`, if given, become p in their own precision."""
        group = self.step.groups[piece.group]
        hyper = Hyper(float(group["lr"]), tuple(group["betas"]), group["eps"], group["weight_decay"])
        step = Step(self.step.number, self.step.factor, (hyper,))
        self._arithmetic.update(p, m, v, gradients, weights, step, 0)


def _starts(pieces: Sequence[Piece]) -> list[int]:
    """Where each begins if they lie end to end, each at a multiple of the unit that torch's kernel needs."""
    starts, at = [], 0
    for piece in pieces:
        starts.append(at)
        at += -(-piece.size // UNIT) * UNIT
    return starts


def host_vector(n: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """Host memory of n elements; pinned, so that copies run beside the rest.

    Ordinary memory is registered with CUDA, because torch's own pinned memory comes in powers of two: 8.2 GB would take 16. It
    is taken where registering fails. Views must not outlive the vector.
    """
    vector = torch.empty(n, dtype=dtype)
    if not pinned or not n:
        return vector
    cudart = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(vector.data_ptr(), vector.nbytes, _PORTABLE)) != 0:
        return torch.empty(n, dtype=dtype, pin_memory=True)
    weakref.finalize(vector, cudart.cudaHostUnregister, vector.data_ptr())
    return vector


def _copies(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Callable[[], None]]:
    """Copies (to, from), each in two halves: what runs beside one is seen between them."""
    parts: list[Callable[[], None]] = []
    for to, source in pairs:
        half = to.numel() // 2
        for part in (slice(0, half), slice(half, None)):
            parts.append(lambda to=to[part], source=source[part]: _copy(to, source))  # type: ignore[misc]
    return parts


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source, non_blocking=True)

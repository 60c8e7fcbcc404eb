"""A machine of plain tensors for programs of several optimizer steps, and random cases of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlpost.offload.arithmetic import Hyper, Step, TorchArithmetic
from rlpost.offload.backends import run_in_order
from rlpost.offload.layout import Piece, cut
from rlpost.offload.program import Lane, Parts, Program, build_update, build_updates

GROUPS = (Hyper(1e-2, (0.9, 0.95), 1e-8, 0.1), Hyper(2e-2, (0.9, 0.95), 1e-8, 0.0))
CLIP = 5.0


class Machine:
    """State, staging and rings. What is to be written before it is read begins as NaN."""

    def __init__(self, case: Case) -> None:
        n, largest = sum(case.sizes), max(case.sizes)
        self.case, device = case, case.device
        self.p = torch.randn(n, generator=torch.Generator().manual_seed(case.seed))
        self.m, self.v = torch.zeros(n), torch.zeros(n)
        self.resident = [torch.full((n,), torch.nan, device=device) for _ in range(3)]
        self.weights = self.p.bfloat16().to(device)
        self.gradients = torch.full((n,), torch.nan, dtype=case.dtype, device=device)
        self.staging = [[torch.full((largest,), torch.nan, device=device) for _ in range(3)] for _ in range(case.sets)]
        self.host_gradients = [torch.full((largest,), torch.nan, dtype=case.dtype) for _ in range(case.ring)]
        self.host_weights = [torch.full((largest,), torch.nan, dtype=torch.bfloat16) for _ in range(case.ring)]
        if device != "cpu":
            self.p, self.m, self.v = (x.pin_memory() for x in (self.p, self.m, self.v))
            self.host_gradients = [x.pin_memory() for x in self.host_gradients]
            self.host_weights = [x.pin_memory() for x in self.host_weights]
        self._residents = [piece for piece in case.pieces() if piece.where == "resident"]
        for piece in self._residents:  # their state moves to the accelerator
            for there, here in zip(self.resident, (self.p, self.m, self.v), strict=True):
                there[piece.start : piece.stop] = here[piece.start : piece.stop]
                here[piece.start : piece.stop] = torch.nan

    def values(self) -> tuple[Tensor, ...]:
        """p, m, v and weights, wherever they lie."""
        state = [x.clone() for x in (self.p, self.m, self.v)]
        for piece in self._residents:
            for x, there in zip(state, self.resident, strict=True):
                x[piece.start : piece.stop] = there[piece.start : piece.stop].cpu()
        return *state, self.weights.cpu()

    def home(self, piece: Piece) -> list[Tensor]:
        """p, m and v of a piece where they stay."""
        state = self.resident if piece.where == "resident" else (self.p, self.m, self.v)
        return [x[piece.start : piece.stop] for x in state]


class Actions:
    """One step's operations on the machine; `factor` of its gradients is known when its backward pass is done."""

    def __init__(self, machine: Machine, number: int, taken: int | None = None) -> None:
        """`taken`: which step of AdamW it is, where some were skipped."""
        self.machine, self.number, self.factor = machine, number, torch.nan
        self.taken = number if taken is None else taken

    def backward(self) -> Parts:
        """Gradients that depend on the weights, of some micro-batches, and what they are clipped by."""
        machine, case = self.machine, self.machine.case
        drawn = torch.Generator().manual_seed(1000 * case.seed + self.number)
        n, device = machine.p.numel(), case.device
        parts = [torch.randn(n, generator=drawn).to(device) for _ in range(case.micro_batches)]

        def clip() -> None:
            self.factor = 1.0 / max(1.0, float(machine.gradients.float().norm()) / CLIP)

        add = [lambda x=x: machine.gradients.add_((x + 0.1 * machine.weights.float()).to(case.dtype)) for x in parts]
        return [lambda: machine.gradients.zero_(), *add, clip]

    def adamw(self, piece: Piece, state: Iterable[Tensor], gradients: Tensor, weights: Tensor | None = None) -> None:
        groups = tuple(replace(group, lr=group.lr / (1 + self.number % 7)) for group in GROUPS)
        step = Step(self.taken, self.factor, groups)
        TorchArithmetic().update(*state, gradients, weights, step, piece.group)

    def staged(self, piece: Piece, slot: int) -> list[Tensor]:
        return [x[: piece.size] for x in self.machine.staging[slot]]

    def fetch(self, piece: Piece, slot: int) -> Parts:
        return copies(zip(self.staged(piece, slot), self.machine.home(piece), strict=True))

    def step_on_gpu(self, piece: Piece, slot: int) -> Parts:
        state, weights = self.staged(piece, slot), self.machine.weights[piece.start : piece.stop]
        gradients = self.machine.gradients[piece.start : piece.stop]
        return [lambda: self.adamw(piece, state, gradients), *copies([(weights, state[0])])]

    def flush(self, piece: Piece, slot: int) -> Parts:
        return copies(zip(self.machine.home(piece), self.staged(piece, slot), strict=True))

    def gradients_down(self, piece: Piece, slot: int) -> Parts:
        received = self.machine.host_gradients[slot][: piece.size]
        return copies([(received, self.machine.gradients[piece.start : piece.stop])])

    def step_on_cpu(self, piece: Piece, slot: int) -> Parts:
        received = self.machine.host_gradients[slot][: piece.size]
        return [lambda: self.adamw(piece, self.machine.home(piece), received)]

    def step_and_cast_on_cpu(self, piece: Piece, slot: int) -> Parts:
        received, narrow = (x[slot][: piece.size] for x in (self.machine.host_gradients, self.machine.host_weights))
        return [lambda: self.adamw(piece, self.machine.home(piece), received, narrow)]

    def cast(self, piece: Piece, slot: int) -> Parts:
        return copies([(self.machine.host_weights[slot][: piece.size], self.machine.home(piece)[0])])

    def weights_up(self, piece: Piece, slot: int) -> Parts:
        return copies([(self.machine.weights[piece.start : piece.stop], self.machine.host_weights[slot][: piece.size])])

    def step_resident(self, piece: Piece) -> Parts:
        gradients, weights = (x[piece.start : piece.stop] for x in (self.machine.gradients, self.machine.weights))
        return [lambda: self.adamw(piece, self.machine.home(piece), gradients, weights)]


def copies(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Callable[[], None]]:
    """Copies (to, from), each in two halves: what runs beside one is seen between them."""
    parts: list[Callable[[], None]] = []
    for to, source in pairs:
        half = to.numel() // 2
        parts += [
            lambda a=to[x], b=source[x]: a.copy_(b, non_blocking=True) for x in (slice(0, half), slice(half, None))
        ]
    return parts


class Case:
    """A random case: sub-groups, parameter groups, pieces, pattern, share of residents, slots, precision, micro-batches."""

    def __init__(self, seed: int, steps: int = 3, **given: Any) -> None:
        """`given`: what is not drawn."""
        drawn = random.Random(seed)
        self.seed, self.steps = seed, steps
        self.sizes: list[int] = [drawn.randint(1, 700) for _ in range(drawn.randint(1, 5))]
        self.groups = [drawn.randint(0, 1) for _ in self.sizes]
        self.largest: int = drawn.choice([64, 128, 256, 1000])
        self.every = drawn.randint(1, 5)
        self.gpu_of = drawn.randint(0, self.every)
        self.resident: float = drawn.choice([0.0, 0.0, 0.3, 1.0])
        self.sets, self.ring = drawn.randint(1, 3), drawn.randint(1, 3)
        self.dtype: torch.dtype = drawn.choice([torch.float32, torch.bfloat16])
        self.micro_batches = drawn.randint(1, 3)
        self.fused = drawn.random() < 0.3
        self.device = "cpu"
        for name, value in given.items():
            setattr(self, name, value)
        self.steps_skipped = {number for number in range(2, steps) if drawn.random() < 0.1}

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    def pieces(self) -> list[Piece]:
        return cut(self.sizes, self.groups, self.largest, gpu_of=self.gpu_of, every=self.every, resident=self.resident)

    def make(self, actions: type[Actions] = Actions) -> tuple[Machine, Program]:
        """A fresh machine, and the program of all steps on it."""
        machine = Machine(self)
        steps = [actions(machine, number) for number in range(1, self.steps + 1)]
        each = [(step, step.backward()) for step in steps]
        return machine, build_updates(self.pieces(), each, sets=self.sets, ring=self.ring, fused=self.fused)

    def on_the_host(self) -> Case:
        """The same case with nothing resident, on a CPU."""
        other = copy.copy(self)
        other.resident, other.device = 0.0, "cpu"
        return other

    def update(self) -> Program:
        """The program of one update alone."""
        return build_update(self.pieces(), Actions(Machine(self), 1), sets=self.sets, ring=self.ring, fused=self.fused)

    def run(self, backend: Callable[[Program], None], change: Callable[[Program], Program] = lambda p: p) -> Machine:
        machine, program = self.make()
        backend(change(program))
        return machine

    def in_order(self) -> tuple[Tensor, ...]:
        return self.run(run_in_order).values()

    def serial(self, skipped: Container[int] = ()) -> tuple[Tensor, ...]:
        """The same steps on a CPU without a program: a backward pass, AdamW on each sub-group as a whole, the cast."""
        machine, start, taken = Machine(self.on_the_host()), 0, 0
        wholes = []
        for size, group in zip(self.sizes, self.groups, strict=True):
            wholes.append(Piece(start, start + size, group, "cpu"))
            start += size
        for number in range(1, self.steps + 1):
            step = Actions(machine, number, taken + 1)
            for part in step.backward():
                part()
            if number in skipped:
                continue
            taken += 1
            for whole in wholes:
                step.adamw(whole, machine.home(whole), machine.gradients[whole.start : whole.stop])
            machine.weights.copy_(machine.p)
        return machine.values()

    def step_by_step(self, backend: Callable[[Program, int], None], skipped: Container[int]) -> tuple[Tensor, ...]:
        """A program for each step, and none for those that are skipped, as for an overflow."""
        machine, pieces, taken = Machine(self), self.pieces(), 0
        for number in range(1, self.steps + 1):
            step = Actions(machine, number, taken + 1)
            for part in step.backward():
                part()
            if number in skipped:
                continue
            taken += 1
            backend(build_update(pieces, step, sets=self.sets, ring=self.ring, fused=self.fused), number)
        return machine.values()


def same(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """To the bit."""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True))


def drop(program: Program, number: int) -> Program:
    """The program without one operation; who waited for it waits for what it waited for, its place in its lane included."""
    gone = program.ops[number]
    before = [i for i in range(number) if program.ops[i].lane == gone.lane][-1:]
    inherited = (*gone.after, *before)

    def renumber(after: tuple[int, ...]) -> tuple[int, ...]:
        kept = {*after} - {number} | ({*inherited} if number in after else set())
        return tuple(sorted(i - (i > number) for i in kept))

    return Program([replace(op, after=renumber(op.after)) for i, op in enumerate(program.ops) if i != number])


def without_all(program: Program, lane: Lane, awaited: Lane) -> Program:
    """The program in which no operation of one lane waits for any of the other."""
    lanes = [op.lane for op in program.ops]
    return Program(
        [
            replace(op, after=tuple(i for i in op.after if lanes[i] != awaited)) if op.lane == lane else op
            for op in program.ops
        ]
    )

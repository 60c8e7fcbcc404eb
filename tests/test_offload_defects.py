"""Defects 1 to 9 of the public branch of Deep Optimizer States (DataStates/DeepSpeed; read, not run).

Each is planted and seen, or cannot be said by a program. The tenth, moments that no checkpoint holds, is a matter of
`test_offload_zero3.py`.
"""

from __future__ import annotations

import time

import pytest
import torch
from offload_machine import Actions, Case, copies, drop, same, without_all

from rlpost.offload.backends import LateDevice, Running, run_adversary, run_in_order, run_threads
from rlpost.offload.program import Program
from rlpost.offload.races import gaps, races


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shaped(**given) -> Case:
    """Eight pieces in turn on the CPU and on the accelerator, and one slot of each kind."""
    every = {
        "sizes": [512],
        "groups": [0],
        "largest": 64,
        "gpu_of": 1,
        "every": 2,
        "resident": 0.0,
        "sets": 1,
        "ring": 1,
        "fused": False,
    }
    return Case(7, **every | {"dtype": torch.bfloat16} | given)


def wrong_within(case: Case, change, orders: int = 20) -> bool:
    expected = case.serial()
    assert same(case.run(lambda program: run_adversary(program, 0)).values(), expected)
    return any(
        not same(case.run(lambda program, order=order: run_adversary(program, order), change).values(), expected)
        for order in range(orders)
    )


class RawCopy(Actions):
    """1: the host's 16-bit copy is float16, and its bytes are taken for bfloat16."""

    def cast(self, piece, slot):
        to = self.machine.host_weights[slot][: piece.size]
        return [lambda: to.copy_(self.machine.home(piece)[0].half().view(torch.bfloat16))]


class NoMoments(Actions):
    """2: moments on the accelerator are what lies in memory."""

    def fetch(self, piece, slot):
        return copies([(self.staged(piece, slot)[0], self.machine.home(piece)[0])])


class WipedResidents(Actions):
    """7: the accelerator's optimizer state is emptied before each step, that of residents too."""

    def step_resident(self, piece):
        def wipe():
            for moment in self.machine.home(piece)[1:]:
                moment.zero_()

        return [wipe, *super().step_resident(piece)]


@pytest.mark.parametrize("defect", [RawCopy, NoMoments, WipedResidents])
def test_operations_that_do_something_else_show_in_the_bits(defect):
    case = shaped(resident=0.3)
    machine, program = case.make()
    run_in_order(program)
    assert same(machine.values(), case.serial())
    machine, program = case.make(defect)
    run_in_order(program)
    assert not same(machine.values(), case.serial())


@pytest.mark.parametrize("sizes", [[512], [64 * 7]])  # 8 pieces, of which the last is the accelerator's; 7
def test_3_a_last_piece_that_is_never_written_back(sizes):
    case = shaped(sizes=sizes)

    def without_last_flush(program: Program) -> Program:
        return drop(program, max(i for i, op in enumerate(program.ops) if op.lane == "flush"))

    assert gaps(case.update(), case.elements) == []
    found = gaps(without_last_flush(case.update()), case.elements)
    assert [gap.split(" of ")[1][0] for gap in found[:3]] == ["p", "m", "v"]
    assert wrong_within(case, without_last_flush, orders=1)


@pytest.mark.parametrize(
    ("lane", "awaited", "buffer"),
    [
        pytest.param("flush", "gpu", "staging 0", id="4: copies back begin without waiting for AdamW"),
        pytest.param(
            "fetch", "flush", "staging 0", id="4: the next piece is fetched over one that is being copied back"
        ),
        pytest.param("gpu", "up", "weights", id="5: the next forward pass begins before all weights are up"),
        pytest.param("cast", "up", "host weights 0", id="6: a 16-bit buffer is used again while it is copied from"),
        pytest.param("down", "cpu", "host gradients 0", id="6: the same of a gradient's buffer"),
        pytest.param("gpu", "fetch", "staging 0", id="AdamW before the fetch"),
        pytest.param("cpu", "down", "host gradients 0", id="AdamW before the gradient"),
        pytest.param("cast", "cpu", "p", id="the cast before AdamW"),
        pytest.param("up", "cast", "host weights 0", id="weights up before the cast"),
        pytest.param("down", "gpu", "gradients", id="gradients down before the backward pass"),
    ],
)
def test_waits_that_are_missing_throughout_are_races_and_show_in_the_bits(lane, awaited, buffer):
    case = shaped()
    program = case.make()[1]
    assert races(program) == []
    assert buffer in {race.buffer for race in races(without_all(program, lane, awaited))}
    assert wrong_within(case, lambda program: without_all(program, lane, awaited))


@pytest.mark.parametrize("lane", ["flush", "cast"])
def test_streams_see_missing_waits_too(lane):
    """Not only the adversary: what issues to streams does not put in order what the program leaves open."""
    case = shaped(sizes=[64 * 16])
    expected = case.serial()
    awaited = {"flush": "gpu", "cast": "up"}[lane]
    assert same(case.run(lambda p: run_threads(p, 0)).values(), expected)
    assert any(
        not same(
            case.run(lambda p, s=s: run_threads(p, s, 1e-3), lambda p: without_all(p, lane, awaited)).values(), expected
        )
        for s in range(10)
    )


class NeverJoined(Running):
    """5: what the accelerator was given is waited for, and the helper that gives it more is not."""

    def finish(self):
        for issued, event in zip(self._issued, self._events, strict=True):
            if issued.is_set():
                self._device.synchronize(event)


@pytest.mark.parametrize(("backend", "joins"), [(Running, True), (NeverJoined, False)])
def test_5_a_helper_that_is_never_joined(backend, joins):
    case = shaped(steps=1)
    machine, program = case.make()
    running = backend(program, LateDevice(0), lambda lane: time.sleep(0.05 if lane == "cast" else 0.0))
    running.finish()
    assert same(machine.values(), case.serial()) is joins
    assert any(thread.is_alive() for thread in running._threads) is not joins
    Running.finish(running)
    assert same(machine.values(), case.serial())


@pytest.mark.parametrize("seed", range(20))
def test_8_and_9_pieces_of_all_sizes_take_turns_in_the_same_few_buffers(seed):
    """No staging of its own for a piece of another size (8), and none for pieces that do not pass through it (9)."""
    case = Case(seed)
    program, pieces = case.update(), case.pieces()
    used: dict[str, set[str]] = {"staging": set(), "host": set()}
    for op in program.ops:
        for use in (*op.reads, *op.writes):
            kind = use.buffer.split()[0]
            if kind in used:
                used[kind].add(use.buffer)
                assert pieces[op.piece].where == {"staging": "gpu", "host": "cpu"}[kind]
                assert (use.start, use.stop) == (0, pieces[op.piece].size)
    counts = {where: sum(piece.where == where for piece in pieces) for where in ("gpu", "cpu")}
    assert len(used["staging"]) == min(case.sets, counts["gpu"])
    assert len(used["host"]) == 2 * min(case.ring, counts["cpu"])

"""What runs programs: streams and events by CUDA's rules on a CPU, failures, and waiting for some operations only."""

from __future__ import annotations

import threading
import time

import pytest
from offload_machine import Case, same

from rlpost.offload.backends import LateDevice, Running, run_adversary, run_in_order, run_on_lanes, run_threads
from rlpost.offload.program import Lane, Program


def linked(*ops: tuple[Lane, object]) -> Program:
    """Operations of one part each, every one waiting for the one before."""
    program = Program()
    for number, (lane, part) in enumerate(ops):
        program.add(lane, str(number), -1, reads=[], writes=[], after=[number - 1] if number else [], parts=[part])
    return program


@pytest.fixture
def device():
    return LateDevice(0, delay_s=1e-3)


def test_a_stream_runs_behind_the_callers_back_and_in_its_order(device):
    stream, gate, seen = device.stream("gpu"), threading.Event(), []
    device.submit(stream, gate.wait)
    for i in range(20):
        device.submit(stream, lambda i=i: seen.append(i))
    event = device.event()
    device.record(stream, event)
    assert seen == []
    gate.set()
    device.synchronize(event)
    assert seen == list(range(20))


def test_a_stream_waits_for_what_was_recorded_and_for_nothing_else(device):
    first, second, gate, seen = device.stream("fetch"), device.stream("gpu"), threading.Event(), []
    event, never = device.event(), device.event()
    device.wait(second, never)  # not recorded: no wait, as in CUDA
    device.synchronize(never)
    device.submit(first, gate.wait)
    device.submit(first, lambda: seen.append("first"))
    device.record(first, event)
    device.wait(second, event)
    device.record(first, event)  # recorded again: who waits already waits for the former
    device.submit(second, lambda: seen.append("second"))
    done = device.event()
    device.record(second, done)
    gate.set()
    device.synchronize(done)
    assert seen == ["first", "second"]


@pytest.mark.parametrize("lane", ["cpu", "fetch"])
def test_what_a_part_raises_is_raised_and_nothing_goes_on_behind_it(lane):
    seen = []

    def fail() -> None:
        raise ValueError("no room")

    program = linked(("up", lambda: seen.append(0)), (lane, fail), ("cast", lambda: seen.append(2)))
    before = threading.active_count()
    with pytest.raises(ValueError, match="no room"):
        run_on_lanes(program, LateDevice(0))
    assert seen == [0]
    deadline = time.monotonic() + 10  # a stream's thread ends a moment after its last part
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_what_fails_on_a_stream_is_raised_when_the_other_streams_are_done():
    seen = []

    def fail() -> None:
        raise ValueError("no room")

    program = Program()
    program.add("fetch", "a", -1, reads=[], writes=[], after=[], parts=[fail])
    program.add(
        "flush", "b", -1, reads=[], writes=[], after=[], parts=[lambda: time.sleep(0.2), lambda: seen.append(1)]
    )
    with pytest.raises(ValueError, match="no room"):
        run_on_lanes(program, LateDevice(0))
    assert seen == [1]


def test_some_operations_can_be_waited_for_while_others_go_on():
    gate, seen = threading.Event(), []
    program = linked(
        ("gpu", lambda: seen.append("weights")), ("flush", gate.wait), ("cpu", lambda: seen.append("last"))
    )
    running = Running(program, LateDevice(0))
    running.wait([0])
    assert seen == ["weights"]
    gate.set()
    running.finish()
    assert seen == ["weights", "last"]


def test_weights_of_a_piece_are_ready_when_their_writers_are_done():
    case = Case(0, steps=1, sizes=[256], groups=[0], largest=64, gpu_of=1, every=2, resident=0.0)
    machine, program = case.make()
    expected, gate = case.serial(), threading.Event()
    flush = max(number for number, op in enumerate(program.ops) if op.lane == "flush")
    program.ops[flush].parts.insert(0, gate.wait)
    running = Running(program, LateDevice(3))
    running.wait(program.writers("weights", 0, 256)[1:])  # [0] would be the first of them, too
    assert same([machine.weights], expected[3:]) and not same([machine.p], expected[:1])
    gate.set()
    running.finish()
    assert same(machine.values(), expected)


@pytest.mark.parametrize("backend", [run_in_order, lambda p: run_adversary(p, 0), lambda p: run_threads(p, 0)])
def test_operations_without_work_and_programs_without_operations(backend):
    backend(Program())
    program = Program()
    first = program.add("gpu", "a", -1, reads=[], writes=[], after=[], parts=[])
    program.add("cpu", "b", -1, reads=[], writes=[], after=[first], parts=[])
    backend(program)

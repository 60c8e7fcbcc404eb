"""The simulation of a program, against figures worked out by hand."""

from __future__ import annotations

import random

import pytest
from offload_machine import Case

from rlpost.offload.layout import Piece, cut
from rlpost.offload.program import LANES, Program, build_update
from rlpost.offload.simulate import Load, Rates, load_of, simulate

RATES = Rates(up=12.0, down=12.0, memory=1e9, gpu_adam=1e9, cpu_adam=2.0, cast=4.0)


class Nothing:
    fetch = step_on_gpu = flush = gradients_down = step_on_cpu = cast = weights_up = lambda self, *_: []

    def step_resident(self, piece: Piece) -> list:
        return []


def update(elements: int, pieces: int, gpu_of: int, every: int, resident: float = 0.0, **slots) -> Program:
    largest = elements // pieces
    made = cut([elements], [0], largest, gpu_of=gpu_of, every=every, resident=resident)
    assert len(made) == pieces
    return build_update(made, Nothing(), **slots)


def seconds(program: Program, **rates) -> float:
    values = {name: getattr(RATES, name) for name in RATES.__slots__}
    return simulate(program, Rates(**values | rates)).total


def test_a_piece_on_the_accelerator_is_fetched_updated_and_flushed():
    timeline = simulate(update(64, 1, 1, 1), Rates(12.0, 6.0, 1e9, 16.0, 1.0, 1.0))
    assert [span.seconds for span in timeline.spans] == pytest.approx([64.0, 4.0, 128.0])
    assert timeline.total == pytest.approx(196.0)
    assert timeline.busy() == pytest.approx({"fetch": 64.0, "gpu": 4.0, "flush": 128.0})
    assert timeline.until(lambda op: op.lane != "flush") == pytest.approx(68.0)


def test_a_piece_on_the_cpu_is_brought_down_updated_cast_and_sent_up():
    timeline = simulate(update(64, 1, 0, 1), RATES)
    assert [span.seconds for span in timeline.spans] == pytest.approx([64 * 4 / 12, 32.0, 16.0, 64 * 2 / 12])


def test_two_sets_hide_flushes_under_fetches_and_one_does_not():
    assert seconds(update(640, 10, 1, 1, sets=2)) == pytest.approx(704.0, rel=1e-6)  # 640 up, and the last one down
    assert seconds(update(640, 10, 1, 1, sets=1)) == pytest.approx(1280.0, rel=1e-6)


def test_memory_is_shared():
    """Fetch and flush move 12 bytes an element each; with room for 18 bytes a second of 24 each has 9 of its 12."""
    program = update(64000, 1000, 1, 1)
    assert seconds(program, memory=18.0) == pytest.approx(64000 * 12 / 9, rel=2e-3)
    assert seconds(program, memory=24.0) == pytest.approx(64000, rel=2e-3)


def loaded(*loads: Load, **capacity: float) -> list[float]:
    """When operations end that begin at once, on lanes of their own."""
    program = Program()
    for lane in LANES[: len(loads)]:
        program.add(lane, "copy", -1, reads=[], writes=[], after=[], parts=[])
    rates = Rates(**{name: capacity.get(name, 1e9) for name in RATES.__slots__})
    needs = dict(zip(LANES, loads, strict=False))
    return [span.end for span in simulate(program, rates, lambda op: needs[op.lane]).spans]


def test_who_needs_the_same_thing_is_slowed_down_alike_and_gets_what_others_leave():
    """16 bytes a second are wanted of 10: each runs at 10/16. One that has more to do speeds up when the others are done."""
    assert loaded(Load(1.0, memory=2), Load(1.0, memory=6), Load(1.0, memory=8), memory=10.0) == pytest.approx(
        [1.6] * 3
    )
    assert loaded(Load(2.0, memory=4), Load(1.0, memory=6), Load(1.0, memory=8), memory=10.0) == pytest.approx(
        [1.6 + 1.0, 1.6, 1.6]
    )


def test_who_waits_for_one_thing_leaves_the_rest_of_another_to_others():
    """Two share the link and run at half speed, so the first takes 0.5 of 1.2 of the memory's; 0.7 is left to the third."""
    ends = loaded(Load(1.0, up=1.0, memory=1.0), Load(1.0, up=1.0), Load(0.7, memory=0.7), up=1.0, memory=1.2)
    assert ends == pytest.approx([2.0, 2.0, 1.0])


def test_both_lanes_of_a_direction_share_the_link():
    program = Program()
    for lane, name in (("fetch", "fetch"), ("up", "weights")):
        program.add(lane, name, -1, reads=[], writes=[], after=[], parts=[], size=60)
    spans = simulate(program, RATES).spans
    assert spans[1].end == pytest.approx(20.0)  # 120 bytes at half of 12 a second
    assert spans[0].end == pytest.approx((720 + 120) / 12)


def test_residents_cost_the_accelerator_alone():
    whole = seconds(update(640, 10, 0, 1, resident=1.0), gpu_adam=64.0)
    assert whole == pytest.approx(10.0)
    assert seconds(update(640, 10, 1, 1, resident=0.5)) == pytest.approx(5 * 64.0 + 64.0, rel=1e-6)


def test_fractions_between_all_and_nothing_pay_where_the_link_is_the_limit():
    """CPU and link take as long for a piece: half of each is nearly twice as fast as either alone."""
    rates = {"cpu_adam": 1.0, "cast": 1e6, "down": 24.0}
    alone = seconds(update(6400, 100, 0, 1), **rates), seconds(update(6400, 100, 1, 1), **rates)
    assert seconds(update(6400, 100, 1, 2), **rates) < 0.65 * min(alone)


def test_bytes_follow_precision():
    program = update(64, 1, 0, 1)
    down, step, cast, up = (load_of(op, RATES, gradient_bytes=2, weight_bytes=4) for op in program.ops)
    assert (down.down, down.memory, step.memory, cast.memory, up.up) == (128.0, 128.0, 26 * 64, 8 * 64, 256.0)


def test_a_fused_cast_takes_no_time_and_a_write_only():
    class Fused(Nothing):
        def step_and_cast_on_cpu(self, piece: Piece, slot: int) -> list:
            return []

    program = build_update([Piece(0, 64, 0, "cpu")], Fused(), fused=True)
    assert [span.seconds for span in simulate(program, RATES).spans] == pytest.approx([64 * 4 / 12, 32.0, 64 * 2 / 12])
    assert load_of(program.ops[1], RATES).memory == 30 * 64


@pytest.mark.parametrize("seed", range(10))
def test_no_operation_runs_before_what_it_waits_for(seed):
    program, drawn = Case(seed).update(), random.Random(seed)
    rates = Rates(**{name: drawn.uniform(1.0, 100.0) for name in RATES.__slots__})
    timeline = simulate(program, rates)
    for number, (op, span) in enumerate(zip(program.ops, timeline.spans, strict=True)):
        assert span.seconds >= load_of(op, rates).seconds * (1 - 1e-6)
        before = [*op.after, *[i for i in range(number) if program.ops[i].lane == op.lane]]
        assert all(timeline.spans[i].end <= span.start * (1 + 1e-9) for i in before)
    for name in ("up", "down", "memory"):
        moved = sum(getattr(load_of(op, rates), name) for op in program.ops)
        assert timeline.total >= moved / getattr(rates, name) * (1 - 1e-6)


def test_what_cannot_be_simulated_is_said():
    with pytest.raises(ValueError, match="memory is not above 0"):
        Rates(1.0, 1.0, 0.0, 1.0, 1.0, 1.0)
    program = Program()
    program.add("gpu", "backward", -1, reads=[], writes=[], after=[], parts=[])
    with pytest.raises(ValueError, match="how long backward on lane gpu takes is not known"):
        simulate(program, RATES)
    assert simulate(program, RATES, lambda op: Load(2.0)).total == 2.0
    assert simulate(program, RATES, lambda op: Load(0.0)).total == 0.0
    assert simulate(Program(), RATES).total == 0.0
    program.add("gpu", "backward", -1, reads=[], writes=[], after=[1], parts=[])
    with pytest.raises(RuntimeError, match="waits for itself"):
        simulate(program, RATES, lambda op: Load(1.0))

"""Programs of several optimizer steps: their bits under every order that they allow, and what is seen of anything left out."""

from __future__ import annotations

import random

import pytest
import torch
from offload_machine import Case, drop, same

from rlpost.offload.backends import run_adversary, run_in_order, run_threads
from rlpost.offload.layout import Piece, pattern
from rlpost.offload.program import LANES, Program, Use, build_update
from rlpost.offload.races import Race, describe_race, gaps, implied, races

pytestmark = pytest.mark.thorough


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(seed: int, *, orders: int, threads: bool) -> None:
    case = Case(seed)
    expected, program = case.serial(), case.make()[1]
    assert races(program) == [] and gaps(case.update(), case.elements) == []
    assert same(case.in_order(), expected)
    for order in range(orders):
        assert same(case.run(lambda program, order=order: run_adversary(program, order)).values(), expected)
    if threads:
        assert same(case.run(lambda program: run_threads(program, seed)).values(), expected)


@pytest.mark.parametrize("seed", range(20))
def test_no_order_changes_a_bit_of_three_steps_in_a_row(seed):
    check(seed, orders=3, threads=seed < 10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_no_order_changes_a_bit_of_many_more(seed):
    check(seed, orders=10, threads=True)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow) if seed > 1 else seed for seed in range(20)]
)
def test_two_hundred_steps_with_skips(seed):
    """Clipping, micro-batches, two parameter groups, a rate that changes, steps that are skipped."""
    case = Case(seed, steps=200, largest=128)
    skipped = case.steps_skipped
    assert len(skipped) > 5
    found = case.step_by_step(lambda program, number: run_adversary(program, 1000 * seed + number), skipped)
    assert same(found, case.serial(skipped))


@pytest.mark.parametrize("seed", [2, 5])
def test_fifty_steps_with_nothing_to_wait_for_at_their_ends(seed):
    case = Case(seed, steps=50)
    assert same(case.run(lambda program: run_adversary(program, seed)).values(), case.serial())


def removals(seeds: range, each: int | None) -> tuple[int, int, int, int]:
    """Waits removed one by one (at most `each` of a program, drawn): how many, how many of them are implied by others, how many
    of the rest the race check names, and how many of these give wrong bits within 20 adversarial orders."""
    drawn, tried, needless, flagged, wrong = random.Random(18), 0, 0, 0, 0
    for seed in seeds:
        case = Case(seed)
        expected, program = case.serial(), case.make()[1]
        waits = [(i, j) for i, op in enumerate(program.ops) for j in op.after]
        for op, event in waits if each is None else drawn.sample(waits, min(each, len(waits))):
            tried += 1
            if implied(program, op, event):
                needless += 1
                assert races(program.without(op, event)) == []
                continue
            flagged += bool(races(program.without(op, event)))
            for order in range(20):
                found = case.run(lambda p, order=order: run_adversary(p, order), lambda p: p.without(op, event))
                if not same(found.values(), expected):
                    wrong += 1
                    break
    return tried, needless, flagged, wrong


def test_every_wait_that_is_removed_is_named_by_the_race_check_and_most_show_in_the_bits():
    tried, needless, flagged, wrong = removals(range(300, 315), 5)
    assert tried > 50 and flagged == tried - needless > 30
    assert wrong >= 0.8 * flagged


@pytest.mark.slow
def test_the_same_of_all_waits_of_many_programs():
    tried, needless, flagged, wrong = removals(range(400, 440), None)
    assert flagged == tried - needless > 500
    assert wrong >= 0.8 * flagged


@pytest.mark.parametrize("seed", range(8))
def test_every_operation_that_is_left_out_leaves_a_gap(seed):
    case = Case(seed)
    program = case.update()
    for number, op in enumerate(program.ops):
        assert gaps(drop(program, number), case.elements), (op.lane, op.name, op.piece)


def test_gaps_are_said_in_words():
    program = Case(
        0, sizes=[256], groups=[0], largest=64, gpu_of=1, every=2, resident=0.0, sets=1, fused=False
    ).update()
    flush = next(i for i, op in enumerate(program.ops) if op.lane == "flush")
    found = gaps(drop(program, flush), 256)
    assert "elements 64 to 128 of m are written 0 times, not once" in found
    fetch = next(i for i, op in enumerate(program.ops) if op.lane == "fetch")
    [said] = gaps(drop(program, fetch), 256)
    assert said == "step on lane gpu of piece 1 reads staging 0, where no operation of that piece has written"
    assert any("written 2 times" in gap for gap in gaps(Program([*program.ops, program.ops[flush]]), 256))


def test_a_race_is_said_in_words():
    program = Program()
    program.add("fetch", "fetch", 3, reads=[], writes=[Use("staging 0", 0, 64)], after=[], parts=[])
    program.add("gpu", "step", 3, reads=[Use("staging 0", 32, 64)], writes=[], after=[], parts=[])
    [race] = races(program)
    assert race == Race(0, 1, "staging 0")
    assert describe_race(program, race) == (
        "nothing orders fetch on lane fetch of piece 3 and step on lane gpu of piece 3, which both use staging 0"
    )


def test_uses_of_other_elements_and_readers_of_the_same_ones_do_not_race():
    program = Program()
    program.add("fetch", "a", 0, reads=[Use("p", 0, 64)], writes=[], after=[], parts=[])
    program.add("flush", "b", 1, reads=[], writes=[Use("p", 64, 128)], after=[], parts=[])
    program.add("cast", "c", 0, reads=[Use("p", 0, 64)], writes=[], after=[], parts=[])
    assert races(program) == []
    program.add("cpu", "d", -1, reads=[], writes=[Use("p", 32, 96)], after=[], parts=[])
    assert races(program) == [Race(0, 3, "p"), Race(2, 3, "p"), Race(1, 3, "p")]


def test_residents_come_first_and_never_exceed_their_share():
    sizes = [64] * 30
    found = pattern(sizes, gpu_of=2, every=3, resident=0.35)
    assert found[:10] == ["resident"] * 10 and "resident" not in found[10:]
    assert found[10:] == pattern(sizes[10:], gpu_of=2, every=3)
    assert pattern([100, 100], gpu_of=1, every=1, resident=0.49) == ["gpu", "gpu"]
    with pytest.raises(ValueError, match="cannot be"):
        pattern(sizes, gpu_of=1, every=2, resident=1.1)


@pytest.mark.parametrize(("gpu_of", "every"), [(1, 2), (2, 3), (1, 4)])
def test_shares_are_of_elements_where_pieces_are_of_unequal_size(gpu_of, every):
    drawn = random.Random(0)
    sizes = [drawn.choice([1, 64, 1000]) for _ in range(500)]
    on_gpu = sum(
        s for s, where in zip(sizes, pattern(sizes, gpu_of=gpu_of, every=every), strict=True) if where == "gpu"
    )
    assert abs(on_gpu - sum(sizes) * gpu_of / every) <= max(sizes)


def test_residents_and_fused_casts_need_actions_that_have_them():
    class Least:
        fetch = step_on_gpu = flush = gradients_down = step_on_cpu = cast = weights_up = lambda self, *_: []

    with pytest.raises(TypeError, match="piece 0 is resident, and Least has no step"):
        build_update([Piece(0, 64, 0, "resident")], Least())
    with pytest.raises(TypeError, match="Least has no step that writes weights"):
        build_update([Piece(0, 64, 0, "cpu")], Least(), fused=True)
    with pytest.raises(ValueError, match="needs one at least"):
        build_update([Piece(0, 64, 0, "gpu")], Least(), sets=0)


def test_who_writes_some_weights_is_known():
    """So that they can be sent to the engine before the rest is done."""
    case = Case(0, sizes=[256], groups=[0], largest=64, gpu_of=1, every=2, resident=0.0, fused=False)
    program = case.update()
    writers = [program.ops[number] for number in program.writers("weights", 60, 70)]
    assert [(op.lane, op.piece) for op in writers] == [("up", 0), ("gpu", 1)]
    machine, program = case.make()
    run_in_order(program)
    assert same(machine.values(), case.serial())


def random_program(seed: int) -> Program:
    """Operations on any lanes, with overlapping uses of two buffers and any waits."""
    drawn, program = random.Random(seed), Program()

    def uses() -> list[Use]:
        starts = [drawn.randrange(12) for _ in range(drawn.randint(0, 2))]
        return [Use(drawn.choice("ab"), start, start + drawn.randint(1, 4)) for start in starts]

    for number in range(25):
        after = [drawn.randrange(number) for _ in range(drawn.randint(0, 3))] if number else []
        lane = drawn.choice(LANES[:4])
        program.add(lane, "any", -1, reads=uses(), writes=uses(), after=after, parts=[])
    return program


def all_races(program: Program) -> set[Race]:
    """Every pair that touches the same elements, one writing, where neither is reached from the other: by definition."""
    before: list[set[int]] = []
    for i, op in enumerate(program.ops):
        direct = {*op.after, *(j for j in range(i) if program.ops[j].lane == op.lane)}
        before.append(direct.union(*(before[j] for j in direct)))
    found = set()
    for i, second in enumerate(program.ops):
        for j, first in enumerate(program.ops[:i]):
            pairs = [(a, b) for a in first.writes for b in (*second.reads, *second.writes)]
            pairs += [(a, b) for a in first.reads for b in second.writes]
            clashes = {a.buffer for a, b in pairs if a.buffer == b.buffer and a.start < b.stop and b.start < a.stop}
            found |= {Race(j, i, buffer) for buffer in clashes if j not in before[i]}
    return found


@pytest.mark.parametrize("seed", range(30))
def test_the_race_check_finds_what_the_definition_does(seed):
    program = random_program(seed)
    found, every = set(races(program)), all_races(program)
    assert found <= every and len(every) > 3
    assert {(race.second, race.buffer, program.ops[race.first].lane) for race in found} == {
        (race.second, race.buffer, program.ops[race.first].lane) for race in every
    }

"""The planner of offloaded updates: which way is the fastest, what it takes, and how near it comes to what was published."""

from __future__ import annotations

import pytest

from benchmarks.offload_model import PUBLISHED, SPECIFIED, best_memory, error, rates, seconds
from rlpost.offload.plan import Kind, Room, Way, choose, predict, timeline, ways
from rlpost.offload.simulate import Rates
from rlpost.recipe.load import load_recipe
from rlpost.recipe.plan.describe import make_plan, print_plan

MACHINE = Rates(up=55e9, down=55e9, memory=95e9, gpu_adam=90e9, cpu_adam=2.5e9, cast=10e9)
BILLION = 1_000_000_000


def test_every_ratio_once():
    found = ways(4)
    assert [(way.gpu_of, way.every) for way in found] == [(0, 1), (1, 4), (1, 3), (1, 2), (2, 3), (3, 4), (1, 1)]
    assert len(ways(3, (0.0, 0.5))) == 2 * len(ways(3))


@pytest.mark.parametrize(
    ("machine", "fastest"),
    [
        (MACHINE, Way(1, 1)),  # 24 bytes of the memory's bandwidth an element in place of 36
        (Rates(1e9, 1e9, 95e9, 90e9, 2.5e9, 10e9), Way(0, 1)),  # a slow link: the CPU alone
        (Rates(50e9, 50e9, 1e13, 90e9, 3e9, 1e10), None),  # memory without a limit: both sides at work
    ],
)
def test_the_fastest_way_follows_from_what_limits(machine, fastest):
    way = choose(BILLION, machine, Kind(2**25), Room(), among=ways(4))[1][0].way
    if fastest is None:
        assert 0 < way.gpu_of < way.every
    else:
        assert way == fastest


def test_no_more_bytes_than_there_are():
    kind = Kind(2**25)
    best, found = choose(BILLION, MACHINE, kind, Room(4.5e9))
    assert best is not None and best.accelerator <= 4.5e9 and best.way.gpu_of == 0
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert choose(BILLION, MACHINE, kind, Room(3e9))[0] is None
    assert choose(BILLION, MACHINE, kind, Room(host=1e9))[0] is None


def test_memory_is_counted_as_it_is_taken():
    one = predict(BILLION, Way(1, 1), MACHINE, Kind(10_000_000))
    assert one.accelerator == 4 * BILLION + 2 * 12 * 10_000_000
    assert one.host == 12 * BILLION
    half = predict(BILLION, Way(1, 2, 0.5), MACHINE, Kind(10_000_000))
    assert half.accelerator == 4 * BILLION + 2 * 12 * 10_000_000 + 6 * BILLION
    assert half.host == 12 * BILLION + 2 * 6 * 10_000_000  # all is at home on the host
    assert half.seconds < predict(BILLION, Way(1, 2), MACHINE, Kind(10_000_000)).seconds


def test_all_that_is_simulated_is_updated_once():
    for way in ways(3, (0.0, 0.3)):
        steps = [op for op in timeline(BILLION, way, MACHINE).program.ops if op.name.startswith("step")]
        assert sum(op.size for op in steps) == BILLION


@pytest.mark.thorough
@pytest.mark.parametrize(("machine", "limit"), [("4 x H100", 0.13), ("4 x A100", 0.13)])
def test_both_published_sweeps_are_met_with_the_rates_of_their_logs(machine, limit):
    """One number a machine is fitted, the bandwidth of its memory; without such a limit the error is three times as large."""
    gap, memory = best_memory(machine, SPECIFIED[machine])
    assert gap < limit
    assert error(machine, rates(machine, SPECIFIED[machine], 1e15)) > 2 * gap
    found = rates(machine, SPECIFIED[machine], memory)
    assert seconds(Way(1, 1), found) < seconds(Way(1, 2), found), "all through the accelerator beats k = 2"
    assert min(PUBLISHED[machine], key=lambda k: seconds(Way(1, k), found)) == 2


def test_the_plan_names_a_faster_way_and_what_lies_where(write_recipe, tmp_path, capsys):
    loaded = load_recipe(write_recipe(tmp_path, {"learner.offload": {"type": "interleaved", "gpu_of": 0, "every": 1}}))
    plan = make_plan(loaded, processes=2, zero_stage=3)
    said = "\n".join(plan.update)
    assert "times as fast: learner.offload.type=" in said and "not measured here" in said
    assert "all by the CPU" in said and "GiB of pinned memory" in said
    print_plan(plan)
    assert "Optimizer's state on the host" in capsys.readouterr().out
    assert make_plan(loaded, processes=2).update == ()

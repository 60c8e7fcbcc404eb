"""The update's program: its bits under every order that it allows, and what a missing wait does."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlpost.offload.backends import LateDevice, run_adversary, run_in_order, run_on_lanes
from rlpost.offload.layout import UNIT, cut
from rlpost.offload.program import Program, Use
from rlpost.offload.races import implied, races
from rlpost.offload.update import FlatState, StepSetting, Update

GROUPS = [
    {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 2e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0},
]
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A random update: sub-groups, pieces, pattern, slots, precision."""

    seed: int

    def __post_init__(self) -> None:
        drawn = random.Random(self.seed)
        sizes = [drawn.randint(1, 700) for _ in range(drawn.randint(1, 5))]
        every = drawn.randint(1, 5)
        for name, value in {
            "sizes": sizes,
            "groups": [drawn.randint(0, 1) for _ in sizes],
            "largest": drawn.choice([64, 128, 256, 1000]),
            "every": every,
            "gpu_of": drawn.randint(0, every),
            "sets": drawn.randint(1, 3),
            "ring": drawn.randint(1, 3),
            "dtype": drawn.choice([torch.float32, torch.bfloat16]),
            "factors": [drawn.choice([1.0, 0.3333]) for _ in range(STEPS)],
        }.items():
            object.__setattr__(self, name, value)

    def state(self) -> FlatState:
        n = sum(self.sizes)
        p = torch.randn(n, generator=torch.Generator().manual_seed(self.seed))
        return FlatState(p, torch.zeros(n), torch.zeros(n), p.bfloat16(), torch.zeros(n, dtype=self.dtype))

    def make(self) -> Update:
        pieces = cut(self.sizes, self.groups, self.largest, gpu_of=self.gpu_of, every=self.every)
        return Update(self.state(), pieces, sets=self.sets, ring=self.ring)

    def setting(self, number: int, state: FlatState) -> StepSetting:
        """The step's setting, with its gradients in place and a rate of its own."""
        drawn = torch.Generator().manual_seed(1000 * self.seed + number)
        state.gradients.copy_(torch.randn(state.gradients.numel(), generator=drawn))
        groups = [group | {"lr": group["lr"] / number} for group in GROUPS]
        return StepSetting(number, self.factors[number - 1], groups)

    def run(self, backend, program=None) -> tuple[Tensor, ...]:
        """All of the state after `STEPS` steps."""
        update = self.make()
        for number in range(1, STEPS + 1):
            update.step = self.setting(number, update.state)
            backend(update.program if program is None else program(update.program), number)
        state = update.state
        return state.p, state.m, state.v, state.weights

    def serial(self) -> tuple[Tensor, ...]:
        """torch's AdamW itself, a parameter for each sub-group."""
        state = self.state()
        parameters = [torch.nn.Parameter(part.clone()) for part in state.p.split(self.sizes)]
        groups = [GROUPS[group] | {"params": [p]} for p, group in zip(parameters, self.groups, strict=True)]
        optimizer = torch.optim.AdamW(groups, fused=True)
        for number in range(1, STEPS + 1):
            setting = self.setting(number, state)
            for group, index in zip(optimizer.param_groups, self.groups, strict=True):
                group["lr"] = setting.groups[index]["lr"]
            for parameter, gradient in zip(parameters, state.gradients.split(self.sizes), strict=True):
                parameter.grad = gradient.float() * setting.factor
            optimizer.step()
        p = torch.cat([parameter.detach() for parameter in parameters])
        moments = [
            torch.cat([optimizer.state[parameter][name] for parameter in parameters])
            for name in ("exp_avg", "exp_avg_sq")
        ]
        return p, *moments, p.bfloat16()


def same(first, second) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True))


def in_order(program, number) -> None:
    run_in_order(program)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(25))
def test_every_order_gives_the_bits_of_adamw_on_the_whole(seed):
    case = Case(seed)
    expected = case.serial()
    assert same(case.run(in_order), expected)
    for adversary in range(3):
        assert same(case.run(lambda program, number, a=adversary: run_adversary(program, 100 * a + number)), expected)


@pytest.mark.parametrize("seed", range(100, 108))
def test_lanes_that_really_run_at_once_give_the_same_bits(seed):
    case = Case(seed)
    assert same(case.run(lambda program, number: run_on_lanes(program, LateDevice(number))), case.serial())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_many_more_of_both(seed):
    case = Case(seed)
    expected = case.serial()
    for adversary in range(5):
        assert same(case.run(lambda program, number, a=adversary: run_adversary(program, 100 * a + number)), expected)
    assert same(case.run(lambda program, number: run_on_lanes(program, LateDevice(number))), expected)


def needed_waits(program: Program) -> list[tuple[int, int]]:
    """Waits that neither lanes nor other waits imply."""
    return [(i, j) for i, op in enumerate(program.ops) for j in op.after if not implied(program, i, j)]


def test_a_wait_that_is_removed_is_seen_by_the_race_check_and_mostly_by_the_bits():
    """Every single wait that is not implied; at least 80 % of them also give wrong bits within 20 orders."""
    drawn, flagged, wrong, tried = random.Random(5), 0, 0, 0
    for seed in range(200, 212):
        case = Case(seed)
        expected, program = case.serial(), case.make().program
        assert not races(program)
        waits = needed_waits(program)
        for op, event in drawn.sample(waits, min(5, len(waits))):
            tried += 1
            flagged += bool(races(program.without(op, event)))
            for adversary in range(20):
                found = case.run(
                    lambda p, number, a=adversary: run_adversary(p, 100 * a + number),
                    lambda p, op=op, event=event: p.without(op, event),
                )
                if not same(found, expected):
                    wrong += 1
                    break
    assert tried >= 40 and flagged == tried
    assert wrong >= 0.8 * tried, (wrong, tried)


def test_a_wait_that_is_implied_is_not_needed():
    """Where a piece's flush is waited for although its lane has already been waited for later on."""
    program = Program()
    first = program.add("fetch", "a", 0, reads=[], writes=[Use("x", 0, 4)], after=[], parts=[])
    second = program.add("gpu", "b", 0, reads=[Use("x", 0, 4)], writes=[], after=[first], parts=[])
    third = program.add("flush", "c", 0, reads=[Use("x", 0, 4)], writes=[], after=[first, second], parts=[])
    assert implied(program, third, first)
    assert not implied(program, second, first)
    assert [tuple(race) for race in races(program.without(second, first))] == [(first, second, "x")]


def test_a_lane_that_fails_ends_the_others():
    program = Program()

    def fail() -> None:
        raise ValueError("no room")

    first = program.add("cpu", "a", 0, reads=[], writes=[], after=[], parts=[fail])
    program.add("up", "b", 0, reads=[], writes=[], after=[first], parts=[lambda: None])
    with pytest.raises(ValueError, match="no room"):
        run_on_lanes(program, LateDevice(0))


def test_a_program_that_waits_for_itself_is_said_to():
    program = Program()
    program.add("gpu", "a", 0, reads=[], writes=[], after=[1], parts=[lambda: None])
    program.add("cpu", "b", 0, reads=[], writes=[], after=[0], parts=[lambda: None])
    with pytest.raises(RuntimeError, match="waits for itself"):
        run_adversary(program, 0)


@pytest.mark.parametrize("sizes", [[1], [64, 65], [700, 3, 128]])
@pytest.mark.parametrize("largest", [1, 64, 100, 10**6])
def test_pieces_cover_everything_once_within_sub_groups_at_multiples(sizes, largest):
    pieces = cut(sizes, range(len(sizes)), largest, gpu_of=1, every=2)
    assert [sizes[piece.group] for piece in pieces] == sorted(
        sizes[piece.group] for piece in pieces
    )  # small ones first
    pieces.sort(key=lambda piece: piece.start)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == sum(sizes)
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    for piece in pieces:
        assert (piece.start - firsts[piece.group]) % UNIT == 0
        assert piece.stop <= firsts[piece.group] + sizes[piece.group]
        assert piece.size <= max(UNIT, -(-largest // UNIT) * UNIT)


@pytest.mark.parametrize(("gpu_of", "every"), [(0, 1), (1, 1), (1, 2), (2, 3), (3, 4), (2, 5)])
def test_the_share_of_the_gpu_is_spread(gpu_of, every):
    pieces = cut([64 * 60], [0], 64, gpu_of=gpu_of, every=every)
    for first in range(0, 60, every):
        assert sum(piece.on_gpu for piece in pieces[first : first + every]) == gpu_of
    with pytest.raises(ValueError, match="cannot be"):
        cut([64], [0], 64, gpu_of=every + 1, every=every)

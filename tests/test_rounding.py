"""Stochastic rounding at the sync: unbiased, one of the two neighbours, and the same wherever it is done."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, rows

from rlpost.recipe.load import load_recipe
from rlpost.recipe.sections.rollout import SyncSection
from rlpost.rollout import rounding
from rlpost.rollout.remote.weights import WeightFiles
from rlpost.rollout.rounding import RoundedEngine, round_by_chance, rounded, with_rounding
from rlpost.rollout.verify import LEVELS
from rlpost.run.loop import train

CHANCES = 2000
CPU = torch.device("cpu")


def neighbours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 numbers nearest to zero and farthest from it between which float32 numbers lie, by numpy."""
    bits = x.numpy().view(np.uint32)
    inner = bits & np.uint32(0xFFFF0000)
    outer = np.where(bits == inner, inner, inner + np.uint32(0x10000))
    return tuple(torch.from_numpy(b.view(np.float32).copy()) for b in (inner, outer))


def weights(n: int = 3000, *, seed: int = 0, spread: float = 0.02) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("spread", [1e-38, 1e-8, 0.02, 1.0, 1e30])
def test_the_result_is_one_of_the_two_neighbours(spread):
    x = weights(spread=spread)
    inner, outer = neighbours(x)
    got = round_by_chance(x, "0|1|w")
    assert got.dtype == torch.bfloat16 and got.shape == x.shape
    assert ((got.float() == inner) | (got.float() == outer)).all()
    assert (got.float() == inner).any() and (got.float() == outer).any()


def test_the_mean_of_many_is_the_number_itself():
    """Within five standard errors, number by number, and all together."""
    x = weights(400)
    inner, outer = neighbours(x)
    share = (x.double() - inner) / (outer.double() - inner)
    up = sum((round_by_chance(x, f"0|{v}|w").float() == outer).double() for v in range(CHANCES)) / CHANCES
    error = (share * (1 - share) / CHANCES).sqrt() + 1e-12
    assert ((up - share).abs() < 5 * error).all()
    assert abs((up - share).mean()) < 5 * math.sqrt(float((error**2).sum())) / len(x)
    nearest = (x.bfloat16().float() == outer).double()
    assert (nearest - share).abs().mean() > 0.2, "which nearest is not"


def test_a_step_too_small_for_bfloat16_arrives_in_the_mean():
    """Weights on bfloat16's grid, moved by 1e-6, as a checkpoint's are by the first steps of a run."""
    start = weights(200_000).bfloat16().float()
    moved = start + 1e-6
    arrived = (round_by_chance(moved, "0|1|w").double() - start).mean()
    spread = (round_by_chance(moved, "0|1|w").double() - start).std() / math.sqrt(len(start))
    assert abs(arrived - (moved.double() - start).mean()) < 5 * spread
    assert spread < 1e-7
    assert abs((moved.bfloat16().double() - start).mean()) < 0.5e-6


def test_what_bfloat16_holds_exactly_stays_and_no_number_becomes_infinite():
    exact = torch.cat([weights().bfloat16().float(), torch.tensor([0.0, -0.0, 1.0, -2.0, math.inf, -math.inf])])
    assert torch.equal(round_by_chance(exact, "k").float().view(torch.int32), exact.view(torch.int32))
    # NaN with digits only where bfloat16 has none would become an infinity by cutting them off.
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert round_by_chance(nan, "k").isnan().all()
    largest = torch.full((1000,), torch.finfo(torch.float32).max)
    assert (round_by_chance(torch.cat([largest, -largest]), "k").abs().float() == torch.finfo(torch.bfloat16).max).all()


def test_any_shape_can_be_rounded():
    for shape in ((), (0, 3), (rounding.PIECE,), (2, 3, 5)):
        assert round_by_chance(torch.ones(shape), "k").shape == shape


def test_the_noise_is_even_and_knows_no_place():
    noise, other = (torch.cat([rounding._noise([f"{i}|{key}"], 2**16, CPU)[0] for i in range(16)]) for key in "kl")
    assert noise.min() >= 0 and noise.max() <= 0xFFFF
    counts = torch.bincount(noise // 256, minlength=256).double()
    assert ((counts - 4096) ** 2 / 4096).sum() < 256 + 5 * math.sqrt(2 * 256)  # chi squared
    x = (noise.double() - noise.double().mean()) / noise.double().std()
    other = (other.double() - other.double().mean()) / other.double().std()
    pairs = [(x[:-s], x[s:]) for s in (1, 2, 64, 1024)] + [(x, other), (x[:-1], other[1:])]
    assert all(abs((a * b).mean()) < 5 / math.sqrt(len(a)) for a, b in pairs)


def test_the_noise_is_the_published_hash():
    """Against numpy's unsigned arithmetic: torch's is signed, and must wrap."""

    def mix(x):
        x = x ^ (x >> np.uint32(16))
        x = x * np.uint32(0x7FEB352D)
        x = x ^ (x >> np.uint32(15))
        x = x * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    x = torch.arange(-5000, 5000, dtype=torch.int32) * 429_496
    want = mix(x.numpy().view(np.uint32))
    rounding._mix(x)
    assert np.array_equal(x.numpy().view(np.uint32), want)


def test_it_depends_on_seed_version_and_name_and_on_nothing_else():
    x = weights(rounding.PIECE + 77)
    one = round_by_chance(x, "0|1|w")
    assert torch.equal(one, round_by_chance(x.clone().view(-1, 1), "0|1|w").view(-1))
    assert torch.equal(one.view(3, -1)[:, :5], round_by_chance(x.view(3, -1).T.contiguous().T, "0|1|w")[:, :5])
    for other in ("1|1|w", "0|2|w", "0|1|v"):
        assert not torch.equal(one, round_by_chance(x, other))
    with torch.random.fork_rng():
        state = torch.random.get_rng_state()
        round_by_chance(x, "0|1|w")
        assert torch.equal(state, torch.random.get_rng_state())


def test_pieces_at_once_round_as_one_by_one(monkeypatch):
    """A GPU takes many at once."""
    x, one = weights(5 * rounding.PIECE + 77), rounding._noise(["a"], 99, CPU)
    assert torch.equal(rounding._noise(["b", "a"], 99, CPU)[1:], one)
    alone = [round_by_chance_piece(x, i) for i in range(6)]
    assert torch.equal(round_by_chance(x, "k"), torch.cat(alone))


def round_by_chance_piece(x: torch.Tensor, number: int) -> torch.Tensor:
    piece = x[number * rounding.PIECE : (number + 1) * rounding.PIECE]
    noise = rounding._noise([f"{number}|k"], len(piece), CPU)
    return rounding._rounded(piece[None], noise)[0].bfloat16()


@pytest.mark.thorough
def test_another_process_with_more_threads_rounds_the_same():
    code = (
        "import torch, hashlib; from rlpost.rollout.rounding import round_by_chance; torch.set_num_threads(2)\n"
        "x = torch.randn(70000, generator=torch.Generator().manual_seed(0)) * 0.02\n"
        "print(hashlib.sha256(round_by_chance(x, '7|3|a.weight').view(torch.int16).numpy().tobytes()).hexdigest())"
    )
    said = [
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    # Written down, so that another version, machine or device that rounds otherwise is noticed.
    assert said[0] == said[1] == "66c9c5beaf569a06ca4e6063443e2a976f600898864889d506358fae7a6d78da\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_rounds_the_same():
    x = weights(rounding.PIECE + 77)
    assert torch.equal(round_by_chance(x, "0|1|w"), round_by_chance(x.cuda(), "0|1|w").cpu())


def test_only_float32_weights_that_an_engine_holds_in_bfloat16_are_rounded():
    given = {
        "a.weight": weights(64),
        "mlp.gate.weight": weights(64),
        "half.weight": weights(64).bfloat16(),
        "steps": torch.tensor([3]),
    }
    got = dict(rounded(given.items(), seed=0, version=5))
    assert list(got) == list(given)
    assert torch.equal(got["a.weight"], round_by_chance(given["a.weight"], "0|5|a.weight"))
    for name in ("mlp.gate.weight", "half.weight", "steps"):
        assert got[name] is given[name]


def test_files_for_servers_hold_what_a_colocated_engine_is_given(tmp_path):
    from safetensors.torch import load_file

    given, files = {"a.weight": weights(64).view(8, 8), "b.weight": weights(9)}, WeightFiles(tmp_path)
    files.write(rounded(given.items(), 3, 2))
    read = {name: tensor for path, _ in files.files for name, tensor in load_file(path).items()}
    colocated = dict(rounded(given.items(), 3, 2))
    assert read.keys() == colocated.keys()
    assert all(read[n].dtype == torch.bfloat16 and torch.equal(read[n], colocated[n]) for n in read)


class Engine:
    name = "fake"

    def load_weights(self, weights, version=0):
        self.held, self.version = dict(weights), version


def test_the_recipe_chooses_and_the_version_goes_on():
    engine = Engine()
    assert with_rounding(engine, SyncSection(), 3) is engine
    wrapped = with_rounding(engine, SyncSection(rounding="stochastic"), 3)
    assert isinstance(wrapped, RoundedEngine) and wrapped.name == "fake"
    wrapped.load_weights([("w", weights())], 9)
    assert engine.version == 9
    assert torch.equal(engine.held["w"], round_by_chance(weights(), "3|9|w"))


@pytest.mark.thorough
@pytest.mark.parametrize("choice", ["nearest", "stochastic"])
def test_a_bfloat16_engine_stays_within_the_probes_level(write_recipe, tmp_path, one_thread, choice):
    """The rounding noise is at the most twice nearest's; and the run is the same when it is made again."""
    found = []
    for name in ("first", "second"):
        changes = {
            "learner.rollouts": 6,
            "learner.learning_rate": 1e-4,
            "rollout.engine": {"type": "transformers", "dtype": "bfloat16"},
            "rollout.sync": {"rounding": choice},
            "evaluation.prompts": 0,
        }
        train(load_recipe(write_recipe(tmp_path / name, changes)))
        found.append(rows(tmp_path / name / "run", "train"))
    assert found[0] == found[1]
    gaps = [row["mismatch/mean_abs_gap"] for row in found[0]]
    print(choice, gaps, found[0][-1]["sync/mean_abs_gap"])
    assert 0 < max(*gaps, found[0][-1]["sync/mean_abs_gap"]) < LEVELS["bfloat16"] / 2

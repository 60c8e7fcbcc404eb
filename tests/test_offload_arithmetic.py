"""AdamW on pieces: torch's fused kernel where pieces begin at multiples of 64, and the C kernel for any cut."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpost.offload import arithmetic as arithmetic_module
from rlpost.offload.arithmetic import (
    Hyper,
    OwnArithmetic,
    Step,
    TorchArithmetic,
    build_kernel,
    constants,
    make_arithmetic,
)
from rlpost.offload.backends import run_adversary
from rlpost.offload.layout import cut
from rlpost.offload.update import FlatState, StepSetting, Update

N, STEPS = 20_011, 6
HYPER = Hyper(1e-3, (0.9, 0.95), 1e-8, 0.1)
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def gradients() -> list[torch.Tensor]:
    """Of very different sizes, from 1e-6 to 1e6."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(N, generator=draw) * 10 ** torch.randn(N, generator=draw).mul_(2) for _ in range(STEPS)]


def trained(arithmetic, cuts=(), kind=torch.float32, weight=torch.bfloat16) -> list[torch.Tensor]:
    """p, m, v and the model's weights after some steps on pieces."""
    p = torch.randn(N, generator=torch.Generator().manual_seed(1))
    m, v, w = torch.zeros(N), torch.zeros(N), torch.zeros(N, dtype=weight)
    for number, gradient in enumerate(gradients(), start=1):
        step = Step(number, 0.3333, (HYPER,))
        for a, b in itertools.pairwise((0, *cuts, N)):
            arithmetic.update(p[a:b], m[a:b], v[a:b], gradient.to(kind)[a:b], w[a:b], step, 0)
    return [p, m, v, w]


def same_bits(a, b) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def own() -> OwnArithmetic:
    library, trouble = build_kernel()
    assert library is not None, trouble
    return OwnArithmetic(library)


def test_torch_on_pieces_cut_at_multiples_of_64_is_torch_on_the_whole():
    whole = trained(TorchArithmetic())
    p = torch.nn.Parameter(torch.randn(N, generator=torch.Generator().manual_seed(1)))
    optimizer = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for gradient in gradients():
        p.grad = gradient.clone().mul_(0.3333)
        optimizer.step()
    state = optimizer.state[p]
    assert same_bits(whole, [p.detach(), state["exp_avg"], state["exp_avg_sq"], p.detach().bfloat16()])
    assert same_bits(trained(TorchArithmetic(), (64, 640, 12_800)), whole)


@needs_compiler
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_the_c_kernel_gives_the_same_bits_for_any_cut(kind, weight, own):
    cuts = sorted(torch.randperm(N - 1, generator=torch.Generator().manual_seed(2))[:40].add(1).tolist())
    whole = trained(own, (), kind, weight)
    assert same_bits(trained(own, cuts, kind, weight), whole)
    assert torch.equal(whole[3], whole[0].to(weight))


@needs_compiler
def test_the_c_kernel_is_numpys_float32_in_the_same_order(own):
    p = torch.randn(N, generator=torch.Generator().manual_seed(1)).numpy().copy()
    m, v = np.zeros(N, np.float32), np.zeros(N, np.float32)
    for number, gradient in enumerate(gradients(), start=1):
        numbers = constants(Step(number, 0.3333, (HYPER,)), 0)
        inverse, keep, beta1, left1, beta2, left2, eps, root, size = map(np.float32, numbers)
        d = gradient.numpy() * inverse
        m = m * beta1 + d * left1
        v = v * beta2 + (d * d) * left2
        p = p * keep - size * (m / (np.sqrt(v) / root + eps))
    assert same_bits([torch.from_numpy(x) for x in (p, m, v)], trained(own)[:3])


@needs_compiler
def test_the_c_kernel_is_close_to_torch(own):
    for mine, theirs in zip(trained(own)[:3], trained(TorchArithmetic())[:3], strict=True):
        assert float((mine - theirs).abs().max()) <= 3e-7 * float(theirs.abs().max())


@needs_compiler
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_with_the_c_kernel_the_bits_do_not_depend_on_the_plan(kind, own):
    """Pieces, the share of either side, and the order."""
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    found = []
    for number, (largest, gpu_of, every) in enumerate([(10**6, 1, 1), (64, 0, 1), (640, 1, 2), (200, 2, 3)]):
        p = torch.randn(N, generator=torch.Generator().manual_seed(1))
        state = FlatState(p, torch.zeros(N), torch.zeros(N), p.bfloat16(), torch.zeros(N, dtype=kind))
        pieces = cut([N - 777, 777], [0, 0], largest, gpu_of=gpu_of, every=every)
        update = Update(state, pieces, arithmetic=own)
        for step, gradient in enumerate(gradients(), start=1):
            state.gradients.copy_(gradient)
            update.step = StepSetting(step, 0.3333, [group])
            run_adversary(update.program, 10 * number + step)
        found.append((state.p, state.m, state.v, state.weights))
    assert all(same_bits(other, found[0]) for other in found)


@needs_compiler
def test_not_a_number_and_infinity_are_rounded_as_torch_does(own):
    p = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-40, -0.0, 1.00390625])
    w, zero = torch.zeros(7, dtype=torch.bfloat16), torch.zeros(7)
    still = Step(1, 1.0, (Hyper(0.0, (0.9, 0.95), 1e-8, 0.0),))
    own.update(p, zero.clone(), zero.clone(), zero.clone(), w, still, 0)
    expected = p.bfloat16()
    assert torch.equal(w.isnan(), expected.isnan())
    assert torch.equal(w[1:].view(torch.int16), expected[1:].view(torch.int16))


@needs_compiler
def test_what_the_c_kernel_cannot_take_is_refused(own):
    vector, step = torch.zeros(8), Step(1, 1.0, (HYPER,))
    for gradient in (torch.zeros(7), torch.zeros(8, dtype=torch.float16), torch.zeros(16)[::2]):
        with pytest.raises(ValueError, match="contiguous vectors of 8"):
            own.update(vector, vector.clone(), vector.clone(), gradient, None, step, 0)


@needs_compiler
def test_the_kernel_is_built_once_into_its_folder(tmp_path):
    assert build_kernel(tmp_path)[0] is not None
    [file] = tmp_path.iterdir()
    made = file.stat().st_mtime_ns
    assert build_kernel(tmp_path)[0] is not None
    assert file.stat().st_mtime_ns == made and [path.name for path in tmp_path.iterdir()] == [file.name]


def test_without_a_compiler_torch_is_used_and_said(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    arithmetic, line = make_arithmetic("own")
    assert isinstance(arithmetic, TorchArithmetic) and "no C compiler" in line and "torch" in line
    assert make_arithmetic("torch")[1] is None


def test_a_compiler_that_fails_is_named(tmp_path):
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    failing.chmod(0o755)
    library, trouble = build_kernel(Path(tmp_path) / "cache", str(failing))
    assert library is None and "no space left" in trouble and str(failing) in trouble


def test_bias_corrections_count_steps_from_one():
    numbers = constants(Step(1, 1.0, (HYPER,)), 0)
    assert numbers[7] == pytest.approx(math.sqrt(0.05)) and numbers[8] == pytest.approx(1e-3 / 0.1)


IN_THE_INTERPRETER = """
import torch
from rlpost.offload import adamw_triton
from rlpost.offload.arithmetic import OwnArithmetic, TorchArithmetic, build_kernel, constants, differing
from rlpost.offload.arithmetic import Hyper, Step

library, trouble = build_kernel()
assert library is not None, trouble
own, step = OwnArithmetic(library), Step(5, 0.3333, (Hyper(1e-3, (0.9, 0.95), 1e-8, 0.1),))


class InTriton:
    def update(self, p, m, v, gradient, weights, step, group):
        adamw_triton.update(p, m, v, gradient, weights, constants(step, group))


assert differing(own, InTriton(), torch.device("cpu")) == 0
assert differing(own, TorchArithmetic(), torch.device("cpu")) > 100, "the comparison sees other roundings"
for n in (0, 1, 1023, 1025):
    for kind in (torch.float32, torch.bfloat16):
        for weight in (None, torch.float32, torch.bfloat16):
            drawn = torch.Generator().manual_seed(n)
            p, m, gradient = (torch.randn(n, generator=drawn) for _ in range(3))
            gradient[:3] = torch.tensor([float("nan"), float("inf"), 0.0])[:n]
            state = [p, m, torch.rand(n, generator=drawn)]
            there = [x.clone() for x in state]
            weights = [None if weight is None else torch.full((n,), 7.0, dtype=weight) for _ in range(2)]
            own.update(*state, gradient.to(kind), weights[0], step, 0)
            InTriton().update(*there, gradient.to(kind), weights[1], step, 0)
            for a, b in zip([*state, weights[0]], [*there, weights[1]], strict=True):
                same = a is None or torch.equal(a.nan_to_num(3.0), b.nan_to_num(3.0))
                assert same and (a is None or torch.equal(a.isnan(), b.isnan())), (n, kind, weight)
"""


@needs_compiler
@pytest.mark.thorough
def test_the_triton_kernel_has_the_c_kernels_bits_in_tritons_interpreter():
    """On a GPU: `test_offload_cuda`. The interpreter is switched on before triton is imported, so in a process of its own."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", IN_THE_INTERPRETER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_a_gpu_kernel_that_rounds_otherwise_or_cannot_be_built_is_not_used(monkeypatch):
    """What compares the two on a GPU is what the test in the interpreter calls; here only what is made of its answer."""
    pytest.importorskip("triton")

    def broken(*_) -> int:
        raise RuntimeError("no compiler for this GPU")

    answers = {"gives other bits": lambda *_: 5, "no compiler for this GPU": broken, "": lambda *_: 0}
    for said, answer in answers.items():
        monkeypatch.setattr(arithmetic_module, "differing", answer)
        arithmetic, trouble = make_arithmetic("own", "cuda")
        assert isinstance(arithmetic, TorchArithmetic if said else OwnArithmetic)
        assert said in trouble if said else trouble is None

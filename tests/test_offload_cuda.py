"""On a GPU: programs on CUDA's streams, made late, and the kernel of AdamW. They passed on an H100 (torch 2.11, CUDA 13.0)."""

from __future__ import annotations

import random

import pytest
import torch
from offload_machine import Case, same

from rlpost.offload.arithmetic import OwnArithmetic, build_kernel, differing, gpu_kernel
from rlpost.offload.backends import CudaDevice, run_on_lanes
from rlpost.offload.program import Program

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class LateCuda(CudaDevice):
    """Streams sleep before some of what they are given."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._drawn = random.Random(seed)

    def submit(self, stream, part) -> None:
        cycles = self._drawn.randrange(1_000_000) if self._drawn.random() < 0.3 else 0

        def late() -> None:
            if cycles:
                torch.cuda._sleep(cycles)
            part()

        super().submit(stream, late)


def one_by_one(program: Program) -> None:
    for op in program.ops:
        for part in op.parts:
            part()
            torch.cuda.synchronize()


@pytest.mark.parametrize("ten", range(20))
def test_late_streams_give_the_bits_of_one_operation_after_the_other(ten):
    for seed in range(10 * ten, 10 * ten + 10):
        case = Case(seed, device="cuda")
        expected = case.run(one_by_one).values()
        assert same(case.run(lambda program, seed=seed: run_on_lanes(program, LateCuda(seed))).values(), expected), seed


def test_streams_are_made_once():
    case = Case(3, device="cuda", gpu_of=1, every=2)
    case.run(lambda program: run_on_lanes(program, CudaDevice()))
    before = dict(CudaDevice._streams)
    case.run(lambda program: run_on_lanes(program, CudaDevice()))
    assert before == CudaDevice._streams


def test_the_triton_kernel_has_the_c_kernels_bits_on_the_gpu(tmp_path):
    from rlpost.offload import adamw_triton  # needs triton, which a machine without a GPU may lack

    device = torch.device("cuda")
    library, why = build_kernel(tmp_path)
    assert library is not None, why
    kernel, why = gpu_kernel(library, device)
    assert kernel is not None, why
    assert differing(OwnArithmetic(library), OwnArithmetic(library, adamw_triton.update), device) == 0

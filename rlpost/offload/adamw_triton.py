"""The kernel of `adamw.c` in Triton, for the accelerator: the same float32 operations, rounded to nearest in the same order.

Imported only where it is used. Its bits were the C kernel's on an H100 (`tests/test_offload_cuda.py`), and are in Triton's
interpreter, on a CPU. `rlpost.offload.arithmetic.make_arithmetic` compares the two on the GPU at every start, and takes
torch's kernel where they differ.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _adamw(
    p, m, v, g, w, n, inverse, keep, beta1, beta1_left, beta2, beta2_left, eps, root, size,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    d = tl.load(g + at, mask=inside, other=0.0).to(tl.float32) * inverse
    first = tl.load(m + at, mask=inside, other=0.0) * beta1 + d * beta1_left
    second = tl.load(v + at, mask=inside, other=0.0) * beta2 + (d * d) * beta2_left
    denominator = tl.div_rn(tl.sqrt_rn(second), tl.zeros([BLOCK], tl.float32) + root) + eps
    x = tl.load(p + at, mask=inside, other=0.0) * keep - size * tl.div_rn(first, denominator)
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    tl.store(p + at, x, mask=inside)
    if WRITE == 32:
        tl.store(w + at, x, mask=inside)
    if WRITE == 16:  # bfloat16 by hand: to nearest, ties to even; NaN stays NaN
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        half = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        tl.store(w + at, half.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)


def update(p: Tensor, m: Tensor, v: Tensor, gradient: Tensor, weights: Tensor | None, numbers: Sequence[float]) -> None:
    """One step in place, by the nine numbers of `rlpost.offload.arithmetic.constants`. All on one device."""
    n, bits = p.numel(), 0 if weights is None else 8 * weights.element_size()
    if weights is not None and bits == 16:
        weights = weights.view(torch.int16)
    if n:
        _adamw[(triton.cdiv(n, BLOCK),)](
            p, m, v, gradient, p if weights is None else weights, n, *numbers,
            WRITE=bits, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip

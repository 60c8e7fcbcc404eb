"""AdamW on a piece of the flat state: torch's fused kernel, or one in C of a fixed order, whose bits no cut changes."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from rlpost.recipe.sections.base import unknown_choice

SOURCE = Path(__file__).with_name("adamw.c")
# No fused multiply-add, which rounds once where two operations round twice; no errno, so that the square root is vectorised.
FLAGS = ("-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-shared", "-fPIC")


@dataclass(frozen=True, slots=True)
class Hyper:
    """AdamW's settings of one parameter group in one step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class Step:
    """What an optimizer step is to every piece: its number (from 1, for the bias corrections), the factor on the gradients
    (loss scale and clipping in one) and the settings by parameter group."""

    number: int
    inverse_scale: float
    groups: tuple[Hyper, ...]


class Arithmetic(Protocol):
    """One AdamW step on a piece."""

    name: str

    def update(
        self, p: Tensor, m: Tensor, v: Tensor, gradient: Tensor, weights: Tensor | None, step: Step, group: int
    ) -> None:
        """Advances `p`, `m`, `v` (float32 [n], in place) by the gradient [n] (float32 or bfloat16, unchanged, not yet scaled)
        and writes the new parameters into `weights` [n], if given, in their own precision. All on one device."""
        ...


class TorchArithmetic:
    """torch's fused AdamW. On a CPU its bits are those of one call on the whole, where pieces begin at multiples of 16 from the
    start of that whole: its vector loop and its scalar tail round differently. CPU and GPU kernels round differently, too."""

    name = "torch"

    def update(
        self, p: Tensor, m: Tensor, v: Tensor, gradient: Tensor, weights: Tensor | None, step: Step, group: int
    ) -> None:
        hyper = step.groups[group]
        scaled = gradient.to(torch.float32, copy=True).mul_(step.inverse_scale)  # as DeepSpeed does, in this order
        adamw(
            [p], [scaled], [m], [v], [], [torch.full((), step.number - 1.0, device=p.device)],
            fused=True, amsgrad=False, beta1=hyper.betas[0], beta2=hyper.betas[1], lr=hyper.lr,
            weight_decay=hyper.weight_decay, eps=hyper.eps, maximize=False,
        )  # fmt: skip
        if weights is not None:
            weights.copy_(p)


GpuKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Sequence[float]], None]
"""p, m, v, gradient, weights, and the numbers of `constants`."""


class OwnArithmetic:
    """The kernel of `adamw.c`, and for what lies on a GPU that of `adamw_triton`. Raises ValueError for tensors that it cannot
    take: it is handed addresses."""

    name = "own"

    def __init__(self, library: ctypes.CDLL, gpu: GpuKernel | None = None) -> None:
        self._library, self._gpu = library, gpu

    def update(
        self, p: Tensor, m: Tensor, v: Tensor, gradient: Tensor, weights: Tensor | None, step: Step, group: int
    ) -> None:
        device = "cpu" if self._gpu is None else p.device.type
        for tensor in (p, m, v):
            _require(tensor, p.numel(), (torch.float32,), device)
        for tensor in (gradient, *([] if weights is None else [weights])):
            _require(tensor, p.numel(), (torch.float32, torch.bfloat16), device)
        if self._gpu is not None and device != "cpu":
            self._gpu(p, m, v, gradient, weights, constants(step, group))
            return
        kinds = [str(gradient.dtype), "none" if weights is None else str(weights.dtype)]
        function = getattr(self._library, "adamw_" + "_".join(kind.removeprefix("torch.") for kind in kinds))
        addresses = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (p, m, v, gradient, weights)]
        numbers = [ctypes.c_float(x) for x in constants(step, group)]
        function(*addresses, ctypes.c_size_t(p.numel()), *numbers)


def constants(step: Step, group: int) -> Sequence[float]:
    """The kernel's nine numbers in its order, each computed in double precision and rounded to float32 once."""
    hyper, (beta1, beta2) = step.groups[group], step.groups[group].betas
    exact = (
        step.inverse_scale,
        1.0 - hyper.lr * hyper.weight_decay,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        hyper.eps,
        math.sqrt(1.0 - beta2**step.number),
        hyper.lr / (1.0 - beta1**step.number),
    )
    return [float(np.float32(x)) for x in exact]


def make_arithmetic(
    arithmetic: Literal["torch", "own"], device: torch.device | str = "cpu"
) -> tuple[Arithmetic, str | None]:
    """The arithmetic of `learner.offload.arithmetic` where weights lie on `device`, and a line to be logged where it is another
    than was asked for."""
    match arithmetic:
        case "torch":
            return TorchArithmetic(), None
        case "own":
            library, trouble = build_kernel()
            if library is not None and torch.device(device).type == "cpu":
                return OwnArithmetic(library), None
            if library is not None:
                gpu, trouble = gpu_kernel(library, torch.device(device))
                if gpu is not None:
                    return OwnArithmetic(library, gpu), None
            return TorchArithmetic(), (
                f"learner.offload.arithmetic=own: {trouble}. torch's fused AdamW is used, whose bits depend on where the state "
                "is cut and on which side computes"
            )
        case _:
            raise unknown_choice("learner.offload.arithmetic", arithmetic)


def gpu_kernel(library: ctypes.CDLL, device: torch.device) -> tuple[GpuKernel | None, str]:
    """The kernel for a GPU, if its bits are the C kernel's there; else what stands against it."""
    try:
        from rlpost.offload import adamw_triton
    except ImportError as error:
        return None, f"the kernel for the GPU needs triton ({error})"
    try:
        wrong = differing(OwnArithmetic(library), OwnArithmetic(library, adamw_triton.update), device)
    except Exception as error:  # what a compiler for GPUs raises is its own
        return (
            None,
            f"triton did not build the kernel for the GPU ({type(error).__name__}: {' '.join(str(error).split())[:300]})",
        )
    if wrong:
        return (
            None,
            f"the kernel for the GPU gives other bits than the one for the CPU here ({wrong} of {_TRIED} numbers)",
        )
    return adamw_triton.update, ""


_TRIED = 4 * 10_007


def differing(one: Arithmetic, other: Arithmetic, device: torch.device) -> int:
    """In how many of p, m, v and bfloat16 weights of a made-up vector two arithmetics differ, of which the other computes on
    `device`."""
    n, drawn = _TRIED // 4, torch.Generator().manual_seed(0)
    p, m, g = (torch.randn(n, generator=drawn) for _ in range(3))
    g *= 10 ** (4 * torch.randn(n, generator=drawn))  # of many sizes, some of which overflow when squared
    state = [p, m, torch.rand(n, generator=drawn), g, torch.zeros(n, dtype=torch.bfloat16)]
    there = [x.to(device, copy=True) for x in state]
    step = Step(3, 0.37, (Hyper(1e-3, (0.9, 0.95), 1e-8, 0.1),))
    for arithmetic, (a, b, c, gradient, weights) in ((one, state), (other, there)):
        arithmetic.update(a, b, c, gradient, weights, step, 0)
    pairs = [
        (x.view(torch.uint8).reshape(n, -1), y.cpu().view(torch.uint8).reshape(n, -1))
        for x, y in zip(state, there, strict=True)
    ]
    return sum(int((x != y).any(dim=1).sum()) for x, y in pairs)


def build_kernel(folder: Path | None = None, compiler: str | None = None) -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernel, and what kept it from being built ("" if nothing did).

    `folder` keeps it (default: rlpost's below the user's cache), under a name that tells source, flags, compiler and processor:
    a home directory may be shared by machines with other instructions.
    """
    compiler = shutil.which(compiler or os.environ.get("CC", "cc"))
    if compiler is None:
        return None, "there is no C compiler (`cc`, or what CC names)"
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = folder or cache / "rlpost"
    flags = (*FLAGS, "-march=native") if platform.machine() in ("x86_64", "AMD64") else FLAGS
    identity = "\n".join((SOURCE.read_text(), *flags, compiler, _processor()))
    file = folder / f"adamw_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    try:
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, flags, file)
        return ctypes.CDLL(str(file)), ""
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler} did not build the kernel ({' '.join(str(said).split())[:300]})"


def _compile(compiler: str, flags: Sequence[str], file: Path) -> None:
    """Under another name first: several processes may build at once, and one may be killed while it does."""
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch) / file.name
        command = [compiler, *flags, str(SOURCE), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        made.replace(file)


def _processor() -> str:
    """What tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _require(tensor: Tensor, count: int, dtypes: Sequence[torch.dtype], device: str) -> None:
    fits = (
        tensor.device.type == device and tensor.is_contiguous() and tensor.numel() == count and tensor.dtype in dtypes
    )
    if not fits:
        raise ValueError(
            f"rlpost's AdamW takes contiguous vectors of {count} numbers on {device}, of {dtypes}; this is "
            f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )

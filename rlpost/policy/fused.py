"""The head's elementwise work as fused kernels: TorchInductor turns it into Triton on a GPU (and C++ on a CPU)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger(__name__)


def fuses(device: torch.device) -> bool:
    """Whether the head's work on `device` is fused. On a GPU every unfused operation reads and writes [chunk, vocabulary]
    numbers; on a CPU small blocks stay in the cache anyway, and compiling takes longer than a short run."""
    return device.type == "cuda"


@cache
def fused(function: Callable[P, R]) -> Callable[P, R]:
    """`function` compiled for any number of rows; as it is, with a warning, where the compiler does not work."""
    compiled = torch.compile(function, dynamic=True)
    works = True

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal works
        if works:
            try:
                return compiled(*args, **kwargs)
            except Exception as error:  # of many kinds: no C compiler, no Triton, a driver too old
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                works = False
                _log.warning(
                    "The head's kernels could not be compiled (%s: %s): unfused operations are used instead, which are slower "
                    "and give the same numbers. Install a C compiler, or update the driver.",
                    type(error).__name__,
                    str(error).strip().splitlines()[0] if str(error).strip() else "no message",
                )
        return function(*args, **kwargs)

    return call


def fused_log_probs(logits: Tensor, target: Tensor, with_p: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(log of the normaliser [c], logp of `target` [c], entropy [c], probabilities [c, V] if wanted) of z [c, V], in nats."""
    top = logits.amax(-1, keepdim=True)
    centred = logits - top
    powers = centred.exp()
    total = powers.sum(-1, keepdim=True)
    log_total = total.log()
    logp = centred.gather(-1, target[:, None]) - log_total
    entropy = log_total - (centred * powers).sum(-1, keepdim=True) / total
    p = powers / total if with_p else None
    return (top + log_total).squeeze(-1), logp.squeeze(-1), entropy.squeeze(-1), p


def fused_grad_logits(
    logits: Tensor,
    normalizer: Tensor,
    target: Tensor,
    entropy: Tensor,
    by_logp: Tensor,
    by_entropy: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the loss with respect to z [c, V], in `dtype`. `logits` is z, `normalizer` [c] the log of its normaliser,
    `entropy` [c] is H; `by_logp` and `by_entropy` [c] are the loss's gradients with respect to logp and H."""
    logq = logits - normalizer[:, None]
    inner = by_entropy[:, None] * (logq + entropy[:, None]) + by_logp[:, None]
    step = -inner * logq.exp()
    own = torch.arange(logits.shape[1], device=logits.device)[None] == target[:, None]
    return (step + torch.where(own, by_logp[:, None], 0.0)).to(dtype)

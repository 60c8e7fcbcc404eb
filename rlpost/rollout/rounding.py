"""How float32 weights become an engine's bfloat16: to the nearest, or by chance, so that the mean is the weight itself.

bfloat16 keeps eight binary digits. Where a step moves a weight by less than half of the last one, rounding to nearest gives
the engine what it had before; rounding up with a probability equal to the share of the way (stochastic rounding,
arXiv:2010.06192) gives it the step in the mean over weights. The noise is a hash of run seed, version, name and place of the
number, so that every process, device and transport makes the same weights of the same weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.rollout import SyncSection

if TYPE_CHECKING:
    from rlpost.experience import Completion
    from rlpost.rollout.engine import Finished, RolloutEngine, SamplingRequest, SamplingSettings

PIECE = 2**16  # numbers that share a key, and fit a processor's cache; part of what the noise is a function of
_PIECES = 256  # at once on a GPU
_LOW = 0xFFFF  # the digits that bfloat16 leaves out
KEPT_WHOLE = (".e_score_correction_bias", ".gate.weight", ".router.weight", ".A_log", ".D", ".dt_bias", ".sinks")
"""Ends of names of small tensors that vLLM holds in float32 in some models: they are sent as they are, and the engine casts."""


def with_rounding(engine: RolloutEngine, sync: SyncSection, seed: int) -> RolloutEngine:
    """The engine, taking weights as `rollout.sync.rounding` says. `seed`: the run's."""
    match sync.rounding:
        case "nearest":
            return engine  # its own cast
        case "stochastic":
            return RoundedEngine(engine, seed)
        case _:
            raise unknown_choice("rollout.sync.rounding", sync.rounding)


class RoundedEngine:
    """An engine in bfloat16 whose weights are rounded stochastically on their way."""

    def __init__(self, engine: RolloutEngine, seed: int) -> None:
        self.engine, self.name, self._seed = engine, engine.name, seed

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int = 0) -> None:
        """As the engine's own. Tensors in another precision than float32 pass as they are."""
        self.engine.load_weights(rounded(weights, self._seed, version), version)

    def sample(
        self, requests: Sequence[SamplingRequest], settings: SamplingSettings, *, finished: Finished | None = None
    ) -> list[Completion]:
        return self.engine.sample(requests, settings, finished=finished)

    def logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        return self.engine.logprobs(sequences)

    def close(self) -> None:
        self.engine.close()


def rounded(weights: Iterable[tuple[str, Tensor]], seed: int, version: int) -> Iterator[tuple[str, Tensor]]:
    """Float32 weights as bfloat16, one at a time, rounded by chance; others, and `KEPT_WHOLE`, as they are.

    A tied weight comes once, and is rounded once."""
    for name, tensor in weights:
        if tensor.dtype != torch.float32 or name.endswith(KEPT_WHOLE):
            yield name, tensor
        else:
            yield name, round_by_chance(tensor, f"{seed}|{version}|{name}")


@torch.no_grad()
def round_by_chance(tensor: Tensor, key: str) -> Tensor:
    """A float32 tensor as bfloat16: each number becomes the next one below or above, with the mean that it has itself.

    What bfloat16 holds exactly stays, infinities and NaN too. A number beyond the largest of bfloat16 becomes that one.
    """
    flat = tensor.detach().contiguous().view(-1)
    out = torch.empty_like(flat, dtype=torch.bfloat16)
    at_once = 1 if flat.device.type == "cpu" else _PIECES  # a cache holds one; a GPU takes as long for one as for many
    whole, start = len(flat) // PIECE, 0
    for size, rows in [*((PIECE, min(at_once, whole - i)) for i in range(0, whole, at_once)), (len(flat) % PIECE, 1)]:
        noise = _noise([f"{start // PIECE + i}|{key}" for i in range(rows)], size, flat.device)
        end = start + rows * size
        out[start:end] = _rounded(flat[start:end].view(rows, size), noise).view(-1)
        start = end
    return out.view(tensor.shape)


def _rounded(x: Tensor, noise: Tensor) -> Tensor:
    """Float32 numbers that bfloat16 holds; `noise` as `_noise` gives it."""
    bits = x.view(torch.int32)
    # Added to the digits that are left out, even noise carries into the others with exactly the right probability.
    chosen = (bits + noise).bitwise_and_(~_LOW).view(torch.float32)
    if bool((x * 0 + chosen * 0).sum() == 0):  # NaN where something is not finite
        return chosen
    below = torch.where(x.isfinite(), (bits & ~_LOW).view(torch.float32), x)
    return torch.where(x.isfinite() & chosen.isfinite(), chosen, below)


def _noise(keys: Sequence[str], size: int, device: torch.device) -> Tensor:
    """int32 [keys, size], each evenly one of 0 to 65535: the same on every device, which torch's generators are not."""
    digests = b"".join(hashlib.blake2b(k.encode(), digest_size=8, person=b"rlpost.round").digest() for k in keys)
    made = torch.frombuffer(bytearray(digests), dtype=torch.int32).view(len(keys), 2).to(device)
    x = _places(device)[: (size + 1) // 2] + made[:, :1]
    _mix(x)
    x ^= made[:, 1:]  # after the first mixing: two tensors never run through the same numbers, shifted
    _mix(x)
    return x.view(torch.int16)[:, :size].to(torch.int32).bitwise_and_(_LOW)


def _mix(x: Tensor) -> None:
    """In place; a bijection of 32 bits in which every bit depends on every other (C. Wellons' lowbias32)."""
    x ^= (x >> 16).bitwise_and_(_LOW)  # torch shifts the sign in
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(_LOW)


@lru_cache(maxsize=4)
def _places(device: torch.device) -> Tensor:
    return torch.arange(PIECE // 2, dtype=torch.int32, device=device)

"""The rollout engine of runs that sample nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rlpost.errors import RolloutError

if TYPE_CHECKING:
    from torch import Tensor

    from rlpost.experience import Completion
    from rlpost.rollout.engine import Finished, SamplingRequest, SamplingSettings


class NoEngine:
    """In place of a rollout engine where learning is from preference pairs or solutions that are there already."""

    name = "none"

    def sample(
        self, requests: Sequence[SamplingRequest], settings: SamplingSettings, *, finished: Finished | None = None
    ) -> list[Completion]:
        raise RolloutError(_NOTHING)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int = 0) -> None:
        """Nobody samples from them, so they are not even gathered."""

    def logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        raise RolloutError(_NOTHING)

    def close(self) -> None:
        """There is nothing to free."""


_NOTHING = (
    "A run on preference pairs, or of SFT without evaluation, samples nothing and has no rollout engine. Give data.train "
    "prompts, not pairs, or set evaluation.prompts."
)

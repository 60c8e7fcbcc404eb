"""Chooses what a run learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlpost.source.pairs import PairSource
from rlpost.source.sampled import SampledSource
from rlpost.source.sampled_pairs import SampledPairSource

if TYPE_CHECKING:
    from rlpost.run.parts import Parts
    from rlpost.source.source import Source


def make_source(parts: Parts) -> Source:
    """Rewarded completions, a preference data set, or preference pairs made of completions, as the recipe says."""
    if parts.recipe.method.pairs is None:
        return SampledSource(parts)
    return PairSource(parts) if parts.recipe.data.has_pairs else SampledPairSource(parts)

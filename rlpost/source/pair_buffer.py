"""Preference pairs as a rollout buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rlpost.data.pairs import Pair
from rlpost.experience import Group
from rlpost.gradient.types import Counts
from rlpost.learner.buffer import DemonstrationRow, RolloutBuffer

if TYPE_CHECKING:
    from rlpost.learner.process import Processes


def pair_group(pair: Pair) -> Group:
    """A pair as a group of two completions, chosen first."""
    return Group(pair, (pair.chosen, pair.rejected))


def open_pairs(
    groups: Sequence[Group],
    baselines: Sequence[tuple[int, ...] | None],
    *,
    step: int,
    minibatches: int,
    processes: Processes,
) -> RolloutBuffer:
    """The buffer of a step's pairs on this process, with the counts of all processes; collective.

    `groups` hold (chosen, rejected); `baselines` the initial model's responses. A preference is an advantage: 1 on chosen,
    -1 on rejected.
    """
    rows = tuple(
        None if ids is None else DemonstrationRow(group.prompt.token_ids, ids)
        for group, ids in zip(groups, baselines, strict=True)
    )
    sides = [side for row in rows for side in (1.0, -1.0, *([0.0] if row is not None else []))]
    minibatch = tuple(i * minibatches // max(1, len(groups)) for i in range(len(groups)))
    own = [Counts(0, 0, 0)] * minibatches
    for group, row, m in zip(groups, rows, minibatch, strict=True):
        held_up = len(group.completions[0].token_ids if row is None else row.token_ids)
        own[m] = _add(own[m], Counts(sum(len(c.token_ids) for c in group.completions), 2, 1, None, 0, 1, held_up))
    counts = [Counts(0, 0, 0)] * minibatches
    for part in processes.gather(own):
        counts = [_add(total, one) for total, one in zip(counts, part, strict=True)]
    return RolloutBuffer(
        step=step,
        groups=tuple(groups),
        minibatch=minibatch,
        dead=(False,) * len(groups),
        advantage=torch.tensor(sides, dtype=torch.float32),
        counts=tuple(counts),
        demonstrations=rows,
    )


def _add(a: Counts, b: Counts) -> Counts:
    return replace(
        a,
        tokens=a.tokens + b.tokens,
        sequences=a.sequences + b.sequences,
        prompts=a.prompts + b.prompts,
        demonstrations=a.demonstrations + b.demonstrations,
        demonstration_tokens=a.demonstration_tokens + b.demonstration_tokens,
    )

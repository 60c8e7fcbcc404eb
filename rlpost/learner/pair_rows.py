"""Micro-batches of whole pairs: both sides of a pair always stand in the same forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlpost.experience import TokenRows
from rlpost.policy.rows import ROW_CAP, RowCompletion, RowGroup, build_rows


def pair_batches(
    groups: Sequence[RowGroup], *, layout: str, micro_batch_tokens: int, pad_id: int, row_cap: int = ROW_CAP
) -> list[TokenRows]:
    """Micro-batches of at most `micro_batch_tokens` positions, unless a single pair is longer than that.

    In the tree layout a pair is one row, the prompt once. A pair whose tree is longer than `row_cap`, and every pair in
    the other layouts, has a row for each response, rows of one micro-batch being padded to one width; pairs of similar
    length are put together.
    """
    budget = min(micro_batch_tokens, row_cap)
    trees = [group for group in groups if layout == "tree" and tree_length(group) <= budget]
    batches = build_rows(trees, layout="tree", micro_batch_tokens=micro_batch_tokens, pad_id=pad_id, row_cap=row_cap)
    apart = [group for group in groups if layout != "tree" or tree_length(group) > budget]
    for chunk in _chunks(apart, micro_batch_tokens):
        # The padded layout cuts its rows into micro-batches by number only: with room for all of them there is one.
        room = 2 * sum(len(group.completions) for group in chunk) * max(map(_width, chunk))
        batches += build_rows(chunk, layout="padded", micro_batch_tokens=room, pad_id=pad_id)
    return batches


def tree_length(group: RowGroup) -> int:
    """Positions of a group's tree."""
    return len(group.prompt_ids) + sum(_lengths(group))


def _lengths(group: RowGroup) -> list[int]:
    return [len(c.token_ids if isinstance(c, RowCompletion) else c[2]) for c in group.completions]


def _width(group: RowGroup) -> int:
    return len(group.prompt_ids) + max(_lengths(group))


def _chunks(groups: Sequence[RowGroup], budget: int) -> Iterator[list[RowGroup]]:
    """The groups, longest first, in runs whose padded rows fit the budget."""
    chunk: list[RowGroup] = []
    for group in sorted(groups, key=_width, reverse=True):
        rows = sum(len(one.completions) for one in (*chunk, group))
        # Padded rows are as wide as the longest prompt plus the longest response.
        prompt = max(len(one.prompt_ids) for one in (*chunk, group))
        longest = max(max(_lengths(one)) for one in (*chunk, group))
        if chunk and rows * (prompt + longest) > budget:
            yield chunk
            chunk = []
        chunk.append(group)
    if chunk:
        yield chunk

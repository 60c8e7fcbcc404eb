"""Lays completions out in rows for the model: prompt-sharing trees, length-sorted rows, or padded rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlpost.errors import DataError
from rlpost.experience import TokenRows
from rlpost.policy.packing import Stack, balanced_split, stack_rows
from rlpost.recipe.sections.base import unknown_choice

Layout = Literal["tree", "sorted", "padded"]
ROW_CAP = 4096  # a tree row's attention mask costs T^2: a group whose tree is longer is split into several trees


@dataclass(frozen=True, slots=True)
class RowCompletion:
    """One completion to be scored: `start` is where its tokens begin in the rollout's flat arrays."""

    sequence: int
    start: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A prompt and those of its completions that are to be scored: (sequence, start, token_ids) each."""

    prompt_ids: tuple[int, ...]
    completions: tuple[RowCompletion | tuple[int, int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class _Tree:
    """What stands in one row: a prompt and the completions that continue it."""

    prompt_ids: tuple[int, ...]
    completions: tuple[RowCompletion, ...]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + sum(len(c.token_ids) for c in self.completions)


def build_rows(
    groups: Sequence[RowGroup], *, layout: Layout, micro_batch_tokens: int, pad_id: int, row_cap: int = ROW_CAP
) -> list[TokenRows]:
    """Micro-batches of [R, T] positions with R * T <= `micro_batch_tokens`, unless a single row is longer than that.

    - "tree": one row a group, the prompt once and each completion as a branch. A group longer than
      min(micro_batch_tokens, row_cap) becomes several trees of about equal length, each with the prompt.
    - "sorted": one row a completion. Both layouts sort rows by length before they are stacked (see `stack_rows`).
    - "padded": the reference: one row a completion in the given order, all as long as the longest prompt plus the
      longest completion.

    A completion is never cut and never spread over micro-batches; one without tokens is left out. Within a micro-batch
    tokens are ordered by `sequence`. The result depends on the arguments alone. Raises DataError for an empty prompt.
    """
    trees = [tree for group in groups for tree in _trees(group, layout, min(micro_batch_tokens, row_cap))]
    if not trees:
        return []
    lengths = [tree.length for tree in trees]
    match layout:
        case "padded":
            width = max(len(t.prompt_ids) for t in trees) + max(len(t.completions[0].token_ids) for t in trees)
            step = max(1, micro_batch_tokens // width)
            stacks = [Stack(tuple(range(i, min(i + step, len(trees)))), width) for i in range(0, len(trees), step)]
        case "tree" | "sorted":
            stacks = stack_rows(lengths, micro_batch_tokens)
        case _:
            raise unknown_choice("learner.layout", layout)
    return [_tensors([trees[i] for i in stack.rows], stack.width, pad_id) for stack in stacks]


def padding_share(batches: Sequence[TokenRows]) -> float:
    """The share of all positions that is padding; 0 for no positions."""
    positions = sum(rows.input_ids.numel() for rows in batches)
    return 1.0 - sum(rows.real_tokens for rows in batches) / positions if positions else 0.0


def to_device(rows: TokenRows, device: torch.device | str) -> TokenRows:
    """The same rows with all tensors on `device`."""
    if rows.input_ids.device == torch.device(device):
        return rows
    return TokenRows(
        input_ids=rows.input_ids.to(device, non_blocking=True),
        position_ids=rows.position_ids.to(device, non_blocking=True),
        tree=rows.tree.to(device, non_blocking=True),
        branch=rows.branch.to(device, non_blocking=True),
        predict_row=rows.predict_row.to(device, non_blocking=True),
        predict_col=rows.predict_col.to(device, non_blocking=True),
        target=rows.target.to(device, non_blocking=True),
        token_index=rows.token_index.to(device, non_blocking=True),
        sequence=rows.sequence.to(device, non_blocking=True),
        causal=rows.causal,
        useful_tokens=rows.useful_tokens,
        real_tokens=rows.real_tokens,
    )


def spare_rows(token: int = 0) -> TokenRows:
    """The smallest micro-batch there is, for passes whose result does not count: `useful_tokens` is 0."""
    one = torch.zeros(1, dtype=torch.int64)
    ids = torch.full((1, 2), token, dtype=torch.int64)
    return TokenRows(
        input_ids=ids,
        position_ids=torch.arange(2)[None],
        tree=torch.zeros_like(ids),
        branch=torch.tensor([[0, 1]]),
        predict_row=one,
        predict_col=one,
        target=one + token,
        token_index=one,
        sequence=one,
        causal=True,
        useful_tokens=0,
        real_tokens=0,
    )


def _trees(group: RowGroup, layout: Layout, budget: int) -> list[_Tree]:
    """The rows of one group. Only the tree layout puts more than one completion in a row."""
    if not group.prompt_ids:
        raise DataError(
            "a prompt has no tokens, so nothing predicts the first token of its completions; give it text, or a chat"
            " template (model.chat_template) that begins with a token of its own"
        )
    completions = [c if isinstance(c, RowCompletion) else RowCompletion(*c) for c in group.completions]
    completions = [c for c in completions if c.token_ids]
    match layout:
        case "sorted" | "padded":
            return [_Tree(group.prompt_ids, (c,)) for c in completions]
        case "tree":
            parts = balanced_split([len(c.token_ids) for c in completions], budget - len(group.prompt_ids))
            return [_Tree(group.prompt_ids, tuple(completions[i] for i in part)) for part in parts]
        case _:
            raise unknown_choice("learner.layout", layout)


def _tensors(trees: Sequence[_Tree], width: int, pad_id: int) -> TokenRows:
    """One micro-batch. Padding goes on counting positions, so that plain rows look like plain rows to transformers."""
    shape = (len(trees), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    position_ids = torch.arange(width).repeat(len(trees), 1)
    branch = torch.full(shape, -1, dtype=torch.int64)
    scored: list[tuple[RowCompletion, int, Tensor]] = []  # completion, row, columns that predict its tokens
    for row, tree in enumerate(trees):
        prompt = len(tree.prompt_ids)
        input_ids[row, :prompt] = torch.tensor(tree.prompt_ids)
        branch[row, :prompt] = 0
        column = prompt
        for number, completion in enumerate(tree.completions, start=1):
            end = column + len(completion.token_ids)
            input_ids[row, column:end] = torch.tensor(completion.token_ids)
            position_ids[row, column:end] = torch.arange(prompt, prompt + end - column)
            branch[row, column:end] = number
            predict = torch.arange(column - 1, end - 1)
            predict[0] = prompt - 1  # the first token of every branch is predicted by the prompt's last
            scored.append((completion, row, predict))
            column = end
    scored.sort(key=lambda item: (item[0].sequence, item[0].start))
    sizes = torch.tensor([len(c.token_ids) for c, _, _ in scored])
    return TokenRows(
        input_ids=input_ids,
        position_ids=position_ids,
        tree=torch.where(branch >= 0, 0, -1),
        branch=branch,
        predict_row=torch.tensor([row for _, row, _ in scored]).repeat_interleave(sizes),
        predict_col=torch.cat([predict for _, _, predict in scored]),
        target=torch.tensor([token for c, _, _ in scored for token in c.token_ids]),
        token_index=torch.cat([torch.arange(c.start, c.start + len(c.token_ids)) for c, _, _ in scored]),
        sequence=torch.tensor([c.sequence for c, _, _ in scored]).repeat_interleave(sizes),
        causal=all(len(tree.completions) == 1 for tree in trees),
        useful_tokens=int(sizes.sum()),
        real_tokens=int((branch >= 0).sum()),
    )

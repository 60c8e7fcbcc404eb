"""Attention for rows: the mask that keeps branches of a tree apart. Which model may use which: `policy/family.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlpost.experience import TokenRows
from rlpost.policy.family import TREE_ATTENTION
from rlpost.policy.family import TREE_MODEL_TYPES as TREE_MODEL_TYPES  # which many look for beside the masks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedConfig, PreTrainedModel


def mask_for(model: PreTrainedModel, rows: TokenRows) -> Tensor | BlockMask | None:
    """`attention_mask` for a model, in the precision that its attention computes in: autocast's where it is on."""
    device = rows.tree.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return attention_mask(rows, model.config._attn_implementation, dtype)


def attention_mask(
    rows: TokenRows, implementation: str, dtype: torch.dtype = torch.float32
) -> Tensor | BlockMask | None:
    """What to pass to a transformers model as `attention_mask` so that it follows the rule of `TokenRows`.

    None for causal rows: padding is at the right end, where no real token can see it. Else an additive mask [R, 1, T, T]:
    0 or minus infinity in `dtype` for "sdpa", which would make one of a boolean mask in every layer, and keep each for the
    backward pass; 0 or the smallest number in float32 for "eager". A BlockMask for "flex_attention", of causal rows too, since
    FlexAttention is compiled once more for every other kind of mask. Padding attends to itself alone, since a softmax over
    nothing is NaN. Raises ValueError for an implementation without masks.
    """
    if implementation == "flex_attention":
        return _block_mask(rows)
    if rows.causal:
        return None
    if implementation not in TREE_ATTENTION:
        raise ValueError(f"attention implementation {implementation!r} cannot take tree rows; use layout 'sorted'")
    allowed = tree_mask(rows)[:, None]
    if implementation == "sdpa":
        return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)
    floor = torch.finfo(torch.float32).min
    return torch.zeros_like(allowed, dtype=torch.float32).masked_fill_(~allowed, floor)


def tree_mask(rows: TokenRows) -> Tensor:
    """[R, T, T] bool: whether position q (dim 1) may attend to position k (dim 2)."""
    tree, branch = rows.tree, rows.branch
    width = tree.shape[1]
    ones = torch.ones(width, width, dtype=torch.bool, device=tree.device)
    same_tree = tree[:, :, None] == tree[:, None, :]
    on_path = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    allowed = ones.tril() & same_tree & on_path & (tree >= 0)[:, :, None]
    return allowed | torch.eye(width, dtype=torch.bool, device=tree.device)


def _block_mask(rows: TokenRows) -> BlockMask:
    """The same rule for FlexAttention, which skips 128 x 128 blocks in which nothing may attend."""
    from torch.nn.attention.flex_attention import create_block_mask

    tree, branch = rows.tree, rows.branch

    def allowed(r: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        on_path = (branch[r, k] == 0) | (branch[r, q] == branch[r, k])
        return ((q >= k) & (tree[r, q] == tree[r, k]) & (tree[r, q] >= 0) & on_path) | (q == k)

    count, width = tree.shape
    return create_block_mask(allowed, count, None, width, width, device=str(tree.device))


def allow_many_shapes() -> None:
    """Lets torch compile FlexAttention for as many kinds of micro-batches as there are.

    One row or several, width a multiple of the block size or not, with and without gradient: about ten. Beyond its usual
    limit of eight torch would go on without a compiled kernel and hold all attention scores in memory.
    """
    import torch._dynamo  # seconds, and only for those who need it

    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)


@contextmanager
def plain_attention(config: PreTrainedConfig) -> Iterator[None]:
    """While open, a model with FlexAttention attends without: on a device on which it is only loaded, nothing compiles."""
    before = config._attn_implementation
    if before == "flex_attention":
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before

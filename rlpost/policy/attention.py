"""Attention for rows: the mask that keeps branches of a tree apart, and which models may use trees at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlpost.experience import TokenRows
from rlpost.policy.rows import Layout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedConfig

# Model types whose layers are plain causal softmax attention over rotary positions, and whose transformers code takes a
# ready 4-D mask and position ids. tests/test_policy_layouts.py compares trees with plain rows for the common ones.
TREE_MODEL_TYPES = frozenset(
    (
        "llama",
        "mistral",
        "mixtral",
        "ministral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "granite",
        "granitemoe",
        "cohere",
        "smollm3",
        "stablelm",
        "starcoder2",
        "glm",
        "glm4",
        "gpt_neox",
        "helium",
        "seed_oss",
    )
)
TREE_ATTENTION = ("sdpa", "eager", "flex_attention")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # frequencies change with the longest position of a micro-batch


def attention_mask(rows: TokenRows, implementation: str) -> Tensor | BlockMask | None:
    """What to pass to a transformers model as `attention_mask` so that it follows the rule of `TokenRows`.

    None for causal rows: padding is at the right end, where no real token can see it. Else [R, 1, T, T]: boolean for
    "sdpa" (True: may attend), additive float32 for "eager", a FlexAttention BlockMask for "flex_attention". Padding
    attends to itself alone, since a softmax over nothing is NaN. Raises ValueError for an implementation without masks.
    """
    if rows.causal:
        return None
    if implementation == "flex_attention":
        return _block_mask(rows)
    if implementation not in TREE_ATTENTION:
        raise ValueError(f"attention implementation {implementation!r} cannot take tree rows; use layout 'sorted'")
    allowed = tree_mask(rows)[:, None]
    if implementation == "sdpa":
        return allowed
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


def check_tree_support(config: PreTrainedConfig) -> str | None:
    """Why a model with this Hugging Face configuration cannot use tree rows, or None if it can."""
    if config.model_type not in TREE_MODEL_TYPES:
        return "attention or positions that are not known to be plain causal attention over rotary positions"
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= {"full_attention"}:
        return "layers of type " + ", ".join(sorted(kinds - {"full_attention"}))
    if not kinds and getattr(config, "sliding_window", None) is not None:
        return f"sliding_window={config.sliding_window}"
    if getattr(config, "use_bidirectional_attention", False):
        return "bidirectional attention"
    rope = _rope_types(getattr(config, "rope_parameters", None) or {})
    if bad := sorted(rope.intersection(_LENGTH_DEPENDENT_ROPE)):
        return f"rotary frequencies that depend on length (rope_type {', '.join(bad)})"
    return None


def choose_layout(config: PreTrainedConfig, wanted: Layout, attention: str = "sdpa") -> tuple[Layout, str | None]:
    """The layout to use, and a line saying why where it is not the wanted one."""
    if wanted != "tree":
        return wanted, None
    if attention not in TREE_ATTENTION:
        return "sorted", f"learner.layout: sorted instead of tree, because model.attention={attention} takes no mask"
    reason = check_tree_support(config)
    if reason is None:
        return "tree", None
    return "sorted", f"learner.layout: sorted instead of tree, because model type {config.model_type} has {reason}"


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """The rope types of one parameter set, or of one set per layer type."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(part.get("rope_type", "default")) for part in (nested or [parameters])}

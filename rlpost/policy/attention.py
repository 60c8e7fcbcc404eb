"""Attention for rows: the mask that keeps branches of a tree apart, and which models may use trees at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlpost.experience import TokenRows
from rlpost.policy.rows import Layout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedConfig, PreTrainedModel

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
_FLEX_SMALLEST_HEAD = 16  # torch's kernel refuses smaller ones
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # frequencies change with the longest position of a micro-batch


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


def check_tree_support(config: PreTrainedConfig, longest: int | None = None) -> str | None:
    """Why a model with this Hugging Face configuration cannot use tree rows, or None if it can.

    `longest` is how many tokens a prompt with its completion may have at the most. A sliding window of at least as many
    never hides anything: positions restart in every branch, and transformers takes a ready 4-D mask as it is. None: not
    known, so that no window is taken.
    """
    if config.model_type not in TREE_MODEL_TYPES:
        return "attention or positions that are not known to be plain causal attention over rotary positions"
    kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    fits = window is not None and longest is not None and window >= longest
    if others := kinds - {"full_attention"} - ({"sliding_attention"} if fits else set()):
        return "layers of type " + ", ".join(sorted(others)) + ("" if window is None else f" (sliding_window={window})")
    if not kinds and window is not None and not fits:
        return f"sliding_window={window}" + ("" if longest is None else f", where a sequence may have {longest} tokens")
    if getattr(config, "use_bidirectional_attention", False):
        return "bidirectional attention"
    rope = _rope_types(getattr(config, "rope_parameters", None) or {})
    if bad := sorted(rope.intersection(_LENGTH_DEPENDENT_ROPE)):
        return f"rotary frequencies that depend on length (rope_type {', '.join(bad)})"
    return None


def choose_attention(
    wanted: str, config: PreTrainedConfig, *, device: torch.device | str, layout: Layout, longest: int | None = None
) -> tuple[str, str | None]:
    """The attention kernel for a model that runs on `device` with rows of this layout, and a line for the user where the
    recipe does not say it by itself. `wanted` is `model.attention`; `longest` as in `check_tree_support`.

    Of "auto" comes "flex_attention" or "sdpa". Models that cap attention scores, which sdpa cannot, get "eager" for sdpa.
    """
    note, place = None, torch.device(device)
    if wanted == "auto" and place.type == "cpu":
        wanted = "sdpa"  # as ever, so nothing to say
    elif wanted == "auto":
        obstacle = _why_not_flex(config, place, layout, longest)
        wanted = "sdpa" if obstacle else "flex_attention"
        note = f"model.attention: {wanted}, because {obstacle or 'rows are trees and the device is a GPU'}"
    if wanted == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        return "eager", f"model.attention: eager instead of sdpa, which cannot cap scores as {config.model_type} does"
    return wanted, note


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


def choose_layout(
    config: PreTrainedConfig, wanted: Layout, attention: str = "sdpa", longest: int | None = None
) -> tuple[Layout, str | None]:
    """The layout to use, and a line saying why where it is not the wanted one. `longest` as in `check_tree_support`."""
    if wanted != "tree":
        return wanted, None
    if attention not in TREE_ATTENTION:
        return "sorted", f"learner.layout: sorted instead of tree, because model.attention={attention} takes no mask"
    reason = check_tree_support(config, longest)
    if reason is None:
        return "tree", None
    return "sorted", f"learner.layout: sorted instead of tree, because model type {config.model_type} has {reason}"


def _why_not_flex(config: PreTrainedConfig, device: torch.device, layout: Layout, longest: int | None) -> str | None:
    """What stands against FlexAttention, or None."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if device.type != "cuda":
        return f"FlexAttention cannot train on {device.type}"
    if choose_layout(config, layout, longest=longest)[0] != "tree":
        return "rows are no trees"  # causal rows have faster kernels
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not getattr(architecture, "_supports_flex_attn", False):
        return f"model type {config.model_type} does not take FlexAttention"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"FlexAttention does not take heads of {head} numbers" if head < _FLEX_SMALLEST_HEAD else None


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """The rope types of one parameter set, or of one set per layer type."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(part.get("rope_type", "default")) for part in (nested or [parameters])}

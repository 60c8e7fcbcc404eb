"""Ulysses sequence parallelism (Jacobs et al. 2023, arXiv 2309.14509) through DeepSpeed: processes share long rows.

Every process of a group holds a slice of the positions of each row, and in attention all positions of a share of the
heads. So a row's activations are spread over the group, while data, buffers and methods stay those of its owner: the
hidden states that predict its completion tokens are brought together on the process that the row belongs to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from rlpost.errors import RecipeError
from rlpost.experience import TokenRows
from rlpost.policy.family import check_tree_support
from rlpost.policy.rows import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

T = TypeVar("T")
States = Callable[[TokenRows, slice], Tensor]  # rows and which of their columns -> hidden states [R, columns, d]

# Attention modules whose calls are shared out. By identity, since copies of a model are not part of the group.
_shared: weakref.WeakKeyDictionary[nn.Module, SequenceParallel] = weakref.WeakKeyDictionary()


class SequenceParallel:
    """This process's place among the `size` neighbours that share rows. Making one is collective; DeepSpeed's communication has
    been initialised before."""

    def __init__(self, size: int, *, rank: int, world: int) -> None:
        self.size = size
        self.rank = rank % size
        self.first = rank - self.rank  # the group's first process
        groups = [dist.new_group(range(start, start + size)) for start in range(0, world, size)]
        self.group: Any = groups[rank // size]
        self._attention: dict[tuple[int, ...], nn.Module] = {}
        self._objects: Any = self.group
        if dist.get_backend() != "gloo":  # rows travel as Python objects from host to host
            self._objects = [dist.new_group(range(s, s + size), backend="gloo") for s in range(0, world, size)][
                rank // size
            ]

    def attach(self, causal_lm: PreTrainedModel) -> None:
        """Has the attention of `causal_lm` share its heads in the group, from now on and for good."""
        for module in causal_lm.modules():
            _shared[module] = self
        _share_attention(str(causal_lm.config._attn_implementation))

    def attention(self, core: Any, query: Tensor, key: Tensor) -> nn.Module:
        """DeepSpeed's Ulysses around the attention function `core`, for queries and keys [R, heads, columns, head size]."""
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        shape = (query.shape[0], query.shape[1], key.shape[1], query.shape[3])
        if shape not in self._attention:  # which is made for one number of rows
            self._attention[shape] = UlyssesSPAttentionHF(
                attn=core,
                batch_size=shape[0],
                attn_head_count=shape[1],
                kv_head_count=shape[2],
                attn_head_size=shape[3],
                num_hidden_layers=1,  # only its debugging asks
                process_group=self.group,
                seq_length_is_variable=True,
            )
        return self._attention[shape]

    def picked(self, rows: TokenRows, states: States) -> Tensor:
        """[N, d] the hidden states that predict the tokens of `rows`, which are this process's own; collective.

        `states` runs the model on a slice of columns. Rows without useful tokens stand for a pass of another process:
        while gradients are kept, only one process of the group may have any, or activations would not be spread.
        """
        everyone = self._exchange(rows)
        owners = [owner for owner, shared in enumerate(everyone) if shared.useful_tokens] or [0]
        if len(owners) > 1 and torch.is_grad_enabled():
            raise RuntimeError("processes that share rows must take turns while gradients are kept; use Policy.passes")
        parts = {owner: self._pass(everyone[owner], owner, states) for owner in owners}
        if self.rank in parts:
            return parts[self.rank]
        # Nothing came of it here, but the backward pass has to take the same turns as the owner's.
        own = next(iter(parts.values()))
        return own.new_zeros(rows.target.shape[0], own.shape[1]) + own.sum()

    def _pass(self, rows: TokenRows, owner: int, states: States) -> Tensor:
        """[N, d] on the process that the rows belong to, [0, d] on the others."""
        rows = padded(rows, self.size)
        width = rows.input_ids.shape[1] // self.size
        hidden = states(rows, slice(self.rank * width, (self.rank + 1) * width))
        here = (rows.predict_col // width == self.rank).nonzero().squeeze(-1)
        place = rows.predict_row[here] * width + rows.predict_col[here] - self.rank * width
        rows_here = functional.embedding(place.to(hidden.device), hidden.flatten(0, 1))
        return _ToOwner.apply(rows_here, here.to(hidden.device), rows.target.shape[0], owner, self)

    def _exchange(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._objects)
        return values


def padded(rows: TokenRows, size: int) -> TokenRows:
    """The rows on the CPU, with padding until their width is a multiple of `size`."""
    rows = to_device(rows, "cpu")
    count, width = rows.input_ids.shape
    more = -width % size
    if more == 0:
        return rows
    after = rows.position_ids[:, -1:] + torch.arange(1, more + 1)
    nothing = torch.full((count, more), -1, dtype=torch.int64)
    return replace(
        rows,
        input_ids=torch.cat([rows.input_ids, torch.zeros_like(nothing)], 1),
        position_ids=torch.cat([rows.position_ids, after], 1),
        tree=torch.cat([rows.tree, nothing], 1),
        branch=torch.cat([rows.branch, nothing], 1),
    )


def why_not(config: PreTrainedConfig, size: int) -> str | None:
    """Why rows of a model with this Hugging Face configuration cannot be shared by `size` processes; None: they can."""
    if reason := check_tree_support(config):
        return f"it has {reason}"
    text = config.get_text_config()
    heads, kv = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if heads % size or (kv % size and size % kv):
        return f"its {heads} attention heads ({kv} of keys and values) cannot be shared evenly by {size} processes"
    return None


def refuse_unshareable(config: PreTrainedConfig, size: int) -> None:
    """Raises RecipeError naming `learner.sequence_parallel` where rows of such a model cannot be shared by `size` processes."""
    if size > 1 and (reason := why_not(config, size)):
        raise RecipeError(
            f"learner.sequence_parallel={size} does not go with model type {config.model_type}: {reason}; set it to 1"
        )


class _ToOwner(torch.autograd.Function):
    """Brings the hidden states of a row's tokens together on the process that the row belongs to, and gradients back."""

    @staticmethod
    def forward(ctx: Any, picked: Tensor, here: Tensor, count: int, owner: int, group: SequenceParallel) -> Tensor:
        ctx.here, ctx.count, ctx.owner, ctx.group = here, count, owner, group
        whole = picked.new_zeros(count, picked.shape[1])
        whole[here] = picked
        dist.all_reduce(whole, group=group.group)  # every token is one process's: a sum with zeros is exact
        return whole if owner == group.rank else whole[:0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group, grad = ctx.group, grads[0]
        whole = grad.contiguous() if ctx.owner == group.rank else grad.new_empty(ctx.count, grad.shape[1])
        dist.broadcast(whole, src=group.first + ctx.owner, group=group.group)
        return whole[ctx.here], None, None, None, None


def _share_attention(implementation: str) -> None:
    """Puts Ulysses in front of transformers' attention function of this name, for the modules in `_shared` alone.

    Under the function's own name, as DeepSpeed does it, so that all that transformers decides by that name stays true.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    core = ALL_ATTENTION_FUNCTIONS[implementation]
    if getattr(core, "shares_heads", False):
        return

    def shared(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        parallel = _shared.get(module)
        if parallel is None:
            return core(module, query, key, value, attention_mask, *args, **more)
        return parallel.attention(core, query, key)(module, query, key, value, attention_mask, *args, **more)

    shared.shares_heads = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS[implementation] = shared


def take_turns(
    own: Sequence[TokenRows], most: int, parallel: SequenceParallel | None, spare: TokenRows
) -> list[TokenRows]:
    """`most` passes of `own` rows and spare ones; of a group that shares rows, one process after the other has its pass."""
    filled = [*own, *[spare] * (most - len(own))]
    if parallel is None:
        return filled
    return [rows if turn == parallel.rank else spare for rows in filled for turn in range(parallel.size)]

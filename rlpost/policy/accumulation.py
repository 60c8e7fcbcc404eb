"""Gradients of the vocabulary's matrices, added to what earlier micro-batches left without a copy of their size.

Autograd hands every layer's gradient over as a tensor of its own, and for an embedding that is as large as the vocabulary's
matrix, whatever few of its rows were read; where the output layer shares the matrix, its part is held through the whole
backward pass until the embedding's is there. Both layers can add to `weight.grad` themselves instead. (Megatron-LM calls
this gradient accumulation fusion.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_MARK = "_accumulates_in_place"


def accumulate_in_place(parameters: Iterable[nn.Parameter]) -> None:
    """Allows backward passes to add to `.grad` of these parameters themselves, once there is one.

    For a learner that only ever reads `.grad` after `loss.backward()`. Not where hooks wait for autograd to hand the
    gradient over (ZeRO, DDP), and not beside `torch.autograd.grad`.
    """
    for parameter in parameters:
        setattr(parameter, _MARK, True)


def gradient_in_place(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`weight.grad` where a backward pass may add gradients in `dtype` to it itself, else None."""
    grad = weight.grad if getattr(weight, _MARK, False) else None
    return grad if grad is not None and grad.dtype == dtype else None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int) -> Tensor:
        ctx.weight, ctx.padding = weight, padding  # not saved: nothing of its values is needed
        ctx.save_for_backward(ids)
        return torch.embedding(weight.detach(), ids, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), weight, padding = ctx.saved_tensors, ctx.weight, ctx.padding
        grad = grads[0]
        total = gradient_in_place(weight, grad.dtype)
        if total is None:
            dense = torch.ops.aten.embedding_dense_backward(grad, ids, weight.shape[0], padding, False)
            return dense, None, None
        rows, places = grad.reshape(-1, grad.shape[-1]), ids.reshape(-1)
        if padding >= 0:
            rows = rows.masked_fill((places == padding)[:, None], 0.0)
        total.index_add_(0, places, rows)
        return None, None, None


class AccumulatingEmbedding(nn.Embedding):
    """An embedding that adds the gradient of the rows it read to `weight.grad`; see `accumulate_in_place`.

    Only on a CPU, where adding row after row has an order; a GPU's would change from run to run.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or not getattr(self.weight, _MARK, False):
            return super().forward(input)
        return _Lookup.apply(self.weight, input, -1 if self.padding_idx is None else self.padding_idx)


def accumulating_embedding(model: nn.Module) -> None:
    """Makes every plain embedding of `model` an `AccumulatingEmbedding`, in place."""
    for module in model.modules():
        if type(module) is nn.Embedding and not (module.sparse or module.scale_grad_by_freq or module.max_norm):
            module.__class__ = AccumulatingEmbedding

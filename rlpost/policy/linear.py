"""Linear layers whose weights are cast for autocast again in backward instead of being kept in both precisions."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _LastCast(NamedTuple):
    """The latest input that was cast, and its cast; neither is kept alive by this."""

    x: weakref.ref[Tensor]
    version: int
    cast: weakref.ref[Tensor]


_last: _LastCast | None = None


def _shared_cast(x: Tensor, product: torch.dtype) -> Tensor:
    """x in the precision `product`: the same tensor for layers that share their input one after the other (q, k and v; gate
    and up), where autocast would make and keep one each."""
    global _last
    if x.dtype == product or not x.requires_grad:
        return x.detach().to(product)  # in a pass without gradients no cast lives until it is asked for again
    last = _last
    if last is not None and last.version == x._version and last.x() is x:
        cast = last.cast()
        if cast is not None and cast.dtype == product:
            return cast
    cast = x.detach().to(product)
    _last = _LastCast(weakref.ref(x), x._version, weakref.ref(cast))
    return cast


class _RecastLinear(torch.autograd.Function):
    """y = x W' + b in autocast's precision; backward casts W again.

    The weight is kept as the parameter itself, not through `save_for_backward`: ZeRO-3 empties it after the module's
    forward and fills it again before the module's backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: torch.dtype) -> Tensor:
        cast = _shared_cast(x, product)
        ctx.weight, ctx.product, ctx.dtypes = weight, product, (x.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(cast if weight.requires_grad else None)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(cast, weight.detach().to(product), None if bias is None else bias.to(product))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight, (of_x, of_bias) = grads[0], ctx.weight, ctx.dtypes
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        x_grad = weight_grad = bias_grad = None
        with torch.autocast(grad.device.type, enabled=False):
            # First: with activation checkpointing the saved input may come from running the layers again, after which ZeRO-3
            # has emptied the weight.
            if to_x:
                x_grad = (grad @ weight.detach().to(ctx.product)).to(of_x)
            flat = grad.reshape(-1, grad.shape[-1])
            if to_weight:
                (x,) = ctx.saved_tensors
                weight_grad = (flat.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
            if to_bias:
                bias_grad = flat.sum(0).to(of_bias)
        return x_grad, weight_grad, bias_grad, None


class RecastLinear(nn.Linear):
    """A linear layer that, under autocast, does not keep its weight's cast for the backward pass.

    Autocast keeps all casts of a pass, half of the float32 weights' own size, and holds them when memory is at its peak.
    Casting them again costs far less than the products. Same values and gradients as `nn.Linear` under autocast, of weights
    that stay as they are until backward.
    """

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(input)
        product = torch.get_autocast_dtype(device)
        if self.weight.dtype in (product, torch.float64) or input.dtype == torch.float64:  # no cast, as autocast has it
            return super().forward(input)
        return _RecastLinear.apply(input, self.weight, self.bias, product)


def recast_linear(model: nn.Module) -> None:
    """Makes every plain linear layer of `model` a `RecastLinear`, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RecastLinear  # in place: weights stay tied, and copies of the model keep working

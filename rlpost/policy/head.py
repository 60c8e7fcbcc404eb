"""Log-probs and entropies of chosen tokens, computed from hidden states in chunks: memory is chunk x vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlpost.gradient.types import HeadStatistics


@dataclass(frozen=True, slots=True)
class LogitRule:
    """How a model's raw head output f becomes the scores z of the sampled distribution softmax(z).

    z = cap(f * scale) / temperature, where cap(x) = softcap * tanh(x / softcap), or x without a softcap (Gemma 2).
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    def scores(self, raw: Tensor) -> Tensor:
        """z [c, V] from f [c, V], in place."""
        raw.mul_(self.scale if self.softcap is None else self.scale / self.softcap)
        if self.softcap is not None:
            raw.tanh_().mul_(self.softcap)
        return raw.div_(self.temperature)

    def slope(self, scores: Tensor) -> Tensor | float:
        """dz / df, elementwise [c, V], from z; a plain number without a softcap."""
        if self.softcap is None:
            return self.scale / self.temperature
        squashed = scores * (self.temperature / self.softcap)
        return squashed.square_().neg_().add_(1.0).mul_(self.scale / self.temperature)


def chunked_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(logp [N], entropy [N]) in nats of softmax(z), z as in `LogitRule`; gradients flow through both.

    hidden [N, d], weight [V, d], bias [V] or None, target [N] int64. Products run in autocast's precision where that is
    on, everything after them in float32 (float64 for float64 inputs). Forward and backward hold a few [chunk, V] and
    [V, d] tensors, whatever N is: backward computes the scores again. With p = softmax(z) and H the entropy,

        d logp_t / dz_j = [j = t] - p_j        dH / dz_j = -p_j (log p_j + H)
    """
    rule = LogitRule(temperature, logit_scale, softcap)
    return _ChunkedHead.apply(hidden, weight, bias, target, rule, chunk)


@torch.no_grad()
def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    k: int | None,
    chunk: int = 1024,
    *,
    bias: Tensor | None = None,
    rule: LogitRule | None = None,
) -> HeadStatistics:
    """Sums of p^2 and p^3 over the vocabulary, and the k largest scores z with the sampled token always among them.

    Shapes as in `chunked_head`; k is cut to the vocabulary's size, and None leaves the scores out.
    """
    rule = rule or LogitRule()
    n = target.shape[0]
    kept = None if k is None else min(k, weight.shape[0])
    sum_p2, sum_p3 = hidden.new_empty(n, dtype=torch.float32), hidden.new_empty(n, dtype=torch.float32)
    ids = None if kept is None else target.new_empty(n, kept)
    top = None if kept is None else hidden.new_empty(n, kept, dtype=torch.float32)
    for part, scores in _score_chunks(hidden, weight, bias, rule, chunk, _product_dtype(hidden, weight)):
        if ids is not None and top is not None and kept is not None:
            ids[part], top[part] = _top_with_target(scores, target[part], kept)
        p = scores.sub_(scores.logsumexp(-1, keepdim=True)).exp_()
        squares = p.square()
        sum_p2[part] = squares.sum(-1)
        sum_p3[part] = squares.mul_(p).sum(-1)
    return HeadStatistics(sum_p2, sum_p3, hidden.detach().float(), ids, top)


def _top_with_target(scores: Tensor, target: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids [c, k], scores [c, k]): the largest first; the target takes the last place if it is not among them."""
    top, ids = scores.topk(k, dim=-1)
    absent = ~(ids == target[:, None]).any(-1)
    ids[:, -1] = torch.where(absent, target, ids[:, -1])
    own = scores.gather(-1, target[:, None]).squeeze(-1)
    top[:, -1] = torch.where(absent, own, top[:, -1])
    return ids, top


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The precision of matrix products: autocast's, or that of the operands."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _score_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: LogitRule, chunk: int, product: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (which tokens, z [c, V] in float32 or wider) chunk after chunk; the caller may overwrite z."""
    exact = torch.promote_types(product, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        columns = weight.detach().to(product).t()
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            raw = (hidden[part].detach().to(product) @ columns).to(exact)
            if bias is not None:
                raw.add_(bias.detach().to(exact))
            yield part, rule.scores(raw)
            del raw  # before the next chunk's is made


class _ChunkedHead(torch.autograd.Function):
    """See `chunked_head`.

    The weight is kept as the parameter itself, not through `save_for_backward`: ZeRO-3 empties it after the module's
    forward and fills it again before the module's backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rule: LogitRule, chunk: int
    ) -> tuple[Tensor, Tensor]:
        product = _product_dtype(hidden, weight)
        exact = torch.promote_types(product, torch.float32)
        normalizer = hidden.new_empty(hidden.shape[0], dtype=exact)
        logp, entropy = torch.empty_like(normalizer), torch.empty_like(normalizer)
        for part, scores in _score_chunks(hidden, weight, bias, rule, chunk, product):
            normalizer[part] = scores.logsumexp(-1)
            logq = scores.sub_(normalizer[part, None])
            logp[part] = logq.gather(-1, target[part, None]).squeeze(-1)
            entropy[part] = -logq.exp().mul_(logq).sum(-1)
        ctx.save_for_backward(hidden, target, normalizer, entropy)
        ctx.weight, ctx.bias, ctx.rule, ctx.chunk, ctx.product = weight, bias, rule, chunk, product
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, target, normalizer, entropy = ctx.saved_tensors
        weight, bias, product = ctx.weight, ctx.bias, ctx.product
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if to_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=normalizer.dtype, device=hidden.device) if to_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=normalizer.dtype, device=hidden.device) if to_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            columns = weight.detach().to(product)
            for part, scores in _score_chunks(hidden, weight, bias, ctx.rule, ctx.chunk, product):
                slope = ctx.rule.slope(scores)
                logq = scores.sub_(normalizer[part, None])
                by_logp, by_entropy = grads[0][part, None], grads[1][part, None]
                p = logq.exp()
                step = logq.add_(entropy[part, None]).mul_(by_entropy).add_(by_logp).mul_(p).neg_()
                step.scatter_add_(-1, target[part, None], by_logp.to(step.dtype)).mul_(slope)
                del p
                if grad_bias is not None:
                    grad_bias += step.sum(0)
                raw = step.to(product)
                if grad_hidden is not None:
                    grad_hidden[part] = (raw @ columns).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += raw.t() @ hidden[part].to(product)
        bias_out = grad_bias.to(bias.dtype) if grad_bias is not None else None
        weight_out = grad_weight.to(weight.dtype) if grad_weight is not None else None
        return grad_hidden, weight_out, bias_out, None, None, None


@dataclass(frozen=True, slots=True)
class HeadRequest:
    """What a `ScoringLinear` computes instead of logits. `statistics_k` is used only with `statistics`."""

    target: Tensor  # [N] int64
    rule: LogitRule
    chunk: int
    statistics: bool = False
    statistics_k: int | None = None


class ScoringLinear(nn.Linear):
    """A model's output layer that can also score given tokens.

    The scoring runs inside this module's forward, so whatever hooks gather its weight (ZeRO-3, FSDP) do so once a pass.
    It returns a plain tuple of tensors, since such hooks do not look into other objects.
    """

    def forward(self, input: Tensor, request: HeadRequest | None = None) -> Any:
        if request is None:
            return super().forward(input)
        rule = request.rule
        scored = chunked_head(
            input,
            self.weight,
            self.bias,
            request.target,
            temperature=rule.temperature,
            chunk=request.chunk,
            softcap=rule.softcap,
            logit_scale=rule.scale,
        )
        if not request.statistics:
            return scored
        more = head_statistics(
            input, self.weight, request.target, request.statistics_k, request.chunk, bias=self.bias, rule=rule
        )
        tensors = (more.sum_p2, more.sum_p3, more.hidden, more.top_ids, more.top_logits)
        return *scored, *(tensor for tensor in tensors if tensor is not None)

"""Log-probs and entropies of chosen tokens, computed from hidden states in chunks: memory is chunk x vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlpost.gradient.types import HeadStatistics, StatisticsRequest
from rlpost.policy.accumulation import gradient_in_place
from rlpost.policy.fused import fused, fused_grad_logits, fused_log_probs, fuses


@dataclass(frozen=True, slots=True)
class LogitRule:
    """How a model's raw head output f becomes the logits z of the sampled distribution softmax(z).

    z = cap(f * scale) / temperature, where cap(x) = softcap * tanh(x / softcap), or x without a softcap (Gemma 2).
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, raw: Tensor) -> Tensor:
        """z [c, V] from f [c, V], in place."""
        raw.mul_(self.scale if self.softcap is None else self.scale / self.softcap)
        if self.softcap is not None:
            raw.tanh_().mul_(self.softcap)
        return raw.div_(self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """dz / df, elementwise [c, V], from z; a plain number without a softcap."""
        if self.softcap is None:
            return self.scale / self.temperature
        squashed = logits * (self.temperature / self.softcap)
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
    [V, d] tensors, whatever N is. Backward computes the logits again, except those of the last chunk, which forward keeps.
    With p = softmax(z) and H the entropy,

        d logp_t / dz_j = [j = t] - p_j        dH / dz_j = -p_j (log p_j + H)
    """
    rule = LogitRule(temperature, logit_scale, softcap)
    return _ChunkedHead.apply(hidden, weight, bias, target, rule, chunk, None)


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
    """Sums of p^2 and p^3 over the vocabulary, and the k largest logits z with the sampled token always among them.

    Shapes as in `chunked_head`; k is cut to the vocabulary's size, and None leaves the logits out.
    """
    rule, request = rule or LogitRule(), StatisticsRequest(k)
    collected = _Collected(hidden, target, request, weight.shape[0])
    for whole, raw in _raw_chunks(hidden, weight, chunk, _product_dtype(hidden, weight)):
        for part, logits in _logit_blocks(whole, raw, bias, rule):
            collected.take_logits(part, logits)
            collected.take_probabilities(part, _log_probs_in_place(logits, target[part])[3])
    return as_statistics(collected.tensors(), request)


def as_statistics(tensors: Sequence[Tensor], request: StatisticsRequest) -> HeadStatistics:
    """Names what a `ScoringLinear` returned, after logp and entropy, to a `HeadRequest` with these statistics."""
    rest = iter(tensors)
    return HeadStatistics(
        hidden=next(rest),
        sum_p2=next(rest) if request.powers else None,
        sum_p3=next(rest) if request.powers else None,
        top_ids=None if request.k is None else next(rest),
        top_logits=None if request.k is None else next(rest),
    )


class _Collected:
    """The tensors of `HeadStatistics`, filled chunk after chunk."""

    def __init__(self, hidden: Tensor, target: Tensor, request: StatisticsRequest, vocabulary: int) -> None:
        n = target.shape[0]
        self.hidden, self.target = hidden.detach().float(), target
        self.k = None if request.k is None else min(request.k, vocabulary)
        self.powers = [hidden.new_empty(n, dtype=torch.float32) for _ in range(2)] if request.powers else []
        self.ids = None if self.k is None else target.new_empty(n, self.k)
        self.top = None if self.k is None else hidden.new_empty(n, self.k, dtype=torch.float32)

    def take_logits(self, part: slice, logits: Tensor) -> Tensor | None:
        """z [c, V] of the tokens `part`; left as it is. Returns the largest z [c, 1] of each where it came to light."""
        if self.ids is None or self.top is None or self.k is None:
            return None
        self.ids[part], self.top[part], largest = _top_with_target(logits, self.target[part], self.k)
        return largest

    def take_probabilities(self, part: slice, p: Tensor) -> None:
        """softmax(z) [c, V] of the tokens `part`; left as it is."""
        if self.powers:
            squares = p.square()
            self.powers[0][part] = squares.sum(-1)
            self.powers[1][part] = squares.mul_(p).sum(-1)

    def tensors(self) -> list[Tensor]:
        """In the order of `HeadStatistics`, without those that were not asked for."""
        everything = (self.hidden, *self.powers, self.ids, self.top)
        return [tensor for tensor in everything if tensor is not None]


def _top_with_target(logits: Tensor, target: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [c, k], logits [c, k], largest logit [c, 1]): the largest first; the target takes the last place if it is not
    among them."""
    top, ids = _largest(logits, k)
    largest = top[:, :1].clone()
    absent = ~(ids == target[:, None]).any(-1)
    ids[:, -1] = torch.where(absent, target, ids[:, -1])
    own = logits.gather(-1, target[:, None]).squeeze(-1)
    top[:, -1] = torch.where(absent, own, top[:, -1])
    return ids, top, largest


def _largest(logits: Tensor, k: int, fold: int = 8) -> tuple[Tensor, Tensor]:
    """(values [c, k], ids [c, k]) as `topk`, largest first. Folds the columns into V / 8 sets and searches only the k sets
    with the largest maxima (and what filled no set), found in the same way: most logits are then read once."""
    width = logits.shape[1] // fold
    if width < 4 * k:
        return logits.topk(k, dim=-1)
    maxima = logits[:, : fold * width].unflatten(-1, (fold, width)).amax(-2)  # across rows: those are vector operations
    sets = _largest(maxima, k, fold)[1]
    ids = (sets[:, None] + torch.arange(0, fold * width, width, device=logits.device)[:, None]).flatten(1)
    rest = torch.arange(fold * width, logits.shape[1], device=logits.device)
    ids = torch.cat([ids, rest.expand(logits.shape[0], -1)], 1)
    top, place = logits.gather(-1, ids).topk(k, dim=-1)
    return top, ids.gather(-1, place)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The precision of matrix products: autocast's, or that of the operands."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _raw_chunks(
    hidden: Tensor,
    weight: Tensor,
    chunk: int,
    product: torch.dtype,
    cast: Tensor | None = None,
    *,
    last_first: bool = False,
    last: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (which tokens, hidden times the weight [c, V] in the precision `product`) chunk after chunk; the caller may
    overwrite the products.

    `cast` is the weight in that precision, and `last` the last chunk's products, where the caller has them.
    """
    starts = range(0, hidden.shape[0], chunk)
    with torch.autocast(hidden.device.type, enabled=False):
        columns = (weight.detach().to(product) if cast is None else cast).t()
        for start in reversed(starts) if last_first else starts:
            part = slice(start, start + chunk)
            if last is not None:
                yield part, last
                last = None
                continue
            raw = hidden[part].detach().to(product) @ columns
            yield part, raw
            del raw  # before the next chunk's is made


def _cast_to_keep(weight: Tensor, product: torch.dtype) -> Tensor | None:
    """The weight in the precision of products, kept for the backward pass, which begins here and needs it chunk after chunk;
    None where there is nothing to cast. None under ZeRO-3 too, which frees the gathered weight in between."""
    if product == weight.dtype or hasattr(weight, "ds_id"):
        return None
    return weight.detach().to(product)


def _logit_blocks(
    part: slice, raw: Tensor, bias: Tensor | None, rule: LogitRule, *, keep: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (which tokens, z [b, V] in float32 or wider) of a chunk's raw products [c, V] of the tokens `part`, a few rows
    after the other; the caller may overwrite z. Overwrites the products themselves unless they are to be kept.

    On a CPU a few rows stay in the cache from one operation to the next, and what is made of them is small enough that
    memory is not asked of the system each time. Fused kernels take all at once: nothing of a chunk's size lies between them.
    """
    exact = torch.promote_types(raw.dtype, torch.float32)
    step = max(1, raw.shape[0]) if fuses(raw.device) else 8 if raw.device.type == "cpu" else 256
    for start in range(0, raw.shape[0], step):
        logits = raw[start : start + step].to(exact, copy=keep)
        if bias is not None:
            logits.add_(bias.detach().to(exact))
        yield slice(part.start + start, part.start + start + logits.shape[0]), rule.logits(logits)
        del logits


def _log_probs_in_place(
    logits: Tensor, target: Tensor, largest: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log of the normaliser [c], logp of `target` [c], entropy [c], probabilities [c, V]) of z [c, V], which is overwritten.
    `largest`: max z [c, 1] where it is known.

    With x = z - max z and Z = sum exp x: logp_t = x_t - log Z, H = log Z - E[x]; both terms are small where H is."""
    top = logits.amax(-1, keepdim=True) if largest is None else largest
    centred = logits.sub_(top)
    p = centred.exp()
    total = p.sum(-1, keepdim=True)
    p.div_(total)
    log_total = total.log_()
    logp = centred.gather(-1, target[:, None]).sub_(log_total)
    entropy = log_total.squeeze(-1) - centred.mul_(p).sum(-1)
    return top.add_(log_total).squeeze(-1), logp.squeeze(-1), entropy, p


def _grad_logits(logq: Tensor, target: Tensor, entropy: Tensor, by_logp: Tensor, by_entropy: Tensor | None) -> Tensor:
    """The gradient of the loss with respect to z [c, V]. `logq` [c, V] is log softmax(z) and is overwritten, `entropy` [c] is
    H; `by_logp` and `by_entropy` [c, 1] are the loss's gradients with respect to logp and H."""
    by_logp = by_logp.to(logq.dtype)
    if by_entropy is None:
        step = logq.exp_().mul_(-by_logp)
    else:
        p = logq.exp()
        step = logq.add_(entropy[:, None]).mul_(by_entropy).add_(by_logp).mul_(p).neg_()
    return step.scatter_add_(-1, target[:, None], by_logp)


def _log_probs(
    logits: Tensor, target: Tensor, *, with_p: bool, largest: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `_log_probs_in_place`; z [c, V] may be overwritten."""
    if fuses(logits.device):
        return fused(fused_log_probs)(logits, target, with_p)
    return _log_probs_in_place(logits, target, largest)


def _grad_raw(
    logits: Tensor,
    target: Tensor,
    normalizer: Tensor,
    entropy: Tensor,
    by_logp: Tensor,
    by_entropy: Tensor | None,
    rule: LogitRule,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the loss with respect to the head's raw output f [c, V], in `dtype` where fused. `logits` [c, V] is z and
    is overwritten; `normalizer`, `entropy`, `by_logp` and `by_entropy` are [c]."""
    slope = rule.slope(logits)
    if not fuses(logits.device):
        logq = logits.sub_(normalizer[:, None])
        rest = None if by_entropy is None else by_entropy[:, None]
        return _grad_logits(logq, target, entropy, by_logp[:, None], rest).mul_(slope)
    by_entropy = torch.zeros_like(by_logp) if by_entropy is None else by_entropy
    if isinstance(slope, Tensor):
        exact = fused(fused_grad_logits)(logits, normalizer, target, entropy, by_logp, by_entropy, logits.dtype)
        return exact.mul_(slope)
    scaled = (by_logp * slope, by_entropy * slope)  # linear in both: no pass of its own
    return fused(fused_grad_logits)(logits, normalizer, target, entropy, *scaled, dtype)


def _add_weight_gradient(total: Tensor | None, raw: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """`total` [V, d] and raw [c, V] transposed times hidden [c, d], in `dtype`. By parts of the vocabulary: the product as a
    whole is as large as the weight, which comes at a pass's peak of memory."""
    vocabulary, first = raw.shape[1], total is None
    if total is None:
        total = torch.empty(vocabulary, hidden.shape[1], dtype=dtype, device=raw.device)
    for start in range(0, vocabulary, 8192):
        part = slice(start, start + 8192)
        share = raw[:, part].t() @ hidden
        if first:
            total[part] = share
        else:
            total[part].add_(share)
    return total


class _ChunkedHead(torch.autograd.Function):
    """See `chunked_head`.

    The weight is kept as the parameter itself, not through `save_for_backward`: ZeRO-3 empties it after the module's
    forward and fills it again before the module's backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rule: LogitRule,
        chunk: int,
        collected: _Collected | None,
    ) -> tuple[Tensor, ...]:
        product = _product_dtype(hidden, weight)
        exact = torch.promote_types(product, torch.float32)
        normalizer = hidden.new_empty(hidden.shape[0], dtype=exact)
        logp, entropy = torch.empty_like(normalizer), torch.empty_like(normalizer)
        cast = _cast_to_keep(weight, product)
        last = None
        for whole, raw in _raw_chunks(hidden, weight, chunk, product, cast):
            # Backward begins with the last chunk, when all activations still live: it would hold these products anyway.
            if whole.stop >= hidden.shape[0] and any(ctx.needs_input_grad[:3]):
                last = raw
            for part, block in _logit_blocks(whole, raw, bias, rule, keep=last is not None):
                largest = None if collected is None else collected.take_logits(part, block)
                with_p = collected is not None and bool(collected.powers)
                scored = _log_probs(block, target[part], with_p=with_p, largest=largest)
                normalizer[part], logp[part], entropy[part], p = scored
                if collected is not None and p is not None:
                    collected.take_probabilities(part, p)
                del p, scored, block
            del raw  # before the next chunk's is made
        ctx.save_for_backward(hidden, target, normalizer, entropy)
        ctx.weight, ctx.bias, ctx.rule, ctx.chunk, ctx.product, ctx.cast = weight, bias, rule, chunk, product, cast
        ctx.last = last
        more = [] if collected is None else collected.tensors()
        ctx.mark_non_differentiable(*more)
        return logp, entropy, *more

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, target, normalizer, entropy = ctx.saved_tensors
        weight, bias, product = ctx.weight, ctx.bias, ctx.product
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if to_hidden else None
        grad_bias = torch.zeros(weight.shape[0], dtype=normalizer.dtype, device=hidden.device) if to_bias else None
        in_place = gradient_in_place(weight, normalizer.dtype) if to_weight else None
        grad_weight = in_place  # None: filled with the first chunk's, without zeros to add the others to
        # Asking makes a GPU wait, which costs more there than the terms that it saves.
        without_entropy = hidden.device.type == "cpu" and not bool(grads[1].any())
        with torch.autocast(hidden.device.type, enabled=False):
            columns = weight.detach().to(product) if ctx.cast is None else ctx.cast
            chunks = _raw_chunks(hidden, weight, ctx.chunk, product, columns, last_first=True, last=ctx.last)
            ctx.last = None  # will be overwritten: another backward pass computes it again
            for whole, raw in chunks:  # each block of products makes room for its gradient
                for part, logits in _logit_blocks(whole, raw, bias, ctx.rule):
                    by_entropy = None if without_entropy else grads[1][part]
                    dtype = product if grad_bias is None else normalizer.dtype
                    known = (target[part], normalizer[part], entropy[part])
                    step = _grad_raw(logits, *known, grads[0][part], by_entropy, ctx.rule, dtype)
                    if grad_bias is not None:
                        grad_bias += step.sum(0)
                    raw[part.start - whole.start : part.stop - whole.start] = step
                    del logits, step
                if grad_hidden is not None:
                    grad_hidden[whole] = (raw @ columns).to(hidden.dtype)
                if to_weight:
                    grad_weight = _add_weight_gradient(grad_weight, raw, hidden[whole].to(product), normalizer.dtype)
                del raw  # before the next chunk's is made
            if to_weight and grad_weight is None:  # no tokens
                grad_weight = torch.zeros(weight.shape, dtype=normalizer.dtype, device=hidden.device)
        bias_out = grad_bias.to(bias.dtype) if grad_bias is not None else None
        weight_out = grad_weight.to(weight.dtype) if grad_weight is not None and in_place is None else None
        return grad_hidden, weight_out, bias_out, None, None, None, None


@dataclass(frozen=True, slots=True)
class HeadRequest:
    """What a `ScoringLinear` computes instead of logits."""

    target: Tensor  # [N] int64
    rule: LogitRule
    chunk: int
    statistics: StatisticsRequest | None = None


class ScoringLinear(nn.Linear):
    """A model's output layer that can also score given tokens.

    The scoring runs inside this module's forward, so whatever hooks gather its weight (ZeRO-3, FSDP) do so once a pass.
    It returns a plain tuple of tensors, since such hooks do not look into other objects.
    """

    def forward(self, input: Tensor, request: HeadRequest | None = None) -> Any:
        if request is None:
            return super().forward(input)
        collected = None
        if request.statistics:
            collected = _Collected(input, request.target, request.statistics, self.weight.shape[0])
        return _ChunkedHead.apply(input, self.weight, self.bias, request.target, request.rule, request.chunk, collected)

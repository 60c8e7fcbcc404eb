"""Whether a loaded policy gives a model's own log-probs, tried on a few tokens, so that no family has to be known by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rlpost.errors import RecipeError, RlpostError
from rlpost.experience import TokenRows
from rlpost.policy.family import INSTEAD
from rlpost.policy.head import HeadRequest, LogitRule
from rlpost.policy.loading import backbone
from rlpost.policy.rows import Layout, RowCompletion, RowGroup, build_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXACT = 1e-3  # nats, in float32; kernels differ by 1e-5
_ROUNDED = 0.25  # nats on average, in 16 bits; a fault of structure is of the order of the log-probs themselves
# Lengths of two prompts and their completions: rows with and without padding, one prompt with several branches.
_SHAPE = ((3, (4, 2)), (5, (3,)))


class Scores(Protocol):
    """What is verified: the part of a `Policy` that scores tokens."""

    autocast: torch.dtype | None
    rule: LogitRule

    @property
    def causal_lm(self) -> PreTrainedModel: ...

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    def precision(self) -> AbstractContextManager[Any]: ...

    def __call__(self, rows: TokenRows) -> Any: ...


@torch.no_grad()
def verify_policy(policy: Scores, layout: Layout) -> None:
    """Compares the policy's log-probs, in rows of `layout`, with those of the model's own forward on single sequences.

    Catches scores that are changed after the output layer, hidden states that are not where they are looked for, attention
    that sees what comes later or what stands in the same pass, and positions that are counted in another way. Raises
    RecipeError.
    """
    causal_lm, kind = policy.causal_lm, policy.config.model_type
    flash = policy.config._attn_implementation == "flash_attention_2"  # cannot run in float32
    with _unknown_code(kind), _without_autocast(policy, keep=flash):
        verify_head(causal_lm, policy.rule, policy.precision())
        groups = _groups(policy.config.get_text_config().vocab_size)
        count = sum(len(tokens) for group in groups for _, _, tokens in _parts(group))
        ours = torch.zeros(count)
        for rows in build_rows(groups, layout=layout, micro_batch_tokens=1000, pad_id=0):
            ours[rows.token_index] = policy(rows).logp.float().cpu()
        theirs = torch.zeros(count)
        for group in groups:
            for _, start, tokens in _parts(group):
                whole = _own_logprobs(policy, group.prompt_ids, tokens)
                _check_causality(kind, whole[:1], _own_logprobs(policy, group.prompt_ids, tokens[:1]))
                theirs[start : start + len(tokens)] = whole
    if gap := apart(ours, theirs, exact=_is_exact(causal_lm, policy.precision())):
        raise RecipeError(
            f"model.path: model type {kind} gives other log-probs in rows of layout {layout} than in a sequence of its own (up "
            f"to {gap:.3g} nats apart): its attention or positions depend on what shares a pass. {INSTEAD}"
        )


@torch.no_grad()
def verify_head(causal_lm: PreTrainedModel, rule: LogitRule, autocast: Any) -> None:
    """Compares log-probs of our output layer with those of the model's own forward on four tokens. Raises RecipeError."""
    kind, device = causal_lm.config.model_type, causal_lm.device
    ids = torch.arange(5, 9, device=device)[None] % causal_lm.config.get_text_config().vocab_size
    with autocast:
        logits = causal_lm(input_ids=ids, use_cache=False).logits[0]
        hidden = backbone(causal_lm)(input_ids=ids, use_cache=False).last_hidden_state[0]
        width = causal_lm.get_output_embeddings().in_features
        if hidden.shape[-1] != width:
            raise RecipeError(
                f"model.path: model type {kind} does something between its last hidden states ({hidden.shape[-1]} numbers) and "
                f"its output layer ({width}) that rlpost does not know. {INSTEAD}"
            )
        ours, _entropy = causal_lm.get_output_embeddings()(hidden, HeadRequest(ids[0], rule, chunk=4))
    theirs = (logits.float() / rule.temperature).log_softmax(-1).gather(-1, ids[0][:, None]).squeeze(-1)
    exact, gap = logits.dtype == torch.float32, float((ours - theirs).abs().max())
    if not torch.allclose(ours.float(), theirs, rtol=1e-3 if exact else 2e-2, atol=1e-3 if exact else 1e-1):
        raise RecipeError(
            f"model.path: model type {kind} changes its scores around the output layer in a way that rlpost does not know "
            f"(log-probs differ by up to {gap:.3g}). {INSTEAD}"
        )


def apart(ours: Tensor, theirs: Tensor, *, exact: bool) -> float | None:
    """The largest difference in nats of two scorings of the same tokens if it is more than rounding (of float32: `exact`, else
    of 16 bits), else None."""
    gap = (ours - theirs).abs()
    wrong = bool(gap.max() > _EXACT) if exact else bool(gap.mean() > _ROUNDED)
    return float(gap.max()) if wrong or not bool(torch.isfinite(gap).all()) else None


def _check_causality(kind: str, of_long: Tensor, of_short: Tensor) -> None:
    if gap := apart(of_long, of_short, exact=False):
        raise RecipeError(
            f"model.path: model type {kind} is no causal language model: what comes later changes a token's log-prob (by "
            f"{gap:.3g} nats). {INSTEAD}"
        )


def _groups(vocabulary: int) -> list[RowGroup]:
    """Prompts and completions of the lengths in `_SHAPE`, of some tokens."""
    token, start, sequence, groups = 5, 0, 0, []
    for prompt, lengths in _SHAPE:
        prompt_ids, token = tuple((token + i) % vocabulary for i in range(prompt)), token + prompt
        completions = []
        for length in lengths:
            tokens = tuple((token + 3 * i) % vocabulary for i in range(length))
            completions.append(RowCompletion(sequence, start, tokens))
            token, start, sequence = token + length, start + length, sequence + 1
        groups.append(RowGroup(prompt_ids, tuple(completions)))
    return groups


def _parts(group: RowGroup) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(c.sequence, c.start, c.token_ids) for c in group.completions if isinstance(c, RowCompletion)]


def _own_logprobs(policy: Scores, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Tensor:
    """[len(tokens)] of the model's own forward on the one sequence, at the policy's temperature."""
    ids = torch.tensor([[*prompt, *tokens]], device=policy.device)
    with policy.precision():
        logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[0]
    scores = (logits.float() / policy.rule.temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return scores.gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu()


def _is_exact(causal_lm: PreTrainedModel, precision: Any) -> bool:
    return causal_lm.dtype == torch.float32 and isinstance(precision, nullcontext)


@contextmanager
def _without_autocast(policy: Scores, *, keep: bool) -> Iterator[None]:
    """While open, the policy computes in its weights' precision, in which faults stand out from rounding."""
    before = policy.autocast
    policy.autocast = before if keep else None
    try:
        yield
    finally:
        policy.autocast = before


@contextmanager
def _unknown_code(kind: str) -> Iterator[None]:
    """Whatever a model's code raises is said in words."""
    try:
        yield
    except (RlpostError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise RecipeError(
            f"model.path: model type {kind} cannot be called as rlpost calls models ({type(error).__name__}: {first}). "
            f"{INSTEAD}"
        ) from error

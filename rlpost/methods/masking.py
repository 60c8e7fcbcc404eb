"""All masks of a method together: which tokens take part in the update. What a single mask computes is in
`rlpost.gradient.masks`, what a recipe may say of it in `rlpost.recipe.sections.masks`."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from rlpost.gradient.masks import off_policy_rejects, reject_lowest, stale_rejects, token_uniform
from rlpost.gradient.metrics import Metric, mean_of
from rlpost.gradient.segments import count_by
from rlpost.gradient.step import StepContext
from rlpost.gradient.types import TokenView
from rlpost.methods.capo import curvature_metrics, moved_tokens, probability_metrics
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.masks import CurvatureMask, Mask, OffPolicyMask, ProbabilityMask, RandomMask, StaleMask
from rlpost.recipe.sections.method import MethodSection


def accepted_tokens(method: MethodSection, view: TokenView, context: StepContext) -> tuple[Tensor, dict[str, Metric]]:
    """[N] bool: tokens that pass every mask, and the masks' metrics over tokens with a non-zero advantage.

    Where the advantage is zero there is no policy gradient to be masked: no mask rejects such a token, and shares of rejected
    tokens do not count it. Demonstrations are never rejected. Every mask decides for itself, whatever the others reject.
    """
    counted = moved_tokens(view)
    predicted, metrics = _curvature_rejects(method, view, counted, context)
    keep = torch.ones_like(counted)
    places: Counter[str] = Counter()
    for mask in method.masks:
        place = places[mask.type]
        places[mask.type] += 1
        rejected = _rejects(mask, place, view, counted, predicted, context) & counted
        name = f"mask/{mask.type}" + (f"_{place + 1}" if place else "")
        metrics[f"{name}/rejected_share"] = mean_of(rejected.double(), counted)
        if not isinstance(mask, CurvatureMask):  # which has reported this already
            metrics |= probability_metrics(name, view, rejected, counted)
        keep &= ~rejected
    if method.overlong.filter:
        cut = view.truncated[view.sequence] & ~view.demonstration[view.sequence]
        metrics["mask/truncated/rejected_share"] = mean_of(cut.double(), counted)
        keep &= ~cut
    if metrics:
        metrics["mask/rejected_share"] = mean_of((~keep).double(), counted)
    return keep, metrics


def _curvature_rejects(
    method: MethodSection, view: TokenView, counted: Tensor, context: StepContext
) -> tuple[Tensor, dict[str, Metric]]:
    """[N] bool: the tokens that the curvature mask rejects.

    Random and probability masks can be told to reject as many tokens as the curvature mask would (CAPO's controls). Their
    method then has no curvature mask, but this is computed all the same, because it gives the number.
    """
    if method.curvature is None:
        return torch.zeros_like(counted), {}
    tracker = context.curvature
    if tracker is None:
        raise ValueError("a curvature mask needs StepContext.curvature (see rlpost.methods.capo.make_tracker)")
    curvature, limits = tracker.predict(view, context), tracker.limits()
    return limits.rejects(curvature) & counted, curvature_metrics(view, curvature, limits, counted)


def _rejects(
    mask: Mask, place: int, view: TokenView, counted: Tensor, predicted: Tensor, context: StepContext
) -> Tensor:
    """[N] bool: what one mask rejects. `place` numbers the masks of one type from 0: two random masks must not draw the same
    numbers."""
    match mask:
        case CurvatureMask():
            return predicted
        case OffPolicyMask():
            return off_policy_rejects(mask, view)
        case StaleMask():
            return stale_rejects(mask, view, context.optimizer_step)
        case ProbabilityMask():
            if mask.below is not None:
                return view.logp.exp() < mask.below
            return _as_many(view.logp, view, counted, predicted)
        case RandomMask():
            if view.token_index is None:
                raise ValueError("a random mask needs TokenView.token_index")
            score = token_uniform(view.token_index, context.seed + place, context.optimizer_step)
            return score < mask.rate if mask.rate is not None else _as_many(score, view, counted, predicted)
        case _:
            raise unknown_choice("masks", mask)


def _as_many(score: Tensor, view: TokenView, counted: Tensor, predicted: Tensor) -> Tensor:
    """[N] bool: in every completion the tokens of lowest `score` [N], as many as the curvature mask would reject there."""
    quota = count_by(view.sequence, view.prompt.numel(), predicted)
    return reject_lowest(score, quota, view.sequence, counted)

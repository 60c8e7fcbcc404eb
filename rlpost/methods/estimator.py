"""From slots to numbers: rewards to advantages, and tokens to coefficients. Every method goes through here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.gradient.advantage import normalise, whiten_batch
from rlpost.gradient.correction import sampler_correction
from rlpost.gradient.kl import kl_coefficient, kl_estimate
from rlpost.gradient.metrics import Mean, Metric, max_of, mean_of, quantiles_of
from rlpost.gradient.ratio import Limited, importance_ratio, limit_ratio
from rlpost.gradient.reduction import token_weights
from rlpost.gradient.shaping import equal_rewards, overlong_share, sum_rewards
from rlpost.gradient.step import StepContext
from rlpost.gradient.types import Coefficients, Counts, StatisticsRequest, TokenView
from rlpost.methods.dpo import pair_coefficients
from rlpost.methods.imitation import demonstration_coefficient, demonstration_weights, loss_parts, sample_factor
from rlpost.methods.masking import accepted_tokens
from rlpost.methods.signal import advantage_metrics
from rlpost.recipe.sections.method import MethodSection, NoClip


@dataclass(frozen=True, slots=True)
class AdvantageResult:
    """Advantages of S completions of P groups."""

    advantage: Tensor  # [S] float64; 0 where the reward is unknown
    zero_variance: Tensor  # [P] bool: the group's known (shaped) rewards are all equal
    metrics: dict[str, Metric]
    known: Tensor  # [S] bool: the completion has a reward
    shaping: Tensor | None  # [S] what was added to the rewards


def compute_advantages(
    method: MethodSection,
    rewards: Tensor,
    prompt: Tensor,
    *,
    weights: Sequence[float] | None = None,
    lengths: Tensor | None = None,
    max_completion_tokens: int = 0,
    sequence_kl: Tensor | None = None,
) -> AdvantageResult:
    """Advantages over the global batch: gather the rewards of all processes first.

    `rewards` [S, R] are weighted; NaN: reward r does not apply to completion s. A completion whose scoring failed must
    have a row of NaN. `prompt` [S] int64 names the group. `weights` [R] are the factors already in `rewards` (needed by
    `combine: normalise_then_sum` and `gdpo`, which would cancel them). `lengths` [S] and `max_completion_tokens` are needed by
    `overlong.penalty`, `sequence_kl` [S] (see `rlpost.gradient.kl`) by `kl.where: reward`. Raises ValueError without.
    """
    rewards, groups = rewards.double(), int(prompt.max()) + 1 if prompt.numel() else 0
    # What is too large for its weight is as unknown as what could not be scored.
    rewards = torch.where(rewards.isinf().any(1, keepdim=True), torch.nan, rewards)
    total = sum_rewards(rewards)
    unknown = ~total.isfinite()
    terms = _shaping(method, rewards, lengths, max_completion_tokens, sequence_kl)
    shaping = torch.stack([coefficient * term for coefficient, term in terms]).sum(0) if terms else None
    columns = [(1.0, total if shaping is None else total + shaping)]
    if method.advantage.each_alone:  # factors stay outside: inside they would cancel
        given = [float(w) for w in (weights if weights is not None else [1.0] * rewards.shape[1])]
        columns = [(w, column / (w or 1.0)) for w, column in zip(given, rewards.unbind(1), strict=True)]
        columns += [(coefficient, torch.where(unknown, torch.nan, term)) for coefficient, term in terms]
    advantage = torch.zeros_like(total)
    zero_variance = torch.ones(groups, dtype=torch.bool, device=rewards.device)
    for factor, column in columns:
        advantage = advantage + factor * normalise(method.advantage, column, prompt, groups)
        zero_variance &= equal_rewards(column, prompt, groups)
    advantage = torch.where(unknown, torch.zeros_like(advantage), advantage)
    if method.advantage.whitened:
        advantage = whiten_batch(method.advantage, advantage, ~unknown)
    metrics = advantage_metrics(method, advantage, ~unknown, zero_variance=zero_variance, shaping=shaping)
    return AdvantageResult(advantage, zero_variance, metrics, ~unknown, shaping)


def _shaping(
    method: MethodSection, rewards: Tensor, lengths: Tensor | None, limit: int, sequence_kl: Tensor | None
) -> list[tuple[float, Tensor]]:
    """What is added to every completion's reward: (coefficient, [S]) pairs. The coefficient stays outside the term, so that
    it does not cancel where terms are normalised one by one."""
    parts: list[tuple[float, Tensor]] = []
    if method.overlong.penalty > 0:
        if lengths is None or limit <= 0:
            raise ValueError("overlong.penalty needs `lengths` and `max_completion_tokens`")
        parts.append((method.overlong.penalty, -overlong_share(method.overlong, lengths.to(rewards.device), limit)))
    if method.kl_place == "reward" and method.critic is None and method.kl.coefficient > 0:
        if sequence_kl is None:
            raise ValueError("kl.where `reward` needs `sequence_kl`: the summed KL of every completion")
        parts.append((method.kl.coefficient, -sequence_kl.double()))
    return parts


def compute_coefficients(
    method: MethodSection, view: TokenView, counts: Counts, *, context: StepContext
) -> Coefficients:
    """The coefficients of a view's tokens (see `rlpost.gradient.loss`): pure, detached, free of the view's boundaries.

    Tokens of demonstrations get what `gate` says, by default coefficient = advantage: no ratio, clip, correction, mask or
    KL acts on them.
    """
    if method.pairs is not None:
        return pair_coefficients(method.pairs, view, counts, method.correction)
    with torch.no_grad():
        demonstration = view.demonstration[view.sequence]
        ratio = importance_ratio(method.ratio, view)
        limited = limit_ratio(method.clip, ratio, view.advantage)
        correction, mismatch = sampler_correction(method.correction, view)
        factor = sample_factor(method.gate, view)
        beta, kl_slope = _kl_penalty(method, view, context)
        keep, masking = accepted_tokens(method, view, context)

        # The coefficient of a sampled token: keep * (limited ratio * correction * A * gate's factor - beta * dKL).
        sampled = limited.ratio * correction * view.advantage * factor - beta * kl_slope
        sampled = torch.where(keep, sampled, torch.zeros_like(sampled))
        coefficient = torch.where(demonstration, demonstration_coefficient(method.gate, view), sampled)

        entropy = torch.where(keep, torch.full_like(sampled, method.entropy.coefficient), torch.zeros_like(sampled))
        weight = token_weights(method.reduction, view, counts, keep)
        metrics = {**_policy_metrics(method, view, ratio, limited, ~demonstration), **mismatch, **masking}
        if method.gate is not None:
            weight = torch.where(demonstration, demonstration_weights(method.gate, view, counts, weight), weight)
            entropy = entropy if method.gate.entropy else torch.where(demonstration, torch.zeros_like(entropy), entropy)
            metrics |= loss_parts(view, coefficient, weight)
        return Coefficients(coefficient, entropy, weight, keep, metrics)


def _kl_penalty(method: MethodSection, view: TokenView, context: StepContext) -> tuple[float, Tensor]:
    """(beta, [N] how the KL estimate changes with log pi): the penalty that is taken off in the loss; (0, 0) for none."""
    if method.kl_place != "loss":
        return 0.0, torch.zeros_like(view.logp)
    if view.ref_logp is None:
        raise ValueError("a KL penalty needs TokenView.ref_logp")
    beta = method.kl.coefficient if context.kl_coefficient is None else context.kl_coefficient
    return beta, kl_coefficient(method.kl.estimator, view.logp, view.ref_logp)


def _policy_metrics(
    method: MethodSection, view: TokenView, ratio: Tensor, limited: Limited, sampled: Tensor
) -> dict[str, Metric]:
    """Means over the view's sampled tokens. Groups that are skipped are in no view, so these are means over groups with signal;
    clip shares are over tokens with an advantage, so that they are the same whether a group without is skipped or not. What
    a method does not have (a ratio, a clip) has no metric."""
    moved = sampled & (view.advantage != 0)
    low, high = mean_of(limited.low.double(), moved), mean_of(limited.high.double(), moved)
    metrics: dict[str, Metric] = {
        "policy/entropy": mean_of(view.entropy, sampled),
        # Tokens come from the old policy, so k3 of (old, current) estimates KL(old || current).
        "policy/kl_old": mean_of(kl_estimate("k3", view.old_logp, view.logp), sampled),
    }
    if method.ratio.level != "none":
        metrics |= {"policy/ratio_mean": mean_of(ratio, sampled), "policy/ratio_max": max_of(ratio[sampled])}
    if not isinstance(method.clip, NoClip):
        either = Mean(low.total + high.total, low.count)
        metrics |= {"policy/clip_fraction": either, "policy/clip_low": low, "policy/clip_high": high}
    if method.controller is not None and view.ref_logp is not None:
        # By the penalty's own estimator. No quantiles: k1 can be negative for a token.
        penalised = kl_estimate(method.kl.estimator, view.logp, view.ref_logp)[sampled]
        metrics["policy/kl_penalised"] = mean_of(penalised)
    if view.ref_logp is not None:
        kl = kl_estimate("k3", view.logp, view.ref_logp)[sampled]
        metrics |= {"policy/kl_reference": mean_of(kl), "policy/kl_reference_max": max_of(kl)}
        metrics |= quantiles_of("policy/kl_reference", kl, (0.95,))
    return metrics


def needs_reference(method: MethodSection) -> bool:
    """Whether log-probs under the reference policy are needed."""
    return method.kl_place is not None


def needs_statistics(method: MethodSection) -> StatisticsRequest | None:
    """What the LM head must return besides log-probs and entropies."""
    mask = method.curvature
    if mask is None:
        return None
    return StatisticsRequest(k=mask.top_k, powers=False) if mask.by_adam else StatisticsRequest()


def dead_groups(method: MethodSection, advantage: Tensor, prompt: Tensor) -> Tensor:
    """[P] bool: dead groups, of whose samples every coefficient is zero, so that they need no forward pass. They still count in
    `Counts`. Most have zero variance (all known rewards equal), but a group of equal rewards is not dead where a penalty, an
    entropy bonus or a critic learns from it, nor where the advantage has no centre."""
    groups = int(prompt.max()) + 1 if prompt.numel() else 0
    pulled = method.kl_place == "loss" or method.entropy.coefficient != 0 or method.critic is not None
    dead = torch.full((groups,), not pulled, dtype=torch.bool, device=prompt.device)
    dead[prompt[advantage != 0]] = False
    return dead

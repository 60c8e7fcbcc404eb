"""CAPO's closed forms (arXiv 2510.00819): what one token's own step on the LM head would do to the policy.

All from u = D h, the logit shift of a candidate step D (learning rate included) at the token's own position. With
p the policy, v = e_a - p, s = v.u (the predicted change of log pi(a)) and A the advantage:

    m_H = A (s + (s^2 - Var_p(u)) / 2)        predicted change of the objective, to second order; equals A (r - 1) + O(u^3)
    m_F = s^2 / 2  or  Var_p(u) / 2           predicted KL, from the sampled token or exact over p
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlpost.recipe.sections.base import unknown_choice

Kl = Literal["sampled", "exact"]


@dataclass(frozen=True, slots=True)
class Curvature:
    """Predictions for N tokens, in nats. Detached."""

    shift: Tensor  # [N] s: change of the sampled token's log-prob
    kl: Tensor  # [N] m_F
    objective: Tensor  # [N] m_H


@dataclass(frozen=True, slots=True)
class Limits:
    """A token is kept when kl < max_kl and min_objective < objective < max_objective."""

    max_kl: float = math.inf
    max_objective: float = math.inf
    min_objective: float = -math.inf

    def kl_rejects(self, curvature: Curvature) -> Tensor:
        """[N] bool. Written so that NaN is rejected."""
        if self.max_kl == math.inf:
            return torch.zeros_like(curvature.kl, dtype=torch.bool)
        return ~(curvature.kl < self.max_kl)

    def objective_rejects(self, curvature: Curvature) -> Tensor:
        """[N] bool."""
        if self.max_objective == math.inf and self.min_objective == -math.inf:
            return torch.zeros_like(curvature.kl, dtype=torch.bool)
        return ~((curvature.objective > self.min_objective) & (curvature.objective < self.max_objective))

    def rejects(self, curvature: Curvature) -> Tensor:
        """[N] bool: CAPO's decision, the tokens that its mask leaves out of the update."""
        return self.kl_rejects(curvature) | self.objective_rejects(curvature)

    @property
    def rules(self) -> int:
        """How many rules are in force."""
        return (self.max_kl < math.inf) + (self.max_objective < math.inf or self.min_objective > -math.inf)


def taylor_forms(shift: Tensor, variance: Tensor, advantage: Tensor, kl: Kl) -> Curvature:
    """m_F and m_H from s [N] and Var_p(u) [N]."""
    objective = advantage * (shift + 0.5 * (shift**2 - variance))
    return Curvature(shift, _kl_of(kl, sampled=0.5 * shift**2, exact=0.5 * variance), objective)


def _kl_of(kl: Kl, *, sampled: Tensor, exact: Tensor) -> Tensor:
    """[N] m_F, from the sampled token or over the vocabulary."""
    match kl:
        case "sampled":
            return sampled
        case "exact":
            return exact
        case _:
            raise unknown_choice("masks.kl", kl)


def sgd_curvature(
    logp: Tensor, sum_p2: Tensor, sum_p3: Tensor, hidden_square: Tensor, advantage: Tensor, learning_rate: float, kl: Kl
) -> Curvature:
    """D = lr A v h': four scalars a token over the full vocabulary, `hidden_square` [N] being |h|^2.

    s = k n and Var_p(u) = k^2 Var_p(v), with k = lr A |h|^2, n = |v|^2 and v = e_a - p.
    """
    p = logp.exp()
    rest = -torch.expm1(logp)  # 1 - p without cancellation
    n = rest**2 + (sum_p2 - p**2).clamp(min=0)
    variance = (p * rest**2 + (sum_p3 - p**3).clamp(min=0) - (p - sum_p2) ** 2).clamp(min=0)
    k = learning_rate * advantage * hidden_square
    return taylor_forms(k * n, k**2 * variance, advantage, kl)


def shift_curvature(
    u: Tensor, p: Tensor, onehot: Tensor, advantage: Tensor, kl: Kl, form: Literal["taylor", "exact"]
) -> Curvature:
    """From u [N, k] over the kept ids with p [N, k] (sums to 1) and the sampled token's one-hot [N, k] bool.

    exact: log r = u_a - log E_p[exp u], m_H = A (r - 1), m_F = (log r)^2 / 2 or KL(p || p') = log E_p[exp u] - p.u.
    """
    mean = (p * u).sum(-1)
    own = torch.where(onehot, u, torch.zeros_like(u)).sum(-1)
    match form:
        case "taylor":
            variance = (p * (u - mean[:, None]) ** 2).sum(-1)
            return taylor_forms(own - mean, variance, advantage, kl)
        case "exact":
            normaliser = torch.logsumexp(p.log() + u, dim=-1)
            log_ratio = own - normaliser
            predicted = _kl_of(kl, sampled=0.5 * log_ratio**2, exact=normaliser - mean)
            return Curvature(log_ratio, predicted, advantage * torch.expm1(log_ratio))
        case _:
            raise unknown_choice("masks.form", form)


def rank_correlation(predicted: Tensor, realised: Tensor) -> float:
    """Spearman's correlation of predicted shifts with realised log-ratios, both [N]; ties share their mean rank.

    NaN when one of them is constant or N < 2.
    """
    a, b = _ranks(predicted), _ranks(realised)
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.flatten().unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]

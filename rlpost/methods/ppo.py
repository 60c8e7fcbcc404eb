"""PPO (arXiv 1707.06347): from rewards and old values to advantages and value targets; whitening with a memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlpost.gradient.gae import ValueCoefficients, aggregate_values, first_tokens, generalised_advantage, last_tokens
from rlpost.gradient.metrics import Metric, max_of, mean_of
from rlpost.gradient.segments import sum_by
from rlpost.gradient.types import Counts
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.critic import CriticSection


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and summed squared deviation of numbers; they add over rollouts and processes (Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    square: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of the numbers in `values` that are not NaN."""
        known = values[~values.isnan()].double()
        if not known.numel():
            return cls()
        mean = known.mean()
        return cls(float(known.numel()), float(mean), float((known - mean).square().sum()))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not count:
            return self
        gap = other.mean - self.mean
        mean = self.mean + gap * other.count / count
        return Moments(count, mean, self.square + other.square + gap**2 * self.count * other.count / count)

    @property
    def variance(self) -> float:
        """Over count - 1; 0 for fewer than two numbers."""
        return self.square / (self.count - 1) if self.count > 1 else 0.0

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Moments:
        return cls(**state)


def total_moments(parts: list[Moments]) -> Moments:
    """The moments of all parts together, added in their order."""
    total = Moments()
    for part in parts:
        total = total + part
    return total


def whiten(values: Tensor, moments: Moments, *, center: bool = True, eps: float = 1e-8) -> Tensor:
    """(values - mean) / (standard deviation + eps), or without subtracting the mean. Equal numbers are not blown up."""
    shifted = values - moments.mean if center else values
    spread = math.sqrt(moments.variance)
    return shifted / (spread + eps) if spread > eps else shifted


class RewardWhitening:
    """Rewards in units of the spread of all rewards so far (SAFE, arXiv 2602.04651, and PPO practice).

    Statistics take the new rewards in first, as in SAFE's code; give it those of all processes.
    """

    def __init__(self, critic: CriticSection) -> None:
        self.settings = critic
        self.moments = Moments()

    def __call__(self, reward: Tensor) -> Tensor:
        """Whitened rewards [S]; NaN (unknown) stays NaN and enters no statistic."""
        match self.settings.whiten_reward:
            case "none":
                return reward
            case "scale":
                center = False
            case "full":
                center = True
            case _:
                raise unknown_choice("critic.whiten_reward", self.settings.whiten_reward)
        self.moments = self.moments + Moments.of(reward)
        return whiten(reward, self.moments, center=center)

    def state_dict(self) -> dict[str, float]:
        return self.moments.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moments = Moments.from_dict(state)


def token_rewards(reward: Tensor, sequence: Tensor, kl: Tensor | None = None, coefficient: float = 0.0) -> Tensor:
    """[N] what every token earns: minus coefficient * KL_t, and the completion's reward [S] at its last token.

    `sequence` [N] non-decreasing, `kl` [N] a per-token estimate (see `rlpost.gradient.kl`) under the policy that sampled.
    InstructGPT (arXiv 2203.02155) eq. 2, token by token.
    """
    earned = torch.zeros(sequence.shape, dtype=reward.dtype, device=reward.device)
    if kl is not None and coefficient:
        earned -= coefficient * kl.to(reward.dtype)
    last = last_tokens(sequence)
    earned[last] += reward[sequence[last]]
    return earned


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a rollout's tokens are worth, before advantages are whitened. 0 where the reward is not known."""

    advantage: Tensor  # [N]
    target: Tensor  # [N] of the value before the token; with one value a completion its target, at each of its tokens
    known: Tensor  # [N] bool


def estimate(
    critic: CriticSection,
    reward: Tensor,
    value: Tensor,
    sequence: Tensor,
    *,
    kl: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> Estimate:
    """Advantages and targets of N tokens of S completions.

    `reward` [S] (NaN: unknown), whitened if it is to be; `value` [N] the aggregated old values (with one value a completion
    that at each of its tokens); `kl` [N] per token, subtracted from the rewards.
    """
    known = ~reward.isnan()[sequence]
    reward = torch.where(reward.isnan(), torch.zeros_like(reward), reward)
    value = value.to(reward.dtype)
    earned = token_rewards(reward, sequence, kl, kl_coefficient)
    completions = reward.numel()
    if not critic.per_token:
        target = sum_by(earned, sequence, completions)[sequence]
        advantage = target - value
    else:
        gamma, lam = critic.gamma, critic.lam
        advantage = generalised_advantage(earned, value, sequence, completions, gamma=gamma, lam=lam)
        value_lam = lam if critic.value_lam is None else critic.value_lam
        longer = advantage
        if value_lam != lam:
            longer = generalised_advantage(earned, value, sequence, completions, gamma=gamma, lam=value_lam)
        target = longer + value
    zero = torch.zeros_like(advantage)
    return Estimate(torch.where(known, advantage, zero), torch.where(known, target, zero), known)


def counted(critic: CriticSection, estimated: Estimate, sequence: Tensor) -> Tensor:
    """[N] bool: the tokens that statistics are taken over: known ones, one a completion where that has one value."""
    if critic.per_token:
        return estimated.known
    first = torch.zeros_like(estimated.known)
    first[first_tokens(sequence)] = True
    return first & estimated.known


def whiten_advantage(critic: CriticSection, estimated: Estimate, moments: Moments) -> Tensor:
    """[N] advantages with mean 0 and spread 1 over the rollout, whose `moments` (of all processes) are those of
    `estimated.advantage` where `counted`. Unknown ones stay 0."""
    if not critic.whiten_advantage:
        return estimated.advantage
    return torch.where(estimated.known, whiten(estimated.advantage, moments), torch.zeros_like(estimated.advantage))


def value_weights(critic: CriticSection, counts: Counts, known: Tensor) -> Tensor:
    """[M] weights of the value terms; over the whole optimizer step they add up to `loss.weight`, masks or not.

    One over all tokens, or over all completions where these have one value. `known` [M] bool: others get 0.
    """
    number = counts.tokens if critic.per_token else counts.sequences
    return known.double() * (critic.loss.weight / max(number, 1))


def explained_variance(target: Moments, error: Moments) -> float | None:
    """1 - Var(target - V) / Var(target): 1 is a perfect critic, 0 a constant, below 0 worse than that. None: undefined."""
    return 1.0 - error.variance / target.variance if target.variance > 0 else None


@dataclass(frozen=True, slots=True)
class ValueStatistics:
    """Moments over a rollout, before its updates; add them over processes, then `metrics`."""

    advantage: Moments = field(default_factory=Moments)
    target: Moments = field(default_factory=Moments)
    error: Moments = field(default_factory=Moments)

    @classmethod
    def of(cls, critic: CriticSection, estimated: Estimate, value: Tensor, sequence: Tensor) -> ValueStatistics:
        where = counted(critic, estimated, sequence)
        target = estimated.target[where]
        error = target - value.to(target.dtype)[where]
        return cls(Moments.of(estimated.advantage[where]), Moments.of(target), Moments.of(error))

    def __add__(self, other: ValueStatistics) -> ValueStatistics:
        return ValueStatistics(self.advantage + other.advantage, self.target + other.target, self.error + other.error)

    def metrics(self) -> dict[str, float]:
        """The critic's bias and error on rewards it had not seen, and the share of their variance that it explains."""
        if not self.target.count:
            return {}
        metrics = {
            "critic/target_mean": self.target.mean,
            "critic/bias": self.error.mean,
            "critic/rmse": math.sqrt(self.error.square / self.error.count + self.error.mean**2),
            "critic/advantage_std": math.sqrt(self.advantage.variance),
        }
        explained = explained_variance(self.target, self.error)
        return metrics if explained is None else {**metrics, "critic/explained_variance": explained}


def value_metrics(
    critic: CriticSection, coefficients: ValueCoefficients, values: Tensor, known: Tensor
) -> dict[str, Metric]:
    """Of a micro-batch's values [M, H] during the update; M as in `known`."""
    value = aggregate_values(critic, values)
    metrics: dict[str, Metric] = {
        "critic/loss": mean_of(coefficients.loss, known),
        "critic/value_mean": mean_of(value, known),
        "critic/clip_fraction": mean_of(coefficients.clipped.double(), known),
    }
    if values.shape[-1] > 1:
        gap = values.amax(-1) - values.amin(-1)
        metrics["critic/head_gap"] = mean_of(gap, known)
        metrics["critic/head_gap_max"] = max_of(gap[known])
        metrics["critic/pessimism"] = mean_of(values.mean(-1) - value, known)
    return metrics

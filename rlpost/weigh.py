"""Weighing: from scored groups to a rollout buffer with advantages, over all processes."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.experience import Group
from rlpost.gradient.kl import kl_estimate
from rlpost.gradient.metrics import values
from rlpost.gradient.shaping import groups_to_refill
from rlpost.gradient.types import Counts
from rlpost.learner.buffer import RolloutBuffer
from rlpost.learner.process import Processes
from rlpost.methods.estimator import compute_advantages, needs_reference, skippable_groups
from rlpost.recipe.method import DynamicSamplingSection, MethodSection
from rlpost.recipe.reward import RewardSection


@dataclass(frozen=True, slots=True)
class Digest:
    """What processes tell each other about their scored groups: a few numbers a completion, no text."""

    rewards: list[list[list[float]]]  # [groups][G][R], weighted; NaN: not applicable, or unknown
    raw: list[list[list[float]]]  # the same without weights, failed scores NaN
    lengths: list[list[int]]
    truncated: list[list[bool]]
    outcomes: Counter[tuple[int, str]]  # (reward, outcome) -> how many
    sequence_kl: Tensor | None  # [S]


def digest(buffer: RolloutBuffer, weights: Sequence[float], method: MethodSection) -> Digest:
    """One process's share of what `weigh` needs."""
    outcomes: Counter[tuple[int, str]] = Counter()
    groups = buffer.groups
    rewards, raw = [], []
    for group in groups:
        group_rewards, group_raw = [], []
        for scores in group.scores:
            outcomes.update((r, score.outcome.value) for r, score in enumerate(scores))
            numbers = [math.nan if s.value is None else s.value for s in scores]
            group_raw.append(numbers)
            # One failed score makes the whole reward unknown: half a sum must not enter a baseline.
            failed = any(score.failed for score in scores)
            group_rewards.append([math.nan if failed else w * x for w, x in zip(weights, numbers, strict=True)])
        rewards.append(group_rewards)
        raw.append(group_raw)
    lengths = [[len(c.token_ids) for c in group.completions] for group in groups]
    truncated = [[c.truncated for c in group.completions] for group in groups]
    return Digest(rewards, raw, lengths, truncated, outcomes, _sequence_kl(buffer, method))


def open_buffer(groups: Sequence[Group], *, step: int, minibatches: int) -> RolloutBuffer:
    """The buffer of a scored rollout, before it is known what its completions are worth."""
    return RolloutBuffer(
        step=step,
        groups=tuple(groups),
        minibatch=tuple(i * minibatches // len(groups) for i in range(len(groups))),
        dead=(False,) * len(groups),
        advantage=torch.zeros(sum(len(g.completions) for g in groups)),
        counts=(),
    )


def weigh(
    buffer: RolloutBuffer,
    *,
    method: MethodSection,
    rewards: Sequence[RewardSection],
    names: Sequence[str],
    minibatches: int,
    max_completion_tokens: int,
    processes: Processes,
) -> None:
    """Gives the buffer its advantages, computed over the groups of all processes, its denominators and its metrics."""
    weights = [r.weight for r in rewards]
    digests = processes.gather(digest(buffer, weights, method))
    sizes = [len(group) for d in digests for group in d.rewards]
    prompt = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)])
    matrix = torch.tensor([row for d in digests for group in d.rewards for row in group], dtype=torch.float64)
    result = compute_advantages(
        method,
        matrix.reshape(len(prompt), len(rewards)),
        prompt,
        weights=weights,
        lengths=torch.tensor([n for d in digests for group in d.lengths for n in group]),
        max_completion_tokens=max_completion_tokens,
        sequence_kl=_all_or_none([d.sequence_kl for d in digests]),
    )
    skippable = skippable_groups(method, result.advantage, prompt)
    first_group = sum(len(d.rewards) for d in digests[: processes.rank])
    first = sum(sizes[:first_group])
    buffer.advantage = result.advantage[first : first + len(buffer.advantage)].float()
    buffer.dead = tuple(skippable[first_group : first_group + len(buffer.groups)].tolist())
    buffer.counts = _counts(digests, minibatches, max_completion_tokens)
    buffer.metrics = {**_metrics(digests, matrix, result.zero_variance, names), **values(result.metrics)}


def flat_groups(groups: Sequence[Group], weights: tuple[float, ...], section: DynamicSamplingSection) -> list[bool]:
    """Which groups dynamic sampling replaces."""
    rewards = [group.reward(i, weights) for group in groups for i in range(len(group.completions))]
    prompt = [g for g, group in enumerate(groups) for _ in group.completions]
    matrix = torch.tensor(rewards, dtype=torch.float64).reshape(-1, 1)
    return groups_to_refill(section, matrix, torch.tensor(prompt), len(groups)).tolist()


def _all_or_none(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _sequence_kl(buffer: RolloutBuffer, method: MethodSection) -> Tensor | None:
    """[S] the summed KL estimate of every completion, where the method takes it from the reward."""
    if not (needs_reference(method) and method.kl.where == "reward"):
        return None
    assert buffer.old_logp is not None and buffer.ref_logp is not None
    estimate = kl_estimate(method.kl.estimator, buffer.old_logp.double(), buffer.ref_logp.double())
    sequence = torch.arange(len(buffer.lengths)).repeat_interleave(torch.tensor(buffer.lengths))
    return torch.zeros(len(buffer.lengths), dtype=torch.float64).index_add_(0, sequence, estimate)


def _counts(digests: Sequence[Digest], minibatches: int, max_completion_tokens: int) -> tuple[Counts, ...]:
    tokens, sequences, prompts = [0] * minibatches, [0] * minibatches, [0] * minibatches
    for d in digests:
        for i, lengths in enumerate(d.lengths):
            m = i * minibatches // len(d.lengths)
            tokens[m] += sum(lengths)
            sequences[m] += len(lengths)
            prompts[m] += 1
    return tuple(
        Counts(tokens=t, sequences=s, prompts=p, max_completion_tokens=max_completion_tokens)
        for t, s, p in zip(tokens, sequences, prompts, strict=True)
    )


def _metrics(
    digests: Sequence[Digest], rewards: Tensor, zero_variance: Tensor, names: Sequence[str]
) -> dict[str, float]:
    lengths = [n for d in digests for group in d.lengths for n in group]
    truncated = [t for d in digests for group in d.truncated for t in group]
    total = rewards.nansum(dim=1)[~rewards.isnan().all(dim=1)]
    metrics = {
        "reward/mean": float(total.mean()) if len(total) else math.nan,
        "reward/std": float(total.std()) if len(total) > 1 else 0.0,
        "reward/min": float(total.min()) if len(total) else math.nan,
        "reward/max": float(total.max()) if len(total) else math.nan,
        "reward/zero_variance_share": float(zero_variance.double().mean()),
        "completions/length_mean": statistics.fmean(lengths),
        "completions/length_max": float(max(lengths)),
        "completions/length_min": float(min(lengths)),
        "completions/truncated_share": sum(truncated) / len(truncated),
        "tokens/completion": float(sum(lengths)),
    }
    outcomes = sum((d.outcomes for d in digests), Counter())
    raw = torch.tensor([row for d in digests for group in d.raw for row in group], dtype=torch.float64)
    failed = 0
    for r, name in enumerate(names):
        scored = raw[:, r][~raw[:, r].isnan()]
        metrics[f"rewards/{name}/mean"] = float(scored.mean()) if len(scored) else math.nan
        for outcome in ("scored", "not_applicable", "timed_out", "crashed", "unparsable"):
            count = outcomes[(r, outcome)]
            metrics[f"scores/{name}/{outcome}"] = float(count)
            failed += count if outcome in ("timed_out", "crashed", "unparsable") else 0
    metrics["scores/failed_share"] = failed / max(1, len(raw) * len(names))
    return metrics

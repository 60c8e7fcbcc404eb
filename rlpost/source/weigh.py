"""Weighing: from scored groups to a rollout buffer with advantages, over all processes."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlpost.experience import Group, Outcome, Score
from rlpost.gradient.kl import kl_estimate
from rlpost.gradient.metrics import values
from rlpost.gradient.shaping import groups_to_refill
from rlpost.gradient.types import Counts
from rlpost.learner.buffer import RolloutBuffer
from rlpost.learner.process import Processes
from rlpost.methods.estimator import dead_groups
from rlpost.methods.hpt import Route, gated_advantages
from rlpost.recipe.sections.method import MethodSection
from rlpost.recipe.sections.reward import Reward
from rlpost.teaching.gate import Gated
from rlpost.teaching.verdict import accuracies, right_of_known

LARGEST = 1e30
"""A weighted score beyond this is no reward: scorers let none beyond 1e20 through, so that only a weight can make one."""


@dataclass(frozen=True, slots=True)
class Digest:
    """What processes tell each other about their scored groups: a few numbers a completion, no text."""

    rewards: list[list[list[float]]]  # [groups][G][R], weighted; NaN: not applicable, or unknown
    raw: list[list[list[float]]]  # the same without weights, failed scores NaN
    lengths: list[list[int]]
    truncated: list[list[bool]]
    outcomes: Counter[tuple[int, str]]  # (reward, outcome) -> how many
    sequence_kl: Tensor | None  # [S]
    right: list[float]  # [S] 1, 0, or NaN: unknown; [] without a gate
    routes: tuple[Route, ...]  # by group
    demonstrations: list[int]  # by group: tokens of the demonstration that is learned from; 0: none


def digest(buffer: RolloutBuffer, sections: Sequence[Reward], method: MethodSection) -> Digest:
    """One process's share of what `weigh` needs."""
    outcomes: Counter[tuple[int, str]] = Counter()
    groups, weights = buffer.groups, [r.weight for r in sections]
    rewards, raw = [], []
    for group in groups:
        group_rewards, group_raw = [], []
        for scores in group.scores:
            outcomes.update((r, score.outcome.value) for r, score in enumerate(scores))
            numbers = [math.nan if s.value is None else s.value for s in scores]
            group_raw.append(numbers)
            group_rewards.append(weighted(scores, weights))
        rewards.append(group_rewards)
        raw.append(group_raw)
    lengths = [[len(c.token_ids) for c in group.completions] for group in groups]
    truncated = [[c.truncated for c in group.completions] for group in groups]
    return Digest(
        rewards=rewards,
        raw=raw,
        lengths=lengths,
        truncated=truncated,
        outcomes=outcomes,
        sequence_kl=_sequence_kl(buffer, method),
        right=_right(groups, sections, method),
        routes=buffer.routes or (Route(),) * len(groups),
        demonstrations=[
            0 if row is None else len(row.token_ids) for row in map(buffer.demonstration, range(len(groups)))
        ],
    )


def open_buffer(groups: Sequence[Group], *, step: int, minibatches: int, gated: Gated | None = None) -> RolloutBuffer:
    """The buffer of a scored rollout, before it is known what its completions are worth."""
    demonstrations = () if gated is None else gated.demonstrations
    sequences = sum(len(g.completions) for g in groups) + sum(row is not None for row in demonstrations)
    return RolloutBuffer(
        step=step,
        groups=tuple(groups),
        minibatch=tuple(i * minibatches // len(groups) for i in range(len(groups))),
        dead=(False,) * len(groups),
        advantage=torch.zeros(sequences),
        counts=(),
        routes=() if gated is None else gated.routes,
        demonstrations=demonstrations,
    )


def weigh(
    buffer: RolloutBuffer,
    *,
    method: MethodSection,
    rewards: Sequence[Reward],
    names: Sequence[str],
    minibatches: int,
    max_completion_tokens: int,
    processes: Processes,
) -> None:
    """Gives the buffer its advantages, computed over the groups of all processes, its denominators and its metrics."""
    weights = [r.weight for r in rewards]
    digests = processes.gather(digest(buffer, rewards, method))
    sizes = [len(group) for d in digests for group in d.rewards]
    prompt = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)], dtype=torch.int64)
    matrix = torch.tensor([row for d in digests for group in d.rewards for row in group], dtype=torch.float64)
    gated = gated_advantages(
        method,
        matrix.reshape(len(prompt), len(rewards)),
        prompt,
        [route for d in digests for route in d.routes],
        weights=weights,
        right=torch.tensor([value for d in digests for value in d.right], dtype=torch.float64),
        lengths=torch.tensor([n for d in digests for group in d.lengths for n in group], dtype=torch.int64),
        max_completion_tokens=max_completion_tokens,
        sequence_kl=_all_or_none([d.sequence_kl for d in digests]),
    )
    dead = dead_groups(method, gated.samples, prompt)
    first_group = sum(len(d.rewards) for d in digests[: processes.rank])
    own_groups, own = slice(first_group, first_group + len(buffer.groups)), sum(sizes[:first_group])
    sampled = torch.tensor(buffer.sampled, dtype=torch.bool)
    has_demonstration = torch.tensor(
        [buffer.demonstration(i) is not None for i in range(len(buffer.groups))], dtype=torch.bool
    )
    buffer.advantage[sampled] = gated.samples[own : own + int(sampled.sum())].float()
    buffer.advantage[~sampled] = gated.demonstrations[own_groups][has_demonstration].float()
    own_dead = [True] * len(buffer.groups) if not len(prompt) else dead[own_groups].tolist()
    routes = digests[processes.rank].routes
    buffer.dead = tuple(is_dead or not route.samples for is_dead, route in zip(own_dead, routes, strict=True))
    buffer.counts = _counts(digests, minibatches, max_completion_tokens)
    buffer.metrics = {**_metrics(digests, matrix, names), **values(gated.metrics)}


def zero_variance_groups(groups: Sequence[Group], weights: Sequence[float], method: MethodSection) -> list[bool]:
    """By group: whether dynamic sampling replaces it, since all its known rewards are equal."""
    rewards = [weighted(scores, weights) for group in groups for scores in group.scores]
    prompt = [g for g, group in enumerate(groups) for _ in group.completions]
    matrix = torch.tensor(rewards, dtype=torch.float64).reshape(-1, len(weights))
    return groups_to_refill(method, matrix, torch.tensor(prompt), len(groups)).tolist()


def logged_metrics(logged: Mapping[str, float], processes: Processes) -> dict[str, float]:
    """`scores/<metric>`: what rewards gave to TRL's `log_metric`, the mean over processes (each with as many prompts) of the
    mean over calls, where something was given. Collective."""
    everyone = processes.gather(dict(logged))
    names = {name: None for part in everyone for name in part}
    return {f"scores/{name}": statistics.fmean(part[name] for part in everyone if name in part) for name in names}


def weighted(scores: Sequence[Score], weights: Sequence[float]) -> list[float]:
    """A completion's scores times their weights; NaN: not applicable. One failed score makes all of the completion's
    scores unknown, because a sum without the failed part would be a wrong reward in the group's baseline. So does one beyond
    LARGEST: its square would stay in running moments (a critic's whitening, a controller's spread) for ever."""
    products = [math.nan if s.value is None else w * s.value for w, s in zip(weights, scores, strict=True)]
    unknown = any(score.failed for score in scores) or any(abs(product) > LARGEST for product in products)
    return [math.nan] * len(products) if unknown else products


def _all_or_none(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _sequence_kl(buffer: RolloutBuffer, method: MethodSection) -> Tensor | None:
    """[S] the summed KL estimate of every completion, where the method takes it from the reward."""
    if not (method.kl_place == "reward" and method.critic is None):  # with a critic it is taken off token by token
        return None
    assert buffer.old_logp is not None and buffer.ref_logp is not None
    estimate = kl_estimate(method.kl.estimator, buffer.old_logp.double(), buffer.ref_logp.double())
    sequence = torch.arange(len(buffer.lengths)).repeat_interleave(torch.tensor(buffer.lengths))
    total = torch.zeros(len(buffer.lengths), dtype=torch.float64).index_add_(0, sequence, estimate)
    return total[torch.tensor(buffer.sampled)]


def _right(groups: Sequence[Group], rewards: Sequence[Reward], method: MethodSection) -> list[float]:
    """[S] whether each sample is right, as the gate judges it; NaN where that is not known."""
    if method.gate is None:
        return []
    judgements = [value for group in groups for value in accuracies(group, [r.accuracy for r in rewards])]
    judged = [right_of_known([value], method.gate.threshold) for value in judgements]
    return [float(right) if known else math.nan for right, known in judged]


def _counts(digests: Sequence[Digest], minibatches: int, max_completion_tokens: int) -> tuple[Counts, ...]:
    counts = [Counts(0, 0, 0, max_completion_tokens=max_completion_tokens)] * minibatches
    for d in digests:
        for i, (lengths, demonstration) in enumerate(zip(d.lengths, d.demonstrations, strict=True)):
            m = i * minibatches // len(d.lengths)
            counts[m] = replace(
                counts[m],
                tokens=counts[m].tokens + sum(lengths),
                sequences=counts[m].sequences + len(lengths),
                prompts=counts[m].prompts + 1,
                demonstrations=counts[m].demonstrations + (demonstration > 0),
                demonstration_tokens=counts[m].demonstration_tokens + demonstration,
            )
    return tuple(counts)


def _metrics(digests: Sequence[Digest], rewards: Tensor, names: Sequence[str]) -> dict[str, float]:
    lengths = [n for d in digests for group in d.lengths for n in group]
    truncated = [t for d in digests for group in d.truncated for t in group]
    if not lengths:  # nothing was sampled
        return {}
    total = rewards.nansum(dim=1)[~rewards.isnan().all(dim=1)]
    metrics = {
        "reward/mean": float(total.mean()) if len(total) else math.nan,
        "reward/std": float(total.std()) if len(total) > 1 else 0.0,
        "reward/min": float(total.min()) if len(total) else math.nan,
        "reward/max": float(total.max()) if len(total) else math.nan,
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
        for outcome in Outcome:
            count = outcomes[(r, outcome.value)]
            metrics[f"scores/{name}/{outcome.value}"] = float(count)
            failed += count if Score(outcome).failed else 0
    metrics["scores/failed_share"] = failed / max(1, len(raw) * len(names))
    return metrics

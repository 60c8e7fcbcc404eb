"""Held-out accuracy: avg@n and the unbiased pass@k, with its error bar and with everything that could not be judged."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlpost.errors import DataError, RecipeError
from rlpost.experience import Group, Outcome, Prompt, Score
from rlpost.recipe.sections.learner import EvaluationSection
from rlpost.recipe.sections.rollout import RolloutSection
from rlpost.rollout.engine import RolloutEngine, SamplingRequest, SamplingSettings
from rlpost.rollout.seeds import request_seed
from rlpost.teaching.verdict import accuracy, is_right


class Scorer(Protocol):
    """What evaluation asks of the scorer."""

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The groups with their scores filled in, in the same order."""
        ...


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What P held-out prompts with n completions each say about the policy.

    A completion's verdict is True, False or None (unknown: its scoring failed, or no accuracy reward applies to it).
    Unknown verdicts are left out of the accuracies, never taken for wrong, and counted. A figure is NaN where nothing
    is known.
    """

    groups: tuple[Group, ...]
    verdicts: tuple[tuple[bool | None, ...], ...]  # as the groups' completions
    accuracy: float  # avg@n: the mean over prompts of the share of right completions
    accuracy_stderr: float  # standard error of `accuracy` over prompts; with one completion a prompt, the binomial one
    pass_at_k: Mapping[int, float]  # the mean over prompts with at least k known verdicts
    reward: float  # the mean weighted reward of the completions that have one
    truncated: float  # share of completions cut at the token limit
    mean_length: float  # tokens per completion
    failed: int  # completions without a verdict because their scoring failed
    not_applicable: int  # completions without a verdict because no accuracy reward applies to them
    hung: int = 0  # completions that count as wrong because an accuracy reward hung on them (`timeout_score`)

    def metrics(self) -> dict[str, float]:
        """Flat `eval/...` numbers; figures that are not known are left out."""
        numbers = {
            "eval/accuracy": self.accuracy,
            "eval/accuracy_stderr": self.accuracy_stderr,
            **{f"eval/pass@{k}": value for k, value in self.pass_at_k.items()},
            "eval/reward": self.reward,
            "eval/truncated": self.truncated,
            "eval/mean_length": self.mean_length,
            "eval/failed": float(self.failed),
            "eval/not_applicable": float(self.not_applicable),
            **({"eval/hung": float(self.hung)} if self.hung else {}),
            "eval/prompts": float(len(self.groups)),
        }
        return {name: number for name, number in numbers.items() if not math.isnan(number)}


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that at least one of k completions is right, estimated without bias from c right ones of n.

    1 - C(n-c, k) / C(n, k): Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1. The
    binomials are exact integers, so there is no overflow. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def verdict(scores: Sequence[Score], accuracy_rewards: Sequence[bool], threshold: float) -> bool | None:
    """Whether a completion is right: its accuracy rewards, weighted 1 each, sum to at least `threshold`.

    None when one of them failed or none applies. Other rewards (format, length) have no say.
    """
    value = accuracy(scores, accuracy_rewards)
    return None if value is None else is_right(value, threshold)


def select_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """At most `count` prompts, in their order; the same ones for every seed, and spread over sorted data sets."""
    if count >= len(prompts):
        return list(prompts)
    return [prompts[i] for i in sorted(random.Random("evaluation").sample(range(len(prompts)), count))]


def sample_groups(
    engine: RolloutEngine, prompts: Sequence[Prompt], samples: int, settings: SamplingSettings, seed: int
) -> list[Group]:
    """`samples` completions of every prompt, not scored yet. The same seeds in every evaluation of a run."""
    requests = [
        SamplingRequest(prompt.token_ids, request_seed(seed, 0, prompt.id, sample))
        for prompt in prompts
        for sample in range(samples)
    ]
    completions = engine.sample(requests, settings)
    return [Group(prompt, tuple(completions[i * samples : (i + 1) * samples])) for i, prompt in enumerate(prompts)]


def evaluate(
    engine: RolloutEngine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    evaluation: EvaluationSection,
    rollout: RolloutSection,
    *,
    seed: int,
    weights: tuple[float, ...],
    accuracy_rewards: Sequence[bool],
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[list[Group]], list[Group]] = list,
) -> EvaluationResult:
    """Samples, scores and judges up to `evaluation.prompts` held-out prompts; greedy with one completion a prompt.

    `weights` and `accuracy_rewards` have one entry per reward function. With several processes each takes every
    `world_size`-th prompt, and `gather` returns the groups of all of them; all processes get the same result.
    Raises RecipeError when nothing could come of it: no accuracy reward, or a k above `evaluation.samples`.
    """
    _check(prompts, evaluation, accuracy_rewards)
    chosen = select_prompts(prompts, evaluation.prompts)
    settings = sampling_settings(evaluation, rollout)
    groups = sample_groups(engine, chosen[rank::world_size], evaluation.samples, settings, seed)
    everywhere = gather(list(scorer.score(groups)))
    place = {prompt.id: i for i, prompt in enumerate(chosen)}
    ordered = sorted(everywhere, key=lambda group: place[group.prompt.id])
    return summarise(ordered, evaluation, weights=weights, accuracy_rewards=accuracy_rewards)


def sampling_settings(evaluation: EvaluationSection, rollout: RolloutSection) -> SamplingSettings:
    """As in training, but greedy when `evaluation.samples` is 1, else at the evaluation's own temperature."""
    if evaluation.samples == 1:
        return SamplingSettings(rollout.max_completion_tokens, temperature=0.0, stop=rollout.stop)
    return SamplingSettings(
        rollout.max_completion_tokens, evaluation.temperature, rollout.top_p, rollout.top_k, rollout.stop
    )


def summarise(
    groups: Sequence[Group],
    evaluation: EvaluationSection,
    *,
    weights: tuple[float, ...],
    accuracy_rewards: Sequence[bool],
) -> EvaluationResult:
    """The figures of scored groups. Pure."""
    verdicts = tuple(
        tuple(verdict(scores, accuracy_rewards, evaluation.threshold) for scores in group.scores) for group in groups
    )
    tallies = [(len(known), sum(known)) for known in ([v for v in row if v is not None] for row in verdicts)]
    shares = [right / known for known, right in tallies if known]
    completions = [completion for group in groups for completion in group.completions]
    rewards = [group.reward(i, weights) for group in groups for i in range(len(group.completions))]
    unknown = [
        _scoring_failed(group.scores[i], accuracy_rewards)
        for group, row in zip(groups, verdicts, strict=True)
        for i, one in enumerate(row)
        if one is None
    ]
    return EvaluationResult(
        groups=tuple(groups),
        verdicts=verdicts,
        accuracy=_mean(shares),
        accuracy_stderr=_standard_error(shares),
        pass_at_k={k: _mean([pass_at_k(n, c, k) for n, c in tallies if n >= k]) for k in evaluation.k},
        reward=_mean([reward for reward in rewards if not math.isnan(reward)]),
        truncated=_mean([float(completion.truncated) for completion in completions]),
        mean_length=_mean([float(len(completion.token_ids)) for completion in completions]),
        failed=sum(unknown),
        not_applicable=len(unknown) - sum(unknown),
        hung=sum(_hung(scores, accuracy_rewards) for group in groups for scores in group.scores),
    )


def evaluation_rows(result: EvaluationResult, reward_names: Sequence[str]) -> list[dict[str, Any]]:
    """One JSON-ready object per completion: the prompt, what was answered, how it was judged, and why."""
    return [
        {
            "prompt_id": group.prompt.id,
            "sample": i,
            "prompt": group.prompt.text,
            "completion": completion.text,
            "tokens": len(completion.token_ids),
            "finish": completion.finish,
            "right": row[i],
            "rewards": _reward_record(group.scores[i], reward_names),
        }
        for group, row in zip(result.groups, result.verdicts, strict=True)
        for i, completion in enumerate(group.completions)
    ]


def _check(prompts: Sequence[Prompt], evaluation: EvaluationSection, accuracy_rewards: Sequence[bool]) -> None:
    if not prompts or evaluation.prompts == 0:
        raise DataError(
            "There are no held-out prompts to evaluate on. Set data.held_out or data.eval, and evaluation.prompts "
            "above 0; or switch evaluation off with evaluation.prompts: 0."
        )
    if not any(accuracy_rewards):
        raise RecipeError(
            "None of the `rewards` says whether an answer is right (`accuracy: true`), so accuracy cannot be "
            "measured. Mark one, or switch evaluation off with evaluation.prompts: 0."
        )
    if max(evaluation.k, default=1) > evaluation.samples:
        raise RecipeError(
            f"evaluation.k asks for pass@{max(evaluation.k)}, but evaluation.samples is {evaluation.samples}: pass@k needs "
            "at least k completions per prompt. Raise evaluation.samples or lower evaluation.k."
        )


def _reward_record(scores: Sequence[Score], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        name: {"value": score.value, "outcome": score.outcome.value, "detail": score.detail}
        for name, score in zip(names, scores, strict=True)
    }


def _scoring_failed(scores: Sequence[Score], accuracy_rewards: Sequence[bool]) -> bool:
    return any(score.failed for score, counts in zip(scores, accuracy_rewards, strict=True) if counts)


def _hung(scores: Sequence[Score], accuracy_rewards: Sequence[bool]) -> bool:
    return any(s.outcome is Outcome.HUNG for s, counts in zip(scores, accuracy_rewards, strict=True) if counts)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _standard_error(shares: Sequence[float]) -> float:
    """Over prompts, as completions of one prompt are not independent; for shares of 0 and 1, sqrt(p (1 - p) / P)."""
    mean = _mean(shares)
    return math.sqrt(_mean([(share - mean) ** 2 for share in shares]) / len(shares)) if shares else math.nan

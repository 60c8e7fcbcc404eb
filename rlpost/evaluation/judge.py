"""Judges a policy on held-out prompts (the weights in the rollout engine) or preference pairs; each process takes its share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlpost.evaluation.accuracy import EvaluationResult, evaluate
from rlpost.experience import Group, Prompt, TokenRows
from rlpost.gradient.metrics import Metric, merge, values
from rlpost.learner.buffer import RolloutBuffer
from rlpost.learner.optimizer import total_optimizer_steps
from rlpost.learner.process import Processes
from rlpost.methods.dpo import pair_coefficients
from rlpost.policy.model import Policy
from rlpost.recipe.sections.preference import PairsSection
from rlpost.recipe.sections.root import Recipe
from rlpost.rollout.engine import RolloutEngine
from rlpost.scoring.factory import GroupScorer


@dataclass(frozen=True, slots=True)
class JointScorer:
    """Scores on all processes at once: a reward that breaks on one of them ends all."""

    scorer: GroupScorer
    processes: Processes
    step: int = 0
    max_steps: int = 0

    def score(self, groups: Sequence[Group]) -> list[Group]:
        return self.processes.together(lambda: self.scorer.score(groups, self.step, self.max_steps))


def judge(
    recipe: Recipe,
    engine: RolloutEngine,
    scorer: GroupScorer,
    held_out: Sequence[Prompt],
    processes: Processes,
    step: int = 0,
) -> EvaluationResult:
    """Held-out accuracy of the weights in the engine, those of optimizer step `step`; each process takes its share of the
    prompts."""
    return evaluate(
        engine,
        JointScorer(scorer, processes, step, total_optimizer_steps(recipe.learner)),
        held_out,
        recipe.evaluation,
        recipe.rollout,
        seed=recipe.seed,
        weights=tuple(r.weight for r in recipe.rewards),
        accuracy_rewards=[r.accuracy for r in recipe.rewards],
        rank=processes.rank,
        world_size=processes.world,
        gather=lambda groups: [group for part in processes.gather(groups) for group in part],
    )


def judge_pairs(
    settings: PairsSection, policy: Policy, buffer: RolloutBuffer, rows: Sequence[TokenRows], processes: Processes
) -> dict[str, float]:
    """Loss, accuracy, margins and log-probs of all processes' pairs under `policy`, without their prefix; collective."""
    arrays, metrics = buffer.arrays(processes.device), list[dict[str, Metric]]()
    with torch.no_grad():
        for batch in policy.passes(rows):
            output = policy(batch)
            if batch.useful_tokens:
                view, _ = arrays.view(batch, output)
                metrics.append(pair_coefficients(settings, view, buffer.counts[0]).metrics)
    merged = values(merge(part for one in processes.gather(metrics) for part in one))
    return {name.removeprefix("pairs/").removeprefix("policy/"): value for name, value in merged.items()}

"""The part of the loop that knows worked solutions: guidance, then the gate, on this process's groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rlpost.data.demonstrations import DemonstrationReader
from rlpost.data.hints import Hinter
from rlpost.experience import Group
from rlpost.gradient.metrics import merge, values
from rlpost.learner.process import Processes
from rlpost.methods.hpt import needs_samples
from rlpost.recipe.sections.root import Recipe
from rlpost.teaching.gate import Gated, gate
from rlpost.teaching.guide import Guided, Sample, Score, guide, trained_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Teaching:
    """A rollout's groups with what came of the solutions."""

    groups: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)  # over all processes
    hint_levels: dict[str, int] = field(default_factory=dict)  # what changes in the run's memory, of all processes
    levels: tuple[int, ...] = ()  # by group: the hint's level that it was sampled at; () without guidance


class Teacher:
    """Guides and gates, as the recipe's method says. Collective calls: all processes make them alike."""

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int | None, processes: Processes
    ) -> None:
        """`context` is the model's context window in tokens, None where it is not known."""
        self.recipe, self.processes = recipe, processes
        self.accuracy_rewards = tuple(r.accuracy for r in recipe.rewards)
        self.hinter = make_hinter(recipe, tokenizer, context)
        self.reader = make_reader(recipe, tokenizer, context)

    def samples_in(self, rollout: int) -> bool:
        """Whether rollout number `rollout` is sampled at all."""
        return needs_samples(self.recipe.method.gate, rollout)

    def guide(
        self, groups: list[Group], *, sample: Sample, score: Score, rollout: int, memory: Mapping[str, int]
    ) -> Teaching:
        """The groups after GHPO's escalation. `sample` and `score` are local to the process."""
        guidance, hinter = self.recipe.method.guidance, self.hinter
        if guidance is None or hinter is None:
            return Teaching(groups)

        def escalate() -> Guided:
            return guide(
                groups,
                guidance,
                sample=sample,
                score=score,
                hint=hinter,
                accuracy_rewards=self.accuracy_rewards,
                rollout=rollout,
                rollouts=self.recipe.learner.rollouts,
                memory=memory,
            )

        guided = self.processes.together(escalate)
        everyone = self.processes.gather((guided.metrics, guided.first_levels))
        changes = {name: level for _, own_levels in everyone for name, level in own_levels.items()}
        return Teaching(guided.groups, values(merge(metrics for metrics, _ in everyone)), changes, tuple(guided.levels))

    def refilled(self, before: Teaching, groups: list[Group]) -> Teaching:
        """With dynamic sampling's `groups` in the places of flat ones, and the figures of what is trained on of these."""
        guidance = self.recipe.method.guidance
        if guidance is None:
            return replace(before, groups=groups)
        old = zip(groups, before.groups, before.levels, strict=True)
        levels = tuple(level if new is before else 0 for new, before, level in old)
        own = trained_metrics(groups, levels, guidance, self.accuracy_rewards)
        metrics = values(merge(self.processes.gather(own)))
        return replace(before, groups=groups, levels=levels, metrics=before.metrics | metrics)

    def gate(self, groups: Sequence[Group], rollout: int) -> tuple[Gated | None, dict[str, float]]:
        """Where the groups go, and the gate's metrics over all processes; (None, {}) without a gate."""
        settings = self.recipe.method.gate
        if settings is None:
            return None, {}
        gated = gate(groups, settings, accuracy_rewards=self.accuracy_rewards, rollout=rollout, read=self.reader)
        return gated, values(merge(self.processes.gather(gated.metrics)))


def make_reader(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int | None) -> DemonstrationReader:
    """What makes a recipe's worked solutions into tokens."""
    return DemonstrationReader(tokenizer, recipe.demonstration_limit, context, recipe.data.template_options)


def make_hinter(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Hinter | None:
    """What makes a recipe's hinted prompts; None without guidance."""
    guidance, limit = recipe.method.guidance, recipe.data.max_prompt_tokens
    if context is not None:
        limit = min(limit, context - recipe.rollout.max_completion_tokens)
    return None if guidance is None else Hinter(guidance, tokenizer, limit, recipe.data.template_options)

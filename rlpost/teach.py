"""The part of the loop that knows worked solutions: guidance, then the gate, on this process's groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlpost.data.demonstrations import DemonstrationReader, demonstration_limit
from rlpost.data.hints import Hinter
from rlpost.experience import Group
from rlpost.gate import Gated, gate
from rlpost.gradient.metrics import merge, values
from rlpost.guide import Guided, Sample, Score, guide
from rlpost.learner.process import Processes
from rlpost.methods.hpt import needs_samples
from rlpost.recipe.root import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Teaching:
    """A rollout's groups with what came of the solutions."""

    groups: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)  # over all processes
    hint_levels: dict[str, int] = field(default_factory=dict)  # what changes in the run's memory, of all processes


class Teacher:
    """Guides and gates, as the recipe's method says. Collective calls: all processes make them alike."""

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int | None, processes: Processes
    ) -> None:
        """`context` is the model's context window in tokens, None where it is not known."""
        self.recipe, self.processes = recipe, processes
        self.accuracy_rewards = tuple(r.accuracy for r in recipe.rewards)
        limit, guidance = recipe.data.max_prompt_tokens, recipe.method.guidance
        if context is not None:
            limit = min(limit, context - recipe.rollout.max_completion_tokens)
        self.hinter = None if guidance is None else Hinter(guidance, tokenizer, limit, recipe.data.template_options)
        self.reader = reader(recipe, tokenizer)

    def samples_in(self, rollout: int) -> bool:
        """Whether rollout number `rollout` is sampled at all."""
        return needs_samples(self.recipe.method.gate, rollout)

    def guide(
        self, groups: list[Group], *, sample: Sample, score: Score, rollout: int, memory: Mapping[str, int]
    ) -> Teaching:
        """The groups after GHPO's escalation. `sample` and `score` are local to the process."""
        section, hinter = self.recipe.method.guidance, self.hinter
        if section is None or hinter is None:
            return Teaching(groups)

        def escalate() -> Guided:
            return guide(
                groups,
                section,
                sample=sample,
                score=score,
                hint=hinter,
                accuracy_rewards=self.accuracy_rewards,
                rollout=rollout,
                rollouts=self.recipe.learner.steps,
                memory=memory,
            )

        guided = self.processes.together(escalate)
        everyone = self.processes.gather((guided.metrics, guided.first_levels))
        changes = {name: level for _, found in everyone for name, level in found.items()}
        return Teaching(guided.groups, values(merge(metrics for metrics, _ in everyone)), changes)

    def gate(self, groups: Sequence[Group], rollout: int) -> tuple[Gated | None, dict[str, float]]:
        """Where the groups go, and the gate's metrics over all processes; (None, {}) without a gate."""
        section = self.recipe.method.gate
        if section is None:
            return None, {}
        gated = gate(groups, section, accuracy_rewards=self.accuracy_rewards, rollout=rollout, read=self.reader)
        return gated, values(merge(self.processes.gather(gated.metrics)))


def reader(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> DemonstrationReader:
    """What makes a recipe's worked solutions into tokens."""
    return DemonstrationReader(tokenizer, demonstration_limit(recipe.data, recipe.rollout.max_completion_tokens))

"""From prompts to scored groups: draw -> sample -> score -> guide -> refill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING

from rlpost.experience import Group, Prompt
from rlpost.learner.optimizer import total_optimizer_steps
from rlpost.rollout.sampler import sample_groups
from rlpost.source.shares import own_places
from rlpost.source.weigh import logged_metrics, zero_variance_groups
from rlpost.teaching.teacher import Teacher, Teaching

if TYPE_CHECKING:
    from rlpost.run.parts import Parts


class Collector:
    """Makes a rollout's scored groups with the weights that are in the engine; the learner takes no part."""

    def __init__(self, parts: Parts, draw: Callable[[int], list[int]]) -> None:
        """`draw`: gives the next k prompts, over all processes."""
        self.parts, self.draw = parts, draw
        self.teacher = Teacher(parts.recipe, parts.tokenizer, parts.learner.policy.context_window, parts.processes)
        self.rollout = 0  # the one being made
        self.memory: Mapping[str, int] = {}

    def collect(self, rollout: int, memory: Mapping[str, int]) -> Teaching:
        """Rollout `rollout` on this process: sampled, scored, guided where it is hard, replaced where all earned alike.

        `memory`: GHPO's hint levels by prompt id, as they were when the rollout was begun.
        """
        return self.finish(self.begin(rollout), rollout, memory)

    def begin(self, rollout: int) -> list[Group]:
        """The rollout's prompts on this process with their first samples, not scored; no samples where it needs none."""
        self.rollout = rollout
        prompts = self._own_prompts()
        if not self.teacher.samples_in(rollout):
            return [Group(prompt, ()) for prompt in prompts]
        return self.parts.phase("rollout", lambda: self._sample_together(prompts))

    def finish(self, groups: list[Group], rollout: int, memory: Mapping[str, int]) -> Teaching:
        """What becomes of the groups that `begin` gave. `rollout`, `memory`: as in `collect`."""
        self.rollout, self.memory = rollout, memory
        if not self.teacher.samples_in(rollout):
            return Teaching(groups)
        parts = self.parts
        groups = parts.phase("score", lambda: self._score_together(groups))
        logged = logged_metrics(parts.scorer.logged, parts.processes)  # before more is scored
        teaching = parts.phase("guide", lambda: self._guide(groups)) if self.teacher.hinter else Teaching(groups)
        groups, refill = self._refill(teaching.groups)
        teaching = self.teacher.refilled(teaching, groups) if refill else teaching
        return replace(teaching, metrics=teaching.metrics | refill | logged)

    def _own_prompts(self) -> list[Prompt]:
        indices = self.draw(self.parts.recipe.rollout.prompts_per_step)
        return [self.parts.prompts[indices[place]] for place in own_places(self.parts.recipe, self.parts.processes)]

    def _sample_together(self, prompts: Sequence[Prompt], level: int = 0) -> list[Group]:
        """G completions of each prompt, on all processes at once. Groups are begun to be scored while others are sampled."""
        last = total_optimizer_steps(self.parts.recipe.learner)

        def finished(group: Group) -> None:
            self.parts.scorer.ahead(group, self.parts.optimizer_step, last)

        return self.parts.processes.together(lambda: self._sample(prompts, level, finished))

    def _sample(
        self, prompts: Sequence[Prompt], level: int = 0, finished: Callable[[Group], None] | None = None
    ) -> list[Group]:
        """The same on this process alone; without `finished` nothing is begun to be scored."""
        parts, recipe = self.parts, self.parts.recipe
        return sample_groups(
            parts.engine,
            prompts,
            recipe.rollout.completions_per_prompt,
            parts.sampling,
            run_seed=recipe.seed,
            step=self.rollout,
            level=level,
            finished=finished,
        )

    def _score_together(self, groups: Sequence[Group], *, more: bool = False) -> list[Group]:
        """The groups with their scores; on all processes at once. `more`: after others of the same rollout."""
        return self.parts.processes.together(lambda: self._score(groups, more=more))

    def _score(self, groups: Sequence[Group], *, more: bool = False) -> list[Group]:
        """The same on this process alone."""
        last = total_optimizer_steps(self.parts.recipe.learner)
        return self.parts.scorer.score(groups, self.parts.optimizer_step, last, more=more)

    def _guide(self, groups: list[Group]) -> Teaching:
        """GHPO: hard groups sampled again with hints."""
        return self.teacher.guide(
            groups,
            sample=self._sample,
            score=lambda sampled: self._score(sampled, more=True),
            rollout=self.rollout,
            memory=self.memory,
        )

    def _refill(self, groups: list[Group]) -> tuple[list[Group], dict[str, float]]:
        """DAPO's dynamic sampling: prompts whose completions all earned the same are replaced by the next ones."""
        parts, dynamic_sampling = self.parts, self.parts.recipe.method.dynamic_sampling
        if not dynamic_sampling.enabled:
            return groups, {}
        weights = tuple(r.weight for r in parts.recipe.rewards)
        places, rounds, replaced = own_places(parts.recipe, parts.processes), 0, 0
        while rounds < dynamic_sampling.max_rounds:
            own = list(compress(places, zero_variance_groups(groups, weights, parts.recipe.method)))
            equal = sorted(place for part in parts.processes.gather(own) for place in part)
            if not equal:
                break
            rounds, replaced = rounds + 1, replaced + len(equal)
            fresh = dict(zip(equal, self.draw(len(equal)), strict=True))
            prompts = [parts.prompts[fresh[place]] for place in own]
            with parts.phases("rollout"):
                sampled = self._sample_together(prompts, rounds)
            with parts.phases("score"):
                scored = dict(zip(own, self._score_together(sampled, more=True), strict=True))
            groups = [scored.get(place, group) for place, group in zip(places, groups, strict=True)]
        return groups, {"dynamic_sampling/rounds": float(rounds), "dynamic_sampling/replaced": float(replaced)}

"""Learning from rewarded completions: draw -> sample -> score -> guide -> refill -> gate -> weigh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch

from rlpost.evaluation.judge import judge
from rlpost.experience import Group, Prompt
from rlpost.learner.actor_critic import old_values, weigh_tokens
from rlpost.learner.optimizer import total_optimizer_steps
from rlpost.methods.estimator import needs_reference
from rlpost.methods.safe import CrashState
from rlpost.rollout.sampler import sample_groups
from rlpost.source.shares import own_places
from rlpost.source.weigh import logged_metrics, open_buffer, weigh, zero_variance_groups
from rlpost.teaching.guide import remember
from rlpost.teaching.teacher import Teacher, Teaching
from rlpost.tracking.completions import ScoredRollout

if TYPE_CHECKING:
    from rlpost.learner.buffer import RolloutBuffer
    from rlpost.run.parts import Parts


class SampledSource:
    """The policy's own completions, scored by the rewards and weighed by the method. A `Source`."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.teacher = Teacher(parts.recipe, parts.tokenizer, parts.learner.policy.context_window, parts.processes)
        self.rollout = 0  # the one being made
        self.hint_levels: dict[str, int] = {}  # by prompt id: GHPO's memory of hard prompts
        self.crashes: dict[str, Any] = {}  # of the reward: a `CrashState` as plain numbers

    def next(self, rollout: int) -> RolloutBuffer:
        """The rollout with its advantages, and the log-probs that later updates compare with."""
        self.rollout = rollout
        teaching = self._scored_groups()
        gated, gating = self.teacher.gate(teaching.groups, rollout)
        minibatches = self.parts.recipe.learner.minibatches
        buffer = open_buffer(teaching.groups, step=rollout, minibatches=minibatches, gated=gated)
        buffer.hint_levels = teaching.hint_levels
        self._weigh_with_log_probs(buffer, teaching.metrics | gating)
        self._count_crashes(buffer)
        self.hint_levels = remember(self.hint_levels, buffer.hint_levels)
        return buffer

    def record(self, buffer: RolloutBuffer) -> ScoredRollout:
        """The rollout of all processes."""
        weights = tuple(r.weight for r in self.parts.recipe.rewards)
        advantages = buffer.advantage[torch.tensor(buffer.sampled, dtype=torch.bool)].split(
            [len(g.completions) for g in buffer.groups]
        )
        own = (
            buffer.groups,
            [[group.reward(i, weights) for i in range(len(group.completions))] for group in buffer.groups],
            [part.tolist() for part in advantages],
        )
        everyone = self.parts.processes.gather(own)
        return ScoredRollout(
            groups=[group for groups, _, _ in everyone for group in groups],
            rewards=[row for _, rows, _ in everyone for row in rows],
            reward_names=self.parts.scorer.names,
            advantages=[row for _, _, rows in everyone for row in rows],
        )

    def evaluate(self) -> tuple[float, dict[str, float]]:
        """Held-out accuracy of the policy as it stands in the engine; each process takes its share of the prompts."""
        parts = self.parts
        result = judge(parts.recipe, parts.engine, parts.scorer, parts.held_out, parts.processes, parts.optimizer_step)
        return result.accuracy, result.metrics()

    def state_dict(self) -> dict[str, Any]:
        return {
            "sampler": self.parts.sampler.state_dict(),
            "hint_levels": self.hint_levels,
            "crashes": self.crashes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parts.sampler.load_state_dict(state["sampler"])
        self.hint_levels, self.crashes = dict(state["hint_levels"]), dict(state["crashes"])

    def _scored_groups(self) -> Teaching:
        """This process's groups: sampled, scored, guided where they are hard, replaced where all earned alike."""
        parts, prompts = self.parts, self._own_prompts()
        if not self.teacher.samples_in(self.rollout):
            return Teaching([Group(prompt, ()) for prompt in prompts])
        groups = parts.phase("rollout", lambda: self._sample_together(prompts))
        groups = parts.phase("score", lambda: self._score_together(groups))
        logged = logged_metrics(parts.scorer.logged, parts.processes)  # before more is scored
        teaching = parts.phase("guide", lambda: self._guide(groups)) if self.teacher.hinter else Teaching(groups)
        groups, refill = self._refill(teaching.groups)
        teaching = self.teacher.refilled(teaching, groups) if refill else teaching
        return replace(teaching, metrics=teaching.metrics | refill | logged)

    def _own_prompts(self) -> list[Prompt]:
        indices = self.parts.sampler.next(self.parts.recipe.rollout.prompts_per_step)
        return [self.parts.prompts[indices[place]] for place in own_places(self.parts.recipe, self.parts.processes)]

    def _sample_together(self, prompts: Sequence[Prompt], level: int = 0) -> list[Group]:
        """G completions of each prompt, not scored yet; on all processes at once."""
        return self.parts.processes.together(lambda: self._sample(prompts, level))

    def _sample(self, prompts: Sequence[Prompt], level: int = 0) -> list[Group]:
        """The same on this process alone."""
        parts, recipe = self.parts, self.parts.recipe
        return sample_groups(
            parts.engine,
            prompts,
            recipe.rollout.completions_per_prompt,
            parts.sampling,
            run_seed=recipe.seed,
            step=self.rollout,
            level=level,
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
            memory=self.hint_levels,
        )

    def _refill(self, groups: list[Group]) -> tuple[list[Group], dict[str, float]]:
        """DAPO's dynamic sampling: prompts whose completions all earned the same are replaced by the next ones."""
        parts, section = self.parts, self.parts.recipe.method.dynamic_sampling
        if not section.enabled:
            return groups, {}
        weights = tuple(r.weight for r in parts.recipe.rewards)
        places, rounds, replaced = own_places(parts.recipe, parts.processes), 0, 0
        while rounds < section.max_rounds:
            own = list(compress(places, zero_variance_groups(groups, weights, parts.recipe.method)))
            equal = sorted(place for part in parts.processes.gather(own) for place in part)
            if not equal:
                break
            rounds, replaced = rounds + 1, replaced + len(equal)
            fresh = dict(zip(equal, parts.sampler.next(len(equal)), strict=True))
            prompts = [parts.prompts[fresh[place]] for place in own]
            with parts.phases("rollout"):
                sampled = self._sample_together(prompts, rounds)
            with parts.phases("score"):
                scored = dict(zip(own, self._score_together(sampled, more=True), strict=True))
            groups = [scored.get(place, group) for place, group in zip(places, groups, strict=True)]
        return groups, {"dynamic_sampling/rounds": float(rounds), "dynamic_sampling/replaced": float(replaced)}

    def _weigh_with_log_probs(self, buffer: RolloutBuffer, metrics: dict[str, float]) -> None:
        """Advantages, and log-probs of the reference and of the policy before its first update, where the method asks.

        KL in the reward and a critic's values say what completions are worth: log-probs come first there. Elsewhere they come
        after it is known which groups are dead, and those are left out.
        """
        parts, method, learner = self.parts, self.parts.recipe.method, self.parts.recipe.learner
        worth_needs_log_probs = method.kl_place == "reward" or parts.updater.actor_critic is not None

        def log_probs() -> None:
            if needs_reference(method):
                buffer.ref_logp = parts.phase("reference", lambda: parts.reference_logprobs(buffer))
            if worth_needs_log_probs or learner.steps_per_rollout > 1:
                parts.phase("old_logprobs", lambda: self._old_policy(buffer))

        if worth_needs_log_probs:
            log_probs()
        parts.phase("weigh", lambda: self._weigh(buffer))
        buffer.metrics |= metrics
        if not worth_needs_log_probs:
            log_probs()

    def _old_policy(self, buffer: RolloutBuffer) -> None:
        """Log-probs, and a critic's values, before the first update."""
        policy, critic = self.parts.learner.policy, self.parts.recipe.method.critic
        if critic is None:
            buffer.old_logp = self.parts.logprobs(buffer)
            return
        rows = self.parts.updater.rows(buffer, None)
        buffer.old_logp, buffer.old_values = old_values(policy, critic, rows, buffer.tokens)

    def _weigh(self, buffer: RolloutBuffer) -> None:
        parts, recipe = self.parts, self.parts.recipe
        weigh(
            buffer,
            method=recipe.method,
            rewards=recipe.rewards,
            names=parts.scorer.names,
            minibatches=recipe.learner.minibatches,
            max_completion_tokens=recipe.rollout.max_completion_tokens,
            processes=parts.processes,
        )
        actor_critic = parts.updater.actor_critic
        if actor_critic is None:
            return
        coefficient = actor_critic.begin_rollout(buffer, parts.processes)
        if recipe.method.critic is not None:
            # Without a centre and a scale the advantage is the shaped reward itself.
            weights = tuple(r.weight for r in recipe.rewards)
            raw = [group.reward(i, weights) for group in buffer.groups for i in range(len(group.completions))]
            known = ~torch.tensor(raw, dtype=torch.float64).isnan()
            rewards = buffer.advantage.double().where(known, torch.nan)
            weigh_tokens(buffer, actor_critic, rewards, coefficient, parts.processes)

    def _count_crashes(self, buffer: RolloutBuffer) -> None:
        """Takes the rollout's mean reward into the run's crash counter."""
        if "reward/mean" not in buffer.metrics:  # nothing was sampled
            return
        crashes = CrashState.from_dict(self.crashes).step(buffer.metrics["reward/mean"])
        self.crashes = crashes.to_dict()
        buffer.metrics |= crashes.metrics()

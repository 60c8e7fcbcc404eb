"""Learning from rewarded completions: collect -> gate -> weigh."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from rlpost.evaluation.judge import judge
from rlpost.learner.actor_critic import old_values, weigh_tokens
from rlpost.methods.estimator import needs_reference
from rlpost.methods.safe import CrashState
from rlpost.rollout.verify import precision
from rlpost.source.ages import age_metrics
from rlpost.source.ahead import Ahead
from rlpost.source.collects import Collects, InTurn
from rlpost.source.weigh import open_buffer, weigh
from rlpost.teaching.guide import remember
from rlpost.teaching.teacher import Teacher
from rlpost.tracking.completions import ScoredRollout

if TYPE_CHECKING:
    from rlpost.learner.buffer import RolloutBuffer
    from rlpost.run.parts import Parts


class SampledSource:
    """The policy's own completions, scored by the rewards and weighed by the method. A `Source`."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        rollout = parts.recipe.rollout
        self.rollouts: Collects = InTurn(parts)
        if rollout.staleness:
            self.rollouts = Ahead(parts, rollout.staleness, in_flight=rollout.in_flight)
        self.teacher = Teacher(parts.recipe, parts.tokenizer, parts.learner.policy.context_window, parts.processes)
        self.hint_levels: dict[str, int] = {}  # by prompt id: GHPO's memory of hard prompts
        self.crashes: dict[str, Any] = {}  # of the reward: a `CrashState` as plain numbers

    def next(self, rollout: int) -> RolloutBuffer:
        """The rollout with its advantages, and the log-probs that later updates compare with."""
        collected = self.rollouts.collect(rollout, self.hint_levels)
        teaching = collected.teaching
        self.hint_levels = remember(self.hint_levels, teaching.hint_levels)
        if not self.probes_first:
            self.ahead(rollout)
        gated, gating = self.teacher.gate(teaching.groups, rollout)
        minibatches = self.parts.recipe.learner.minibatches
        buffer = open_buffer(teaching.groups, step=rollout, minibatches=minibatches, gated=gated)
        self._weigh_with_log_probs(buffer, teaching.metrics | gating)
        self._count_crashes(buffer)
        if self.parts.recipe.rollout.staleness:
            buffer.metrics |= age_metrics(buffer.groups, self.parts.optimizer_step, self.parts.processes)
            buffer.metrics |= collected.metrics
        return buffer

    @property
    def probes_first(self) -> bool:
        """Whether the probe asks the engine about a rollout before others are sampled beside its learning."""
        recipe = self.parts.recipe
        return recipe.rollout.probe is not None and precision(recipe) == "float32" and not recipe.rollout.in_flight

    def ahead(self, rollout: int) -> None:
        self.rollouts.ahead(rollout, self.hint_levels)

    def settle(self) -> None:
        self.rollouts.settle()

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
        self.rollouts.rest()
        with parts.learner.parked():
            result = judge(
                parts.recipe, parts.engine, parts.scorer, parts.held_out, parts.processes, parts.optimizer_step
            )
        return result.accuracy, result.metrics()

    def bookmark(self) -> Callable[[], None]:
        go_back, hint_levels, crashes = self.rollouts.bookmark(), self.hint_levels, self.crashes

        def all_back() -> None:
            go_back()
            self.hint_levels, self.crashes = hint_levels, crashes

        return all_back

    def state_dict(self) -> dict[str, Any]:
        return {"sampler": self.rollouts.position(), "hint_levels": self.hint_levels, "crashes": self.crashes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rollouts.load(state["sampler"])
        self.hint_levels, self.crashes = dict(state["hint_levels"]), dict(state["crashes"])

    def own_state(self) -> Any:
        return self.rollouts.kept()

    def load_own_state(self, state: Any) -> None:
        self.rollouts.keep(state)

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

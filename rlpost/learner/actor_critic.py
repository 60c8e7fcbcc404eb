"""What actor-critic methods do around an optimizer step: old values, token advantages, the controller and its memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlpost.experience import TokenRows
from rlpost.gradient.gae import aggregate_values, value_coefficients, value_surrogate
from rlpost.gradient.kl import kl_estimate
from rlpost.gradient.metrics import Metric, mean_of, merge
from rlpost.gradient.metrics import values as metric_values
from rlpost.gradient.segments import mean_by
from rlpost.gradient.types import Counts
from rlpost.learner.buffer import RolloutBuffer
from rlpost.learner.process import Processes
from rlpost.methods.controllers import Decision, KlController, Observation, loss_coefficient, reward_coefficient
from rlpost.methods.ppo import (
    Moments,
    RewardWhitening,
    ValueStatistics,
    estimate,
    total_moments,
    value_metrics,
    value_weights,
    whiten_advantage,
)
from rlpost.policy.critic import read_places
from rlpost.policy.model import Policy
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.critic import CriticSection, penalty_place
from rlpost.recipe.sections.method import MethodSection


@dataclass(slots=True)
class ActorCritic:
    """The state that a critic and a controller add to a run."""

    method: MethodSection
    whitening: RewardWhitening | None = None
    controller: KlController | None = None
    # The newest measurements (kl, entropy, reward, reward_std) that the controller has not been given yet.
    seen: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, method: MethodSection) -> ActorCritic:
        critic, controller = method.critic, method.controller
        return cls(
            method,
            None if critic is None else RewardWhitening(critic),
            None if controller is None else KlController(controller),
        )

    def begin_rollout(self, buffer: RolloutBuffer, processes: Processes) -> float:
        """Measures KL of the fresh rollout; the coefficient of KL in the reward. Collective."""
        if self.controller is None:
            match self.method.kl.where:
                case "reward":
                    return self.method.kl.coefficient
                case "loss":
                    return 0.0
                case _:
                    raise unknown_choice("kl.where", self.method.kl.where)
        assert buffer.old_logp is not None and buffer.ref_logp is not None
        own = Moments.of(kl_estimate(self.method.kl.estimator, buffer.old_logp.double(), buffer.ref_logp.double()))
        total = total_moments(processes.gather(own))
        self.seen["kl"] = total.mean if total.count else math.nan
        self.seen |= {"reward": buffer.metrics["reward/mean"], "reward_std": buffer.metrics["reward/std"]}
        if penalty_place(self.controller.settings.term) == "loss":
            return 0.0
        decision = self._decide()
        buffer.metrics |= decision.metrics
        return reward_coefficient("reward", decision)

    def begin_step(self) -> Decision | None:
        """The controller's word on the coming optimizer step; None without one, or where it acts on rewards."""
        if self.controller is None or penalty_place(self.controller.settings.term) == "reward":
            return None
        return self._decide()

    def kl_coefficient(self, decision: Decision | None) -> float | None:
        """What replaces `kl.coefficient` in the loss of the step; None: nothing does."""
        if self.controller is None:
            return None
        return 0.0 if decision is None else loss_coefficient(self.controller.settings.term, decision)

    def end_step(self, metrics: dict[str, float]) -> None:
        """Takes note of what the step's forward passes measured, before its update."""
        self.seen["kl"] = metrics.get("policy/kl_penalised", math.nan)
        self.seen["entropy"] = metrics.get("policy/entropy", math.nan)

    def _decide(self) -> Decision:
        assert self.controller is not None
        names = ("kl", "entropy", "reward", "reward_std")
        observation = Observation(*(self.seen.get(name, math.nan) for name in names))
        # A rollout is observed at its first update only. Observed again at each of its updates, the same reward would look to
        # the controller like a reward that has stopped changing.
        for name in ("reward", "reward_std"):
            self.seen.pop(name, None)
        return self.controller.step(observation)

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": dict(self.seen),
            "whitening": None if self.whitening is None else self.whitening.state_dict(),
            "controller": None if self.controller is None else self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = dict(state["seen"])
        if self.whitening is not None:
            self.whitening.load_state_dict(state["whitening"])
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])


@torch.no_grad()
def old_values(
    policy: Policy, critic: CriticSection, micro_batches: Sequence[TokenRows], tokens: int
) -> tuple[Tensor, Tensor]:
    """(log-probs [N], every head's value [N, H]) on the CPU, of all completion tokens as policy and critic are now. With
    `level: sequence` a completion's value stands at each of its tokens. Collective like `Policy.passes`."""
    logp, values = torch.zeros(tokens), torch.zeros(tokens, critic.heads)
    for rows in policy.passes(micro_batches):
        output = policy(rows)
        if not rows.useful_tokens:
            continue
        index = rows.token_index.cpu()
        logp[index] = output.logp.float().cpu()
        of_rows = output.values.float().cpu()
        if not critic.per_token:
            _, local = torch.unique_consecutive(rows.sequence.cpu(), return_inverse=True)
            of_rows = of_rows[local]
        values[index] = of_rows
    return logp, values


def weigh_tokens(
    buffer: RolloutBuffer, state: ActorCritic, rewards: Tensor, kl_coefficient: float, processes: Processes
) -> None:
    """Gives the buffer a token's advantage and its value's target. `rewards` [S] are this process's shaped ones, NaN where
    unknown. Collective."""
    critic, old = state.method.critic, buffer.old_values
    assert critic is not None and state.whitening is not None and old is not None and buffer.old_logp is not None
    everyone = processes.gather(rewards)
    first = sum(len(part) for part in everyone[: processes.rank])
    reward = state.whitening(torch.cat(everyone))[first : first + len(rewards)]
    lengths = torch.tensor(buffer.lengths)
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    kl = None
    if kl_coefficient and buffer.ref_logp is not None:
        kl = kl_estimate(state.method.kl.estimator, buffer.old_logp.double(), buffer.ref_logp.double())
    value = aggregate_values(critic, old.double())
    estimated = estimate(critic, reward, value, sequence, kl=kl, kl_coefficient=kl_coefficient)
    parts = processes.gather(ValueStatistics.of(critic, estimated, value, sequence))
    statistics = sum(parts[1:], parts[0])
    buffer.token_advantage = whiten_advantage(critic, estimated, statistics.advantage).float()
    buffer.target, buffer.known = estimated.target.float(), estimated.known
    buffer.advantage = mean_by(buffer.token_advantage, sequence, len(lengths))
    buffer.dead = (False,) * len(buffer.groups)  # no group is dead: the critic learns from every completion
    size = merge(processes.gather({"advantage/mean_abs": mean_of(buffer.token_advantage.abs(), estimated.known)}))
    buffer.metrics |= {**statistics.metrics(), **metric_values(size)}  # replaces figures of advantages without a critic


def critic_loss(
    critic: CriticSection, buffer: RolloutBuffer, rows: TokenRows, values: Tensor, counts: Counts
) -> tuple[Tensor, dict[str, Metric]]:
    """The value loss of a micro-batch (a surrogate: its gradient counts), and its metrics. `values` [M, H] carry gradients."""
    assert buffer.old_values is not None and buffer.target is not None and buffer.known is not None
    index = rows.token_index.cpu()
    places = read_places(critic, rows.sequence.cpu())
    index = index if places is None else index[places]
    old = buffer.old_values[index].to(values.device)
    match critic.train:
        case "heads":
            pass
        case "aggregate":
            old = aggregate_values(critic, old)
        case _:
            raise unknown_choice("critic.train", critic.train)
    target, known = buffer.target[index].to(values.device), buffer.known[index].to(values.device)
    coefficients = value_coefficients(critic, values.detach(), old, target)
    weight = value_weights(critic, counts, known).to(values.dtype)
    return value_surrogate(coefficients, weight, values), value_metrics(critic, coefficients, values.detach(), known)

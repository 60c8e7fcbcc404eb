"""rlpost's update on a frozen rollout, with the layout, precision and head of one's choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.frozen import FrozenRollout, with_old_logprobs
from rlpost.gradient.ratio import importance_ratio
from rlpost.gradient.types import Coefficients, TokenView
from rlpost.learner.actor_critic import ActorCritic, old_values, weigh_tokens
from rlpost.learner.buffer import RolloutBuffer
from rlpost.learner.learner import DataParallelLearner, StepReport, token_logprobs
from rlpost.learner.process import Processes
from rlpost.learner.update import Updater
from rlpost.methods.capo import make_tracker
from rlpost.methods.estimator import compute_coefficients
from rlpost.policy.critic import make_critic
from rlpost.policy.head import HeadRequest, ScoringLinear
from rlpost.policy.model import load_policy
from rlpost.recipe.sections.critic import CriticSection
from rlpost.recipe.sections.learner import LearnerSection
from rlpost.recipe.sections.method import MethodSection, PpoClip
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.reward import RewardSection
from rlpost.source.weigh import open_buffer, weigh

Step = Callable[[int], dict[str, float]]


@dataclass(frozen=True, slots=True)
class RlpostSetting:
    """How the update is done; none of it changes the gradient."""

    layout: Literal["tree", "sorted", "padded"] = "tree"
    micro_batch_tokens: int = 4096
    skip_dead: bool = True
    autocast: Literal["bfloat16", "none"] = "bfloat16"
    dtype: Literal["float32", "bfloat16"] = "float32"
    head: Literal["chunked", "full"] = "chunked"
    head_chunk_tokens: int = 1024
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-6


class FullLogitsHead(ScoringLinear):
    """The usual head, for comparison: all logits [N, V] at once, log-softmax and entropy left to autograd."""

    def forward(self, input: Tensor, request: HeadRequest | None = None) -> Any:
        if request is None:
            return super().forward(input)
        logits = functional.linear(input, self.weight, self.bias).float()
        logq = torch.log_softmax(logits, -1)
        logp = logq.gather(-1, request.target[:, None]).squeeze(-1)
        return logp, -(logq.exp() * logq).sum(-1)


class GradientTap(DataParallelLearner):
    """Keeps a copy of the last step's gradients when told to."""

    keep = False
    gradients: dict[str, Tensor] | None = None

    def step(self, index: int, **options: Any) -> StepReport:
        if self.keep:
            named = self.policy.model.named_parameters()
            self.gradients = {n: p.grad.detach().clone() for n, p in named if p.grad is not None}
        return super().step(index, **options)


class RlpostSide:
    """A policy, its optimizer and one frozen rollout, from which any number of steps can be taken."""

    def __init__(
        self,
        model: str,
        rollout: FrozenRollout,
        setting: RlpostSetting,
        *,
        method: Mapping[str, Any],
        max_grad_norm: float | None = 1.0,
    ) -> None:
        self.setting, self.rollout = setting, rollout
        # The frozen rollout has no sampler: no correction for its numerics, on neither side.
        self.method = MethodSection.model_validate({"correction": {"action": "none"}, **method})
        self.processes = Processes()
        self.section = LearnerSection(
            learning_rate=setting.learning_rate,
            layout=setting.layout,
            micro_batch_tokens=setting.micro_batch_tokens,
            max_grad_norm=max_grad_norm,
            head_chunk_tokens=setting.head_chunk_tokens,
        )
        loaded = ModelSection(
            path=model,
            dtype=setting.dtype,
            autocast=setting.autocast,
            attention=setting.attention,
            gradient_checkpointing=setting.gradient_checkpointing,
        )
        self.policy = load_policy(
            loaded, model, device=self.processes.device, head_chunk_tokens=setting.head_chunk_tokens
        )
        if setting.head == "full":
            self.policy.causal_lm.get_output_embeddings().__class__ = FullLogitsHead
        self.learner = GradientTap(self.policy, self.section, self.processes)
        self.updater = self._updater(self.method)
        self.critic_state_bytes = 0
        self.buffer = self._buffer()

    def step(self, index: int = 0, updater: Updater | None = None) -> dict[str, float]:
        """Takes an optimizer step from the frozen rollout, as if it were new, and returns its metrics."""
        self.buffer.updates_done = 0
        return (updater or self.updater).update(self.buffer, index)

    def gradients(self) -> dict[str, Tensor]:
        """Takes a step and returns the gradients that it was taken with, unclipped, by parameter."""
        self.learner.keep = True
        self.step()
        assert self.learner.gradients is not None
        return self.learner.gradients

    def with_masks(self, masks: list[dict[str, Any]]) -> Updater:
        """Another updater of the same policy and optimizer, with the given `masks`."""
        return self._updater(self.method.model_copy(update={"masks": MethodSection(masks=masks).masks}))

    def with_critic(self, path: str, slots: Mapping[str, Any]) -> tuple[Step, Callable[[], None]]:
        """PPO with a critic on the same policy and optimizer: (an optimizer step, the pass that reads values before it).

        A separate critic starts from the model at `path`. Makes the learner anew, so call it before any step.
        """
        method = self.method.model_copy(update={"critic": CriticSection.model_validate(slots)})
        section, state = method.critic, ActorCritic.of(method)
        assert section is not None
        model = ModelSection(path=path, dtype=self.setting.dtype, autocast=self.setting.autocast)
        width = self.policy.config.get_text_config().hidden_size
        critic = make_critic(section, model, path, width, device=self.processes.device)
        self.policy.critic = critic
        self.learner = GradientTap(self.policy, self.section, self.processes)
        self.critic_state_bytes = sum(4 * p.numel() * p.element_size() for p in critic.parameters())
        updater, plain = self._updater(method, state), self.buffer
        buffer = replace(plain, groups=plain.groups)
        rewards = plain.advantage.double()

        def read() -> None:
            self.policy.critic = critic
            rows = updater.rows(buffer, None)
            buffer.old_logp, buffer.old_values = old_values(self.policy, section, rows, buffer.tokens)
            weigh_tokens(buffer, state, rewards, 0.0, self.processes)

        def take(index: int) -> dict[str, float]:
            self.policy.critic, buffer.updates_done = critic, 0
            return updater.update(buffer, index)

        return take, read

    def without_critic(self) -> tuple[Step, Callable[[], None]]:
        """The same without: an optimizer step, and nothing before it."""
        updater = self._updater(self.method)

        def leave_out() -> None:
            self.policy.critic = None

        return lambda index: self.step(index, updater), leave_out

    def drifted_logprobs(self, drift: float, seed: int = 0) -> FrozenRollout:
        """The rollout with log-probs of an older policy, against which rewarded tokens have become likelier and the others
        less likely, by half-normal noise: some ratios get clipped, and the loss is no sum of terms that cancel."""
        rows = self.updater.rows(self.buffer, None, skip_dead=False)
        logp = token_logprobs(self.policy, rows, self.buffer.tokens)
        noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(seed)).abs()
        towards = self.buffer.advantage.sign().repeat_interleave(torch.tensor(self.buffer.lengths))
        return with_old_logprobs(self.rollout, (logp - drift * towards * noise).tolist())

    @torch.no_grad()
    def surrogate(self) -> float:
        """The published objective's value (negated), which rlpost itself never computes: its loss has the same gradient
        but another value."""
        arrays, total = self.buffer.arrays(self.processes.device), 0.0
        for rows in self.updater.rows(self.buffer, 0):
            view, _ = arrays.view(rows, self.policy(rows))
            context = self.updater.context(0)
            coefficients = compute_coefficients(self.method, view, self.buffer.counts[0], context=context)
            total += surrogate_value(self.method, view, coefficients)
        return total

    def _updater(self, method: MethodSection, actor_critic: ActorCritic | None = None) -> Updater:
        head = self.policy.causal_lm.get_output_embeddings().weight
        return Updater(
            learner=self.learner,
            method=method,
            settings=self.section,
            layout=self.setting.layout,
            pad_id=0,
            probe=None,
            seed=0,
            curvature=make_tracker(method, head.shape[0], head.shape[1], device=self.processes.device),
            actor_critic=actor_critic,
        )

    def _buffer(self) -> RolloutBuffer:
        buffer = open_buffer(self.rollout.groups, step=0, minibatches=1)
        weigh(
            buffer,
            method=self.method,
            rewards=[RewardSection(function="frozen")],
            names=["frozen"],
            minibatches=1,
            max_completion_tokens=self.rollout.spec.max_completion_tokens,
            processes=self.processes,
        )
        if not self.setting.skip_dead:
            buffer.dead = (False,) * len(buffer.groups)
        if self.rollout.old_logprobs is not None:
            flat = [x for group in self.rollout.old_logprobs for tokens in group for x in tokens]
            buffer.old_logp = torch.tensor(flat)
        return buffer


def surrogate_value(method: MethodSection, view: TokenView, coefficients: Coefficients) -> float:
    """- sum of weight * min(r A, clip(r) A) (PPO, GRPO, DAPO, GSPO), or of weight * clip(r) A log pi (CISPO)."""
    ratio, clip, advantage = importance_ratio(method.ratio, view), method.clip, view.advantage
    if isinstance(clip, PpoClip):
        bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
        value = torch.minimum(ratio * advantage, bounded * advantage)
    else:
        value = coefficients.coefficient * view.logp
    return -float((coefficients.weight * value).double().sum())

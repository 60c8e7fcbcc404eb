"""One optimizer step: forward, coefficients, backward over the micro-batches of a minibatch, then the step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlpost.experience import TokenRows
from rlpost.gradient.correction import sampler_correction
from rlpost.gradient.loss import coefficient_loss
from rlpost.gradient.metrics import Mean, Metric, Total, merge, values
from rlpost.gradient.step import StepContext
from rlpost.learner.actor_critic import ActorCritic, critic_loss
from rlpost.learner.buffer import RolloutBuffer, micro_batches
from rlpost.learner.curvature_step import CurvatureStep
from rlpost.learner.learner import Learner, token_logprobs
from rlpost.learner.optimizer import later_rates, learning_rate
from rlpost.learner.pair_rows import pair_batches
from rlpost.methods.capo import CurvatureTracker
from rlpost.methods.controllers import Decision
from rlpost.methods.estimator import compute_coefficients, needs_statistics
from rlpost.policy.model import Policy
from rlpost.policy.rows import Layout
from rlpost.recipe.sections.learner import LearnerSection
from rlpost.recipe.sections.method import MethodSection
from rlpost.recipe.sections.rollout import ProbeSection
from rlpost.rollout.probe import ProbeResult, check, check_jump, remember


@dataclass(frozen=True, slots=True)
class Updater:
    """Takes optimizer steps from a rollout buffer."""

    learner: Learner
    method: MethodSection
    settings: LearnerSection
    layout: Layout
    pad_id: int
    probe: ProbeSection | None
    seed: int
    curvature: CurvatureTracker | None = None
    actor_critic: ActorCritic | None = None
    exact_engine: bool = False  # learner and engine compute in float32
    probed: list[ProbeResult] = field(default_factory=list)  # the last that passed since this process started

    def rows(self, buffer: RolloutBuffer, minibatch: int | None, *, skip_dead: bool = True) -> list[TokenRows]:
        """The micro-batches of a minibatch (None: of the whole rollout)."""
        make = micro_batches if self.method.pairs is None else pair_batches
        return make(
            buffer.row_groups(minibatch, skip_dead=skip_dead),
            layout=self.layout,
            micro_batch_tokens=self.settings.micro_batch_tokens,
            pad_id=self.pad_id,
        )

    def logprobs(self, buffer: RolloutBuffer, policy: Policy) -> Tensor:
        """Log-probs [N] of the rollout under `policy`; 0 for the tokens of dead groups. Collective like `Policy.passes`."""
        return token_logprobs(policy, self.rows(buffer, None), buffer.tokens)

    def update(self, buffer: RolloutBuffer, optimizer_step: int) -> dict[str, float]:
        """Takes optimizer step `optimizer_step` of the run from the buffer's next minibatch; returns its metrics.

        Raises RolloutError when the engine's log-probs are too far from the learner's: then its weights are not ours.
        """
        minibatch = buffer.updates_done % self.settings.minibatches
        rows = self.rows(buffer, minibatch)
        decision = None if self.actor_critic is None else self.actor_critic.begin_step()
        context = self.context(optimizer_step, decision)
        curvature_step = None if self.curvature is None else CurvatureStep(self.curvature, context)
        parts = self._accumulate(buffer, rows, minibatch, context, curvature_step)
        metrics = values(merge(self.learner.processes.gather(merge(parts))))
        if self.probe is not None and buffer.updates_done == 0 and buffer.step % self.probe.every == 0:
            if "mismatch/mean_abs_gap" not in metrics and self.method.pairs is None:
                metrics |= values(merge(self.learner.processes.gather(self._look_at_dead_groups(buffer))))
            self._check_engine(metrics, self.probe, optimizer_step + 1)
        report = self.learner.step(
            optimizer_step,
            scale=1.0 if decision is None else decision.step_scale,
            critic_only=self._critic_only(buffer),
        )
        if self.actor_critic is not None:
            self.actor_critic.end_step(metrics)
            metrics |= {} if decision is None else decision.metrics
        if curvature_step is not None and report.skipped:
            curvature_step.forget()
        elif curvature_step is not None:
            metrics |= curvature_step.finish(self.learner.policy, self.learner.processes)
        buffer.updates_done += 1
        metrics["optimizer/grad_norm"] = report.grad_norm
        metrics["optimizer/learning_rate"] = report.learning_rate
        metrics["optimizer/skipped"] = float(report.skipped)
        metrics |= report.metrics
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers from step to step."""
        parts = {"curvature": self.curvature, "actor_critic": self.actor_critic}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        if self.curvature is not None:
            self.curvature.load_state_dict(state["curvature"])
        if self.actor_critic is not None:
            self.actor_critic.load_state_dict(state["actor_critic"])

    def context(self, optimizer_step: int, decision: Decision | None = None) -> StepContext:
        """What methods may know of an optimizer step."""
        controlled = self.actor_critic
        rule = self.learner.policy.rule
        calibrating = self.curvature is not None and self.curvature.calibrating
        return StepContext(
            learning_rate=learning_rate(self.settings, optimizer_step),
            optimizer_step=optimizer_step,
            seed=self.seed,
            later_rates=later_rates(self.settings, optimizer_step) if calibrating else (),
            logit_slope=rule.slope if rule.softcap is not None else rule.scale / rule.temperature,
            kl_coefficient=None if controlled is None else controlled.kl_coefficient(decision),
            curvature=self.curvature,
        )

    def _critic_only(self, buffer: RolloutBuffer) -> bool:
        """Whether the policy stands still (`critic.warmup_rollouts`)."""
        return self.method.critic is not None and buffer.step < self.method.critic.warmup_rollouts

    @torch.no_grad()
    def _look_at_dead_groups(self, buffer: RolloutBuffer) -> dict[str, Metric]:
        """What the probe looks at where every group of the step is dead and nothing was computed: this process's first group.

        Without it an engine with other weights would go unnoticed as long as no group has signal. Collective.
        """
        arrays = buffer.arrays(self.learner.processes.device)
        rows = micro_batches(
            buffer.row_groups(None, skip_dead=False)[:1],
            layout=self.layout,
            micro_batch_tokens=self.settings.micro_batch_tokens,
            pad_id=self.pad_id,
        )
        gaps_by_pass: list[dict[str, Metric]] = []
        for batch in self.learner.policy.passes(rows):
            output = self.learner.policy(batch)
            if batch.useful_tokens:
                view, _ = arrays.view(batch, output)
                mismatch = sampler_correction(self.method.correction, replace(view, old_logp=view.logp))[1]
                gaps = {name: mismatch[name] for name in ("mismatch/mean_abs_gap", "mismatch/max_abs_gap")}
                gaps_by_pass.append({**gaps, "tokens/probed": Total(batch.useful_tokens)})
        return merge(gaps_by_pass)

    def _check_engine(self, metrics: dict[str, float], probe: ProbeSection, step: int) -> None:
        """The samples' own log-probs are the probe: the engine reported them, the learner has just computed them."""
        gap = metrics.get("mismatch/mean_abs_gap")
        if gap is None:  # nothing was sampled
            return
        largest = metrics.get("mismatch/max_abs_gap", gap)

        def compare() -> None:
            check(result, float(probe.max_mean_gap), step=step, earlier=self.probed[-1] if self.probed else None)
            if self.exact_engine:
                check_jump(result, self.probed, step=step)

        result = ProbeResult(gap, largest, int(metrics.get("tokens/probed", metrics["tokens/useful"])))
        self.learner.processes.together(compare)
        remember(self.probed, result)

    def _accumulate(
        self,
        buffer: RolloutBuffer,
        rows: list[TokenRows],
        minibatch: int,
        context: StepContext,
        curvature_step: CurvatureStep | None,
    ) -> list[dict[str, Metric]]:
        processes = self.learner.processes
        arrays = buffer.arrays(processes.device)
        request = needs_statistics(self.method)
        passes = self.learner.policy.passes(rows)
        parts: list[dict[str, Metric]] = []
        for i, batch in enumerate(passes):
            output = self.learner.policy(batch, statistics=request)
            if not batch.useful_tokens:  # a pass only so that the other processes are not left waiting
                # Every output takes part, as in other passes: ZeRO-3 compares which modules run backward, and how often.
                nothing = (output.logp * 0.0).sum() + (output.entropy * 0.0).sum()
                nothing = nothing if output.values is None else nothing + (output.values * 0.0).sum()
                self.learner.backward(nothing, last=i == len(passes) - 1)
                continue
            view, group_tokens = arrays.view(batch, output)
            counts = replace(buffer.counts[minibatch], prompt_tokens=group_tokens)
            if curvature_step is None:
                coefficients = compute_coefficients(self.method, view, counts, context=context)
            else:
                coefficients = curvature_step.coefficients(self.method, batch, view, counts)
            loss = coefficient_loss(coefficients, output.logp, output.entropy)
            of_critic: dict[str, Metric] = {}
            if output.values is not None and self.method.critic is not None:
                critic = self.method.critic
                loss = loss * float(not self._critic_only(buffer))
                value_loss, of_critic = critic_loss(critic, buffer, batch, output.values, counts)
                loss = loss + value_loss
            value = float(loss.detach())
            # Zero times minus infinity: such a loss can have a finite gradient, which is not to be stepped on either.
            self.learner.backward(loss if math.isfinite(value) else loss * math.nan, last=i == len(passes) - 1)
            parts.append({**coefficients.metrics, **of_critic, **row_metrics(batch, value)})
        return parts or [row_metrics(None, 0.0)]


def row_metrics(rows: TokenRows | None, loss: float) -> dict[str, Metric]:
    """What a micro-batch cost."""
    size = 0 if rows is None else rows.input_ids.numel()
    return {
        "optimizer/loss": Total(loss),
        "tokens/useful": Total(0.0 if rows is None else rows.useful_tokens),
        "tokens/real": Total(0.0 if rows is None else rows.real_tokens),
        "tokens/padded": Total(float(size)),
        "tokens/micro_batches": Total(0.0 if rows is None else 1.0),
        "tokens/padding_share": Mean(0.0 if rows is None else size - rows.real_tokens, float(size)),
    }

"""The loop, as the papers write it: sample -> score -> guide -> weigh -> update -> sync -> report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlpost.errors import TrainingError
from rlpost.experience import Group, Prompt
from rlpost.learner.actor_critic import old_values, weigh_tokens
from rlpost.learner.curvature_check import mask_share
from rlpost.learner.learner import token_logprobs
from rlpost.learner.watch import Interrupt
from rlpost.methods.estimator import needs_reference
from rlpost.methods.safe import CrashState
from rlpost.rollout.sampler import sample_groups
from rlpost.run.assemble import Parts, assemble
from rlpost.run.state import RunState, load_checkpoint, save_checkpoint
from rlpost.run.weigh import flat_groups, open_buffer, weigh
from rlpost.teaching.guide import remember
from rlpost.teaching.teacher import Teacher, Teaching
from rlpost.tracking.completions import ScoredRollout
from rlpost.tracking.metrics import number, read_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from rlpost.learner.buffer import RolloutBuffer
    from rlpost.policy.model import Policy
    from rlpost.recipe.load import LoadedRecipe


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    run_dir: Path
    optimizer_steps: int
    interrupted: bool
    accuracy_before: float | None
    accuracy_after: float | None
    checkpoint: Path | None


def train(loaded: LoadedRecipe) -> RunResult:
    """Runs a recipe from its start, or from a checkpoint, to its end. Ctrl-C saves and returns."""
    parts = assemble(loaded)
    try:
        with Interrupt() as interrupt:
            return loop_for(parts)(parts, interrupt).run()
    except BaseException as error:
        parts.close(f"failed: {type(error).__name__}")
        raise


def loop_for(parts: Parts) -> type[Loop]:
    """The loop that the recipe asks for: on rewards, on a preference data set, or on pairs of what is sampled."""
    if parts.recipe.method.pairs is None:
        return Loop
    from rlpost.source.pairs import PairLoop, SampledPairLoop

    return PairLoop if parts.recipe.data.has_pairs else SampledPairLoop


class Loop:
    """One run. State that must survive is in `self.state`; everything else is rebuilt from the recipe."""

    def __init__(self, parts: Parts, interrupt: Interrupt) -> None:
        self.parts = parts
        self.interrupt = interrupt
        self.teacher = Teacher(parts.recipe, parts.tokenizer, parts.learner.policy.context_window, parts.processes)
        self.state = RunState()
        self.saved_step: int | None = None
        self.accuracy_after: float | None = None

    def run(self) -> RunResult:
        parts, recipe = self.parts, self.parts.recipe
        if parts.resume_from is not None:
            self.state = load_checkpoint(parts.resume_from, parts)
            self.saved_step = self.state.optimizer_step
            if self.finished_before():
                key = "steps" if recipe.learner.stop_after is None else "stop_after"
                parts.tracker.note(
                    f"This run is finished: it took its {recipe.learner.rollouts} rollouts before. Nothing was done. Raise "
                    f"learner.{key} to go on with it, or start another under a new name."
                )
                return self.end(interrupted=False)
        if self.state.sampler is None:
            self.state.sampler = parts.sampler.state_dict()
        parts.phase("sync", self.sync)
        if recipe.evaluation.at_start and self.state.accuracy_before is None and parts.held_out:
            self.state.accuracy_before = self.evaluate()
        interrupted = self.stop_asked()
        while not interrupted and self.state.rollout < recipe.learner.rollouts:
            interrupted = self.step()
        if not interrupted and recipe.evaluation.at_end and parts.held_out:
            self.accuracy_after = self.evaluate()
        self.save()
        return self.end(interrupted=interrupted)

    def finished_before(self) -> bool:
        """Whether the run taken up has made all its steps, and the evaluation after them."""
        parts, state = self.parts, self.state
        if state.rollout < parts.recipe.learner.rollouts:
            return False
        rows = read_metrics(parts.run.metrics, "eval") if parts.processes.is_main else []
        final = [number(row, "eval/accuracy") for row in rows if row["step"] == state.optimizer_step]
        final = parts.processes.gather(final)[0]
        self.accuracy_after = final[-1] if final else None
        return bool(final) or not (parts.recipe.evaluation.at_end and parts.held_out)

    def end(self, *, interrupted: bool) -> RunResult:
        """Ends all parts and says what came of the run."""
        parts, state = self.parts, self.state
        parts.phase("checkpoint", parts.store.wait)
        result = RunResult(
            run_dir=parts.run.path,
            optimizer_steps=state.optimizer_step,
            interrupted=interrupted,
            accuracy_before=state.accuracy_before,
            accuracy_after=self.accuracy_after,
            checkpoint=parts.store.latest(),
        )
        parts.close("interrupted" if interrupted else "finished")
        return result

    def step(self) -> bool:
        """One rollout and its optimizer steps. Returns whether the run is to stop now."""
        parts, learner = self.parts, self.parts.recipe.learner
        if self.state.buffer is None:
            critic = parts.updater.actor_critic
            before = None if critic is None else critic.state_dict()
            buffer = self.roll_out()
            if self.stop_asked():  # the sampler's state still stands before this rollout: it is drawn again on resume
                if critic is not None and before is not None:  # whitening and controller have seen its rewards
                    critic.load_state_dict(before)
                return True
            self.count_crashes(buffer)
            self.state.buffer, self.state.sampler = buffer, parts.sampler.state_dict()
            self.state.hint_levels = remember(self.state.hint_levels, buffer.hint_levels)
        buffer = self.state.buffer
        while buffer.updates_done < learner.minibatches * learner.epochs:
            self.update(buffer)
            if buffer.updates_done == learner.minibatches * learner.epochs:
                self.end_rollout()
            every = parts.recipe.checkpoint.every
            if every and self.state.optimizer_step % every == 0:
                self.save()
            if self.stop_asked():
                return True
        return False

    def roll_out(self) -> RolloutBuffer:
        """sample -> score -> guide -> weigh, and the log-probs that later updates compare with."""
        parts, recipe = self.parts, self.parts.recipe
        taught = self.scored_groups()
        gated, gating = self.teacher.gate(taught.groups, self.state.rollout)
        buffer = open_buffer(
            taught.groups, step=self.state.rollout, minibatches=recipe.learner.minibatches, gated=gated
        )
        buffer.hint_levels = taught.hint_levels
        # KL in the reward and values are needed before it is known what completions are worth, and which groups are dead.
        kl_first = recipe.method.kl_place == "reward" or parts.updater.actor_critic is not None
        if kl_first and needs_reference(recipe.method):
            buffer.ref_logp = parts.phase("reference", lambda: self.reference_logprobs(buffer))
        if kl_first:
            parts.phase("old_logprobs", lambda: self.old_policy(buffer))
        parts.phase("weigh", lambda: self.weigh(buffer))
        buffer.metrics |= taught.metrics | gating
        if needs_reference(recipe.method) and not kl_first:
            buffer.ref_logp = parts.phase("reference", lambda: self.reference_logprobs(buffer))
        if recipe.learner.minibatches * recipe.learner.epochs > 1 and not kl_first:
            buffer.old_logp = parts.phase("old_logprobs", lambda: self.logprobs(buffer, parts.learner.policy))
        return buffer

    def count_crashes(self, buffer: RolloutBuffer) -> None:
        """Takes the rollout's mean reward into the run's crash counter."""
        if "reward/mean" not in buffer.metrics:  # nothing was sampled
            return
        crashes = CrashState.from_dict(self.state.crashes).step(buffer.metrics["reward/mean"])
        self.state.crashes = crashes.to_dict()
        buffer.metrics |= crashes.metrics()

    def scored_groups(self) -> Teaching:
        """This process's groups for the rollout: sampled, scored, guided where they are hard, replaced where they are flat."""
        parts, rollout, prompts = self.parts, self.state.rollout, self.own_prompts()
        if not self.teacher.samples_in(rollout):
            return Teaching([Group(prompt, ()) for prompt in prompts])
        groups = parts.phase("rollout", lambda: self.sample(prompts))
        groups = parts.phase("score", lambda: self.score(groups))
        logged = {f"scores/{name}": value for name, value in parts.scorer.logged.items()}
        guided = parts.phase("guide", lambda: self.guide(groups)) if self.teacher.hinter else Teaching(groups)
        groups, refill = self.refill(guided.groups)
        taught = self.teacher.refilled(guided, groups) if refill else guided
        return replace(taught, metrics=taught.metrics | refill | logged)

    def guide(self, groups: list[Group]) -> Teaching:
        """GHPO: hard groups sampled again with hints."""
        return self.teacher.guide(
            groups,
            sample=self.sample_here,
            score=lambda sampled: self.score_here(sampled, more=True),
            rollout=self.state.rollout,
            memory=self.state.hint_levels,
        )

    def own_prompts(self) -> list[Prompt]:
        """This process's share of the next prompts."""
        indices = self.parts.sampler.next(self.parts.recipe.rollout.prompts_per_step)
        return [self.parts.prompts[indices[place]] for place in self.places()]

    def places(self) -> list[int]:
        """Which of the rollout's P prompts are this process's: of every minibatch an equal part, so that minibatches hold
        the same prompts whatever the number of processes."""
        recipe, processes = self.parts.recipe, self.parts.processes
        per_minibatch = recipe.rollout.prompts_per_step // recipe.learner.minibatches
        share = per_minibatch // processes.world
        starts = [m * per_minibatch + processes.rank * share for m in range(recipe.learner.minibatches)]
        return [start + i for start in starts for i in range(share)]

    def sample(self, prompts: Sequence[Prompt], level: int = 0) -> list[Group]:
        """G completions of each prompt, not scored yet; on all processes at once."""
        return self.parts.processes.together(lambda: self.sample_here(prompts, level))

    def sample_here(self, prompts: Sequence[Prompt], level: int = 0) -> list[Group]:
        """The same on this process alone."""
        parts, recipe = self.parts, self.parts.recipe
        return sample_groups(
            parts.engine,
            prompts,
            recipe.rollout.completions_per_prompt,
            parts.sampling,
            run_seed=recipe.seed,
            step=self.state.rollout,
            level=level,
        )

    def score(self, groups: Sequence[Group], *, more: bool = False) -> list[Group]:
        """The groups with their scores; on all processes at once. `more`: after others of the same rollout."""
        return self.parts.processes.together(lambda: self.score_here(groups, more=more))

    def score_here(self, groups: Sequence[Group], *, more: bool = False) -> list[Group]:
        """The same on this process alone."""
        steps = self.parts.recipe.learner.steps
        return self.parts.scorer.score(groups, self.state.rollout, steps, more=more)

    def refill(self, groups: list[Group]) -> tuple[list[Group], dict[str, float]]:
        """DAPO's dynamic sampling: prompts whose completions all earned the same are replaced by the next ones."""
        parts, section = self.parts, self.parts.recipe.method.dynamic_sampling
        if not section.enabled:
            return groups, {}
        weights = tuple(r.weight for r in parts.recipe.rewards)
        places, rounds, replaced = self.places(), 0, 0
        while rounds < section.max_rounds:
            own = list(compress(places, flat_groups(groups, weights, parts.recipe.method)))
            flat = sorted(place for part in parts.processes.gather(own) for place in part)
            if not flat:
                break
            rounds, replaced = rounds + 1, replaced + len(flat)
            fresh = dict(zip(flat, parts.sampler.next(len(flat)), strict=True))
            with parts.phases("rollout"):
                sampled = self.sample([parts.prompts[fresh[place]] for place in own], rounds)
            with parts.phases("score"):
                found = dict(zip(own, self.score(sampled, more=True), strict=True))
            groups = [found.get(place, group) for place, group in zip(places, groups, strict=True)]
        return groups, {"dynamic_sampling/rounds": float(rounds), "dynamic_sampling/replaced": float(replaced)}

    def old_policy(self, buffer: RolloutBuffer) -> None:
        """Log-probs, and a critic's values, before the first update."""
        policy, critic = self.parts.learner.policy, self.parts.recipe.method.critic
        if critic is None:
            buffer.old_logp = self.logprobs(buffer, policy)
            return
        rows = self.parts.updater.rows(buffer, None)
        buffer.old_logp, buffer.old_values = old_values(policy, critic, rows, buffer.tokens)

    def weigh(self, buffer: RolloutBuffer) -> None:
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
        state = parts.updater.actor_critic
        if state is None:
            return
        coefficient = state.begin_rollout(buffer, parts.processes)
        if recipe.method.critic is not None:
            # Without a centre and a scale the advantage is the shaped reward itself.
            weights = tuple(r.weight for r in recipe.rewards)
            raw = [group.reward(i, weights) for group in buffer.groups for i in range(len(group.completions))]
            known = ~torch.tensor(raw, dtype=torch.float64).isnan()
            rewards = buffer.advantage.double().where(known, torch.nan)
            weigh_tokens(buffer, state, rewards, coefficient, parts.processes)

    def logprobs(self, buffer: RolloutBuffer, policy: Policy) -> Tensor:
        """Log-probs [N] of the rollout under `policy`; 0 for the tokens of dead groups."""
        return token_logprobs(policy, self.parts.updater.rows(buffer, None), buffer.tokens)

    def reference_logprobs(self, buffer: RolloutBuffer) -> Tensor:
        """Log-probs [N] of the rollout under the policy before any training."""
        with self.parts.reference() as reference:
            return self.logprobs(buffer, reference)

    def update(self, buffer: RolloutBuffer) -> None:
        """One optimizer step, and its row in metrics.jsonl."""
        parts = self.parts
        first = buffer.updates_done == 0
        metrics = parts.phase("update", lambda: parts.updater.update(buffer, self.state.optimizer_step))
        self.state.optimizer_step += 1
        self.count_skipped(metrics)
        if buffer.updates_done == parts.recipe.learner.minibatches * parts.recipe.learner.epochs:
            parts.phase("sync", self.sync)
        seconds = parts.phases.take()
        row = {"rollout": float(buffer.step), **buffer.metrics, **metrics, **mask_share(metrics, seconds), **seconds}
        scored = self.scored_rollout(buffer) if first else None
        parts.processes.together(lambda: parts.tracker.step(self.state.optimizer_step, row, scored))
        self.guard()

    def scored_rollout(self, buffer: RolloutBuffer) -> ScoredRollout:
        """The rollout of all processes, for `completions/`."""
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

    def end_rollout(self) -> None:
        """The policy is what the next rollout will be sampled from."""
        self.state.buffer = None
        self.state.rollout += 1
        every = self.parts.recipe.evaluation.every
        if every and self.state.rollout % every == 0 and self.state.rollout < self.parts.recipe.learner.rollouts:
            self.evaluate()

    def count_skipped(self, metrics: dict[str, float]) -> None:
        """Takes note of whether the step was skipped."""
        skipped = bool(metrics["optimizer/skipped"])
        self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if skipped else 0
        self.state.skipped_steps += skipped
        metrics["optimizer/skipped_total"] = float(self.state.skipped_steps)

    def guard(self) -> None:
        """Stops a run that only takes skipped steps. Raises TrainingError."""
        limit = self.parts.recipe.learner.skip_nonfinite
        if self.state.skipped_in_a_row >= limit:
            latest = self.parts.store.latest()
            error = TrainingError(
                f"The loss or its gradient was not finite in {limit} optimizer steps in a row (learner.skip_nonfinite); "
                f"each was skipped, the weights are those of step {self.state.optimizer_step - limit}. "
                f"The last checkpoint is {latest or 'none'}. Lower learner.learning_rate, look at the rewards in "
                f"{self.parts.run.metrics}, or use model.dtype=float32; then start again with resume=auto."
            )
            self.parts.processes.fail(error)

    def sync(self) -> None:
        """The learner's weights into the engine, in place."""
        self.parts.engine.load_weights(self.parts.learner.named_weights())

    def evaluate(self) -> float:
        """Held-out accuracy, recorded."""
        result = self.parts.phase("eval", self.parts.evaluate)
        self.parts.phases.take()
        step, tracker = self.state.optimizer_step, self.parts.tracker
        self.parts.processes.together(lambda: tracker.evaluation(step, result.metrics()))
        return result.accuracy

    def save(self) -> None:
        """A checkpoint of the current optimizer step, unless there is one."""
        if self.saved_step == self.state.optimizer_step:
            return
        self.parts.tracker.sync()  # a checkpoint must not outlive the metrics of the steps before it
        self.parts.phase("checkpoint", lambda: save_checkpoint(self.parts, self.state))
        self.saved_step = self.state.optimizer_step

    def stop_asked(self) -> bool:
        """Whether any process was asked to stop."""
        return self.parts.processes.any(self.interrupt.requested)

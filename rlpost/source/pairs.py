"""Training on preference pairs: the loop with a pair source in place of sampling, or with pairs made of what was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlpost.data.pairs import Pair
from rlpost.errors import DataError
from rlpost.experience import Group
from rlpost.gradient.metrics import Metric, merge, values
from rlpost.gradient.types import Counts
from rlpost.learner.buffer import DemonstrationRow, RolloutBuffer
from rlpost.methods.dpo import best_and_worst, pair_coefficients
from rlpost.run.loop import Loop
from rlpost.source.reference import ReferenceTable, cache_path, read_cache, write_cache

if TYPE_CHECKING:
    from rlpost.experience import TokenRows
    from rlpost.learner.process import Processes
    from rlpost.policy.model import Policy
    from rlpost.recipe.sections.preference import PairsSection
    from rlpost.tracking.completions import ScoredRollout


def pair_group(pair: Pair) -> Group:
    """A pair as a group of two completions, chosen first."""
    return Group(pair, (pair.chosen, pair.rejected))


def open_pairs(
    groups: Sequence[Group],
    baselines: Sequence[tuple[int, ...] | None],
    *,
    step: int,
    minibatches: int,
    processes: Processes,
) -> RolloutBuffer:
    """The buffer of a step's pairs on this process, with the counts of all processes; collective.

    `groups` hold (chosen, rejected); `baselines` the initial model's responses. A preference is an advantage: 1 on chosen,
    -1 on rejected.
    """
    rows = tuple(
        None if ids is None else DemonstrationRow(group.prompt.token_ids, ids)
        for group, ids in zip(groups, baselines, strict=True)
    )
    sides = [side for row in rows for side in (1.0, -1.0, *([0.0] if row is not None else []))]
    minibatch = tuple(i * minibatches // max(1, len(groups)) for i in range(len(groups)))
    own = [Counts(0, 0, 0)] * minibatches
    for group, row, m in zip(groups, rows, minibatch, strict=True):
        held_up = len(group.completions[0].token_ids if row is None else row.token_ids)
        own[m] = _add(own[m], Counts(sum(len(c.token_ids) for c in group.completions), 2, 1, None, 0, 1, held_up))
    counts = [Counts(0, 0, 0)] * minibatches
    for part in processes.gather(own):
        counts = [_add(total, one) for total, one in zip(counts, part, strict=True)]
    return RolloutBuffer(
        step=step,
        groups=tuple(groups),
        minibatch=minibatch,
        dead=(False,) * len(groups),
        advantage=torch.tensor(sides, dtype=torch.float32),
        counts=tuple(counts),
        demonstrations=rows,
    )


def _add(a: Counts, b: Counts) -> Counts:
    return replace(
        a,
        tokens=a.tokens + b.tokens,
        sequences=a.sequences + b.sequences,
        prompts=a.prompts + b.prompts,
        demonstrations=a.demonstrations + b.demonstrations,
        demonstration_tokens=a.demonstration_tokens + b.demonstration_tokens,
    )


def judge_pairs(
    section: PairsSection, policy: Policy, buffer: RolloutBuffer, rows: Sequence[TokenRows], processes: Processes
) -> dict[str, float]:
    """Loss, accuracy, margins and log-probs of all processes' pairs under `policy`, without their prefix; collective."""
    arrays, found = buffer.arrays(processes.device), list[dict[str, Metric]]()
    with torch.no_grad():
        for batch in policy.passes(rows):
            output = policy(batch)
            if batch.useful_tokens:
                view, _ = arrays.view(batch, output)
                found.append(pair_coefficients(section, view, buffer.counts[0]).metrics)
    merged = values(merge(part for one in processes.gather(found) for part in one))
    return {name.removeprefix("pairs/").removeprefix("policy/"): value for name, value in merged.items()}


class PairLoop(Loop):
    """A run on a preference data set: no sampling, no rewards, reference log-probs from the cache."""

    _table: ReferenceTable | None = None
    _held_out_table: ReferenceTable | None = None

    def roll_out(self) -> RolloutBuffer:
        """The next pairs, with their reference log-probs."""
        parts, recipe = self.parts, self.parts.recipe
        table = self.table() if self._cached else None  # before the sampler moves on
        indices = parts.sampler.next(recipe.rollout.prompts_per_step)
        own = [indices[place] for place in self.places()]
        buffer = self.open(_pairs(parts.prompts, own), recipe.learner.minibatches)
        if table is not None:
            buffer.ref_logp = table.take(own)
        else:
            buffer.ref_logp = parts.phase("reference", lambda: self.reference_logprobs(buffer))
        buffer.metrics = {"data/epochs": parts.sampler.epochs}
        return buffer

    def open(self, pairs: Sequence[Pair], minibatches: int) -> RolloutBuffer:
        """This process's pairs as a buffer; collective."""
        initial = self.parts.recipe.method.pairs is not None and self.parts.recipe.method.pairs.baseline == "initial"
        return open_pairs(
            [pair_group(pair) for pair in pairs],
            [pair.baseline if initial else None for pair in pairs],
            step=self.state.rollout,
            minibatches=minibatches,
            processes=self.parts.processes,
        )

    def table(self) -> ReferenceTable:
        """The training pairs' reference log-probs."""
        if self._table is None:
            self._table = self.build_table(_pairs(self.parts.prompts), "training")
        return self._table

    def held_out_table(self) -> ReferenceTable:
        """The held-out pairs'."""
        if self._held_out_table is None:
            self._held_out_table = self.build_table(self.held_out(), "held-out")
        return self._held_out_table

    def held_out(self) -> list[Pair]:
        """The pairs that are evaluated on."""
        return _pairs(self.parts.held_out[: self.parts.recipe.evaluation.prompts])

    @property
    def _cached(self) -> bool:
        pairs = self.parts.recipe.method.pairs
        return pairs is None or pairs.reference == "cached"

    def build_table(self, pairs: Sequence[Pair], what: str) -> ReferenceTable:
        """From the cache, or computed: each process takes every world-th pair; collective."""
        parts, processes = self.parts, self.parts.processes
        path = cache_path(parts.recipe, parts.model_path, pairs)
        tokens = sum(len(ids) for pair in pairs for ids in pair.responses)
        found = processes.gather(read_cache(path, tokens) if processes.is_main else None)[0]
        if found is not None:
            parts.tracker.note(f"Reference log-probs of {len(pairs)} {what} pairs: read from {path}")
            return ReferenceTable.of(pairs, found)
        own = list(range(processes.rank, len(pairs), processes.world))
        buffer = self.open([pairs[i] for i in own], 1)
        logp = parts.phase("reference", lambda: self.reference_logprobs(buffer))
        flat = torch.zeros(tokens)
        empty = ReferenceTable.of(pairs, flat)
        for rank, part in enumerate(processes.gather(logp)):
            theirs = list(range(rank, len(pairs), processes.world))
            start = 0
            for i in theirs:
                size = empty.offsets[i + 1] - empty.offsets[i]
                flat[empty.offsets[i] : empty.offsets[i + 1]] = part[start : start + size]
                start += size
        problem = write_cache(path, flat) if processes.is_main else None
        if self._cached:
            parts.forget_reference()
        kept = f"kept in {path}" if problem is None else f"not kept: {problem}"
        parts.tracker.note(f"Reference log-probs of {len(pairs)} {what} pairs: computed, {kept}")
        return ReferenceTable.of(pairs, flat)

    def reference_logprobs(self, buffer: RolloutBuffer) -> Tensor:
        """Log-probs [N] under the policy before any training, which a fresh run's own policy still is at its first step."""
        parts = self.parts
        if parts.resume_from is None and self.state.optimizer_step == 0 and not parts.learner.policy.has_adapter:
            return self.logprobs(buffer, parts.learner.policy)
        with parts.reference() as reference:
            return self.logprobs(buffer, reference)

    def evaluate(self) -> float:
        """Held-out accuracy, margins and log-probs, recorded."""
        found = self.parts.phase("eval", self.judge)
        self.parts.phases.take()
        step, tracker = self.state.optimizer_step, self.parts.tracker
        self.parts.processes.together(lambda: tracker.evaluation(step, found))
        return found["accuracy"]

    def judge(self) -> dict[str, float]:
        """The metrics of the held-out pairs under the policy as it is; collective."""
        parts = self.parts
        section = parts.recipe.method.pairs
        assert section is not None  # the rules ask for it
        pairs, processes = self.held_out(), parts.processes
        own = list(range(processes.rank, len(pairs), processes.world))
        buffer = self.open([pairs[i] for i in own], 1)
        buffer.ref_logp = self.held_out_table().take(own)
        return judge_pairs(section, parts.learner.policy, buffer, parts.updater.rows(buffer, None), processes)

    def scored_rollout(self, buffer: RolloutBuffer) -> ScoredRollout | None:  # type: ignore[override]
        """Nothing was sampled."""
        return None


class SampledPairLoop(Loop):
    """Online RPO: completions are sampled and scored, and the best of each group is paired with its worst."""

    _sampled: RolloutBuffer | None = None

    def roll_out(self) -> RolloutBuffer:
        """sample -> score -> pair; the reference's log-probs are computed for the pairs alone."""
        parts, recipe = self.parts, self.parts.recipe
        section = recipe.method.pairs
        assert section is not None
        sampled = super().roll_out()
        self._sampled = sampled
        weights = tuple(r.weight for r in recipe.rewards)
        groups = [
            Group(group.prompt, tuple(group.completions[i] for i in sides), tuple(group.scores[i] for i in sides))
            for group in sampled.groups
            if (
                sides := best_and_worst(
                    [group.reward(i, weights) for i in range(len(group.completions))],
                    [c.token_ids for c in group.completions],
                    section.min_gap,
                )
            )
        ]
        buffer = open_pairs(
            groups,
            [None] * len(groups),
            step=sampled.step,
            minibatches=recipe.learner.minibatches,
            processes=parts.processes,
        )
        buffer.ref_logp = parts.phase("reference", lambda: self.reference_logprobs(buffer))
        made = sum(count.prompts for count in buffer.counts)
        prompts = sum(parts.processes.gather(len(sampled.groups)))
        buffer.metrics = sampled.metrics | {"pairs/made": float(made), "pairs/made_share": made / max(1, prompts)}
        return buffer

    def scored_rollout(self, buffer: RolloutBuffer) -> ScoredRollout:
        """All that was sampled, not only what became pairs; the pairs alone when the run was taken up in between."""
        return super().scored_rollout(self._sampled or buffer)


def _pairs(prompts: Sequence[object], indices: Sequence[int] | None = None) -> list[Pair]:
    """The prompts that a preference source gave, as what they are."""
    found = [prompts[i] for i in (range(len(prompts)) if indices is None else indices)]
    pairs = [prompt for prompt in found if isinstance(prompt, Pair)]
    if len(pairs) != len(found):
        raise DataError("data.train: a run on pairs needs a source of type `preference`.")
    return pairs

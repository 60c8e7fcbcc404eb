"""Learning from a preference data set: no sampling, no rewards, reference log-probs from the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlpost.data.pairs import Pair
from rlpost.errors import DataError
from rlpost.evaluation.judge import judge_pairs
from rlpost.source.pair_buffer import open_pairs, pair_group
from rlpost.source.reference import ReferenceTable, cache_path, read_cache, write_cache
from rlpost.source.shares import own_places

if TYPE_CHECKING:
    from torch import Tensor

    from rlpost.learner.buffer import RolloutBuffer
    from rlpost.run.parts import Parts


class PairSource:
    """The pairs of a data set, one rollout's share after the other. A `Source`."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._table: ReferenceTable | None = None
        self._held_out_table: ReferenceTable | None = None

    def next(self, rollout: int) -> RolloutBuffer:
        """The next pairs, with their reference log-probs."""
        parts, recipe = self.parts, self.parts.recipe
        table = self._training_table() if self._cached else None  # before the sampler moves on
        indices = parts.sampler.next(recipe.rollout.prompts_per_step)
        own = [indices[place] for place in own_places(recipe, parts.processes)]
        buffer = self._open(_pairs(parts.prompts, own), recipe.learner.minibatches, rollout)
        if table is not None:
            buffer.ref_logp = table.take(own)
        else:
            buffer.ref_logp = parts.phase("reference", lambda: self.reference_logprobs(buffer))
        buffer.metrics = {"data/epochs": parts.sampler.epochs}
        return buffer

    def record(self, buffer: RolloutBuffer) -> None:
        """Nothing was sampled."""
        return

    def evaluate(self) -> tuple[float, dict[str, float]]:
        """Accuracy, margins and log-probs of the held-out pairs under the policy as it is."""
        parts = self.parts
        settings = parts.recipe.method.pairs
        assert settings is not None  # the rules ask for it
        pairs, processes = self._held_out(), parts.processes
        own = list(range(processes.rank, len(pairs), processes.world))
        buffer = self._open([pairs[i] for i in own], 1, 0)
        if self._held_out_table is None:
            self._held_out_table = self._build_table(pairs, "held-out")
        buffer.ref_logp = self._held_out_table.take(own)
        metrics = judge_pairs(settings, parts.learner.policy, buffer, parts.updater.rows(buffer, None), processes)
        return metrics["accuracy"], metrics

    def bookmark(self) -> Callable[[], None]:
        state = self.state_dict()
        return lambda: self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        return {"sampler": self.parts.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parts.sampler.load_state_dict(state["sampler"])

    def ahead(self, rollout: int) -> None:
        return  # nothing is sampled

    def settle(self) -> None:
        return

    def own_state(self) -> None:
        return

    def load_own_state(self, state: Any) -> None:
        return

    def reference_logprobs(self, buffer: RolloutBuffer) -> Tensor:
        """Log-probs [N] under the policy before any training, which a policy that never took a step still is."""
        if not self.parts.policy_changed and not self.parts.learner.policy.has_adapter:
            return self.parts.logprobs(buffer)
        return self.parts.reference_logprobs(buffer)

    def _open(self, pairs: Sequence[Pair], minibatches: int, rollout: int) -> RolloutBuffer:
        """This process's pairs as a buffer; collective."""
        settings = self.parts.recipe.method.pairs
        initial = settings is not None and settings.from_initial
        return open_pairs(
            [pair_group(pair) for pair in pairs],
            [pair.baseline if initial else None for pair in pairs],
            step=rollout,
            minibatches=minibatches,
            processes=self.parts.processes,
        )

    def _training_table(self) -> ReferenceTable:
        """The training pairs' reference log-probs."""
        if self._table is None:
            self._table = self._build_table(_pairs(self.parts.prompts), "training")
        return self._table

    def _held_out(self) -> list[Pair]:
        """The pairs that are evaluated on."""
        return _pairs(self.parts.held_out[: self.parts.recipe.evaluation.prompts])

    @property
    def _cached(self) -> bool:
        pairs = self.parts.recipe.method.pairs
        return pairs is None or pairs.cached

    def _build_table(self, pairs: Sequence[Pair], what: str) -> ReferenceTable:
        """From the cache, or computed: each process takes every world-th pair; collective."""
        parts, processes = self.parts, self.parts.processes
        path = cache_path(parts.recipe, parts.model_path, pairs)
        tokens = sum(len(ids) for pair in pairs for ids in pair.responses)
        kept = processes.gather(read_cache(path, tokens) if processes.is_main else None)[0]
        if kept is not None:
            parts.tracker.note(f"Reference log-probs of {len(pairs)} {what} pairs: read from {path}")
            return ReferenceTable.of(pairs, kept)
        own = list(range(processes.rank, len(pairs), processes.world))
        buffer = self._open([pairs[i] for i in own], 1, 0)
        logp = parts.phase("reference", lambda: self.reference_logprobs(buffer))
        table = ReferenceTable.joined(pairs, processes.gather(logp))
        problem = write_cache(path, table.logp) if processes.is_main else None
        if self._cached:
            parts.forget_reference()
        where = f"kept in {path}" if problem is None else f"not kept: {problem}"
        parts.tracker.note(f"Reference log-probs of {len(pairs)} {what} pairs: computed, {where}")
        return table


def _pairs(prompts: Sequence[object], indices: Sequence[int] | None = None) -> list[Pair]:
    """The prompts that a preference source gave, as what they are."""
    chosen = [prompts[i] for i in (range(len(prompts)) if indices is None else indices)]
    pairs = [prompt for prompt in chosen if isinstance(prompt, Pair)]
    if len(pairs) != len(chosen):
        raise DataError("data.train: a run on pairs needs a source of type `preference`.")
    return pairs

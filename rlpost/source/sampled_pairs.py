"""Online RPO: completions are sampled and scored, and the best of each group is paired with its worst."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlpost.experience import Group
from rlpost.methods.dpo import best_and_worst
from rlpost.source.pair_buffer import open_pairs
from rlpost.source.sampled import SampledSource

if TYPE_CHECKING:
    from rlpost.learner.buffer import RolloutBuffer
    from rlpost.run.parts import Parts
    from rlpost.tracking.completions import ScoredRollout


class SampledPairSource:
    """Pairs made of what a `SampledSource` gives. A `Source`."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.sampled = SampledSource(parts)
        self._last: RolloutBuffer | None = None  # all that was sampled for the rollout that is learned from

    def next(self, rollout: int) -> RolloutBuffer:
        """sample -> score -> pair; the reference's log-probs are computed for the pairs alone."""
        parts = self.parts
        self._last = sampled = self.sampled.next(rollout)
        groups = [pair for group in sampled.groups if (pair := self._pair(group)) is not None]
        buffer = open_pairs(
            groups,
            [None] * len(groups),
            step=rollout,
            minibatches=parts.recipe.learner.minibatches,
            processes=parts.processes,
        )
        buffer.ref_logp = parts.phase("reference", lambda: parts.reference_logprobs(buffer))
        made = sum(count.prompts for count in buffer.counts)
        prompts = sum(parts.processes.gather(len(sampled.groups)))
        buffer.metrics = sampled.metrics | {"pairs/made": float(made), "pairs/made_share": made / max(1, prompts)}
        return buffer

    def record(self, buffer: RolloutBuffer) -> ScoredRollout:
        """All that was sampled, not only what became pairs; the pairs alone when the run was taken up in between."""
        return self.sampled.record(self._last or buffer)

    def evaluate(self) -> tuple[float, dict[str, float]]:
        """Held-out accuracy of what the policy samples."""
        return self.sampled.evaluate()

    def bookmark(self) -> Callable[[], None]:
        return self.sampled.bookmark()

    def state_dict(self) -> dict[str, Any]:
        return self.sampled.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampled.load_state_dict(state)

    def ahead(self, rollout: int) -> None:
        self.sampled.ahead(rollout)

    def settle(self) -> None:
        self.sampled.settle()

    def own_state(self) -> Any:
        return self.sampled.own_state()

    def load_own_state(self, state: Any) -> None:
        self.sampled.load_own_state(state)

    def _pair(self, group: Group) -> Group | None:
        """(chosen, rejected) of a group; None where no completion earned enough more than another."""
        pairs = self.parts.recipe.method.pairs
        assert pairs is not None
        weights = tuple(r.weight for r in self.parts.recipe.rewards)
        rewards = [group.reward(i, weights) for i in range(len(group.completions))]
        sides = best_and_worst(rewards, [c.token_ids for c in group.completions], pairs.min_gap)
        if not sides:
            return None
        return Group(group.prompt, tuple(group.completions[i] for i in sides), tuple(group.scores[i] for i in sides))

"""Compares learner and engine before and after every sync, on a few of the rollout's own completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rlpost.learner.learner import token_logprobs
from rlpost.policy.rows import RowGroup, build_rows
from rlpost.rollout.verify import Pair, Sequences, Watched, check_sync, level, precision

if TYPE_CHECKING:
    from rlpost.experience import Group
    from rlpost.learner.buffer import RolloutBuffer
    from rlpost.learner.process import Processes
    from rlpost.policy.model import Policy
    from rlpost.policy.rows import Layout
    from rlpost.rollout.engine import RolloutEngine
    from rlpost.run.parts import Parts
    from rlpost.run.state import RunState

SEQUENCES = 3
"""Completions that each process compares. In float32 a few dozen tokens show a stale layer; more cost time and show no more."""
TOKENS = 1024
"""Of prompts and completions together, at the most, beyond the first completion."""


class SyncProbe:
    """Looks before the first optimizer step of a rollout, and after the sync that follows the last.

    Nothing that is learned depends on it.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.settings = parts.recipe.rollout.probe
        self._precision = precision(parts.recipe)
        self._exact = self._precision == "float32"

    def before(self, buffer: RolloutBuffer) -> Watched | None:
        """Called with a rollout that nothing was learned from yet: learner and engine hold the same weights. Collective."""
        if self.settings is None or buffer.step % self.settings.every or not self.parts.recipe.samples:
            return None
        by_signal = sorted(zip(buffer.groups, buffer.dead, strict=True), key=lambda pair: pair[1])  # dead groups last
        sequences = choose([group for group, _ in by_signal])
        if not all(self.parts.processes.gather(bool(sequences))):
            return None
        return Watched(sequences, self._look(sequences) if self._exact else None)

    def after(self, state: RunState) -> dict[str, float]:
        """Called after the sync; metrics. Raises RolloutError when it did not bring the learner's weights. Collective."""
        watched, state.watched = state.watched, None
        # In 16 bits only the size of the gap can be judged. The next rollout's own samples are more, and show it better, unless
        # this is the last rollout, or other weights sample the next one.
        recipe = self.parts.recipe
        last = state.rollout + 1 >= recipe.learner.planned_rollouts or recipe.rollout.staleness > 0
        if watched is None or self.settings is None or not (self._exact or last):
            return {}
        everyone = self.parts.processes.gather((watched.said, self._look(watched.sequences)))
        after = _joined([pair for _, pair in everyone])
        before = [pair for pair, _ in everyone if pair is not None]
        result, measured = check_sync(
            _joined(before) if len(before) == len(everyone) else None,
            after,
            limit=level(self.settings.max_mean_gap, self._precision),
            exact=self._exact,
            when=f"Step {state.optimizer_step}",
        )
        metrics = {"sync/mean_abs_gap": result.mean_gap, "sync/max_abs_gap": result.max_gap}
        if measured is not None and measured.telling:
            metrics["sync/slope"] = measured.value
        return metrics

    def _look(self, sequences: Sequences) -> Pair:
        parts, updater = self.parts, self.parts.updater
        return look(
            parts.learner.policy,
            parts.engine,
            parts.processes,
            sequences,
            layout=updater.layout,
            micro_batch_tokens=updater.settings.micro_batch_tokens,
            pad_id=updater.pad_id,
        )


def look(
    policy: Policy,
    engine: RolloutEngine,
    processes: Processes,
    sequences: Sequences,
    *,
    layout: Layout,
    micro_batch_tokens: int,
    pad_id: int,
) -> Pair:
    """What policy and engine say of the completions' tokens, at temperature 1. Collective; `sequences` is not empty."""
    scored = processes.together(lambda: engine.logprobs([p + c for p, c in sequences]))
    heard = [value for (_, c), row in zip(sequences, scored, strict=True) for value in row[-len(c) :]]
    groups, offset = [], 0
    for i, (prompt, completion) in enumerate(sequences):
        groups.append(RowGroup(prompt, ((i, offset, completion),)))
        offset += len(completion)
    rows = build_rows(groups, layout=layout, micro_batch_tokens=micro_batch_tokens, pad_id=pad_id)
    rule = policy.rule
    policy.rule = replace(rule, temperature=1.0)
    try:
        learner = token_logprobs(policy, rows, offset)
    finally:
        policy.rule = rule
    return learner.tolist(), heard


def choose(groups: Sequence[Group]) -> Sequences:
    """(prompt, completion) of one completion a group, then of the next, until there are enough."""
    longest = max((len(g.completions) for g in groups), default=0)
    chosen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    tokens = 0
    for place in range(longest):
        for group in groups:
            if place >= len(group.completions):
                continue
            prompt, completion = group.prompt.token_ids, group.completions[place].token_ids
            size = len(prompt) + len(completion)
            if len(chosen) == SEQUENCES or (chosen and tokens + size > TOKENS):
                return tuple(chosen)
            chosen.append((prompt, completion))
            tokens += size
    return tuple(chosen)


def _joined(pairs: list[Pair]) -> Pair:
    return [x for learner, _ in pairs for x in learner], [x for _, engine in pairs for x in engine]

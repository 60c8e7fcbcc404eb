"""Compares learner and engine before and after every sync, on a few of the rollout's own completions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlpost.learner.learner import token_logprobs
from rlpost.policy.rows import RowGroup, build_rows
from rlpost.rollout.verify import check_sync, level, precision

if TYPE_CHECKING:
    from rlpost.learner.buffer import RolloutBuffer
    from rlpost.run.parts import Parts

SEQUENCES = 8
"""Completions that each process compares: one in eight of the quickstart's rollout, so that it costs little of a step."""
TOKENS = 1024
"""Of prompts and completions together, at the most, beyond the first completion."""

Pair = tuple[list[float], list[float]]  # log-probs of the same tokens by learner and engine


@dataclass(frozen=True, slots=True)
class Watched:
    """Completions and what both sides said of them while they held the same weights."""

    sequences: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # prompt and completion
    said: Pair


class SyncProbe:
    """Looks before the first optimizer step of a rollout, and after the sync that follows the last.

    Nothing that is learned depends on it.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.section = parts.recipe.rollout.probe
        self._watched: Watched | None = None
        self._precision = precision(parts.recipe)

    def before(self, buffer: RolloutBuffer) -> None:
        """Called with a rollout that nothing was learned from yet: learner and engine hold the same weights. Collective."""
        self._watched = None
        if self.section is None or buffer.step % self.section.every or not self.parts.recipe.samples:
            return
        sequences = choose(buffer)
        if not all(self.parts.processes.gather(bool(sequences))):
            return
        self._watched = Watched(sequences, self._look(sequences))

    def after(self, step: int) -> dict[str, float]:
        """Called after the sync; metrics. Raises RolloutError when it did not bring the learner's weights. Collective."""
        watched, self._watched = self._watched, None
        if watched is None or self.section is None:
            return {}
        everyone = self.parts.processes.gather((watched.said, self._look(watched.sequences)))
        before, after = (_joined([pair[i] for pair in everyone]) for i in (0, 1))
        result, found = check_sync(
            before,
            after,
            limit=level(self.section.max_mean_gap, self._precision),
            exact=self._precision == "float32",
            step=step,
        )
        metrics = {"sync/mean_abs_gap": result.mean_gap, "sync/max_abs_gap": result.max_gap}
        if found is not None and found.telling:
            metrics["sync/slope"] = found.value
        return metrics

    def _look(self, sequences: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]) -> Pair:
        """What learner and engine say of the completions' tokens, at temperature 1."""
        parts = self.parts
        scored = parts.processes.together(lambda: parts.engine.logprobs([p + c for p, c in sequences]))
        engine = [value for (_, c), row in zip(sequences, scored, strict=True) for value in row[-len(c) :]]
        groups, offset = [], 0
        for i, (prompt, completion) in enumerate(sequences):
            groups.append(RowGroup(prompt, ((i, offset, completion),)))
            offset += len(completion)
        updater, policy = parts.updater, parts.learner.policy
        rows = build_rows(
            groups, layout=updater.layout, micro_batch_tokens=updater.section.micro_batch_tokens, pad_id=updater.pad_id
        )
        with self._at_temperature_1():
            learner = token_logprobs(policy, rows, offset)
        return learner.tolist(), engine

    @contextmanager
    def _at_temperature_1(self) -> Iterator[None]:
        policy = self.parts.learner.policy
        rule = policy.rule
        policy.rule = replace(rule, temperature=1.0)
        try:
            yield
        finally:
            policy.rule = rule


def choose(buffer: RolloutBuffer) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """(prompt, completion) of one completion a group, then of the next, until there are enough; dead groups last."""
    groups = [g for g, dead in sorted(zip(buffer.groups, buffer.dead, strict=True), key=lambda pair: pair[1])]
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

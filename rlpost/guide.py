"""Guidance: between scoring and weighing, prompts that nothing solved are sampled again with a part of their solution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlpost.experience import Group, Prompt
from rlpost.gradient.metrics import Mean, Metric, Total
from rlpost.methods.ghpo import accuracies, is_hard, level_ratios, next_first_level
from rlpost.recipe.guidance import HintGuidance

SEED_LEVEL = 1000
"""Added to a hint's level where seeds are derived: the rounds of dynamic sampling have the numbers below."""

Sample = Callable[[Sequence[Prompt], int], Sequence[Group]]
Score = Callable[[Sequence[Group]], Sequence[Group]]
Hint = Callable[[Sequence[Prompt], float], Sequence[Prompt | None]]


@dataclass(frozen=True, slots=True)
class Guided:
    """This process's groups after guidance."""

    groups: list[Group]
    levels: list[int]  # by group: the hint's level that its completions were sampled at; 0: without a hint
    metrics: dict[str, Metric]  # to be merged over processes
    first_levels: dict[str, int] = field(default_factory=dict)  # by prompt id: where it begins next time (new values)


def guide(
    groups: Sequence[Group],
    section: HintGuidance,
    *,
    sample: Sample,
    score: Score,
    hint: Hint,
    accuracy_rewards: Sequence[bool],
    rollout: int,
    rollouts: int,
    memory: Mapping[str, int],
) -> Guided:
    """GHPO's escalation (arXiv 2507.10628, q*): every hard group is replaced by samples from its hinted prompt.

    `groups` are scored. `sample(prompts, seed_level)` gives unscored groups, `score` scores them, `hint(prompts, ratio)`
    makes hinted prompts (None: impossible); all are local to the process, and each is called once per level for all groups
    that are still hard. `memory` has the level at which a prompt begins (absent: 1). A group that no level solves keeps the
    samples of its last hint.
    """
    ratios = level_ratios(section, rollout, rollouts)
    run = _Escalation(list(groups), section, accuracy_rewards)
    first = {i: min(memory.get(groups[i].prompt.id, 1), max(1, len(ratios))) for i in run.hard}
    for level, ratio in enumerate(ratios, start=1):
        asked = [i for i in run.still_hard() if first[i] <= level]
        prompts = hint([groups[i].prompt for i in asked], ratio)
        chosen = [(i, prompt) for i, prompt in zip(asked, prompts, strict=True) if prompt is not None]
        if chosen:
            sampled = sample([prompt for _, prompt in chosen], SEED_LEVEL + level)
            run.replace([i for i, _ in chosen], _judge(sampled, section, score), level)
    return Guided(
        groups=_conditioned(run.groups, run.levels, section),
        levels=run.levels,
        metrics=run.metrics(groups, len(section.ratios)),
        first_levels=_first_levels(run, first, memory, len(ratios)) if section.memory and ratios else {},
    )


class _Escalation:
    """The groups of one process while levels are tried."""

    def __init__(self, groups: list[Group], section: HintGuidance, accuracy_rewards: Sequence[bool]) -> None:
        self.groups, self.section, self.accuracy_rewards = groups, section, accuracy_rewards
        self.levels = [0] * len(groups)
        self.hard = self.still_hard()
        self._counted: dict[str, Metric] = {}

    def still_hard(self) -> list[int]:
        """Which groups nothing has solved."""
        found = (accuracies(group, self.accuracy_rewards) for group in self.groups)
        return [i for i, values in enumerate(found) if is_hard(values, self.section.wrong_at_most)]

    def replace(self, places: Sequence[int], sampled: Sequence[Group], level: int) -> None:
        """Puts the samples of a level into the places of the failed ones."""
        for i, group in zip(places, sampled, strict=True):
            self.groups[i], self.levels[i] = group, level
        self._counted[f"guidance/groups_level_{level}"] = Total(float(len(places)))
        tokens = sum(len(c.token_ids) for group in sampled for c in group.completions)
        self._counted[f"guidance/tokens_level_{level}"] = Total(float(tokens))
        self._counted[f"guidance/accuracy_level_{level}"] = self._right(sampled)

    def metrics(self, before: Sequence[Group], levels: int) -> dict[str, Metric]:
        """Shares and counts of one process's groups. The same names whatever happened, so that curves have no gaps."""
        hard, unsolved, all_ = len(self.hard), set(self.still_hard()), float(len(self.groups))
        hinted = [i for i, level in enumerate(self.levels) if level]
        unhinted = [group for group, level in zip(self.groups, self.levels, strict=True) if not level]
        found: dict[str, Metric] = {
            "guidance/hard_share": Mean(float(hard), all_),
            "guidance/hinted_share": Mean(float(len(hinted)), all_),
            "guidance/unsolved_share": Mean(float(len(unsolved)), all_),
            "guidance/no_hint": Total(float(sum(self.levels[i] == 0 for i in self.hard))),
            "guidance/accuracy_without_hints": self._right(before),
            "guidance/accuracy_trained": self._right(self.groups),
            "guidance/accuracy_trained_unhinted": self._right(unhinted),
            "guidance/accuracy_trained_hinted": self._right([self.groups[i] for i in hinted]),
            "guidance/hint_tokens": Mean(float(sum(_hint_tokens(self.groups[i]) for i in hinted)), float(len(hinted))),
        }
        for level in range(1, levels + 1):
            solved = sum(self.levels[i] == level and i not in unsolved for i in hinted)
            found[f"guidance/solved_level_{level}"] = Mean(float(solved), float(hard))
            found |= {f"guidance/{what}_level_{level}": Total(0.0) for what in ("groups", "tokens")}
        return found | self._counted

    def _right(self, groups: Iterable[Group]) -> Mean:
        values = [value for group in groups for value in accuracies(group, self.accuracy_rewards) if value is not None]
        return Mean(float(sum(value > self.section.wrong_at_most for value in values)), float(len(values)))


def _hint_tokens(group: Group) -> int:
    return len(group.prompt.token_ids) - len(group.prompt.bare.token_ids)


def _judge(sampled: Sequence[Group], section: HintGuidance, score: Score) -> list[Group]:
    """Scores the samples: what was sampled, or the assistant's whole turn, the hint included."""
    if section.judge == "completion":
        return list(score(sampled))
    turns = [
        replace(g, completions=tuple(replace(c, text=g.prompt.hint + c.text) for c in g.completions)) for g in sampled
    ]
    return [replace(g, scores=turn.scores) for g, turn in zip(sampled, score(turns), strict=True)]


def _conditioned(groups: Sequence[Group], levels: Sequence[int], section: HintGuidance) -> list[Group]:
    """The groups with the prompt that their completions are learned under; other than the sampled one in ablations."""
    last = max(levels, default=0)
    kept = {"hinted": 0, "question": last + 1, "released": last}[section.condition]
    return [
        _under_bare_prompt(group) if 0 < level < kept else group for group, level in zip(groups, levels, strict=True)
    ]


def _under_bare_prompt(group: Group) -> Group:
    """The sampler's log-probs were under another prompt, so they are not known under this one."""
    completions = tuple(replace(c, sampler_logprobs=(math.nan,) * len(c.token_ids)) for c in group.completions)
    return replace(group, prompt=group.prompt.bare, completions=completions)


def _first_levels(run: _Escalation, first: Mapping[int, int], memory: Mapping[str, int], levels: int) -> dict[str, int]:
    """What changes in the memory: 1 stands for a prompt that needs no entry any more."""
    unsolved = set(run.still_hard())
    changes: dict[str, int] = {}
    for i, group in enumerate(run.groups):
        name = group.prompt.id
        if i in first and run.levels[i]:
            changes[name] = next_first_level(first[i], None if i in unsolved else run.levels[i], levels)
        elif i not in first and name in memory:
            changes[name] = 1
    return changes


def remember(memory: Mapping[str, int], changes: Mapping[str, int]) -> dict[str, int]:
    """The memory with the changes; prompts that begin at level 1 have no entry, so that it stays small."""
    return {name: level for name, level in {**memory, **changes}.items() if level > 1}

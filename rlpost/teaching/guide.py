"""Guidance: between scoring and weighing, prompts that nothing solved are sampled again with a part of their solution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlpost.experience import Group, Prompt
from rlpost.gradient.metrics import Mean, Metric, Total
from rlpost.methods.ghpo import is_hard, is_solved, level_ratios, next_first_level
from rlpost.recipe.sections.guidance import HintGuidance
from rlpost.teaching.verdict import accuracies, right_of_known

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
    guidance: HintGuidance,
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
    that are still unsolved. `memory` has the level at which a prompt begins (absent: 1). A group that no level solves keeps
    the samples of its last hint. Escalation begins only for groups whose completions are all known to be wrong. It then goes on
    until a completion is right: an unknown one does not end it.
    """
    ratios = level_ratios(guidance, rollout, rollouts)
    run = _Escalation(list(groups), guidance, accuracy_rewards)
    first = {i: min(memory.get(groups[i].prompt.id, 1), max(1, len(ratios))) for i in run.hard}
    for level, ratio in enumerate(ratios, start=1):
        asked = [i for i in run.unsolved() if first[i] <= level]
        run.asked.update(asked)
        prompts = hint([groups[i].prompt for i in asked], ratio)
        chosen = [(i, prompt) for i, prompt in zip(asked, prompts, strict=True) if prompt is not None]
        if chosen:
            sampled = sample([prompt for _, prompt in chosen], SEED_LEVEL + level)
            run.replace([i for i, _ in chosen], _judge(sampled, guidance, score), level)
    return Guided(
        groups=_conditioned(run.groups, run.levels, guidance),
        levels=run.levels,
        metrics=run.metrics(groups, len(guidance.ratios)),
        first_levels=_first_levels(run, first, memory) if guidance.memory and ratios else {},
    )


class _Escalation:
    """The groups of one process while levels are tried."""

    def __init__(self, groups: list[Group], guidance: HintGuidance, accuracy_rewards: Sequence[bool]) -> None:
        self.groups, self.settings, self.accuracy_rewards = groups, guidance, accuracy_rewards
        self.levels = [0] * len(groups)
        self.asked: set[int] = set()  # groups for which a hint was wanted
        by_group = [accuracies(group, accuracy_rewards) for group in groups]
        self.hard = [i for i, values in enumerate(by_group) if is_hard(values, guidance)]
        self.unknown = sum(not is_hard(values, guidance) and not is_solved(values, guidance) for values in by_group)
        self._counted: dict[str, Metric] = {}

    def solved(self, i: int) -> bool:
        """Whether a completion of group i is right, as far as guidance is concerned."""
        return is_solved(accuracies(self.groups[i], self.accuracy_rewards), self.settings)

    def unsolved(self) -> list[int]:
        """Which hard groups nothing has solved yet. One whose hinted samples are wrong or unknown is not solved."""
        return [i for i in self.hard if not self.solved(i)]

    def replace(self, places: Sequence[int], sampled: Sequence[Group], level: int) -> None:
        """Puts the samples of a level into the places of the failed ones."""
        for i, group in zip(places, sampled, strict=True):
            self.groups[i], self.levels[i] = group, level
        self._counted[f"guidance/groups_level_{level}"] = Total(float(len(places)))
        tokens = sum(len(c.token_ids) for group in sampled for c in group.completions)
        self._counted[f"guidance/tokens_level_{level}"] = Total(float(tokens))
        self._counted[f"guidance/accuracy_level_{level}"] = accuracy_of(sampled, self.settings, self.accuracy_rewards)

    def metrics(self, before: Sequence[Group], levels: int) -> dict[str, Metric]:
        """Shares and counts of one process's groups. The same names whatever happened, so that curves have no gaps."""
        hard, unsolved, all_ = len(self.hard), set(self.unsolved()), float(len(self.groups))
        hinted = [i for i, level in enumerate(self.levels) if level]
        metrics: dict[str, Metric] = {
            "guidance/hard_share": Mean(float(hard), all_),
            "guidance/unknown_share": Mean(float(self.unknown), all_),
            "guidance/unsolved_share": Mean(float(len(unsolved)), all_),
            "guidance/no_hint": Total(float(sum(self.levels[i] == 0 for i in self.asked))),
            "guidance/accuracy_without_hints": accuracy_of(before, self.settings, self.accuracy_rewards),
            "guidance/hint_tokens": Mean(float(sum(_hint_tokens(self.groups[i]) for i in hinted)), float(len(hinted))),
            **trained_metrics(self.groups, self.levels, self.settings, self.accuracy_rewards),
        }
        for level in range(1, levels + 1):
            solved = sum(self.levels[i] == level and i not in unsolved for i in hinted)
            metrics[f"guidance/solved_level_{level}"] = Mean(float(solved), float(hard))
            metrics |= {f"guidance/{what}_level_{level}": Total(0.0) for what in ("groups", "tokens")}
        return metrics | self._counted


def trained_metrics(
    groups: Sequence[Group], levels: Sequence[int], guidance: HintGuidance, accuracy_rewards: Sequence[bool]
) -> dict[str, Metric]:
    """What one process's groups that are trained on are like; `levels` has the level that each was sampled at."""
    hinted = [group for group, level in zip(groups, levels, strict=True) if level]
    unhinted = [group for group, level in zip(groups, levels, strict=True) if not level]
    return {
        "guidance/hinted_share": Mean(float(len(hinted)), float(len(groups))),
        "guidance/accuracy_trained": accuracy_of(groups, guidance, accuracy_rewards),
        "guidance/accuracy_trained_hinted": accuracy_of(hinted, guidance, accuracy_rewards),
        "guidance/accuracy_trained_unhinted": accuracy_of(unhinted, guidance, accuracy_rewards),
    }


def accuracy_of(groups: Iterable[Group], guidance: HintGuidance, accuracy_rewards: Sequence[bool]) -> Mean:
    """As evaluation computes it: the mean over groups of the share of right completions among those that are known."""
    tallies = [right_of_known(accuracies(group, accuracy_rewards), guidance.threshold) for group in groups]
    shares = [right / known for right, known in tallies if known]
    return Mean(math.fsum(shares), float(len(shares)))


def _hint_tokens(group: Group) -> int:
    return len(group.prompt.token_ids) - len(group.prompt.bare.token_ids)


def _judge(sampled: Sequence[Group], guidance: HintGuidance, score: Score) -> list[Group]:
    """Scores the samples: what was sampled, or the assistant's whole turn, the hint included."""
    if not guidance.judges_turn:
        return list(score(sampled))
    turns = [
        replace(g, completions=tuple(replace(c, text=g.prompt.hint + c.text) for c in g.completions)) for g in sampled
    ]
    return [replace(g, scores=turn.scores) for g, turn in zip(sampled, score(turns), strict=True)]


def _conditioned(groups: Sequence[Group], levels: Sequence[int], guidance: HintGuidance) -> list[Group]:
    """The groups, each with the prompt under which its completions are learned: the hinted one that they were sampled from, or,
    in ablations (`guidance.condition`), the bare question."""
    last = max(levels, default=0)
    kept = {"hinted": 0, "question": last + 1, "released": last}[guidance.condition]
    return [
        _under_bare_prompt(group) if 0 < level < kept else group for group, level in zip(groups, levels, strict=True)
    ]


def _under_bare_prompt(group: Group) -> Group:
    """The sampler's log-probs were under another prompt, so they are not known under this one."""
    completions = tuple(replace(c, sampler_logprobs=(math.nan,) * len(c.token_ids)) for c in group.completions)
    return replace(group, prompt=group.prompt.bare, completions=completions)


def _first_levels(run: _Escalation, first: Mapping[int, int], memory: Mapping[str, int]) -> dict[str, int]:
    """What changes in the memory: 1 stands for a prompt that needs no entry any more."""
    changes: dict[str, int] = {}
    for i, group in enumerate(run.groups):
        name = group.prompt.id
        if i in first and run.levels[i]:
            changes[name] = next_first_level(first[i], run.levels[i], run.solved(i))
        elif name in memory and (i in first or run.solved(i)):
            changes[name] = 1  # solved without a hint; or no hint from the remembered level on can be shown: begin anew
    return changes


def remember(memory: Mapping[str, int], changes: Mapping[str, int]) -> dict[str, int]:
    """The memory with the changes; prompts that begin at level 1 have no entry, so that it stays small."""
    return {name: level for name, level in {**memory, **changes}.items() if level > 1}

"""Frozen rollouts: the same token ids and rewards for rlpost and for TRL, so that only the update differs."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlpost.experience import Completion, Group, Outcome, Prompt, Score


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """What a frozen rollout looks like. Everything follows from these numbers."""

    prompts: int = 4
    completions: int = 8  # G
    prompt_tokens: int = 96
    max_completion_tokens: int = 384
    lengths: Literal["lognormal", "equal"] = "lognormal"
    mean_tokens: int = 128  # lognormal: of the distribution before it is cut at the maximum; equal: every length
    sigma: float = 0.8  # lognormal: of the logarithm
    dead_share: float = 0.0  # of the groups: all completions earned the same, so nothing is learned from them
    vocabulary: int = 1000  # ids 3 .. vocabulary - 1 are drawn: neither padding nor end of sequence
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


FULL = RolloutSpec(prompts=4, completions=8, prompt_tokens=96, max_completion_tokens=384, mean_tokens=128)
# A third of the lengths: for a CPU on which a step of TRL at full scale takes minutes.
MEDIUM = RolloutSpec(prompts=4, completions=8, prompt_tokens=32, max_completion_tokens=96, mean_tokens=32)
SMALL = RolloutSpec(prompts=2, completions=8, prompt_tokens=32, max_completion_tokens=96, mean_tokens=32)
# For a GPU: long completions, as reasoning runs have.
GPU = RolloutSpec(prompts=16, completions=8, prompt_tokens=256, max_completion_tokens=2048, mean_tokens=768)
SCALES = {"full": FULL, "medium": MEDIUM, "small": SMALL, "gpu": GPU}


@dataclass(frozen=True, slots=True)
class FrozenRollout:
    """Scored groups. `old_logprobs` [group][completion][token] stand for a policy some updates ago, where given."""

    spec: RolloutSpec
    groups: tuple[Group, ...]
    old_logprobs: tuple[tuple[tuple[float, ...], ...], ...] | None = None

    @property
    def lengths(self) -> list[int]:
        """Completion tokens, [S]."""
        return [len(c.token_ids) for group in self.groups for c in group.completions]

    def counts(self) -> dict[str, float]:
        """Tokens by what they cost: `padded` is one row a completion, all as long as the longest; `tree` one prompt a group."""
        lengths, prompt = self.lengths, self.spec.prompt_tokens
        return {
            "completion": sum(lengths),
            "rows": sum(lengths) + prompt * len(lengths),
            "padded": (max(lengths) + prompt) * len(lengths),
            "tree": sum(lengths) + prompt * len(self.groups),
            "mean_completion": sum(lengths) / len(lengths),
        }


def make_rollout(spec: RolloutSpec) -> FrozenRollout:
    """Random token ids, lengths and rewards. Dead groups are spread evenly; every other group has both rewards 0 and 1."""
    rng = random.Random(spec.seed)
    lengths = completion_lengths(spec, rng)
    groups = []
    for g in range(spec.prompts):
        # The floor of (g + 1) * share rises by one at exactly the dead groups.
        dead = math.floor((g + 1) * spec.dead_share + 1e-9) > math.floor(g * spec.dead_share + 1e-9)
        rewards = [1.0] * spec.completions if dead else _mixed_rewards(spec.completions, rng)
        prompt = Prompt(id=str(g), messages=(), text=str(g), token_ids=_tokens(spec.prompt_tokens, spec, rng))
        completions = []
        for _ in range(spec.completions):
            ids = _tokens(lengths.pop(), spec, rng)
            completions.append(Completion(ids, (math.nan,) * len(ids), text="", finish="stop"))
        scores = tuple((Score(Outcome.SCORED, reward),) for reward in rewards)
        groups.append(Group(prompt, tuple(completions), scores))
    return FrozenRollout(spec, tuple(groups))


def completion_lengths(spec: RolloutSpec, rng: random.Random) -> list[int]:
    """[S] lengths: all `mean_tokens`, or lognormal around it, at least 2 and at most the maximum."""
    count = spec.prompts * spec.completions
    if spec.lengths == "equal":
        return [spec.mean_tokens] * count
    mu = math.log(spec.mean_tokens) - spec.sigma**2 / 2
    drawn = [round(rng.lognormvariate(mu, spec.sigma)) for _ in range(count)]
    return [min(max(n, 2), spec.max_completion_tokens) for n in drawn]


def with_old_logprobs(rollout: FrozenRollout, flat: Sequence[float]) -> FrozenRollout:
    """The rollout with the log-probs `flat` [N] of the policy at its start, completion after completion."""
    values, nested = iter(flat), []
    for group in rollout.groups:
        nested.append(tuple(tuple(next(values) for _ in c.token_ids) for c in group.completions))
    return FrozenRollout(rollout.spec, rollout.groups, tuple(nested))


class TrlRollout:
    """A frozen rollout as TRL takes it: prompts as data set, `rollout_func`, and a reward function that reads it back."""

    def __init__(self, rollout: FrozenRollout) -> None:
        self.rollout = rollout
        self.places: list[tuple[int, int]] = []  # (group, completion) of the generation batch, in TRL's order
        self.__name__ = "frozen"  # TRL names rewards and rollouts by this

    def prompts(self) -> list[dict[str, str]]:
        """The data set: the prompt's text is its group's number."""
        return [{"prompt": group.prompt.text} for group in self.rollout.groups]

    def sample(self, prompts: Sequence[str], _trainer: Any) -> dict[str, Any]:
        """`rollout_func`: the k-th time that a prompt is asked for, its k-th completion. TRL's columns."""
        seen: Counter[int] = Counter()
        self.places = []
        for text in prompts:
            g = int(text)
            self.places.append((g, seen[g]))
            seen[g] += 1
        completions = [self.rollout.groups[g].completions[k] for g, k in self.places]
        return {
            "prompt_ids": [list(self.rollout.groups[g].prompt.token_ids) for g, _ in self.places],
            "completion_ids": [list(c.token_ids) for c in completions],
            "logprobs": None,  # no importance correction on either side (TRL applies one only with use_vllm)
            "frozen_reward": [self.rollout.groups[g].reward(k, (1.0,)) for g, k in self.places],
        }

    def old_logprobs(self) -> list[tuple[float, ...]] | None:
        """Of the generation batch, in TRL's order."""
        old = self.rollout.old_logprobs
        return None if old is None else [old[g][k] for g, k in self.places]


def frozen_reward(completions: list[str], frozen_reward: list[float], **_columns: Any) -> list[float]:
    """A reward function in TRL's convention that returns what the rollout brought along."""
    return list(frozen_reward)


def _tokens(count: int, spec: RolloutSpec, rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(3, spec.vocabulary) for _ in range(count))


def _mixed_rewards(count: int, rng: random.Random) -> list[float]:
    """0 and 1, at least one of each."""
    solved = rng.randint(1, count - 1)
    rewards = [1.0] * solved + [0.0] * (count - solved)
    rng.shuffle(rewards)
    return rewards

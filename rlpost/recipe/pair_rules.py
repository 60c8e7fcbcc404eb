"""Cross-field rules for learning from preference pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlpost.recipe.preference import PairsSection, PreferenceSource
from rlpost.recipe.root import Recipe

if TYPE_CHECKING:
    from rlpost.recipe.rules import Setting


def pair_problems(r: Recipe, _: Setting) -> Iterator[str]:
    """Whether data and method agree, and whether a pair fits into one micro-batch."""
    section = r.method.pairs
    if r.data.has_pairs and section is None:
        yield (
            f"data.train is of type preference, but method.preset={r.method.preset} does not learn from pairs. Use preset "
            "dpo, rpo or rpo_average, or give method.pairs"
        )
    if r.data.has_pairs and r.rewards:
        yield "data.train is of type preference, so nothing is sampled, but rewards are given. Remove the rewards"
    if r.data.eval is not None and isinstance(r.data.eval, PreferenceSource) != r.data.has_pairs:
        yield (
            f"data.eval is of type {r.data.eval.type}, but data.train of type {r.data.train.type}: both must hold pairs, or "
            "both prompts. Change one of them"
        )
    if section is not None:
        yield from _fit(r, section)
        yield from (_offline(r, section) if r.data.has_pairs else _online(r, section))


def _fit(r: Recipe, section: PairsSection) -> Iterator[str]:
    prompt, response = r.data.max_prompt_tokens, r.rollout.max_completion_tokens
    sides = 3 if section.baseline == "initial" else 2
    longest = prompt + sides * response if r.learner.layout == "tree" else sides * (prompt + response)
    if r.learner.micro_batch_tokens < longest:
        yield (
            f"learner.micro_batch_tokens={r.learner.micro_batch_tokens}, but the longest pair has {longest} positions "
            f"(data.max_prompt_tokens={prompt}, {sides} responses of rollout.max_completion_tokens={response}), and a pair is "
            f"never split. Set it to at least {longest}, or lower a limit"
        )


def _offline(r: Recipe, section: PairsSection) -> Iterator[str]:
    if r.rollout.temperature != 1:
        yield (
            f"rollout.temperature={r.rollout.temperature:g} with pairs from a data set: log-probs would be those of another "
            "distribution. Set it to 1"
        )
    for key, source in (("data.train", r.data.train), ("data.eval", r.data.eval)):
        if section.baseline == "initial" and isinstance(source, PreferenceSource) and source.baseline is None:
            yield (
                f"method.pairs.baseline=initial, but {key}.baseline is null: name the column with the initial model's "
                "responses, or use method.pairs.baseline=chosen"
            )
        if section.baseline == "chosen" and isinstance(source, PreferenceSource) and source.baseline is not None:
            yield (
                f"{key}.baseline={source.baseline}, but method.pairs.baseline=chosen does not learn from these responses. Set "
                f"method.pairs.baseline=initial, or {key}.baseline to null"
            )


def _online(r: Recipe, section: PairsSection) -> Iterator[str]:
    if r.rollout.completions_per_prompt < 2:
        yield "rollout.completions_per_prompt=1 with method.pairs: a pair needs two completions of a prompt. Sample at least 2"
    if section.baseline == "initial":
        yield (
            "method.pairs.baseline=initial needs a preference data set with such responses, but data.train is of type "
            f"{r.data.train.type}. Use method.pairs.baseline=chosen"
        )

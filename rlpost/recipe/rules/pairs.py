"""Cross-field rules for learning from preference pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlpost.recipe.sections.preference import PairsSection, PreferenceSource
from rlpost.recipe.sections.root import Recipe

if TYPE_CHECKING:
    from rlpost.recipe.rules.setting import Setting


def pair_problems(r: Recipe, _: Setting) -> Iterator[str]:
    """Whether data and method agree, and whether a pair fits into one micro-batch."""
    pairs = r.method.pairs
    if r.data.has_pairs and pairs is None:
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
    if pairs is not None:
        yield from _fit(r, pairs)
        yield from (_offline(r, pairs) if r.data.has_pairs else _online(r, pairs))


def layout_in_use(r: Recipe) -> tuple[str, str | None]:
    """The layout of the learner's rows and why it is not `learner.layout`, as far as it is known before a model is loaded:
    models that cannot take tree rows get sorted ones. Looks at local files only."""
    from rlpost.policy.local_config import local_config

    wanted, attention = r.learner.layout, r.model.attention
    config = local_config(r.model) if wanted == "tree" else None
    if config is None:
        return wanted, None
    from rlpost.policy.family import choose_layout  # imports torch, which reading the configuration has done already

    return choose_layout(config, wanted, "sdpa" if attention == "auto" else attention, r.longest_sequence)


def _fit(r: Recipe, pairs: PairsSection) -> Iterator[str]:
    prompt, response = r.data.max_prompt_tokens, r.rollout.max_completion_tokens
    sides = 3 if pairs.baseline == "initial" else 2
    tree, rows = prompt + sides * response, sides * (prompt + response)
    if r.learner.micro_batch_tokens >= rows:  # the larger of the two: whatever the layout, a pair fits
        return
    layout, why = layout_in_use(r)
    longest = tree if layout == "tree" else rows
    if r.learner.micro_batch_tokens < longest:
        yield (
            f"learner.micro_batch_tokens={r.learner.micro_batch_tokens}, but the longest pair has {longest} positions "
            f"(data.max_prompt_tokens={prompt}, {sides} responses of rollout.max_completion_tokens={response}"
            f"{'; ' + why if why else ''}), and a pair is never split. Set it to at least {longest}, or lower a limit"
        )


def _offline(r: Recipe, pairs: PairsSection) -> Iterator[str]:
    if r.rollout.temperature != 1:
        yield (
            f"rollout.temperature={r.rollout.temperature:g} with pairs from a data set: log-probs would be those of another "
            "distribution. Set it to 1"
        )
    for key, source in (("data.train", r.data.train), ("data.eval", r.data.eval)):
        if pairs.baseline == "chosen" and isinstance(source, PreferenceSource) and source.baseline is not None:
            yield (
                f"{key}.baseline={source.baseline}, but method.pairs.baseline=chosen does not learn from these responses. Set "
                f"method.pairs.baseline=initial, or {key}.baseline to null"
            )


def describe_baseline(r: Recipe) -> str | None:
    """For `rlpost plan`: what is sampled before a run on a preference data set, if anything is."""
    sources = [s for s in (r.data.train, r.data.eval) if isinstance(s, PreferenceSource)]
    pairs = r.method.pairs
    if pairs is None or pairs.baseline != "initial" or all(source.baseline is not None for source in sources):
        return None
    return (
        "once, before training: a greedy response of the initial model to every prompt, by rollout.engine "
        f"({r.rollout.engine.type}), kept in the cache"
    )


def _online(r: Recipe, pairs: PairsSection) -> Iterator[str]:
    if r.rollout.completions_per_prompt < 2:
        yield "rollout.completions_per_prompt=1 with method.pairs: a pair needs two completions of a prompt. Sample at least 2"
    if pairs.baseline == "initial":
        yield (
            "method.pairs.baseline=initial needs a preference data set with such responses, but data.train is of type "
            f"{r.data.train.type}. Use method.pairs.baseline=chosen"
        )

"""What a run looks at before its model is loaded: the data, the worked solutions, the critic's vocabulary."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from rlpost.data.packaged import described_by
from rlpost.errors import DataError, RecipeError
from rlpost.policy.loading import load_config
from rlpost.recipe.sections.root import Recipe
from rlpost.run.build import context_window, vocabulary
from rlpost.scoring.factory import ChecksColumns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlpost.data.pairs import PairSets
    from rlpost.data.prompts import PromptSets


def load_prompts(recipe: Recipe, scorer: ChecksColumns) -> tuple[PreTrainedTokenizerBase, PromptSets | PairSets]:
    """The tokenizer and the prompts, checked. Raises DataError, RecipeError and RewardError."""
    from rlpost.data.pairs import build_pairs
    from rlpost.data.prompts import build_prompts
    from rlpost.data.tokenizer import load_tokenizer
    from rlpost.data.vocabulary import check_vocabulary

    tokenizer = load_tokenizer(recipe.model)
    build = build_pairs if recipe.data.has_pairs else build_prompts
    sets: PromptSets | PairSets = build(
        recipe.data,
        tokenizer,
        max_context=context_window(recipe),
        seed=recipe.seed,
        max_completion_tokens=recipe.rollout.max_completion_tokens,
    )
    check_vocabulary(tokenizer, vocabulary(recipe), chain(sets.train, sets.held_out), path=recipe.model.path)
    check_prompts(sets, recipe, scorer)
    return tokenizer, sets


def check_prompts(sets: PromptSets | PairSets, recipe: Recipe, scorer: ChecksColumns) -> None:
    """What can only be judged once the prompts are there."""
    if not sets.train:
        raise DataError(
            f"No training prompt is left ({sets.note()}). Raise data.max_prompt_tokens, or give more data in data.train."
        )
    if len(sets.train) < recipe.rollout.prompts_per_step:
        raise DataError(
            f"Only {len(sets.train)} training prompts are left ({sets.note()}), fewer than rollout.prompts_per_step="
            f"{recipe.rollout.prompts_per_step}: a step would take some of them twice. Raise data.max_prompt_tokens, give more "
            "data, or take a smaller step."
        )
    if recipe.evaluation.prompts and not sets.held_out:
        raise DataError(
            f"No held-out prompt is left ({sets.note()}), but evaluation.prompts={recipe.evaluation.prompts}. Raise "
            "data.max_prompt_tokens or data.held_out, or switch evaluation off with evaluation.prompts=0."
        )
    scorer.check(sets.train[0].columns.keys())


def note_demonstrations(sets: PromptSets | PairSets, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """A line about the worked solutions that the method needs. Raises DataError when it cannot do with them."""
    from rlpost.data.demonstrations import check_demonstrations
    from rlpost.teaching.teacher import make_hinter, make_reader

    context = context_window(recipe)
    reader, hinter = make_reader(recipe, tokenizer, context), make_hinter(recipe, tokenizer, context)
    return check_demonstrations(sets.train, recipe.method, recipe.data, reader, hinter)


def check_critic(recipe: Recipe, words: int) -> None:
    """Raises RecipeError where a separate critic cannot read what a tokenizer of so many words writes; nothing is loaded."""

    critic = recipe.method.critic
    if critic is None or critic.path is None:
        return
    config, _ = load_config(recipe.model, described_by(critic.path), key="method.critic.path")
    known = config.get_text_config().vocab_size
    words = min(words, vocabulary(recipe))  # what the policy does not know, it cannot write
    if known < words:
        raise RecipeError(
            f"method.critic.path={critic.path} knows {known} tokens, but the tokenizer of model.path={recipe.model.path} has "
            f"{words}: the critic reads the policy's tokens. Name a model with that tokenizer, or null for the policy's own."
        )

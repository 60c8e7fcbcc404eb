"""Tokens that a tokenizer knows and the model's embedding does not: looked for before a model is loaded.

A model meets them as an index out of range, on a GPU as a device-side assert that names nothing. Some published models have
such tokens and never write them (Gemma 3's text models one for images), so what counts is whether the run would use them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rlpost.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlpost.experience import Prompt

_log = logging.getLogger(__name__)
_NAMED = 5


def tokens_beyond(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[int, str]:
    """The tokens whose ids have no row in an embedding of `rows` rows, by id."""
    return dict(sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows))


def special_problem(tokenizer: PreTrainedTokenizerBase, rows: int) -> str | None:
    """Why a run cannot start with this tokenizer and an embedding of `rows` rows: its end-of-sequence or padding token, or one
    that its chat template writes, has no row. None if nothing speaks against it."""
    beyond = tokens_beyond(tokenizer, rows)
    if not beyond:
        return None
    for name in ("eos_token", "pad_token"):
        if (number := getattr(tokenizer, f"{name}_id")) in beyond:
            return f"its {name} {beyond[number]} is {sizes(beyond, [number], tokenizer, rows)}. {_way_out(name)}"
    if used := _in_template(tokenizer, beyond):
        return f"its chat template writes {sizes(beyond, used, tokenizer, rows)}. {_way_out('chat template')}"
    return None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, prompts: Iterable[Prompt], *, path: str) -> None:
    """Raises RecipeError or DataError, naming tokens and both sizes, where the run would use tokens of the tokenizer that have
    no row in the model's embedding of `rows` rows; notes tokens that it would not use. `path` is `model.path`."""
    if problem := special_problem(tokenizer, rows):
        raise RecipeError(f"model.path={path}: the model does not know all of its tokenizer's tokens: {problem}")
    beyond = tokens_beyond(tokenizer, rows)
    if not beyond:
        return
    for prompt in prompts:
        for what, ids in _written(prompt, tokenizer):
            if used := [number for number in ids if number in beyond]:
                raise DataError(
                    f"The {what} of prompt {prompt.id} has {sizes(beyond, used, tokenizer, rows)}, which the model "
                    f"{path} does not know. {_way_out('data')}"
                )
    _log.warning(
        "model.path: %s; no prompt and no template writes them, so nothing is lost",
        sizes(beyond, beyond, tokenizer, rows),
    )


def sizes(beyond: Mapping[int, str], used: Iterable[int], tokenizer: PreTrainedTokenizerBase, rows: int) -> str:
    """The tokens `used` with their ids, and how many tokens and rows there are."""
    ids = list(dict.fromkeys(used))
    names = ", ".join(f"{beyond[i]} ({i})" for i in ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
    return f"{names}, beyond the embedding: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows"


def _in_template(tokenizer: PreTrainedTokenizerBase, beyond: Mapping[int, str]) -> list[int]:
    """What the template writes of these around a plain message; [] where it cannot be told (no template, or other roles)."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "."}], tokenize=False, add_generation_prompt=True
        )
    except Exception:  # of all kinds: templates are programs; what is wrong with one is said where prompts are made
        return []
    return [number for number in tokenizer(text, add_special_tokens=False)["input_ids"] if number in beyond]


def _written(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Iterable[tuple[str, Sequence[int]]]:
    yield "text", prompt.token_ids
    if prompt.demonstration is not None:
        yield "worked solution", tokenizer(prompt.demonstration.text, add_special_tokens=False)["input_ids"]
    for ids in getattr(prompt, "responses", ()):
        yield "response", ids


def _way_out(what: str) -> str:
    other = {
        "eos_token": "set eos_token in tokenizer_config.json to one that it has",
        "pad_token": "set pad_token in tokenizer_config.json to the eos_token",
        "chat template": "give a template without these tokens (model.chat_template)",
        "data": "take these texts out of the data",
    }[what]
    return (
        "Use the tokenizer that belongs to the model, give the model rows for its tokens (transformers' "
        f"`resize_token_embeddings(len(tokenizer))`, then save both), or {other}"
    )

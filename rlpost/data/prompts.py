"""From rows to prompts: chat template, token ids, length limit, and the split into training and held-out prompts."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from rlpost.data.answers import Answers
from rlpost.data.rows import Row
from rlpost.data.sources import load_rows
from rlpost.data.template import ChatTemplate, require_template
from rlpost.errors import DataError
from rlpost.experience import Message, Prompt
from rlpost.recipe.sections.data import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

__all__ = ["PromptSets", "build_prompts", "require_template"]
TOKENIZER_BATCH = 1000  # rows at once: fast tokenizers work through a batch in parallel, memory stays small


@dataclass(frozen=True, slots=True)
class PromptSets:
    """The prompts of a run. No text of `held_out` occurs in `train`."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    dropped_too_long: int = 0  # of both sets, for `data.too_long: drop`
    dropped_duplicates: int = 0  # training prompts whose text is among the held-out ones
    remarks: tuple[str, ...] = ()  # what should be known of the prompts

    @property
    def dropped(self) -> int:
        """How many prompts were left out, for whatever reason."""
        return self.dropped_too_long + self.dropped_duplicates

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max((len(prompt.token_ids) for prompt in (*self.train, *self.held_out)), default=0)

    @property
    def fingerprint(self) -> str:
        """A short hash of the training prompts in their order, by which a resumed run knows them again."""
        digest = hashlib.blake2b(digest_size=8)
        for prompt in self.train:
            digest.update(f"{prompt.id}\0{prompt.text}\0".encode())
        return digest.hexdigest()

    def note(self) -> str:
        """The counts in one line, and what should be known of the prompts."""
        return "; ".join((self._counts(), *self.remarks))

    def _counts(self) -> str:
        return (
            f"{len(self.train)} training and {len(self.held_out)} held-out prompts, longest {self.longest} tokens; "
            f"dropped: {self.dropped_too_long} too long, {self.dropped_duplicates} from training for being held out"
        )


def build_prompts(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_context: int | None,
    seed: int = 0,
    max_completion_tokens: int = 0,
) -> PromptSets:
    """Loads, templates, tokenises and splits the prompts of a recipe.

    `max_context` is the model's context window in tokens, of which `max_completion_tokens` are kept free. The split
    is determined by `seed` and the data alone. Raises DataError; see docs/data.md for the rules.
    """
    template = ChatTemplate(tokenizer, data.template_options)
    limit = _prompt_limit(data, max_context, max_completion_tokens)
    train = list(_tokenised(load_rows(data.train, "data.train"), data, template))
    train, too_long = _fitting(train, limit, data, "data.train")
    if data.eval is None:
        held_out = _split_off(train, data.held_out, seed)
    else:
        held_out = list(_tokenised(load_rows(data.eval, "data.eval"), data, template))
        held_out, more = _fitting(held_out, limit, data, "data.eval")
        too_long += more
    held_texts = {prompt.text for prompt in held_out}
    kept = [prompt for prompt in train if prompt.text not in held_texts]
    if not kept:
        raise DataError(
            f"data: all {len(train)} training prompts are also held-out prompts. Use more or other training data, "
            f"or lower data.held_out (now {data.held_out})."
        )
    set_aside = len(held_out) if data.eval is None else 0
    duplicates = len(train) - len(kept) - set_aside
    sets = PromptSets(tuple(kept), tuple(held_out), too_long, duplicates, tuple(template.notes()))
    logger.debug("%s", sets.note())
    return sets


def _prompt_limit(data: DataSection, max_context: int | None, max_completion_tokens: int) -> int:
    if max_context is None:
        return data.max_prompt_tokens
    if max_context <= max_completion_tokens:
        raise DataError(
            f"The model's context of {max_context} tokens leaves no room for a prompt beside completions of "
            f"{max_completion_tokens} tokens. Lower rollout.max_completion_tokens."
        )
    return min(data.max_prompt_tokens, max_context - max_completion_tokens)


def _messages(row: Row, system_prompt: str | None) -> tuple[Message, ...]:
    question = row.question
    messages = (Message(role="user", content=question),) if isinstance(question, str) else question
    if system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise DataError(
            f"data.system_prompt is given, but row {row.id} has a system message of its own, and there can be only "
            "one. Remove data.system_prompt, or the system messages from the data set."
        )
    return (Message(role="system", content=system_prompt), *messages)


def _tokenised(rows: Iterable[Row], data: DataSection, template: ChatTemplate) -> Iterator[Prompt]:
    rows, checked = iter(rows), False
    while batch := list(islice(rows, TOKENIZER_BATCH)):
        messages = [_messages(row, data.system_prompt) for row in batch]
        texts = template.prompts(messages, [row.id for row in batch], [row.options for row in batch])
        if not checked:
            _check_opening(template, texts[0], messages[0], batch[0])
            checked = True
        # The template has written the special tokens (the beginning of the text among them) already.
        token_ids = template.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for row, chat, text, ids in zip(batch, messages, texts, token_ids, strict=True):
            is_text = isinstance(row.question, str)
            made = Prompt(
                row.id, chat, text, tuple(ids), row.columns, row.demonstration, is_text=is_text, options=row.options
            )
            yield made


def _check_opening(template: ChatTemplate, text: str, chat: Sequence[Message], row: Row) -> None:
    """Raises RecipeError for a template that does not open the answer."""
    try:
        Answers(template.tokenizer, template).form(text, chat, row.id, row.options)
    except DataError:  # a template for prompts alone, which takes no answers: there is nothing to compare with
        return


def _fitting(prompts: list[Prompt], limit: int, data: DataSection, where: str) -> tuple[list[Prompt], int]:
    """The prompts within the limit, and how many are not. A cut prompt would be another question, so none is cut."""
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    too_long = len(prompts) - len(fitting)
    if too_long and (data.too_long == "refuse" or not fitting):
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        way_out = " or set data.too_long: drop" if fitting else ""
        raise DataError(
            f"{where}: {too_long} of {len(prompts)} prompts have more than {limit} tokens (data.max_prompt_tokens is "
            f"{data.max_prompt_tokens}; the model's context less rollout.max_completion_tokens also counts). The "
            f"longest, {longest.id}, has {len(longest.token_ids)}. Raise the limit{way_out}."
        )
    return fitting, too_long


def _split_off(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` prompts with distinct texts, drawn from the run's seed."""
    by_text = {prompt.text: prompt for prompt in reversed(prompts)}  # reversed: the first of equal prompts stays
    distinct = [prompt for prompt in prompts if by_text[prompt.text] is prompt]
    if count >= len(distinct):
        raise DataError(
            f"data.held_out asks for {count} prompts to be set aside for evaluation, but data.train has only "
            f"{len(distinct)} distinct prompts that fit, and some must remain for training. Lower data.held_out or "
            "give data.eval."
        )
    return random.Random(f"held-out/{seed}").sample(distinct, count)

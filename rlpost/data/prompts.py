"""From rows to prompts: chat template, token ids, length limit, and the split into training and held-out prompts."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from rlpost.data.answers import Answers
from rlpost.data.dataset import RowStream, dataset_rows
from rlpost.data.prompt_cache import kept_prompts
from rlpost.data.rows import Row
from rlpost.data.sources import load_rows
from rlpost.data.table import Places, PromptTable, fingerprint_of, lengths_of, marks_of, take
from rlpost.data.template import ChatTemplate, require_template
from rlpost.errors import DataError
from rlpost.experience import Message, Prompt
from rlpost.recipe.sections.data import DataSection, DatasetSource, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

__all__ = ["PromptSets", "build_prompts", "require_template"]
TOKENIZER_BATCH = 1000  # rows at once: fast tokenizers work through a batch in parallel, memory stays small


@dataclass(frozen=True, slots=True)
class PromptSets:
    """The prompts of a run. No text of `held_out` occurs in `train`."""

    train: Sequence[Prompt]  # of a large data set a table on disk
    held_out: Sequence[Prompt]
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
        return max(int(lengths_of(prompts).max(initial=0)) for prompts in (self.train, self.held_out))

    @property
    def fingerprint(self) -> str:
        """A short hash of the training prompts in their order, by which a resumed run knows them again."""
        if isinstance(self.train, PromptTable):
            return self.train.fingerprint()
        return fingerprint_of((prompt.id, prompt.text) for prompt in self.train)

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
    train = _prompts(data.train, "data.train", data, template)
    fitting = _fitting(train, limit, data, "data.train")
    too_long = len(train) - len(fitting)
    marks = marks_of(train)[fitting]
    if data.eval is None:
        own = _split_off(marks, data.held_out, seed)
        held_out, held_marks = take(train, fitting[own]), marks[own]
    else:
        held_out = _prompts(data.eval, "data.eval", data, template)
        held_fitting = _fitting(held_out, limit, data, "data.eval")
        too_long += len(held_out) - len(held_fitting)
        held_out = take(held_out, held_fitting)
        held_marks = marks_of(held_out)
    kept = fitting[~np.isin(marks, held_marks)]
    if not len(kept):
        raise DataError(
            f"data: all {len(fitting)} training prompts are also held-out prompts. Use more or other training data, "
            f"or lower data.held_out (now {data.held_out})."
        )
    set_aside = len(held_out) if data.eval is None else 0
    duplicates = len(fitting) - len(kept) - set_aside
    sets = PromptSets(take(train, kept), held_out, too_long, duplicates, tuple(template.notes()))
    logger.debug("%s", sets.note())
    return sets


def _prompts(source: Source, where: str, data: DataSection, template: ChatTemplate) -> Sequence[Prompt]:
    """All prompts of a source: of a large data set as a table on disk."""
    if not isinstance(source, DatasetSource):
        return list(_tokenised(load_rows(source, where), template, data))
    stream = RowStream(source, where)
    table = kept_prompts(stream, data, template, partial(_tokenised, data=data)) if stream.large else None
    if table is None:
        return list(_tokenised(dataset_rows(source, where, stream), template, data))
    if len(table):
        _check_opening(template, table[0])
    return table


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


def _tokenised(rows: Iterable[Row], template: ChatTemplate, data: DataSection) -> Iterator[Prompt]:
    rows, checked = iter(rows), False
    while batch := list(islice(rows, TOKENIZER_BATCH)):
        messages = [_messages(row, data.system_prompt) for row in batch]
        texts = template.prompts(messages, [row.id for row in batch], [row.options for row in batch])
        # The template has written the special tokens (the beginning of the text among them) already.
        token_ids = template.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for row, chat, text, ids in zip(batch, messages, texts, token_ids, strict=True):
            is_text = isinstance(row.question, str)
            made = Prompt(
                row.id, chat, text, tuple(ids), row.columns, row.demonstration, is_text=is_text, options=row.options
            )
            if not checked:
                _check_opening(template, made)
                checked = True
            yield made


def _check_opening(template: ChatTemplate, prompt: Prompt) -> None:
    """Raises RecipeError for a template that does not open the answer."""
    try:
        Answers(template.tokenizer, template).form(prompt.text, prompt.messages, prompt.id, prompt.options)
    except DataError:  # a template for prompts alone, which takes no answers: there is nothing to compare with
        return


def _fitting(prompts: Sequence[Prompt], limit: int, data: DataSection, where: str) -> Places:
    """The places of the prompts within the limit. A cut prompt would be another question, so none is cut."""
    lengths = lengths_of(prompts)
    fitting = np.flatnonzero(lengths <= limit)
    too_long = len(prompts) - len(fitting)
    if too_long and (data.too_long == "refuse" or not len(fitting)):
        longest = prompts[int(lengths.argmax())]
        way_out = " or set data.too_long: drop" if len(fitting) else ""
        raise DataError(
            f"{where}: {too_long} of {len(prompts)} prompts have more than {limit} tokens (data.max_prompt_tokens is "
            f"{data.max_prompt_tokens}; the model's context less rollout.max_completion_tokens also counts). The "
            f"longest, {longest.id}, has {len(longest.token_ids)}. Raise the limit{way_out}."
        )
    return fitting


def _split_off(marks: np.ndarray[Any, Any], count: int, seed: int) -> Places:
    """The places of `count` prompts with distinct texts, drawn from the run's seed."""
    distinct = np.sort(np.unique(marks, return_index=True)[1])  # the first of equal prompts stays
    if count >= len(distinct):
        raise DataError(
            f"data.held_out asks for {count} prompts to be set aside for evaluation, but data.train has only "
            f"{len(distinct)} distinct prompts that fit, and some must remain for training. Lower data.held_out or "
            "give data.eval."
        )
    drawn = random.Random(f"held-out/{seed}").sample(range(len(distinct)), count)
    return distinct[np.array(drawn, dtype=np.int64)]

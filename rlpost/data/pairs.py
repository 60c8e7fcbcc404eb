"""Preference pairs: tokenised, measured, and split into training and held-out pairs."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rlpost.data.answers import AnswerFault, Answers
from rlpost.data.preferences import SAYS, SETTING, Preference, load_preferences, refusal
from rlpost.data.template import ChatTemplate
from rlpost.errors import DataError
from rlpost.experience import Completion, Message, Prompt
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.data import DataSection
from rlpost.recipe.sections.preference import PreferenceSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAYS = {
    **SAYS,
    "prompt": "have a prompt that is too long",
    "held_out": "share their prompt with a held-out pair",
}
BATCH = 1000  # rows at once: fast tokenizers work through a batch in parallel, memory stays small


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(Prompt):
    """A prompt with two responses to it; `baseline` is the initial model's, where the recipe names one."""

    chosen: Completion
    rejected: Completion
    baseline: tuple[int, ...] | None = None

    @property
    def responses(self) -> tuple[tuple[int, ...], ...]:
        """The token ids of all responses, in the order in which they are learned from."""
        return (self.chosen.token_ids, self.rejected.token_ids, *([self.baseline] if self.baseline is not None else []))


@dataclass(frozen=True, slots=True)
class PairSets:
    """The pairs of a run. No prompt of `held_out` occurs in `train`."""

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    cut: int = 0  # responses
    remarks: tuple[str, ...] = ()  # what should be known of prompts and responses

    @property
    def fingerprint(self) -> str:
        """A short hash of the training pairs in their order, by which a resumed run knows them again."""
        return fingerprint(self.train)

    def note(self) -> str:
        """The counts in one line, and what should be known of the pairs."""
        reasons = "; ".join(f"{n} {_SAYS[reason]}" for reason, n in sorted(self.dropped.items()) if n)
        counts = f"{len(self.train)} training and {len(self.held_out)} held-out pairs; dropped: {reasons or 'none'}"
        cut = [f"{self.cut} responses cut at the token limit"] if self.cut else []
        return "; ".join((counts, *cut, *self.remarks))

    def way_out(self) -> str:
        """What to do about the pairs that were dropped, for each reason that there was."""
        lost = {reason for reason, count in self.dropped.items() if count}
        advice = {
            "prompt": "raise data.max_prompt_tokens",
            "too_long": "raise rollout.max_completion_tokens or set data.train.too_long=cut",
            "held_out": "lower data.held_out, or give a data.eval with other prompts",
        }
        ways = [text for reason, text in advice.items() if reason in lost]
        if rows := sorted(lost - advice.keys()):
            ways.append(
                f"look at the rows of data.train: data.train.{SETTING.get(rows[0], rows[0])}=refuse names the first"
            )
        return "; ".join([*ways, "or give more data in data.train"])


def fingerprint(pairs: Sequence[Pair]) -> str:
    """A short hash of the tokens of `pairs`, in their order."""
    digest = hashlib.blake2b(digest_size=12)
    for pair in pairs:
        digest.update(repr((pair.token_ids, pair.responses)).encode())
    return digest.hexdigest()


def build_pairs(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_context: int | None,
    seed: int,
    max_completion_tokens: int,
) -> PairSets:
    """Loads, templates, tokenises and splits the preference pairs of a recipe.

    Raises DataError for whatever the sources' settings refuse, and when no pair is left.
    """
    limit = data.max_prompt_tokens
    if max_context is not None:
        limit = min(limit, max_context - max_completion_tokens)
    if limit < 1:
        raise DataError(
            f"The model's context of {max_context} tokens leaves no room for a prompt beside responses of "
            f"{max_completion_tokens} tokens. Lower rollout.max_completion_tokens."
        )
    reader = _Reader(data, tokenizer, limit, max_completion_tokens)
    train = reader.read(data.train, "data.train")
    if not train:
        raise _nothing_left(PairSets((), (), reader.dropped, reader.cut))
    held_out = _split_off(train, data.held_out, seed) if data.eval is None else reader.read(data.eval, "data.eval")
    texts = {pair.text for pair in held_out}
    kept = [pair for pair in train if pair.text not in texts]
    shared = len(train) - len(kept) - (len(held_out) if data.eval is None else 0)
    reader.dropped["held_out"] += shared
    sets = PairSets(tuple(kept), tuple(held_out), reader.dropped, reader.cut, reader.remarks())
    if not kept:
        raise _nothing_left(sets)
    return sets


def _nothing_left(sets: PairSets) -> DataError:
    """The error that says why every pair was dropped, and what to do about these reasons."""
    way_out = sets.way_out()
    return DataError(f"No training pair is left ({sets.note()}). {way_out[0].upper()}{way_out[1:]}.")


class _Reader:
    """Reads sources and counts what it drops."""

    def __init__(self, data: DataSection, tokenizer: PreTrainedTokenizerBase, prompt_limit: int, limit: int) -> None:
        self.settings, self.tokenizer = data, tokenizer
        self.prompt_limit, self.limit = prompt_limit, limit
        self.dropped: Counter[str] = Counter()
        self.cut = 0
        self._answers: dict[bool, Answers] = {}

    def answers(self, plain: bool) -> Answers:
        """What knows how the chat template, or without one the tokenizer, ends a response."""
        if plain not in self._answers:
            template = None if plain else ChatTemplate(self.tokenizer, self.settings.template_options)
            self._answers[plain] = Answers(self.tokenizer, template)
        return self._answers[plain]

    def remarks(self) -> tuple[str, ...]:
        return tuple(
            line
            for answers in self._answers.values()
            for line in (*answers.notes(), *(() if answers.template is None else answers.template.notes()))
        )

    def read(self, source: object, where: str) -> list[Pair]:
        if not isinstance(source, PreferenceSource):
            raise DataError(
                f"{where}: pairs come from a source of type `preference`, not `{getattr(source, 'type', source)}`."
            )
        rows, dropped = load_preferences(source, where)
        self.dropped += dropped
        pairs: list[Pair] = []
        faults: list[tuple[str, str]] = []
        for start in range(0, len(rows), BATCH):
            pairs += self._batch(rows[start : start + BATCH], source, faults)
        if faults and source.missing == "refuse":
            raise refusal("malformed", len(faults), len(rows), faults[0], where)
        self.dropped["malformed"] += len(faults)
        fitting = [pair for pair in pairs if len(pair.token_ids) <= self.prompt_limit]
        long = [pair for pair in fitting if max(map(len, pair.responses)) > self.limit]
        self._refuse(
            source, where, long, [pair for pair in pairs if len(pair.token_ids) > self.prompt_limit], len(rows)
        )
        self.dropped["prompt"] += len(pairs) - len(fitting)
        match source.too_long:
            case "cut":
                self.cut += sum(len(ids) > self.limit for pair in long for ids in pair.responses)
                fitting = [self._shortened(pair) for pair in fitting]
            case "drop" | "refuse":
                self.dropped["too_long"] += len(long)
                fitting = [pair for pair in fitting if max(map(len, pair.responses)) <= self.limit]
            case _:
                raise unknown_choice("data.train.too_long", source.too_long)
        return self._distinct(fitting, source, where, len(rows))

    def _distinct(self, pairs: list[Pair], source: PreferenceSource, where: str, total: int) -> list[Pair]:
        """The pairs whose responses differ as the model sees them: texts that differ may be the same tokens, where the
        template strips them or they differ behind the limit only."""
        same = [pair for pair in pairs if pair.chosen.token_ids == pair.rejected.token_ids]
        if same and source.identical == "refuse":
            detail = f"both are the same {len(same[0].chosen.token_ids)} tokens, after the template and the limit"
            raise refusal("identical", len(same), total, (same[0].id, detail), where)
        self.dropped["identical"] += len(same)
        return [pair for pair in pairs if pair.chosen.token_ids != pair.rejected.token_ids]

    def _refuse(self, source: PreferenceSource, where: str, long: list[Pair], prompts: list[Pair], total: int) -> None:
        if long and source.too_long == "refuse":
            detail = f"{max(map(len, long[0].responses))} tokens, where rollout.max_completion_tokens is {self.limit}"
            raise refusal("too_long", len(long), total, (long[0].id, detail), where)
        if prompts and self.settings.too_long == "refuse":
            raise DataError(
                f"{where}: {len(prompts)} of {total} prompts have more than {self.prompt_limit} tokens, the first is "
                f"{prompts[0].id}. Raise data.max_prompt_tokens, or set data.too_long=drop."
            )

    def _shortened(self, pair: Pair) -> Pair:
        chosen, rejected = (
            one if len(one.token_ids) <= self.limit else _completion(one.token_ids[: self.limit], one.text, cut=True)
            for one in (pair.chosen, pair.rejected)
        )
        baseline = None if pair.baseline is None else pair.baseline[: self.limit]
        return replace(pair, chosen=chosen, rejected=rejected, baseline=baseline)

    def _batch(
        self, rows: Sequence[Preference], source: PreferenceSource, faults: list[tuple[str, str]]
    ) -> Iterator[Pair]:
        """Pairs in tokens; `faults` collects (row, why) of rows with a response that cannot be one."""
        answers = self.answers(source.plain)
        chats = [self._messages(row) for row in rows]
        texts = self._texts(rows, chats, answers)
        ids = answers.prompt_ids(texts)
        for row, chat, text, own in zip(rows, chats, texts, ids, strict=True):
            try:
                ends = [
                    answers.whole(text, chat, one, row.id, row.options)
                    for one in (row.chosen, row.rejected, row.baseline)
                    if one is not None
                ]
            except AnswerFault as fault:
                faults.append((row.id, f"one {fault}"))
                continue
            responses = answers.token_ids([text] * len(ends), [own] * len(ends), ends)
            yield Pair(
                row.id,
                chat,
                text,
                own,
                options=row.options,
                chosen=_completion(responses[0], row.chosen),
                rejected=_completion(responses[1], row.rejected),
                baseline=responses[2] if len(responses) > 2 else None,
            )

    def _texts(self, rows: Sequence[Preference], chats: Sequence[tuple[Message, ...]], answers: Answers) -> list[str]:
        """The prompts as the model reads them."""
        if answers.template is not None:
            return answers.template.prompts(chats, [row.id for row in rows], [row.options for row in rows])
        chat = next((row for row in rows if not isinstance(row.prompt, str)), None)
        if chat is not None:
            raise DataError(
                f"plain=true is for texts, but the prompt of row {chat.id} is a list of chat messages, which need the chat "
                "template. Set data.train.plain=false (data.eval.plain)."
            )
        for key in ("system_prompt", "template_options"):
            if getattr(self.settings, key):
                raise DataError(
                    f"data.{key} is for the chat template, which plain=true does without. Set one of them only."
                )
        return [str(row.prompt) for row in rows]

    def _messages(self, row: Preference) -> tuple[Message, ...]:
        messages = (Message(role="user", content=row.prompt),) if isinstance(row.prompt, str) else row.prompt
        system = self.settings.system_prompt
        if system is None:
            return messages
        if messages[0]["role"] == "system":
            raise DataError(
                f"data.system_prompt is given, but row {row.id} has a system message of its own, and there can be only "
                "one. Remove data.system_prompt, or the system messages from the data set."
            )
        return (Message(role="system", content=system), *messages)


def _completion(ids: tuple[int, ...], text: str, *, cut: bool = False) -> Completion:
    return Completion(ids, (math.nan,) * len(ids), text, "length" if cut else "stop")


def _split_off(pairs: list[Pair], count: int, seed: int) -> list[Pair]:
    """`count` pairs with distinct prompts, drawn from the run's seed."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(pair.text, pair)
    if count and count >= len(first):
        raise DataError(
            f"data.held_out asks for {count} pairs to be set aside, but data.train has only {len(first)} distinct prompts that "
            "fit, and some must remain for training. Lower data.held_out or give data.eval."
        )
    return random.Random(f"held-out/{seed}").sample(list(first.values()), count)

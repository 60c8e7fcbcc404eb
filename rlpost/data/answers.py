"""How a chat template opens an answer and ends one: the one place that knows.

Prompts, preference pairs, demonstrations and hints ask it, so that the same text ends as an answer in the same tokens
wherever it is learned from: with the mark that the template puts behind an answer, once, and nothing behind it. A template
is asked with an answer that it cannot know (a marker): what it writes in front of it and behind it are its forms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlpost.data.template import Chat, ChatTemplate
from rlpost.errors import DataError, RecipeError
from rlpost.experience import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
_MARKER = "rlpost0answer0marker"
# What templates write as marks where they are no tokens of the tokenizer: <|end|>, </s>, <end_of_turn>, [/INST].
_MARK = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜\s]+｜>|</?[A-Za-z_][\w-]*>|\[/?[A-Z_]+\]")
_ASSISTANT = re.compile(r"assistant|model|/INST", re.IGNORECASE)
_THINK = re.compile(r"<(think|thinking|thought|reasoning|analysis)>|\[(THINK)\]", re.IGNORECASE)

_THOUGHT = re.compile(_THINK.pattern.replace("<(", "</(").replace(r"\[(", r"\[/("), re.IGNORECASE)


class AnswerFault(DataError):
    """A text that cannot be an answer under the chat template. The message is the end of a sentence about the row."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a template writes around an answer to conversations of one kind."""

    opens: str
    """The end of a prompt that is there for the answer's sake, such as `<|im_start|>assistant\\n`."""
    before: str | None
    """What stands between the prompt and a past answer. None: a conversation with a past answer does not begin with the
    prompt's text, or does not show the answer."""
    behind: str
    """Everything that stands behind a past answer."""
    end: str
    """The part of `behind` that the model itself is to write."""
    thinking: str = ""
    """The tag, such as <think>, of thinking that the template opens for the answer and does not close; empty for none."""


@dataclass(slots=True)
class Answers:
    """Texts as answers to prompts. `template` is None for texts that need none: they end with the tokenizer's end token."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    unclosed: int = 0  # answers that never close the thinking that the template opens for them
    _forms: dict[str, Form] = field(default_factory=dict, init=False)
    _specials: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self._specials = special_tokens(self.tokenizer)

    def whole(self, prompt: str, chat: Chat, answer: str, row: str, options: Mapping[str, Any] | None = None) -> str:
        """What follows a prompt's text where `answer` is learned as the answer to it, its end included.

        The answer is written as the template writes past answers (stripped, say), where a conversation with a past answer
        begins with the prompt as it is sampled from and keeps the answer whole. Else (some templates drop the thinking of past
        turns) the answer stands as it is.
        Raises AnswerFault for an answer with an end inside, or with thinking where the template has closed it.
        """
        if self.template is None:
            return self._bare(answer, self._eos) + self._eos
        form = self.form(prompt, chat, row, options)
        bare = self._bare(answer, form.end)
        text = self._learned(prompt, chat, bare, row, options, form)
        self.unclosed += bool(form.thinking) and _closing(form.thinking) not in text
        return text + form.end

    def _learned(
        self, prompt: str, chat: Chat, bare: str, row: str, options: Mapping[str, Any] | None, form: Form
    ) -> str:
        """An answer between prompt and end, as the template writes it where it can be asked."""
        assert self.template is not None
        text = _continued(bare, form)
        if form.before is None:
            return text
        shown = bare if _THINK.search(form.opens) else text
        past = self.template.conversation((*chat, Message(role="assistant", content=shown)), row, options)
        if not (past.startswith(prompt) and past.endswith(form.behind)):
            return text
        inner = past[len(prompt) : len(past) - len(form.behind)]
        ways = (text, text.strip(), text.rstrip(), text.lstrip())
        return inner if any(inner == form.before + way for way in ways) or text.strip() in inner else text

    def beginning(self, prompt: str, chat: Chat, text: str, row: str, options: Mapping[str, Any] | None = None) -> str:
        """What follows a prompt's text where the answer begins with `text`, and is gone on with."""
        if self.template is None:
            return text
        return _continued(text, self.form(prompt, chat, row, options))

    def bare(self, text: str, prompt: str, chat: Chat, row: str, options: Mapping[str, Any] | None = None) -> str:
        """A text without the end of an answer, where it brings one."""
        end = self._eos if self.template is None else self.form(prompt, chat, row, options).end
        return self._bare(text, end)

    def form(self, prompt: str, chat: Chat, row: str, options: Mapping[str, Any] | None = None) -> Form:
        """What the template writes around an answer to such a conversation. Raises RecipeError for a template that does not
        open the answer it is asked to open."""
        key = json.dumps([[message["role"] for message in chat], dict(options or {})], default=str, sort_keys=True)
        if key not in self._forms:
            self._forms[key] = self._find_form(prompt, chat, row, options)
        return self._forms[key]

    def _find_form(self, prompt: str, chat: Chat, row: str, options: Mapping[str, Any] | None) -> Form:
        assert self.template is not None
        asked = self.template.conversation(chat, row, options)
        past = self.template.conversation((*chat, Message(role="assistant", content=_MARKER)), row, options)
        opens = self._opening(prompt, asked, chat)
        tags = list(_THINK.finditer(opens))
        thinking = tags[-1][0] if tags and _closing(tags[-1][0]) not in opens[tags[-1].start() :] else ""
        at = past.rfind(_MARKER)
        if at < 0:  # the template shows no past answers
            return Form(opens, None, "", self._eos, thinking)
        before = past[len(prompt) : at] if past.startswith(prompt) and at >= len(prompt) else None
        if asked == prompt and before is not None and before.strip() and not _THINK.search(opens + before):
            raise RecipeError(
                f"model.chat_template: the template ignores `add_generation_prompt`: it ends prompts without "
                f"{before!r}, which it writes in front of an answer, so the model would have to write that itself (row {row}). "
                "Give a template that opens the assistant's turn: {% if add_generation_prompt %}...{% endif %} at its end."
            )
        behind = past[at + len(_MARKER) :]
        return Form(opens, before, behind, self._end(behind, opens), thinking)

    def _opening(self, prompt: str, asked: str, chat: Chat) -> str:
        """The end of a prompt that stands there for the answer's sake."""
        if asked == prompt:  # always, or never: what stands behind the question
            content = str(chat[-1]["content"] or "").strip() if chat else ""
            at = prompt.rfind(content) if content else -1
            return prompt[at + len(content) :] if at >= 0 else ""
        pairs = zip(prompt, asked, strict=False)
        cut = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(prompt), len(asked)))
        return prompt[min([cut, *(start for start, stop in _marks(prompt, self._specials) if start < cut < stop)]) :]

    def _end(self, behind: str, opens: str) -> str:
        """As much of what a template writes behind an answer as ends it."""
        marks = _marks(behind, self._specials)
        if not marks:
            return behind.rstrip() or self._eos
        start, stop = marks[0]
        # Some templates open the next answer at once, whether they are asked to or not.
        if _ASSISTANT.search(behind[start:stop]) and behind[start:stop] in opens:
            return behind[:start].rstrip() or self._eos
        return behind[:stop]

    @property
    def _eos(self) -> str:
        return str(self.tokenizer.eos_token)

    def _bare(self, text: str, end: str) -> str:
        """A text without the ends that stand behind it, whether the template's or the tokenizer's."""
        ends = [mark for mark in dict.fromkeys((end, end.strip(), self._eos)) if mark]
        bare = text
        while (mark := next((m for m in ends if bare.rstrip().endswith(m)), None)) is not None:
            bare = bare.rstrip().removesuffix(mark)
        inside = next((mark for mark in ends if mark in self._specials and mark in bare), None)
        if inside is not None:
            raise AnswerFault(f"has the end of an answer, `{inside}`, before its own end")
        return bare

    def prompt_ids(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of prompts.

        A template has written the special tokens already. Texts without one get what the tokenizer puts in front of every
        text (once, where the text brings it), but not what it puts behind it, since the answer follows.
        """
        bare = [tuple(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        if self.template is not None:
            return bare
        full = [tuple(ids) for ids in self.tokenizer(list(texts), add_special_tokens=True)["input_ids"]]
        return [_front(ids, more) + ids for ids, more in zip(bare, full, strict=True)]

    def token_ids(self, prompts: Sequence[str], prompt_ids: Sequence[Sequence[int]], texts: Sequence[str]) -> list[Ids]:
        """The tokens of each text behind its prompt. Where a token would reach over the border, the text is tokenised by
        itself, as it would be sampled."""
        if not texts:
            return []
        both = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        joined = self.tokenizer(both, add_special_tokens=False)["input_ids"]
        return [
            self._behind(tuple(own), tuple(ids), text) for own, ids, text in zip(prompt_ids, joined, texts, strict=True)
        ]

    def _behind(self, prompt: Ids, both: Ids, text: str) -> Ids:
        # What the tokenizer puts in front of a prompt without a template is not in `both`.
        for front in range(3 if self.template is None else 1):
            own = prompt[front:]
            if both[: len(own)] == own and len(both) > len(own):
                return both[len(own) :]
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def notes(self) -> list[str]:
        """What should be known of the answers that were read, a line each."""
        notes = []
        if self.unclosed:
            notes.append(f"{self.unclosed} answers never close the thinking that the chat template opens for them")
        if before := next((form.before for form in self._forms.values() if (form.before or "").strip()), None):
            notes.append(
                f"in front of answers without thinking the chat template writes {before!r}, which is learned too"
            )
        return notes


def _continued(text: str, form: Form) -> str:
    """An answer without the beginning of its thinking, where the template has written that at the prompt's end already."""
    opened = list(_THINK.finditer(form.opens))
    closed = _THOUGHT.search(form.opens)
    if not opened and closed is None:
        return text
    start = text.lstrip()
    if opened:
        tag, written = opened[-1][0], form.opens[opened[-1].start() :]
    else:  # closed without having been opened, as DeepSeek V3.1 does it for answers without thinking
        assert closed is not None
        tag, written = closed[0].replace("/", ""), form.opens[closed.start() :]
    if start.startswith(written):
        return start[len(written) :]
    if not start.startswith(tag):
        return text
    if form.thinking:
        return start[len(tag) :].lstrip()
    close = _closing(tag)
    empty = re.match(rf"{re.escape(tag)}\s*{re.escape(close)}\s*", start)
    if empty is None:
        raise AnswerFault(
            f"begins with {tag}, but the template has written {written!r} already, which closes the thinking (see "
            "data.template_options, such as enable_thinking)"
        )
    return start[empty.end() :]


def _closing(tag: str) -> str:
    return tag.replace("<", "</").replace("[", "[/")


def _front(ids: Ids, full: Ids) -> Ids:
    """What stands in front of `ids` in `full`, where they do not begin with it themselves."""
    for start in range(len(full) - len(ids) + 1):
        if full[start : start + len(ids)] == ids:
            front = full[:start]
            return () if front and ids[: len(front)] == front else front
    return ()


def end_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The special token with which the tokenizer's chat template ends an answer, where it is not the tokenizer's end token:
    sampling must end there too, since what is learned does. Empty where there is none, or no template."""
    if not getattr(tokenizer, "chat_template", None):
        return ()
    chat = (Message(role="user", content="?"),)
    try:
        template = ChatTemplate(tokenizer)
        end = Answers(tokenizer, template).form(template.prompts([chat], ["?"])[0], chat, "?").end
    except (DataError, RecipeError):  # such a template is refused where prompts are made
        return ()
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    return tuple(ids[-1:]) if ids and ids[-1] in _special_ids(tokenizer) - {tokenizer.eos_token_id} else ()


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that are no text: decoding leaves them out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens that a text names as a whole (special and added ones), longer ones first."""
    added: Iterable[Any] = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {*map(str, added), *map(str, tokenizer.all_special_tokens)}
    return tuple(sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token)))


def _marks(text: str, specials: Sequence[str]) -> list[tuple[int, int]]:
    """[start, end) of what stands in a text as a mark, in order."""
    spans = [match.span() for match in _MARK.finditer(text)]
    for token in specials:
        spans += [match.span() for match in re.finditer(re.escape(token), text)]
    return sorted(spans, key=lambda span: (span[0], -span[1]))

"""Hints: the beginning of a worked solution, cut where it hurts nothing, and the prompt that shows it."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from rlpost.data.answers import Answers
from rlpost.data.template import ChatTemplate
from rlpost.experience import Message, Prompt
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.guidance import HintGuidance, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A LaTeX command, a number (sign, thousands, decimals, fraction, exponent, percent), a word, or a sub- or superscript that
# belongs to a bracket.
_ATOM = re.compile(
    r"\\(?:[A-Za-z]+\*?|.)"
    r"|[-+]?(?:\d+|\.\d+)(?:(?:[./]|(?:\\!)*,(?:\\!)*|\{,\}|\\,)\d+)*(?:[eE][-+]?\d+)?(?:\\?%)?"
    r"|[^\W\d_]+(?:['’-][^\W\d_]+)*"
    r"|[\^_](?=[{\\\w])",
    re.DOTALL,
)
# How many arguments a command takes even where they have no braces, or a space before them. Others: what is attached.
_ARGUMENTS = dict.fromkeys(
    ("frac", "dfrac", "tfrac", "cfrac", "binom", "dbinom", "tbinom", "overset", "underset", "stackrel"), 2
) | dict.fromkeys(
    ("sqrt", "boxed", "text", "mathrm", "mathbf", "mathbb", "overline", "underline", "vec", "hat", "bar"), 1
)
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_BARE_ARGUMENT = re.compile(r"\\[A-Za-z]+|\w")
_BARE_SCRIPT = re.compile(r"[-+]?\w+")
_SPACES = re.compile(r" *")
# A step ends with its line, or with a sentence.
_STEP = re.compile(r"\n+|(?<=[.!?])[ \t]+(?=[^\s])")
_BRACES = {"{": "}", "[": "]"}


def cut_hint(
    text: str,
    ratio: float,
    unit: Unit = "characters",
    *,
    snap: bool = True,
    token_ends: Sequence[int] | None = None,
) -> str:
    """The first round(n * ratio) of the text's n units; the whole text only for ratio 1.

    `snap` shortens the result further until it cuts no word, number or LaTeX command (a command's arguments belong to
    it). `token_ends` (needed by `unit: tokens`) are the places in `text` where its tokens end. White space at the end is
    dropped. May be empty.
    """
    if ratio >= 1:
        return text.rstrip()
    ends = _unit_ends(text, unit, token_ends)
    count = min(round(len(ends) * ratio), len(ends) - 1)
    if count <= 0:
        return ""
    end = ends[count - 1]
    if snap:
        end = safe_end(text, end)
    return text[:end].rstrip() if snap else text[:end]


def _unit_ends(text: str, unit: Unit, token_ends: Sequence[int] | None) -> Sequence[int]:
    """Where the units of a text end."""
    if unit == "characters":
        return range(1, len(text) + 1)
    if unit == "tokens":
        if token_ends is None:
            raise ValueError("hints by tokens need `token_ends`")
        return token_ends
    text = text.rstrip()
    if unit == "lines":
        ends = [match.end() for match in re.finditer(r"\n+", text) if match.start()]
    elif unit == "steps":
        atoms = _atoms(text)
        ends = [m.end() for m in _STEP.finditer(text) if m.start() and _cut_by(atoms, m.start()) is None]
    else:
        raise unknown_choice("guidance.unit", unit)
    return [*ends, len(text)]


def safe_end(text: str, end: int) -> int:
    """The last place at or before `end` that lies inside no word, number or LaTeX command."""
    cut = _cut_by(_atoms(text), end)
    return end if cut is None else cut


def _cut_by(atoms: Sequence[tuple[int, int]], place: int) -> int | None:
    """The start of the atom that `place` lies inside of, or None."""
    before = bisect_left(atoms, place, key=lambda atom: atom[0]) - 1
    return atoms[before][0] if before >= 0 and place < atoms[before][1] else None


def _atoms(text: str) -> list[tuple[int, int]]:
    """[start, end) of what must not be cut, in order; a LaTeX command reaches to the end of its last argument."""
    atoms: list[tuple[int, int]] = []
    place = 0
    while match := _ATOM.search(text, place):
        start, stop = match.span()
        if match[0][0] in "^_":
            stop = start
        elif match[0][0] == "\\" and match[0][1:2].isalpha():
            stop = _scripts_end(text, _arguments_end(text, stop, _ARGUMENTS.get(match[0][1:].rstrip("*"), 0)))
            stop = _arguments_end(text, stop, 0)
        stop = max(_scripts_end(text, stop), match.end())
        atoms.append((start, stop))
        place = stop
    return atoms


def _arguments_end(text: str, place: int, arguments: int) -> int:
    """Where a command's arguments end; `place` is where the command's name ends.

    Brackets that follow at once always belong to the command. The first `arguments` arguments may also stand behind a space,
    or be a single character or command without braces."""
    taken = 0
    while place < len(text):
        begin = _SPACES.match(text, place).end() if taken < arguments else place  # type: ignore[union-attr]
        after: int | None
        if text[begin : begin + 1] in _BRACES:
            after = _bracket_end(text, begin)
            taken += text[begin] == "{"
        elif taken < arguments:
            bare, taken = _BARE_ARGUMENT.match(text, begin), taken + 1
            after = None if bare is None else bare.end()
        else:
            break
        if after is None:
            break
        place = after
    return place


def _scripts_end(text: str, place: int) -> int:
    """Where the sub- and superscripts that begin at `place` end: braces, a command with its arguments, or a word or number."""
    while text[place : place + 1] in ("^", "_"):
        after: int | None
        if text[place + 1 : place + 2] == "{":
            after = _bracket_end(text, place + 1)
        elif match := _COMMAND.match(text, place + 1):
            after = _arguments_end(text, match.end(), _ARGUMENTS.get(match[1], 0))
        else:
            bare = _BARE_SCRIPT.match(text, place + 1)
            after = None if bare is None else bare.end()
        if after is None:
            break
        place = after
    return place


def _bracket_end(text: str, place: int) -> int | None:
    """The place behind the bracket that closes the one at `place`; None when there is none."""
    opening, closing = text[place], _BRACES[text[place]]
    depth, i = 0, place
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += (text[i] == opening) - (text[i] == closing)
        if depth == 0:
            return i + 1
        i += 1
    return None


@dataclass(slots=True)
class Hinter:
    """Makes hinted prompts: tokenised as they will be sampled from."""

    settings: HintGuidance
    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    template_options: Mapping[str, Any] = field(default_factory=dict)
    _answers: Answers | None = field(default=None, init=False)

    @property
    def answers(self) -> Answers:
        """What knows how the chat template opens and ends an answer."""
        if self._answers is None:
            self._answers = Answers(self.tokenizer, ChatTemplate(self.tokenizer, self.template_options))
        return self._answers

    def hint(self, prompt: Prompt, ratio: float) -> str:
        """The hint that a prompt's demonstration gives; empty without a demonstration or where nothing is left."""
        if prompt.demonstration is None or ratio <= 0:
            return ""
        bare = prompt.bare
        text = self.answers.bare(prompt.demonstration.text, bare.text, bare.messages, prompt.id, prompt.options)
        ends = self._token_ends(text) if self.settings.unit == "tokens" else None
        return cut_hint(text, ratio, self.settings.unit, snap=self.settings.snap, token_ends=ends)

    def __call__(self, prompts: Sequence[Prompt], ratio: float) -> list[Prompt | None]:
        """Every prompt with a hint; None where there is no hint, or where it does not fit `max_prompt_tokens`.

        The hinted prompt has the same id and columns, and knows the bare one as its `origin`.
        """
        return [p if p is not None and self._fits(p) else None for p in self._hint_all(prompts, ratio)]

    def too_long(self, prompts: Sequence[Prompt], ratio: float) -> list[Prompt]:
        """The prompts whose hinted form does not fit `max_prompt_tokens`."""
        pairs = zip(prompts, self._hint_all(prompts, ratio), strict=True)
        return [prompt for prompt, hinted in pairs if hinted is not None and not self._fits(hinted)]

    def _fits(self, hinted: Prompt) -> bool:
        return len(hinted.token_ids) <= self.max_prompt_tokens

    def _hint_all(self, prompts: Sequence[Prompt], ratio: float) -> list[Prompt | None]:
        """Every prompt with a hint, however long; None where there is no hint."""
        hints = [self.hint(prompt, ratio) for prompt in prompts]
        made = iter(self._tokenise([(prompt, hint) for prompt, hint in zip(prompts, hints, strict=True) if hint]))
        return [next(made) if hint else None for hint in hints]

    def _tokenise(self, wanted: Sequence[tuple[Prompt, str]]) -> list[Prompt]:
        if not wanted:
            return []
        if self.settings.continues:
            # The turn that the template has opened is continued, so the prompt's own tokens stay as they are.
            begun = [self.answers.beginning(p.text, p.messages, hint, p.id, p.options) for p, hint in wanted]
            more = self.answers.token_ids([p.text for p, _ in wanted], [p.token_ids for p, _ in wanted], begun)
            return [
                replace(p, text=p.text + text, token_ids=(*p.token_ids, *ids), hint=hint, origin=p)
                for (p, hint), text, ids in zip(wanted, begun, more, strict=True)
            ]
        messages = [with_hint(p.messages, self.settings.wording.replace("{hint}", hint)) for p, hint in wanted]
        template = self.answers.template
        assert template is not None
        texts = template.prompts(messages, [p.id for p, _ in wanted], [p.options for p, _ in wanted])
        token_ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [
            replace(p, messages=chat, text=text, token_ids=tuple(ids), hint=hint, origin=p)
            for (p, hint), chat, text, ids in zip(wanted, messages, texts, token_ids, strict=True)
        ]

    def _token_ends(self, text: str) -> list[int]:
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [end for _, end in offsets]


def with_hint(messages: Sequence[Message], addition: str) -> tuple[Message, ...]:
    """The messages with `addition` behind the last one of the user (or, if there is none, the last one)."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    at = users[-1] if users else len(messages) - 1
    return tuple(
        cast(Message, {**m, "content": (m["content"] or "") + addition}) if i == at else m
        for i, m in enumerate(messages)
    )

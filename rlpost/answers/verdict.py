"""Puts reading and comparing together: is what a text answers the gold answer?"""

from __future__ import annotations

import re
from functools import lru_cache

from rlpost.answers.boxes import boxed_answers
from rlpost.answers.compare import same
from rlpost.answers.final import final_answers, said_answer
from rlpost.answers.library import library_reading, library_same
from rlpost.answers.read import canonical, read
from rlpost.answers.tree import Listing, Value, Words

_MISSING = frozenset(("", "none", "null", "nan", "n/a"))
_BARE_WORDS = 3
"""A gold answer of more words is a sentence, unless it stands in \\text: nobody answers in the same sentence."""

_LABELLED = re.compile(
    r"\\(?:text(?:bf|rm)?|math(?:bf|rm))\s*\{\s*\(([A-Z])\)\s*\}(?:\\(?:[ ,;:]|q?quad)|[~:\s])*(\S.*)", re.DOTALL
)
_LETTER = re.compile(r"(?:\\text(?:bf)?\s*\{)?\(?([A-Z])\)?\}?")


@lru_cache(maxsize=2048)
def read_gold(gold: str) -> tuple[str, tuple[Value, ...]]:
    """A gold answer's text, without what surrounds it, and its readings; no readings if it cannot be read.

    It may be a worked solution that ends in boxes, or in GSM8K's "#### 42".
    """
    text = gold.rpartition("####")[2].strip()
    parts = boxed_answers(text)
    if not parts and text.casefold() in _MISSING:
        return text, ()
    if not parts and re.search(r"\banswer\b", text, re.IGNORECASE):
        return text, ()
    whole = ", ".join(parts) or text
    if _LABELLED.fullmatch(whole):
        return whole, (Words(whole),)
    readings = combined(parts or [text])
    bare = r"\text" not in text and not parts
    kept = tuple(
        r
        for r in readings
        if not (bare and isinstance(r, Words) and len(re.findall("[a-z]{2,}", r.text)) > _BARE_WORDS)
    )
    return ", ".join(parts) or text, kept


def is_readable(gold: str) -> bool:
    """Whether a gold answer can be read, by this package or by math-verify."""
    text, readings = read_gold(gold)
    return bool(readings) or bool(library_reading(text))


def is_right(text: str, gold: str) -> bool:
    """Whether the final answer of `text` (see `final_text` for what stands behind the thinking) is the gold answer."""
    wanted, readings = read_gold(gold)
    answers = final_answers(text)
    labelled = [_LABELLED.fullmatch(part) for part in (wanted, answers[0] if len(answers) == 1 else "")]
    if any(labelled):
        return _is_right_choice(wanted, answers or [said_answer(text) or ""], labelled)
    said = said_answer(text)
    if answers and agrees(wanted, readings, answers):
        return True
    if said is not None and _LETTER.fullmatch(wanted):
        return _letter(said) == _letter(wanted)
    # Words without a box: only where the text says "the answer is" and nothing but the words behind it.
    return said is not None and any(isinstance(r, Words) for r in readings) and agrees(wanted, readings, [said])


def _is_right_choice(gold: str, answers: list[str], labelled: list[re.Match[str] | None]) -> bool:
    r"""Where one of the two is a choice with its letter, \textbf{(C)}\ 3: by the letter, or by what stands behind it."""
    of_gold, of_answer = labelled
    letters = (of_gold[1] if of_gold else _letter(gold), of_answer[1] if of_answer else _letter(", ".join(answers)))
    if None not in letters:
        return letters[0] == letters[1]
    answer = [of_answer[2]] if of_answer else answers
    wanted, readings = read_gold(of_gold[2] if of_gold else gold)
    return agrees(wanted, readings, answer)


def _letter(text: str) -> str | None:
    """The letter that an answer is, perhaps in brackets: a choice, or the name of a point."""
    match = _LETTER.fullmatch(text.strip(" .*$"))
    return match[1] if match else None


def agrees(gold: str, readings: tuple[Value, ...], answers: list[str]) -> bool:
    """Whether answers, all of them together, are the gold answer with these readings."""
    joined = ", ".join(answers)
    if len(joined) > 2000:
        return False
    if canonical(gold) == canonical(joined) and canonical(gold):
        return True
    if any(same(one, other) for one in readings for other in combined(answers)):
        return True
    return not readings and library_same(gold, joined)


def combined(texts: list[str]) -> tuple[Value, ...]:
    """The readings of several texts that are one answer: one list, in which what is said twice stands once."""
    if len(texts) == 1:
        return read(texts[0])
    items: list[Value] = []
    for text in texts:
        readings = read(text)
        if not readings:
            return ()
        first = readings[0]
        for item in first.items if isinstance(first, Listing) else (first,):
            if not any(same(item, other) for other in items):
                items.append(item)
    return (items[0],) if len(items) == 1 else (Listing(tuple(items)),)

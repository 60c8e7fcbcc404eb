r"""Multiple choice: 1 if the chosen letter is the right one, else 0 (also where no single letter is chosen).

Read in this order: the last <answer>B</answer>, the last \boxed{B}, the last "answer is (B)" or "Answer: B", or a
completion that begins with the letter and has nothing else but the choice's text, such as "B" or "(B) Paris".
Text up to </think> does not count.

Columns:   answer    the right letter.
Arguments: letters   the letters to choose from; "ABCD" if not given.
"""

from __future__ import annotations

import re
from typing import Any

from rlpost.scoring import Unparsable

LETTER = r"[(\[*\s]*(?:\\text\s*\{\s*)?[(]?([A-Za-z])(?![A-Za-z'])"
FORMS = (
    re.compile(rf"<answer>{LETTER}[^<]*</answer>", re.IGNORECASE),
    re.compile(rf"\\boxed\s*\{{{LETTER}"),
    re.compile(rf"\banswer(?:\s+is|\s*:)[:\s]*{LETTER}", re.IGNORECASE),
    re.compile(r"\A[(\[*]*([A-Z])(?:[)\].:*]+[^\n]*)?\Z"),
)


def reward(
    completions: list[list[dict[str, str]]], answer: list[str], letters: str = "ABCD", **columns: Any
) -> list[float]:
    texts = [completion[-1]["content"].rpartition("</think>")[2].strip() for completion in completions]
    return [1.0 if chosen(text) == gold(right, letters) else 0.0 for text, right in zip(texts, answer, strict=True)]


def chosen(text: str) -> str | None:
    for form in FORMS:
        found = form.findall(text)
        if found:
            return found[-1].upper()
    return None


def gold(right: object, letters: str) -> str:
    letter = str(right).strip().strip("()[].").upper()
    if len(letter) != 1 or letter not in letters.upper():
        raise Unparsable(f"the column `answer` holds {right!r}, which is none of the letters {letters}")
    return letter

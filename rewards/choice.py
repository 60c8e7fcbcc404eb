r"""Multiple choice: 1 if the chosen letter is the right one, else 0 (also where no single letter is chosen).

Read in this order: the last <answer>B</answer>, the last \boxed{B}, the last "answer is (B)" or "Answer: B", or a
completion that begins with the letter and has nothing else but the choice's text, such as "B" or "(B) Paris".
"A or B" chooses none, and the article in "a number" is no letter. Thinking does not count, finished or not.

Columns:   answer    the right letter.
Arguments: letters   the letters to choose from; "ABCD" if not given.
           opened    true: the chat template has already written "<think>" into the prompt.
"""

from __future__ import annotations

from typing import Any

from rlpost.answers import final_text
from rlpost.answers.choices import chosen
from rlpost.scoring import Unparsable


def reward(
    completions: list[Any], answer: list[str], letters: str = "ABCD", opened: bool = False, **columns: Any
) -> list[float]:
    texts = [final_text(completion, opened) for completion in completions]
    return [
        1.0 if chosen(text, letters) == gold(right, letters) else 0.0 for text, right in zip(texts, answer, strict=True)
    ]


def gold(right: object, letters: str) -> str:
    letter = str(right).strip().strip("()[].").upper()
    if len(letter) != 1 or letter not in letters.upper():
        raise Unparsable(f"the column `answer` holds {right!r}, which is none of the letters {letters}")
    return letter

r"""Exact number: 1 if the last number of the completion equals the answer, else 0.

1,234 and 1 234 are one number; .5, 1e3, 1.2 x 10^3, 1/2 and \frac{1}{2} are read as what they are, and are equal or not
exactly. The unit behind a number is not read, nor is a percent sign. Thinking does not count, finished or not.

Columns:   answer   the right number, as a number or text ("1,234", "$5", "€5" and "50%" are fine).
Arguments: only     true: the completion must be nothing but the number (spaces around it are allowed).
           opened   true: the chat template has already written "<think>" into the prompt.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from rlpost.answers import final_text
from rlpost.answers.numbers import last_number, only_number
from rlpost.scoring import Unparsable


def reward(
    completions: list[Any], answer: list[Any], only: bool = False, opened: bool = False, **columns: Any
) -> list[float]:
    read = only_number if only else last_number
    values = [read(final_text(completion, opened)) for completion in completions]
    return [1.0 if value == gold(right) else 0.0 for value, right in zip(values, answer, strict=True)]


def gold(right: object) -> Fraction:
    value = (
        None
        if isinstance(right, bool)
        else only_number(str(right).strip().strip("$€£¥ ").removesuffix("%").rstrip("\\"))
    )
    if value is None:
        raise Unparsable(f"the column `answer` holds {right!r}, which is no number")
    return value

"""Exact number: 1 if the last number of the completion equals the answer, else 0.

Columns:   answer   the right number, as an integer or text ("1,234" is fine).
Arguments: only     true: the completion must be nothing but the number (spaces around it are allowed).
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from rlpost.scoring import Unparsable

# A minus is a sign only where no operand stands before it: the last number of "12-7" is 7.
NUMBER = re.compile(r"(?:(?<![0-9)\]\w])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")


def reward(
    completions: list[list[dict[str, str]]], answer: list[Any], only: bool = False, **columns: Any
) -> list[float]:
    texts = [completion[-1]["content"].strip().replace("\N{MINUS SIGN}", "-") for completion in completions]
    return [1.0 if read(text, only) == gold(right) else 0.0 for text, right in zip(texts, answer, strict=True)]


def read(text: str, only: bool) -> Decimal | None:
    if only:
        return value(text) if NUMBER.fullmatch(text) else None
    found = NUMBER.findall(text)
    return value(found[-1]) if found else None


def gold(right: object) -> Decimal:
    text = str(right).strip()
    if isinstance(right, bool) or not NUMBER.fullmatch(text):
        raise Unparsable(f"the column `answer` holds {right!r}, which is no number")
    return value(text)


def value(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))

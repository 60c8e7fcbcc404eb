r"""Mathematics: 1 if the final answer equals the gold answer as mathematics (math-verify), else 0.

The final answer is the last \boxed{...}; without a box, the last number. Text up to </think> does not count.

Columns: answer     the gold answer: "42", "\frac{1}{2}", "x = 3", "#### 42" (GSM8K), ...
         solution   or a worked solution that ends in \boxed{...}; used where there is no `answer`.

A gold answer that cannot be read raises Unparsable: it is never counted as right, nor as wrong.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import E

from rlpost.scoring import Unparsable

# rlpost has deadlines of its own and kills what hangs. math-verify's use signals, which only a main thread can.
logging.getLogger("math_verify").setLevel(logging.ERROR)
FORMS = (LatexExtractionConfig(), ExprExtractionConfig())
TEXT = re.compile(r"\\(?:text|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
WORD = re.compile(r"[A-Za-z]{4,}")
NUMBER = re.compile(r"(?:(?<![0-9)\]\w])-)?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?%?")


def reward(
    completions: list[list[dict[str, str]]],
    answer: list[Any] | None = None,
    solution: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    n = len(completions)
    golds = zip(answer or [None] * n, solution or [None] * n, strict=True)
    return [score(c[-1]["content"], a if a is not None else s) for c, (a, s) in zip(completions, golds, strict=True)]


def score(text: str, gold: object) -> float:
    right = read_gold(str(gold)) if gold is not None else ()
    if not right:
        raise Unparsable(f"the gold answer {str(gold)[:200]!r} cannot be read (columns `answer` or `solution`)")
    final = final_answer(text)
    return 1.0 if final and verify(list(right), read(final), timeout_seconds=None) else 0.0


@lru_cache(maxsize=1024)
def read_gold(gold: str) -> tuple:
    """The gold answer's readings; none if it is no mathematics."""
    gold = gold.rpartition("####")[2].strip()
    gold = last_box(gold) or gold
    found = tuple(expression for expression in read(gold) if str(expression) not in ("nan", "zoo"))
    # Words outside of \text{...} would be read as products of letters, and "blue" would equal "lube".
    letters = any(getattr(expression, "free_symbols", None) or expression.has(E) for expression in found)
    return () if letters and WORD.search(TEXT.sub("", gold)) else found


def read(expression: str) -> list:
    return parse(f"${expression.replace('$', '')}$", FORMS, fallback_mode="no_fallback", parsing_timeout=None)


def final_answer(text: str) -> str | None:
    text = text.rpartition("</think>")[2]
    numbers = NUMBER.findall(text)
    return last_box(text) or (numbers[-1].rstrip(",") if numbers else None)


def last_box(text: str) -> str | None:
    r"""What stands in the last \boxed{...} that is closed."""
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for i in range(box.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[box.end() : i].strip()
    return None

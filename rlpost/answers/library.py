"""What math-verify reads and this package does not: sums, integrals, limits, products, matrices that are added."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

# rlpost has deadlines of its own and kills what hangs. math-verify's use signals, which only a main thread can.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_BEYOND = re.compile(r"\\(?:sum|int|iint|oint|prod|lim|partial|nabla|begin|det|pmod|bmod|mod)(?![A-Za-z])")
_WORDS = re.compile(r"\\text|[A-Za-z]{4,}(?![A-Za-z]*\})")
_LONGEST = 300
_DEEPEST = 5  # its parser takes seconds for brackets nested more deeply


def is_beyond(text: str) -> bool:
    """Whether an answer is of the kinds that are left to math-verify, and short enough for it."""
    plain = re.sub(r"\\[A-Za-z]+(?:\{[a-z]*matrix\})?", lambda m: m[0] if m[0] == r"\text" else " ", text)
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return len(text) <= _LONGEST and deepest <= _DEEPEST and bool(_BEYOND.search(text)) and not _WORDS.search(plain)


@lru_cache(maxsize=512)
def library_reading(text: str) -> tuple[Any, ...]:
    """math-verify's readings; none where it has none, or for what `is_beyond` excludes."""
    if not is_beyond(text):
        return ()
    from math_verify import LatexExtractionConfig, parse

    readings = parse(
        f"${text.replace('$', '')}$", (LatexExtractionConfig(),), fallback_mode="no_fallback", parsing_timeout=None
    )
    return tuple(expression for expression in readings if str(expression) not in ("nan", "zoo"))


def library_same(gold: str, answer: str) -> bool:
    """Whether math-verify takes the two for equal, with no rounding to speak of."""
    from math_verify import LatexExtractionConfig, parse, verify

    if len(answer) > _LONGEST:
        return False
    readings = library_reading(answer) or parse(
        f"${answer.replace('$', '')}$", (LatexExtractionConfig(),), fallback_mode="no_fallback", parsing_timeout=None
    )
    return bool(
        verify(
            list(library_reading(gold)), list(readings), float_rounding=15, numeric_precision=40, timeout_seconds=None
        )
    )

"""Length: two penalties for long completions, in tokens. They say nothing about being right: `accuracy: false`.

`length` is DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to max_tokens - buffer tokens, then falling
in a straight line to -1 at max_tokens, and -1 beyond.

    Arguments: max_tokens   usually rollout.max_completion_tokens
               buffer       the width of the slope, in tokens (DAPO: 4096 below a maximum of 20480)

`length:linear` costs the same for every token: -cost * tokens.

    Arguments: cost         per token, such as 0.001

Columns: none.
"""

from __future__ import annotations

from typing import Any


def reward(
    completions: list[Any],
    completion_ids: list[list[int]],
    max_tokens: int,
    buffer: int,
    **columns: Any,
) -> list[float]:
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"length: buffer={buffer} must be above 0 and at most max_tokens={max_tokens}")
    slope_starts = max_tokens - buffer
    return [-min(max(len(ids) - slope_starts, 0) / buffer, 1.0) for ids in completion_ids]


def linear(completions: list[Any], completion_ids: list[list[int]], cost: float, **columns: Any) -> list[float]:
    return [-cost * len(ids) for ids in completion_ids]

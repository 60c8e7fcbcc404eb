r"""Mathematics: 1 if the final answer equals the gold answer as mathematics, else 0.

The final answer is the last \boxed{...}, together with boxes right before it that are joined to it ("\boxed{1} and
\boxed{2}"); without a box the last formula or number, as a whole. Thinking does not count, finished or not.
What counts as equal, and what does not: docs/rewards.md.

Columns:   answer     the gold answer: "42", "\frac{1}{2}", "x = 3", "(1, \infty)", "#### 42" (GSM8K), ...
           solution   or a worked solution that ends in \boxed{...}; used where there is no `answer`.
Arguments: opened     true: the chat template has already written "<think>" into the prompt.

A gold answer that cannot be read raises Unparsable: it is never counted as right, nor as wrong.
"""

from __future__ import annotations

from typing import Any

from rlpost.answers import final_text, is_readable, is_right
from rlpost.scoring import Unparsable


def reward(
    completions: list[Any],
    answer: list[Any] | None = None,
    solution: list[str] | None = None,
    opened: bool = False,
    **columns: Any,
) -> list[float]:
    n = len(completions)
    golds = zip(answer or [None] * n, solution or [None] * n, strict=True)
    texts = [final_text(completion, opened) for completion in completions]
    return [score(text, a if a is not None else s) for text, (a, s) in zip(texts, golds, strict=True)]


def score(text: str, gold: object) -> float:
    if gold is None or not is_readable(str(gold)):
        raise Unparsable(f"the gold answer {str(gold)[:200]!r} cannot be read (columns `answer` or `solution`)")
    return 1.0 if is_right(text, str(gold)) else 0.0

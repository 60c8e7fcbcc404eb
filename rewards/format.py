"""Format: 1 if the whole completion has the wanted form, else 0. Says nothing about being right: `accuracy: false`.

Columns:   none.
Arguments: pattern   a regular expression that must match the whole completion (the dot matches newlines). Without it:
                     <think>...</think> followed by <answer>...</answer>, each tag exactly once.
           opened    true: the chat template has already written "<think>" into the prompt.
"""

from __future__ import annotations

import re
from typing import Any

from rlpost.answers import completion_text

BLOCKS = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def reward(completions: list[Any], pattern: str | None = None, opened: bool = False, **columns: Any) -> list[float]:
    texts = [("<think>" if opened else "") + completion_text(completion).strip() for completion in completions]
    if pattern is not None:
        return [1.0 if re.fullmatch(pattern, text, re.DOTALL) else 0.0 for text in texts]
    return [1.0 if BLOCKS.fullmatch(text) and all(text.count(tag) == 1 for tag in TAGS) else 0.0 for text in texts]

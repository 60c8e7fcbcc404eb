"""reasoning-gym: the score that a task's own verifier gives, between 0 and 1.

The answer is what stands in the last <answer>...</answer> behind the thinking; without one, all of the text behind it.

Columns:   task     the task's name, such as "countdown"
           entry    the question's entry (question, answer, metadata) as JSON text
Arguments: opened   true: the chat template has already written "<think>" into the prompt.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import reasoning_gym

from rlpost.answers import final_text
from rlpost.scoring import Unparsable

verifier = lru_cache(maxsize=None)(reasoning_gym.get_score_answer_fn)


def reward(
    completions: list[Any], task: list[str], entry: list[str], opened: bool = False, **columns: Any
) -> list[float]:
    texts = [final_text(completion, opened) for completion in completions]
    return [score(text, t, e) for text, t, e in zip(texts, task, entry, strict=True)]


def score(text: str, task: str, entry: str) -> float:
    try:
        question, check = json.loads(entry), verifier(task)
    except (TypeError, ValueError) as error:
        raise Unparsable(f"task {task!r}: {error}") from error
    answer = reasoning_gym.utils.extract_answer(text) or text.strip()
    return float(check(answer=answer, entry=question))

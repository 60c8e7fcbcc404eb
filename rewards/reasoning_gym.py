"""reasoning-gym: the score that a task's own verifier gives, between 0 and 1.

The answer is what stands in the last <answer>...</answer>; without one, the whole text after </think>.

Columns: task    the task's name, such as "countdown"
         entry   the question's entry (question, answer, metadata) as JSON text
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import reasoning_gym

from rlpost.scoring import Unparsable

verifier = lru_cache(maxsize=None)(reasoning_gym.get_score_answer_fn)


def reward(completions: list[list[dict[str, str]]], task: list[str], entry: list[str], **columns: Any) -> list[float]:
    texts = [completion[-1]["content"] for completion in completions]
    return [score(text, t, e) for text, t, e in zip(texts, task, entry, strict=True)]


def score(text: str, task: str, entry: str) -> float:
    try:
        question, check = json.loads(entry), verifier(task)
    except (TypeError, ValueError) as error:
        raise Unparsable(f"task {task!r}: {error}") from error
    answer = reasoning_gym.utils.extract_answer(text) or text.rpartition("</think>")[2].strip()
    return float(check(answer=answer, entry=question))

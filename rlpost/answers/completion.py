"""The text of a completion that can hold an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_OPENS = re.compile(r"<think(?:ing)?>|\[THINK\]")
_CLOSES = re.compile(r"</think(?:ing)?>|\[/THINK\]")


def completion_text(completion: str | Sequence[Mapping[str, object]]) -> str:
    """The text of a completion: a plain string, or the last of a list of chat messages."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    return content if isinstance(content, str) else ""


def final_text(completion: str | Sequence[Mapping[str, object]], opened: bool = False) -> str:
    """What stands behind the thinking; nothing if the thinking has not come to an end.

    Args:
        completion: a string, or a list of messages of which the last one counts.
        opened: the chat template has already written "<think>" into the prompt, so a completion without "</think>" is
            all thinking.
    """
    text = completion_text(completion)
    end = 0
    for closing in _CLOSES.finditer(text):
        end = closing.end()
    if opened and end == 0:
        return ""
    behind = text[end:]
    again = _OPENS.search(behind)
    return behind[: again.start()] if again else behind

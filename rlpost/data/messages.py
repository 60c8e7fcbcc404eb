"""What stands in a row as chat messages: kept with all their keys, or refused naming the row, the message and the key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

from rlpost.errors import DataError
from rlpost.experience import Message

Question = str | tuple[Message, ...]
# Keywords of `apply_chat_template` that say what it does, not what the template shows.
RESERVED = (
    "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
# What an answer may hold beside its text. Templates write it in forms of their own, so it is no text to learn from.
_BESIDE_TEXT = ("tool_calls", "reasoning_content", "reasoning", "thinking")


def chat_fault(value: Any) -> str | None:
    """Why a value is neither a text nor a list of chat messages (empty ones are both), as the end of a sentence; None where
    it is one of them. A message has the texts `role` and `content`; beside tool calls, `content` may be null or missing."""
    if isinstance(value, str):
        return None
    if not isinstance(value, list | tuple):
        return f"holds a value of type {type(value).__name__}, not a text or a list of chat messages"
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            return f"holds a list of {type(message).__name__}, not of chat messages"
        content, role = message.get("content"), message.get("role")
        if isinstance(role, str) and (isinstance(content, str) or (content is None and message.get("tool_calls"))):
            continue
        if "from" in message and "value" in message:
            return "has messages with `from` and `value` (ShareGPT's form): rename them to `role` and `content`"
        key = "content" if isinstance(role, str) else "role"
        kind = "null" if message.get(key) is None else f"of type {type(message[key]).__name__}"
        parts = " (content parts): join them to one text" if key == "content" and kind == "of type list" else ""
        return f"has a message {i} whose `{key}` is {kind}, not a text{parts}"
    return None


def answer_fault(message: Mapping[str, Any], index: int) -> str | None:
    """Why an assistant's message cannot be learned from as a text, as the end of a sentence; None where it can."""
    if message.get("tool_calls"):
        return f"has tool calls in message {index}, which cannot be learned from yet"
    for key in _BESIDE_TEXT:
        if message.get(key):
            return (
                f"has `{key}` in message {index}, which would not be learned: write it into `content`, in the form in which "
                "the model is to answer (such as <think>...</think>)"
            )
    return None


def read_question(value: Any, row_id: str, key: str, *, filled: bool = False) -> Question:
    """A text, or chat messages with all their keys; DataError for anything else. `filled`: see `without_nulls`."""
    if isinstance(value, str) and value.strip():
        return value
    fault = chat_fault(value)
    if isinstance(value, list) and value and fault is None:
        if value[-1]["role"] == "assistant":
            raise DataError(
                f"{key}: the messages of row {row_id} end with the assistant's answer. A prompt ends with the "
                "question: move the answer to a column of its own."
            )
        return as_messages(value, filled=filled)
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    why = f" ({fault})" if fault is not None and isinstance(value, list) else ""
    raise DataError(
        f"{key}: row {row_id} holds {shown}{why}. A prompt is a text that is not empty, or a list of chat messages, "
        "each with the texts `role` and `content`."
    )


def read_solution(value: Any, row_id: str, key: str, *, filled: bool = False) -> str:
    """The text of a worked solution: a text, or the last one of chat messages. May be empty."""
    fault = chat_fault(value)
    if fault is None and not isinstance(value, str) and value:
        last = without_nulls(value[-1]) if filled else value[-1]
        fault = answer_fault(last, len(value) - 1)
        if fault is None and last["role"] in ("user", "system", "tool"):
            fault = f"ends with a message of the role `{last['role']}`, which is no answer"
        value = last["content"]
    if fault is not None:
        raise DataError(
            f"{key}: the column of row {row_id} {fault}. A worked solution must be a string or a list of chat messages that "
            "ends with the answer (or null, where there is none)."
        )
    return value if value and value.strip() else ""


def as_messages(chat: Iterable[Mapping[str, Any]], *, filled: bool = False) -> tuple[Message, ...]:
    """Chat messages as they stand in the row."""
    return tuple(cast(Message, without_nulls(one) if filled else dict(one)) for one in chat)


def without_nulls(value: Any) -> Any:
    """A value without the keys that are null, at any depth: table formats give every object of a column the keys of all the
    others, with null for those that it does not have."""
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(one) for one in value]
    return value


def template_columns(values: Mapping[str, Any], row_id: str, where: str, *, filled: bool = False) -> dict[str, Any]:
    """The row's own keywords of the chat template: the columns `tools` and `chat_template_kwargs`, as with TRL, each given as
    it is or as JSON, and `documents` where it is a list of objects. Raises DataError for what no template could take."""
    columns: dict[str, Any] = {}
    for column in ("tools", "chat_template_kwargs"):
        value = _parsed(values.get(column), column, row_id, where)
        value = without_nulls(value) if filled else value
        if not value:
            continue
        wanted, called = (list, "a list of tools") if column == "tools" else (Mapping, "keywords and their values")
        if not isinstance(value, wanted):
            raise DataError(
                f"{where}: column `{column}` of row {row_id} holds a {type(value).__name__}, where the chat template needs "
                f"{called}. Correct it, or remove or rename the column."
            )
        columns |= {column: value} if column == "tools" else value
    documents = values.get("documents")  # many data sets have a column of this name that is meant for no template
    if isinstance(documents, list) and documents and all(isinstance(one, Mapping) for one in documents):
        columns.setdefault("documents", without_nulls(documents) if filled else documents)
    if taken := next((name for name in RESERVED if name in columns), None):
        raise DataError(
            f"{where}: column `chat_template_kwargs` of row {row_id} has the keyword `{taken}`, which is no template's: it "
            "says what is done with the template. Remove it."
        )
    return columns


def _parsed(value: Any, column: str, row_id: str, where: str) -> Any:
    """The value of a column, which may be a JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(
            f"{where}: column `{column}` of row {row_id} is a text that is no JSON ({error}). It is handed to the chat "
            "template, as by TRL: correct it, or remove or rename the column."
        ) from error

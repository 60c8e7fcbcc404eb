"""The source `preference`: rows of a data set as prompt, chosen and rejected texts, with every problem counted or refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlpost.data.dataset import load_table
from rlpost.data.rows import nearest
from rlpost.errors import DataError
from rlpost.experience import Message
from rlpost.recipe.sections.data import DatasetSource
from rlpost.recipe.sections.preference import PreferenceSource

Reason = Literal["missing", "malformed", "no_baseline", "empty", "identical", "mismatch"]
Question = str | tuple[Message, ...]
SAYS: dict[str, str] = {
    "missing": "have no chosen or no rejected response",
    "malformed": "have a response that is neither a text nor chat messages of texts",
    "no_baseline": "have no response of the initial model",
    "empty": "have an empty response",
    "identical": "have two identical responses",
    "mismatch": "have responses that do not answer one and the same prompt",
    "too_long": "have a response that is too long",
}
SETTING = {"malformed": "missing", "no_baseline": "missing"}  # the recipe key that decides, where it has another name


@dataclass(frozen=True, slots=True)
class Preference:
    """A row: one prompt and two answers to it, as texts. `options` are the row's own keywords of the chat template."""

    id: str
    prompt: Question
    chosen: str
    rejected: str
    baseline: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row is no pair."""

    reason: Reason
    detail: str


def load_preferences(source: PreferenceSource, where: str = "data.train") -> tuple[list[Preference], Counter[str]]:
    """The usable rows of a source in their order, and how many were dropped for which reason.

    Raises DataError for a missing or unreadable data set or column, and for rows that the source's settings refuse.
    """
    table, name = load_table(
        DatasetSource(path=source.path, name=source.name, split=source.split, limit=source.limit), where
    )
    _check_columns(source, table, where)
    found: list[Preference] = []
    problems: dict[str, list[tuple[str, str]]] = {}
    for i, values in enumerate(table):
        row = read_row(f"{name}/{i}", values, source, where)
        if isinstance(row, Preference):
            found.append(row)
        else:
            problems.setdefault(row.reason, []).append((f"{name}/{i}", row.detail))
    for reason, rows in problems.items():
        if getattr(source, SETTING.get(reason, reason)) == "refuse":
            raise refusal(reason, len(rows), len(table), rows[0], where)
    return found, Counter({reason: len(rows) for reason, rows in problems.items()})


def refusal(reason: str, count: int, total: int, first: tuple[str, str], where: str) -> DataError:
    """The error for rows that `<where>.<reason>: refuse` refuses; `first` is (row, detail)."""
    return DataError(
        f"{where}: {count} of {total} rows {SAYS[reason]}; the first is {first[0]}: {first[1]}. Correct the data, or drop "
        f"such rows (counted and reported) with {where}.{SETTING.get(reason, reason)}=drop."
    )


def read_row(
    row_id: str, values: Mapping[str, Any], source: PreferenceSource, where: str = "data.train"
) -> Preference | Problem:
    """One row in any of TRL's preference formats: texts or chat messages, prompt given or implicit.

    `where` is the source's place in the recipe, for what the problem's `detail` advises.
    """
    chosen, rejected = values[source.chosen], values[source.rejected]
    if (problem := _sides(source, chosen, rejected)) is not None:
        return problem
    prompt = None
    if source.prompt is not None and source.prompt in values:
        prompt = values[source.prompt]
        if fault := _prompt_fault(prompt):
            return Problem("mismatch", f"`{source.prompt}` {fault}")
    if isinstance(chosen, str):
        parts = _texts(prompt, chosen, rejected, source, where)
    else:
        parts = _chats(prompt, list(chosen), list(rejected))
    if isinstance(parts, Problem):
        return parts
    question, good, bad = parts
    if not good.strip() or not bad.strip():
        return Problem("empty", f"`{source.rejected if good.strip() else source.chosen}` holds only white space")
    if good == bad:
        return Problem("identical", "the two responses are the same")
    baseline = None if source.baseline is None else _last_text(values[source.baseline])
    if source.baseline is not None and not (baseline or "").strip():
        return Problem("no_baseline", f"`{source.baseline}` {_fault(values[source.baseline]) or 'is empty'}")
    return Preference(row_id, question, good, bad, baseline, _options(values, row_id, where))


def _sides(source: PreferenceSource, chosen: Any, rejected: Any) -> Problem | None:
    """What is wrong with the two responses as they stand in the row."""
    for column, value in ((source.chosen, chosen), (source.rejected, rejected)):
        if value is None:
            return Problem("missing", f"`{column}` is null")
        if fault := _fault(value):
            return Problem("malformed", f"`{column}` {fault}")
        if not value:
            return Problem("empty", f"`{column}` is empty")
    if chosen == rejected:
        return Problem("identical", "the two responses are the same")
    if isinstance(chosen, str) != isinstance(rejected, str):
        return Problem("mismatch", "one response is a text, the other a list of messages")
    return None


Parts = tuple[Question, str, str]


def _texts(prompt: Any, chosen: str, rejected: str, source: PreferenceSource, where: str) -> Parts | Problem:
    if prompt is not None:
        return (prompt if isinstance(prompt, str) else _as_messages(prompt)), chosen, rejected
    parts = _extract(chosen, rejected)
    if not str(parts["prompt"]).strip():
        return Problem("mismatch", "there is no prompt, and the responses have no beginning in common")
    if not source.plain:
        return Problem(
            "mismatch",
            "there is no prompt and the responses are texts, so what they have in common is no user message: name the "
            f"prompt's column with {where}.prompt, or use their beginning as it is, without a template ({where}.plain=true)",
        )
    return parts["prompt"], parts["chosen"], parts["rejected"]


def _chats(prompt: Any, chosen: list[Any], rejected: list[Any]) -> Parts | Problem:
    given: list[Any] | None = None if prompt is None or isinstance(prompt, str) else list(prompt)
    if given is not None:
        # Some data sets repeat the prompt's messages in front of the responses.
        chosen, rejected = (side[len(given) :] if side[: len(given)] == given else side for side in (chosen, rejected))
    elif isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
        given = [{"role": "user", "content": prompt}]
    else:
        parts = _extract(chosen, rejected)
        given, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
        if isinstance(prompt, str) and given and prompt not in (m["content"] for m in given):
            return Problem(
                "mismatch", "the prompt given is not among the messages that the two responses have in common"
            )
        if given and (fault := _prompt_fault(given)):
            return Problem("mismatch", f"what the two responses have in common {fault}")
    if not given:
        return Problem("mismatch", "there is no prompt, and the two responses begin with different messages")
    if any(len(side) != 1 or side[0]["role"] != "assistant" for side in (chosen, rejected)):
        return Problem("mismatch", "after the common prompt each side must have one message, the assistant's")
    return _as_messages(given), chosen[0]["content"], rejected[0]["content"]


def _prompt_fault(value: Any) -> str | None:
    """What keeps a value from being a prompt, as the end of a sentence; None for a text, or chat messages that end with a
    question, as the source `dataset` takes them."""
    if value is None:
        return "is null"
    if fault := _fault(value):
        return fault
    last = value if isinstance(value, str) else value[-1]["content"] if value else ""
    if not last.strip():
        return "is empty, or ends with an empty message"
    if not isinstance(value, str) and value[-1]["role"] == "assistant":
        return "ends with the assistant's answer, and a prompt ends with the question"
    return None


def _fault(value: Any) -> str | None:
    """Why a value is neither a text nor a list of chat messages with text content (empty ones are both), as the end of a
    sentence; None where it is one of them."""
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        return f"holds a value of type {type(value).__name__}, not a text or a list of chat messages"
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            return f"holds a list of {type(message).__name__}, not of chat messages"
        if isinstance(message.get("role"), str) and isinstance(message.get("content"), str):
            if message.get("tool_calls"):
                return f"has tool calls in message {i}, which cannot be learned from yet"
            continue
        if "from" in message and "value" in message:
            return "has messages with `from` and `value` (ShareGPT's form): rename them to `role` and `content`"
        key = "content" if isinstance(message.get("role"), str) else "role"
        found = "null" if message.get(key) is None else f"of type {type(message[key]).__name__}"
        parts = " (content parts): join them to one text" if key == "content" and found == "of type list" else ""
        return f"has a message {i} whose `{key}` is {found}, not a text{parts}"
    return None


def _options(values: Mapping[str, Any], row_id: str, where: str) -> dict[str, Any]:
    """TRL's columns `tools` and `chat_template_kwargs`, each given as it is or as JSON: the row's own keywords of the chat
    template. Nulls are left out: tables fill a row up with them where another row has a key more.
    """
    found: dict[str, Any] = {}
    for column in ("tools", "chat_template_kwargs"):
        value = values.get(column)
        try:
            value = json.loads(value) if isinstance(value, str) and value.strip() else value
        except ValueError as error:
            raise DataError(
                f"{where}: column `{column}` of row {row_id} is a text that is no JSON ({error}). It is handed to the chat "
                "template, as by TRL: correct it, or remove or rename the column."
            ) from error
        if column == "tools":
            found["tools"] = value or None
        elif value and not isinstance(value, Mapping):
            raise DataError(
                f"{where}: column `{column}` of row {row_id} holds a {type(value).__name__}, where the chat template needs "
                "keywords and their values. Correct it, or remove or rename the column."
            )
        else:
            found |= value or {}
    return {name: value for name, value in found.items() if value is not None}


def _extract(chosen: Any, rejected: Any) -> dict[str, Any]:
    from trl.data_utils import extract_prompt  # TRL's own rule for prompts that are implicit in both responses

    return extract_prompt({"chosen": chosen, "rejected": rejected})


def _as_messages(chat: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    return tuple(Message(role=one["role"], content=one["content"]) for one in chat)


def _last_text(value: Any) -> str | None:
    if _fault(value) is not None or not value:
        return None
    return value if isinstance(value, str) else value[-1]["content"]


def _check_columns(source: PreferenceSource, table: Any, where: str) -> None:
    """Every column that is named is there. A prompt may only be implicit where that is sure to be meant: in chat messages,
    whose roles say where it ends, or where the recipe says `prompt: null`."""
    available = table.column_names
    texts = source.chosen in available and "string" in str(getattr(table.features[source.chosen], "dtype", ""))
    for key in ("chosen", "rejected", "baseline", "prompt"):
        column = getattr(source, key)
        if column is None or column in available:
            continue
        if key == "prompt" and not texts and "prompt" not in source.model_fields_set:
            continue
        implicit = f", or {where}.prompt to null if it is what both responses begin with" if key == "prompt" else ""
        raise DataError(
            f"{where}.{key}: `{source.path}` has no column `{column}`. It has {', '.join(f'`{c}`' for c in available)}."
            f"{nearest(column, available)} Set {where}.{key} to the column you mean{implicit}."
        )

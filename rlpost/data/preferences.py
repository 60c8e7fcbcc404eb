"""The source `preference`: rows of a data set as prompt, chosen and rejected texts, with every problem counted or refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlpost.data.dataset import load_table
from rlpost.data.rows import nearest
from rlpost.errors import DataError
from rlpost.experience import Message
from rlpost.recipe.data import DatasetSource
from rlpost.recipe.preference import PreferenceSource

Reason = Literal["missing", "empty", "identical", "mismatch"]
Question = str | tuple[Message, ...]
SAYS: dict[str, str] = {
    "missing": "have no chosen or no rejected response",
    "empty": "have an empty response",
    "identical": "have two identical responses",
    "mismatch": "have responses that do not answer one and the same prompt",
    "too_long": "have a response that is too long",
}


@dataclass(frozen=True, slots=True)
class Preference:
    """A row: one prompt and two answers to it, as texts."""

    id: str
    prompt: Question
    chosen: str
    rejected: str
    baseline: str | None = None


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
    _check_columns(source, table.column_names, where)
    found: list[Preference] = []
    problems: dict[str, list[tuple[str, str]]] = {}
    for i, values in enumerate(table):
        row = read_row(f"{name}/{i}", values, source)
        if isinstance(row, Preference):
            found.append(row)
        else:
            problems.setdefault(row.reason, []).append((f"{name}/{i}", row.detail))
    for reason, rows in problems.items():
        if getattr(source, reason) == "refuse":
            raise refusal(reason, len(rows), len(table), rows[0], where)
    return found, Counter({reason: len(rows) for reason, rows in problems.items()})


def refusal(reason: str, count: int, total: int, first: tuple[str, str], where: str) -> DataError:
    """The error for rows that `<where>.<reason>: refuse` refuses; `first` is (row, detail)."""
    return DataError(
        f"{where}: {count} of {total} rows {SAYS[reason]}; the first is {first[0]}: {first[1]}. Correct the data, or drop "
        f"such rows (counted and reported) with {where}.{reason}=drop."
    )


def read_row(row_id: str, values: Mapping[str, Any], source: PreferenceSource) -> Preference | Problem:
    """One row in any of TRL's preference formats: texts or chat messages, prompt given or implicit."""
    chosen, rejected = values[source.chosen], values[source.rejected]
    for side, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None:
            return Problem("missing", f"`{getattr(source, side)}` is null")
        if not isinstance(value, str) and not _is_chat(value) and value != []:
            return Problem("missing", f"`{getattr(source, side)}` is neither a text nor a list of chat messages")
        if not value:
            return Problem("empty", f"`{getattr(source, side)}` is empty")
    if chosen == rejected:
        return Problem("identical", "the two responses are the same")
    if isinstance(chosen, str) != isinstance(rejected, str):
        return Problem("mismatch", "one response is a text, the other a list of messages")
    prompt = values.get(source.prompt) if source.prompt is not None else None
    if isinstance(chosen, str):
        parts = _texts(prompt, chosen, rejected, source)
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
        return Problem("missing", f"`{source.baseline}` is empty")
    return Preference(row_id, question, good, bad, baseline)


Parts = tuple[Question, str, str]


def _texts(prompt: Any, chosen: str, rejected: str, source: PreferenceSource) -> Parts | Problem:
    if isinstance(prompt, str) and prompt.strip():
        return prompt, chosen, rejected
    if _is_chat(prompt):
        return _as_messages(prompt), chosen, rejected
    if prompt is not None:
        return Problem("mismatch", "the prompt is empty, or neither a text nor a list of chat messages")
    parts = _extract(chosen, rejected)
    if not str(parts["prompt"]).strip():
        return Problem("mismatch", "there is no prompt, and the responses have no beginning in common")
    if not source.plain:
        return Problem(
            "mismatch",
            "there is no prompt column and the responses are texts, so what they have in common is no user message: set "
            "data.train.plain=true to use it as it is",
        )
    return parts["prompt"], parts["chosen"], parts["rejected"]


def _chats(prompt: Any, chosen: list[Any], rejected: list[Any]) -> Parts | Problem:
    given: list[Any] | None = list(prompt) if _is_chat(prompt) else None
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
    if not given:
        return Problem("mismatch", "the two responses begin with different messages")
    if any(len(side) != 1 or side[0]["role"] != "assistant" for side in (chosen, rejected)):
        return Problem("mismatch", "after the common prompt each side must have one message, the assistant's")
    return _as_messages(given), chosen[0]["content"], rejected[0]["content"]


def _extract(chosen: Any, rejected: Any) -> dict[str, Any]:
    from trl.data_utils import extract_prompt  # TRL's own rule for prompts that are implicit in both responses

    return extract_prompt({"chosen": chosen, "rejected": rejected})


def _as_messages(chat: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    return tuple(Message(role=one["role"], content=one["content"]) for one in chat)


def _last_text(value: Any) -> str | None:
    if _is_chat(value):
        return value[-1]["content"]
    return value if isinstance(value, str) else None


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def _check_columns(source: PreferenceSource, available: list[str], where: str) -> None:
    for key in ("chosen", "rejected", "baseline"):
        column = getattr(source, key)
        if column is not None and column not in available:
            listed = ", ".join(f"`{name}`" for name in available)
            raise DataError(
                f"{where}.{key}: `{source.path}` has no column `{column}`. It has {listed}.{nearest(column, available)} Set "
                f"{where}.{key} to the column you mean."
            )

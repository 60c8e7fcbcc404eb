"""The source `preference`: rows of a data set as prompt, chosen and rejected texts, with every problem counted or refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlpost.data.dataset import Table, load_table
from rlpost.data.messages import Question, answer_fault, as_messages, chat_fault, template_columns, without_nulls
from rlpost.data.rows import nearest
from rlpost.errors import DataError
from rlpost.recipe.sections.data import DatasetSource
from rlpost.recipe.sections.preference import PreferenceSource

Reason = Literal["missing", "malformed", "no_baseline", "empty", "identical", "mismatch"]
SAYS: dict[str, str] = {
    "missing": "have no chosen or no rejected response",
    "malformed": "have a response that cannot be an answer",
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
    table = load_table(DatasetSource(path=source.path, name=source.name, split=source.split, limit=source.limit), where)
    _check_columns(source, table, where)
    preferences: list[Preference] = []
    problems: dict[str, list[tuple[str, str]]] = {}
    for i, values in enumerate(table.rows):
        row_id = f"{table.name}/{i}"
        if table.filled:
            values = {column: without_nulls(value) for column, value in values.items()}
        row = read_row(row_id, values, source, where)
        if isinstance(row, Preference):
            preferences.append(row)
        else:
            problems.setdefault(row.reason, []).append((row_id, row.detail))
    for reason, rows in problems.items():
        if getattr(source, SETTING.get(reason, reason)) == "refuse":
            raise refusal(reason, len(rows), len(table.rows), rows[0], where)
    return preferences, Counter({reason: len(rows) for reason, rows in problems.items()})


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
        parts = _chats(prompt, list(chosen), list(rejected), source)
    if isinstance(parts, Problem):
        return parts
    question, good, bad = parts
    if not good.strip() or not bad.strip():
        return Problem("empty", f"`{source.rejected if good.strip() else source.chosen}` holds only white space")
    if good == bad:
        return Problem("identical", "the two responses are the same")
    baseline = None if source.baseline is None else _last_text(values[source.baseline])
    if source.baseline is not None and not (baseline or "").strip():
        return Problem("no_baseline", f"`{source.baseline}` {chat_fault(values[source.baseline]) or 'is empty'}")
    return Preference(row_id, question, good, bad, baseline, template_columns(values, row_id, where))


def _sides(source: PreferenceSource, chosen: Any, rejected: Any) -> Problem | None:
    """What is wrong with the two responses as they stand in the row."""
    for column, value in ((source.chosen, chosen), (source.rejected, rejected)):
        if value is None:
            return Problem("missing", f"`{column}` is null")
        if fault := chat_fault(value):
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
        return (prompt if isinstance(prompt, str) else as_messages(prompt)), chosen, rejected
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


def _chats(prompt: Any, chosen: list[Any], rejected: list[Any], source: PreferenceSource) -> Parts | Problem:
    ends = len(chosen) - 1, len(rejected) - 1
    given: list[Any] | None = None if prompt is None or isinstance(prompt, str) else list(prompt)
    if given is not None:
        # Some data sets repeat the prompt's messages in front of the responses.
        chosen, rejected = (side[len(given) :] if side[: len(given)] == given else side for side in (chosen, rejected))
    elif isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
        given = [{"role": "user", "content": prompt}]
    else:
        parts = _extract(chosen, rejected)
        given, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
        if isinstance(prompt, str) and given and prompt not in (m.get("content") for m in given):
            return Problem(
                "mismatch", "the prompt given is not among the messages that the two responses have in common"
            )
        if given and (fault := _prompt_fault(given)):
            return Problem("mismatch", f"what the two responses have in common {fault}")
    if not given:
        return Problem("mismatch", "there is no prompt, and the two responses begin with different messages")
    for column, side, index in ((source.chosen, chosen, ends[0]), (source.rejected, rejected, ends[1])):
        if len(side) != 1 or side[0]["role"] != "assistant":
            return Problem("mismatch", "after the common prompt each side must have one message, the assistant's")
        if fault := answer_fault(side[0], index):
            return Problem("malformed", f"`{column}` {fault}")
    return as_messages(given), chosen[0]["content"], rejected[0]["content"]


def _prompt_fault(value: Any) -> str | None:
    """What keeps a value from being a prompt, as the end of a sentence; None for a text, or chat messages that end with a
    question, as the source `dataset` takes them."""
    if value is None:
        return "is null"
    if fault := chat_fault(value):
        return fault
    last = value if isinstance(value, str) else value[-1]["content"] if value else ""
    if value and not isinstance(value, str) and value[-1]["role"] == "assistant":
        return "ends with the assistant's answer, and a prompt ends with the question"
    if not (last or "").strip():
        return "is empty, or ends with an empty message"
    return None


def _extract(chosen: Any, rejected: Any) -> dict[str, Any]:
    from trl.data_utils import extract_prompt  # TRL's own rule for prompts that are implicit in both responses

    return extract_prompt({"chosen": chosen, "rejected": rejected})


def _last_text(value: Any) -> str | None:
    if chat_fault(value) is not None or not value:
        return None
    if isinstance(value, str):
        return value
    return None if answer_fault(value[-1], 0) else value[-1]["content"]


def _check_columns(source: PreferenceSource, table: Table, where: str) -> None:
    """Every column that is named is there. A prompt may only be implicit where that is sure to be meant: in chat messages,
    whose roles say where it ends, or where the recipe says `prompt: null`."""
    available = table.columns
    texts = any(isinstance(row.get(source.chosen), str) for row in table.rows)
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

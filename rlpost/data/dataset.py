"""The source `dataset`: Hugging Face datasets, from the hub or from local JSONL, JSON, CSV and parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlpost.data.files import find_files, is_local
from rlpost.data.messages import read_question, read_solution, template_columns
from rlpost.data.readers import Values, columns_of, read_rows
from rlpost.data.rows import Row, nearest
from rlpost.errors import DataError
from rlpost.experience import Demonstration
from rlpost.recipe.sections.data import DatasetSource


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a data set, each with all columns: None where a row has no such key."""

    name: str  # what its rows' ids begin with
    columns: list[str]
    rows: list[Values]
    filled: (
        bool  # a table format, where every object of a column has the keys of all of them: null may mean "no such key"
    )


def dataset_rows(source: DatasetSource, where: str = "data.train") -> list[Row]:
    """The data set's rows in its own order; every column but the prompt is kept in `columns`.

    Raises DataError for a missing file or hub name, an empty data set, a missing column or an unusable question.
    """
    table = load_table(source, where)
    for key, column in (("prompt", source.prompt), ("demonstration", source.demonstration)):
        if column is not None:
            _check_column(column, table.columns, f"{where}.{key}", source.path)
    return [_row(f"{table.name}/{i}", values, source, where, table.filled) for i, values in enumerate(table.rows)]


def load_table(source: DatasetSource, where: str) -> Table:
    """The rows that a source names, cut to its `limit`. Raises DataError."""
    local = is_local(source.path)
    rows = _load_local(source, where) if local else _load_hub(source, where)
    if not rows:
        raise DataError(f"{where}.path: `{source.path}` has no rows (split `{source.split}`).")
    columns = columns_of(rows)
    for values in rows:
        if len(values) < len(columns):
            values.update((name, None) for name in columns if name not in values)
    name = source.path if local else ":".join(filter(None, (source.path, source.name, source.split)))
    return Table(name, columns, rows, filled=not local or source.path.lower().endswith(".parquet"))


def _load_local(source: DatasetSource, where: str) -> list[Values]:
    files = find_files(source.path, where)
    if source.name is not None or source.split != "train":
        raise DataError(
            f"{where}: `{source.path}` is a local file, which has no configurations, and no split but `train`. "
            f"Leave out {where}.{'name' if source.name is not None else 'split'}."
        )
    try:
        rows = list(islice((row for file in files for row in read_rows(file)), source.limit))
    except DataError as error:
        raise DataError(f"{where}.path: `{source.path}` cannot be loaded: {error}") from error
    if not rows:
        raise DataError(f"{where}.path: `{source.path}` cannot be loaded: it has no rows, and needs at least one row.")
    return rows


def _load_hub(source: DatasetSource, where: str) -> list[Values]:
    import datasets

    try:
        table = datasets.load_dataset(source.path, source.name, data_files=None, split=source.split)
    # The hub's and the readers' errors have no common base; whatever they are, the user needs the same advice.
    except Exception as error:
        cause = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise DataError(
            f"{where}.path: `{source.path}` cannot be loaded: {cause.rstrip('.!')}. {_advice(error, where)}"
        ) from error
    if source.limit is not None:
        table = table.select(range(min(source.limit, len(table))))
    return list(table)


def _advice(error: Exception, where: str) -> str:
    if isinstance(error, ValueError):
        return f"Check {where}.name (the configuration) and {where}.split."
    return (
        "Check the name and the connection to the hub (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE), or download the data "
        f"set elsewhere, save it as .jsonl or .parquet, and give that file as {where}.path."
    )


def _check_column(column: str, available: list[str], key: str, path: str) -> None:
    if column not in available:
        listed = ", ".join(f"`{name}`" for name in available)
        raise DataError(
            f"{key}: `{path}` has no column `{column}`. It has {listed or 'no columns'}.{nearest(column, available)} "
            f"Set {key} to the column you mean."
        )


def _row(row_id: str, values: Values, source: DatasetSource, where: str, filled: bool) -> Row:
    """Takes `values` over: what is left of it is what rewards receive."""
    named = {name: _field(values, path, f"{where}.columns.{name}", row_id) for name, path in source.columns.items()}
    options = template_columns(values, row_id, where, filled=filled)
    question = read_question(values.pop(source.prompt), row_id, f"{where}.prompt", filled=filled)
    if source.system == "drop" and not isinstance(question, str):
        question = tuple(message for message in question if message["role"] != "system")
        if not question:
            raise DataError(
                f"{where}.system=drop leaves nothing of the prompt of row {row_id}: it is a system message alone."
            )
    solution = None if source.demonstration is None else values.get(source.demonstration)
    text = None if solution is None else read_solution(solution, row_id, f"{where}.demonstration", filled=filled)
    values.update(named)
    return Row(row_id, question, values, Demonstration(text) if text else None, options)


def _field(values: Mapping[str, Any], path: str, key: str, row_id: str) -> Any:
    """The value that a dotted path leads to."""
    value: Any = values
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            there = nearest(name, value) if isinstance(value, Mapping) else " What stands before it has no fields."
            raise DataError(f"{key}: `{path}` does not exist in row {row_id}: there is no `{name}`.{there}")
        value = value[name]
    return value

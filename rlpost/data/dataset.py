"""The source `dataset`: Hugging Face datasets, from the hub or from local JSONL, JSON, CSV and parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rlpost.data.files import find_files, is_local
from rlpost.data.messages import read_question, read_solution, template_columns
from rlpost.data.readers import Values, columns_of, read_rows
from rlpost.data.rows import Row, nearest
from rlpost.errors import DataError
from rlpost.experience import Demonstration
from rlpost.recipe.sections.data import DatasetSource

LARGE_BYTES = 2**22  # of local files: below, prompts are made anew by every process and held in memory
LARGE_ROWS = 10_000  # of a hub's data set, and what a `limit` must leave of any
_LOOKED_AT = 1000  # rows in which the columns that a recipe names should occur


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a data set, each with all columns: None where a row has no such key."""

    name: str  # what its rows' ids begin with
    columns: list[str]
    rows: list[Values]
    filled: (
        bool  # a table format, where every object of a column has the keys of all of them: null may mean "no such key"
    )


def dataset_rows(source: DatasetSource, where: str = "data.train", opened: RowStream | None = None) -> list[Row]:
    """The data set's rows in its own order; every column but the prompt is kept in `columns`. `opened`: the source, where it
    has been opened already.

    Raises DataError for a missing file or hub name, an empty data set, a missing column or an unusable question.
    """
    table = load_table(source, where, opened)
    _check_columns(source, table.columns, where)
    return [_row(f"{table.name}/{i}", values, source, where, table.filled) for i, values in enumerate(table.rows)]


def load_table(source: DatasetSource, where: str, opened: RowStream | None = None) -> Table:
    """The rows that a source names, cut to its `limit`. Raises DataError."""
    local = is_local(source.path)
    stream = RowStream(source, where) if opened is None else opened
    rows = list(stream.values())
    if local and not rows:
        raise DataError(f"{where}.path: `{source.path}` cannot be loaded: it has no rows, and needs at least one row.")
    if not rows:
        raise DataError(f"{where}.path: `{source.path}` has no rows (split `{source.split}`).")
    columns = columns_of(rows)
    for values in rows:
        if len(values) < len(columns):
            values.update((name, None) for name in columns if name not in values)
    return Table(_name(source, local=local), columns, rows, filled=_is_filled(source, local=local))


def _name(source: DatasetSource, *, local: bool) -> str:
    """What the rows' ids begin with."""
    return source.path if local else ":".join(filter(None, (source.path, source.name, source.split)))


def _is_filled(source: DatasetSource, *, local: bool) -> bool:
    return not local or source.path.lower().endswith(".parquet")


class RowStream:
    """The rows of a large data set, one at a time: the same as those of `dataset_rows`, but that a row lacks the columns that
    only others have. Behind the last row `others` names all that rewards receive."""

    def __init__(self, source: DatasetSource, where: str) -> None:
        """Raises DataError for a missing file or hub name."""
        self.source, self.where = source, where
        self._local = is_local(source.path)
        self._files = _find_local(source, where) if self._local else []
        self._table: Any = None if self._local else _open_hub(source, where)
        self.name = _name(source, local=self._local)
        self._columns: dict[str, None] = {}

    @property
    def large(self) -> bool:
        """Whether its prompts are worth a file of their own."""
        if self.source.limit is not None and self.source.limit < LARGE_ROWS:
            return False
        if not self._local:
            return len(self._table) >= LARGE_ROWS
        return sum(file.stat().st_size for file in self._files) >= LARGE_BYTES

    @property
    def others(self) -> list[str]:
        """The names of all columns but the prompt's, in the order in which they first occurred so far."""
        return [name for name in self._columns if name != self.source.prompt]

    def identity(self) -> list[Any] | None:
        """What changes when the rows do; None where that is not known."""
        if not self._local:
            mark = getattr(self._table, "_fingerprint", None)
            return None if mark is None else [mark, len(self._table)]
        looks = [(str(file.resolve()), file.stat()) for file in self._files]
        # A file that was changed and set back to its old time has another time of change.
        return [[path, look.st_size, look.st_mtime_ns, look.st_ctime_ns, look.st_ino] for path, look in looks]

    def __iter__(self) -> Iterator[Row]:
        """Raises DataError as `dataset_rows` does; of several things that are wrong, perhaps another first."""
        rows = self.values()
        first = list(islice(rows, _LOOKED_AT))
        self._columns = dict.fromkeys(columns_of(first))
        asked = {self.source.prompt, *(path.split(".")[0] for path in self.source.columns.values())}
        if self.source.demonstration is not None:
            asked.add(self.source.demonstration)
        if not asked <= self._columns.keys():  # in no row so far: then it is better to know now than behind the last
            self._columns = dict.fromkeys(columns_of(self.values()))
        _check_columns(self.source, list(self._columns), self.where)
        filled = _is_filled(self.source, local=self._local)
        for i, values in enumerate(chain(first, rows)):
            self._columns.update(dict.fromkeys(values))
            for column in asked & self._columns.keys():
                values.setdefault(column, None)
            yield _row(f"{self.name}/{i}", values, self.source, self.where, filled)

    def values(self) -> Iterator[Values]:
        """What stands in every row."""
        if self._local:
            return _read_local(self._files, self.source, self.where)
        return (dict(row) for row in self._table)


def _find_local(source: DatasetSource, where: str) -> list[Path]:
    files = find_files(source.path, where)
    if source.name is not None or source.split != "train":
        raise DataError(
            f"{where}: `{source.path}` is a local file, which has no configurations, and no split but `train`. "
            f"Leave out {where}.{'name' if source.name is not None else 'split'}."
        )
    return files


def _read_local(files: list[Path], source: DatasetSource, where: str) -> Iterator[Values]:
    try:
        yield from islice((row for file in files for row in read_rows(file)), source.limit)
    except DataError as error:
        raise DataError(f"{where}.path: `{source.path}` cannot be loaded: {error}") from error


def _open_hub(source: DatasetSource, where: str) -> Any:
    """The hub's data set, cut to its `limit`; its rows lie on disk."""
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
    return table


def _advice(error: Exception, where: str) -> str:
    if isinstance(error, ValueError):
        return f"Check {where}.name (the configuration) and {where}.split."
    return (
        "Check the name and the connection to the hub (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE), or download the data "
        f"set elsewhere, save it as .jsonl or .parquet, and give that file as {where}.path."
    )


def _check_columns(source: DatasetSource, available: list[str], where: str) -> None:
    for key, column in (("prompt", source.prompt), ("demonstration", source.demonstration)):
        if column is not None:
            _check_column(column, available, f"{where}.{key}", source.path)


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

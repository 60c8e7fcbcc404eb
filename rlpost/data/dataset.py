"""The source `dataset`: Hugging Face datasets, from the hub or from local JSONL, JSON, CSV and parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

from rlpost.data.rows import Row, nearest
from rlpost.errors import DataError
from rlpost.experience import Demonstration, Message
from rlpost.recipe.sections.data import DatasetSource

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def dataset_rows(source: DatasetSource, where: str = "data.train") -> list[Row]:
    """The data set's rows in its own order; every column but the prompt is kept in `columns`.

    Raises DataError for a missing file or hub name, an empty data set, a missing column or an unusable question.
    """
    table, name = load_table(source, where)
    for key, column in (("prompt", source.prompt), ("demonstration", source.demonstration)):
        if column is not None:
            _check_column(column, table.column_names, f"{where}.{key}", source.path)
    return [_row(f"{name}/{i}", values, source, where) for i, values in enumerate(table)]


def load_table(source: DatasetSource, where: str) -> tuple[Any, str]:
    """The `datasets.Dataset` that a source names, cut to its `limit`, and what its rows' ids begin with. Raises DataError."""
    local = Path(source.path).suffix.lower() in BUILDERS
    table = _load_local(source, where) if local else _load_hub(source, where)
    if source.limit is not None:
        table = table.select(range(min(source.limit, len(table))))
    if len(table) == 0:
        raise DataError(f"{where}.path: `{source.path}` has no rows (split `{source.split}`).")
    return table, source.path if local else ":".join(filter(None, (source.path, source.name, source.split)))


def _load_local(source: DatasetSource, where: str) -> Any:
    pattern = str(Path(source.path).expanduser())
    # Path.glob takes no absolute patterns.
    files = [pattern] if Path(pattern).is_file() else sorted(glob(pattern, recursive=True))  # noqa: PTH207
    if not files:
        raise DataError(
            f"{where}.path: no file matches `{source.path}` (looked in {Path.cwd()}).{_nearest_file(pattern)} "
            "Correct the path, or give a hub name without a file ending."
        )
    if source.name is not None or source.split != "train":
        raise DataError(
            f"{where}: `{source.path}` is a local file, which has no configurations, and no split but `train`. "
            f"Leave out {where}.{'name' if source.name is not None else 'split'}."
        )
    # datasets stops with a bare StopIteration when no file holds anything.
    filled = [file for file in files if Path(file).stat().st_size > 0]
    if not filled:
        raise DataError(f"{where}.path: `{source.path}` is empty ({len(files)} file(s) without any content).")
    with _quiet_progress():
        return _load(BUILDERS[Path(pattern).suffix.lower()], None, filled, source, where)


def _load_hub(source: DatasetSource, where: str) -> Any:
    return _load(source.path, source.name, None, source, where)


def _load(path: str, name: str | None, files: list[str] | None, source: DatasetSource, where: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, name, data_files=files, split=source.split)
    # The hub's and the readers' errors have no common base; whatever they are, the user needs the same advice.
    except Exception as error:
        cause = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        cause = cause.rstrip(".!")
        raise DataError(
            f"{where}.path: `{source.path}` cannot be loaded: {cause}.{_bad_line(files)} {_advice(error, files, where)}"
        ) from error


def _bad_line(files: list[str] | None) -> str:
    """Where the first line stands that is no JSON object, which the reader's own message does not say."""
    for file in files or ():
        if Path(file).suffix.lower() != ".jsonl":
            continue
        with Path(file).open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    right = not line.strip() or isinstance(json.loads(line), dict)
                except json.JSONDecodeError:
                    right = False
                if not right:
                    shown = line.strip() if len(line) <= 60 else line.strip()[:57] + "..."
                    return f" {file}, line {number}, is no JSON object: {shown}"
    return ""


def _advice(error: Exception, files: list[str] | None, where: str) -> str:
    if files is not None:
        return (
            "It needs at least one row. Every line of a .jsonl file must be one JSON object, a .json file must hold a list "
            "of objects, and a .csv file must begin with its column names."
        )
    if isinstance(error, ValueError):
        return f"Check {where}.name (the configuration) and {where}.split."
    return (
        "Check the name and the connection to the hub (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE), or download the data "
        f"set elsewhere, save it as .jsonl or .parquet, and give that file as {where}.path."
    )


@contextmanager
def _quiet_progress() -> Iterator[None]:
    """Reading a local file is quick: no progress bar a rank, and no error logged that is raised too."""
    import logging

    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not silent:
            datasets.enable_progress_bars()


def _nearest_file(pattern: str) -> str:
    folder = Path(pattern).parent
    if not folder.is_dir():
        return f" The folder {folder} does not exist."
    return nearest(Path(pattern).name, (file.name for file in folder.iterdir()))


def _check_column(column: str, available: list[str], key: str, path: str) -> None:
    if column not in available:
        listed = ", ".join(f"`{name}`" for name in available)
        raise DataError(
            f"{key}: `{path}` has no column `{column}`. It has {listed or 'no columns'}.{nearest(column, available)} "
            f"Set {key} to the column you mean."
        )


def _row(row_id: str, values: Mapping[str, Any], source: DatasetSource, where: str) -> Row:
    columns = {name: value for name, value in values.items() if name != source.prompt}
    columns |= {name: _field(values, path, f"{where}.columns.{name}", row_id) for name, path in source.columns.items()}
    question = _question(values[source.prompt], row_id, f"{where}.prompt")
    if source.system == "drop" and not isinstance(question, str):
        question = tuple(message for message in question if message["role"] != "system")
    if source.demonstration is None:
        return Row(row_id, question, columns)
    text = values[source.demonstration]
    if isinstance(text, list) and text and all(_is_message(one) for one in text):
        text = text[-1]["content"]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{where}.demonstration: column `{source.demonstration}` of row {row_id} holds a {type(text).__name__}; a "
            "worked solution must be a string or a list of chat messages (or null, where there is none)."
        )
    return Row(row_id, question, columns, Demonstration(text) if text else None)


def _field(values: Mapping[str, Any], path: str, key: str, row_id: str) -> Any:
    """The value that a dotted path leads to."""
    found: Any = values
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            there = nearest(name, found) if isinstance(found, Mapping) else " What stands before it has no fields."
            raise DataError(f"{key}: `{path}` does not exist in row {row_id}: there is no `{name}`.{there}")
        found = found[name]
    return found


def _question(value: Any, row_id: str, key: str) -> str | tuple[Message, ...]:
    """A string, or chat messages, as the row holds them; anything else is refused."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(_is_message(one) for one in value):
        if value[-1]["role"] == "assistant":
            raise DataError(
                f"{key}: the messages of row {row_id} end with the assistant's answer. A prompt ends with the "
                "question: move the answer to a column of its own."
            )
        return tuple(Message(role=one["role"], content=one["content"]) for one in value)
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    raise DataError(
        f"{key}: row {row_id} holds {shown}. A prompt is a text that is not empty, or a list of chat messages, "
        "each with the texts `role` and `content`."
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)

"""Local data files as rows, with every value as it stands in the file, or an error that says where it could not be kept.

JSON and JSON lines are read by Python's own reader, object by object, so that a date stays a text, a large number exact,
and an object has the keys that it has; nothing is inferred from a column's other values, as table formats must. Of CSV
every field is a text. Parquet has types of its own, which pyarrow hands over as Python values.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from rlpost.data.files import find_files, kind_of, numbered_lines
from rlpost.errors import DataError

Values = dict[str, Any]
LINES = "Every line of a .jsonl file must be one JSON object"
COUNTED_BYTES = 2**24  # .json and .csv files up to this size are read to count their rows
DOUBLE_DIGITS = 17  # a number with so many significant digits names one 64-bit float, and a float needs no more


def read_rows(file: Path) -> Iterator[Values]:
    """The rows of one file, one dict each, in their order. Raises DataError naming file, line or row, and key."""
    return _READERS[str(kind_of(file))](file)


def _read_jsonl(file: Path) -> Iterator[Values]:
    for _, values in numbered_objects(file, LINES):
        yield values


def numbered_objects(file: Path, wanted: str) -> Iterator[tuple[int, Values]]:
    """(line number from 1, JSON object) of every line that is not blank. `wanted` is what errors say that a line must be."""
    for number, line in numbered_lines(file):
        if line.strip():
            yield number, _line(line, f"{file}, line {number},", wanted)


def _read_json(file: Path) -> Iterator[Values]:
    """A list of objects; or, as other tools take it under this ending too, one object a line."""
    lines = numbered_lines(file)
    first = next((line for _, line in lines if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _read_json_lines(file)
        return
    text = first + "".join(line for _, line in lines)
    wanted = "A .json file must hold a list of JSON objects"
    place, row = _skip(text, text.index("[") + 1), 0
    while text[place : place + 1] != "]" or row:
        value, place = _object(text, place, f"{file}, row {row},", wanted)
        yield value
        place, row = _skip(text, place), row + 1
        mark = text[place : place + 1]
        if mark == "]":
            break
        if mark != ",":
            what = f"`{_short(text[place:])}`" if mark else "the file's end"
            raise DataError(
                f"{file}: behind row {row - 1} stands {what}, where a comma or `]` belongs. Is it complete?"
            )
        place = _skip(text, place + 1)
    if rest := text[place + 1 :].strip():
        raise DataError(f"{file} goes on behind the end of its list of {row} rows: {_short(rest)}. Remove that.")


def _read_json_lines(file: Path) -> Iterator[Values]:
    wanted = "A .json file must hold a list of JSON objects, or one JSON object in every line"
    for number, line in numbered_lines(file):
        if not line.strip():
            continue
        if number == 1 and line.strip() == "{":
            raise DataError(f"{file} holds a JSON object over several lines, not a list of rows. {wanted}.")
        yield _line(line, f"{file}, line {number},", wanted)


def _skip(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\n", "\r") and place < len(text):
        place += 1
    return place


def _line(text: str, place: str, wanted: str) -> Values:
    """The one JSON object that a line holds."""
    start = _skip(text, 0)
    value, end = _object(text, start, place, wanted)
    if rest := text[end:].strip():
        raise DataError(f"{place} is no JSON object: behind one stands {_short(rest)}. {wanted}.")
    return value


def _object(text: str, start: int, place: str, wanted: str) -> tuple[Values, int]:
    """The JSON object that begins at `start`, exactly, and where it ends. `place` says where it stands, for errors."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos + 1 - start}"
        raise DataError(
            f"{place} is no JSON object: {_short(text[start:])} ({reason}). {wanted}.{_rename(text, place, wanted)}"
        ) from error
    except (RecursionError, ValueError) as error:
        reason = str(error) if isinstance(error, _Inexact) else f"holds what Python does not read: {error}."
        raise DataError(f"{place} {reason}") from error
    if not isinstance(value, dict):
        called = {list: "array", str: "text", type(None): "null"}.get(type(value), "number or truth value")
        raise DataError(
            f"{place} is no JSON object but a JSON {called}: {_short(text[start:end])}. {wanted}.{_rename(text, place, wanted)}"
        )
    # Only an escape can bring half a surrogate pair into a text; whole pairs are often written so too.
    if text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0:
        for path, one in _leaves(value):
            if isinstance(one, str) and not _encodable(one):
                raise DataError(
                    f"{place} has half a surrogate pair in `{path}`, which is no character. Correct that text."
                )
    return value, end


def _rename(text: str, place: str, wanted: str) -> str:
    if wanted == LINES and place.endswith("line 1,") and text.lstrip().startswith("["):
        return " This file is a JSON array: if it is a list of objects, rename it to .json."
    return ""


class _Inexact(ValueError):
    """A value that would not be what stands in the file."""


def _fraction(text: str) -> float:
    """The 64-bit float that a number names. Raises _Inexact where the float has another value than the number."""
    value = float(text)
    if len(text) < DOUBLE_DIGITS and "e" not in text and "E" not in text:
        return value
    if not _same(text, value):
        raise _Inexact(
            f"has the number {text if len(text) <= 60 else text[:57] + '...'}, of which a float (64 bits) keeps {value!r} "
            "only. Write it as a text (in quotes), and let the reward read it."
        )
    return value


def _same(text: str, value: float) -> bool:
    """Whether a decimal number is the value of this float, as far as DOUBLE_DIGITS digits can tell."""
    if not math.isfinite(value):
        return False
    exact = Decimal(text)
    if exact == Decimal(repr(value)):  # the shortest name of that float, as most programs write it
        return True
    return abs(exact - Decimal(value)) <= Decimal(5).scaleb(
        exact.adjusted() - DOUBLE_DIGITS
    )  # half of the last such digit


def _distinct(pairs: list[tuple[str, Any]]) -> Values:
    """An object; refused where a key stands in it twice, since only one of the two values could be kept."""
    mapping = {sys.intern(key): value for key, value in pairs}
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Inexact(f"has the key `{twice}` twice in one object. Remove one of them.")
    return mapping


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_float=_fraction)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in an object that holds nothing more, keys included."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield path or key, key
            yield from _leaves(inside, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, inside in enumerate(value):
            yield from _leaves(inside, f"{path}.{i}")
    else:
        yield path, value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(text: str) -> str:
    text = text.strip()
    line = text.partition("\n")[0]
    return line if len(line) <= 60 and line == text else line[:57] + "..."


def _read_csv(file: Path) -> Iterator[Values]:
    """Every field as the text that stands in the file."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # a field may hold a long solution
    records = _records(file)
    _, header = next(records, (0, []))
    if not header:
        raise DataError(f"{file} is empty. A .csv file must begin with its column names.")
    names = _column_names(file, header)
    for line, record in records:
        if len(record) != len(names):
            raise DataError(
                f"{file}, line {line}, has {len(record)} fields where the first line names {len(names)} columns. Put fields "
                'with commas, quotes or line breaks into "quotes".'
            )
        yield dict(zip(names, record, strict=True))


def _records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line where it ends, fields) of every record that is no blank line."""
    reader = csv.reader((line for _, line in numbered_lines(file)), strict=True)
    try:
        for record in reader:
            if record:
                yield reader.line_num, record
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}, is not valid CSV: {error}. Correct that line.") from error


def _column_names(file: Path, header: list[str]) -> list[str]:
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)) is not None:
        called = {";": "semicolons", "\t": "tabs", "|": "bars"}[other]
        raise DataError(
            f"{file} has one column, `{_short(header[0])}`: its fields seem to be separated by {called}. Save it with commas, "
            "or as .jsonl."
        )
    names = [sys.intern(name) if name else f"Unnamed: {i}" for i, name in enumerate(header)]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise DataError(f"{file} has two columns named `{twice}`. Rename one of them.")
    return names


def _read_parquet(file: Path) -> Iterator[Values]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file} cannot be read as parquet: {' '.join(str(error).split())}. The file is damaged or incomplete: copy or "
            "make it anew."
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Values]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def count_rows(path: str) -> int | None:
    """How many rows local files have, where that is quickly known; None for large files that would have to be read to be
    counted, and for what cannot be read, which reading will say."""
    try:
        return sum(_count(file) for file in find_files(path, "path"))
    except (DataError, _Unknown):
        return None


class _Unknown(Exception):
    """A file is too large to be counted by reading it."""


def _count(file: Path) -> int:
    kind = kind_of(file)
    if kind == ".jsonl":
        lines = (line for _, line in numbered_lines(file))
        begins = next((line for line in lines if line.strip()), "").lstrip()[:1]
        if begins != "{":
            raise _Unknown
        return 1 + sum(1 for line in lines if line.strip())
    if kind == ".parquet":
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(file).num_rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise _Unknown from error
    if file.stat().st_size > COUNTED_BYTES:
        raise _Unknown
    return sum(1 for _ in read_rows(file))


def columns_of(rows: Iterable[Values]) -> list[str]:
    """The names of all columns, in the order in which they first occur."""
    return list(dict.fromkeys(name for row in rows for name in row))

"""`metrics.jsonl`: one JSON object per line, flat keys, written as the run goes and read back by resume and report."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rlpost.errors import RlpostError, TrainingError, in_words

Kind = Literal["train", "eval"]
_HEAD = re.compile(rb'\{"step": (\d+), "kind": "(train|eval)"[,}]')  # how a row begins that was written here
_TAIL_BYTES = 2**16
MetricRow = dict[str, Any]
"""A line of `metrics.jsonl`: `step` (int), `kind` ("train" or "eval"), numbers under flat keys; null: not finite."""


def clean_number(value: Any) -> int | float | None:
    """A number that JSON can hold; None for NaN and infinities. Takes 0-dim tensors and numpy scalars too."""
    if isinstance(value, bool | int):
        return int(value)
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def number(row: Mapping[str, Any], key: str) -> float | None:
    """The row's finite number under `key`, or None."""
    value = row.get(key)
    if type(value) is float and math.isfinite(value):  # nearly always, and asked for millions of times in a long run
        return value
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


class MetricsWriter:
    """Appends rows to `metrics.jsonl`.

    The file is opened anew for every row: steps take seconds, and so nothing is lost in a buffer when the process is
    killed, and a resume may cut the file back under a living writer. A row whose (kind, step) is already there is not
    written twice: a resumed run repeats what happened after its checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: set[tuple[str, int]] | None = None

    def append(self, step: int, metrics: Mapping[str, Any], *, kind: Kind = "train") -> MetricRow:
        """Writes one row and returns it as written. Raises TrainingError when the file cannot be written."""
        row: MetricRow = {"step": int(step), "kind": kind}
        row.update({key: clean_number(value) for key, value in metrics.items() if key not in ("step", "kind")})
        written = self._keys()
        if (kind, row["step"]) in written:
            return row
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        written.add((kind, row["step"]))
        return row

    def forget(self) -> None:
        """Reads the file again before the next row: call it after something else has cut the file."""
        self._written = None

    def history(self, aside: Path) -> Iterator[MetricRow]:
        """The rows of the file, read once. Lines that are none (the file was damaged) are moved to the file `aside` behind the
        last, so that the run can go on."""
        written, damaged = set[tuple[str, int]](), False
        drop_partial_line(self.path)
        for line in _complete_lines(self.path):
            if (row := _parse(line)) is None:
                damaged = True
                continue
            written.add((str(row.get("kind", "train")), int(row["step"])))
            yield row
        if damaged:
            keep_rows(self.path, lambda line: _parse(line) is not None, aside)
        self._written = written

    def sync(self) -> None:
        """Forces the rows to disk, so that a checkpoint never outlives the rows before it."""
        if not self.path.exists():
            return
        try:
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _keys(self) -> set[tuple[str, int]]:
        if self._written is None:
            drop_partial_line(self.path)
            self._written = {(str(row.get("kind", "train")), int(row["step"])) for row in iter_metrics(self.path)}
        return self._written


def read_metrics(path: Path, kind: Kind | None = None) -> list[MetricRow]:
    """The rows of a metrics file, oldest first; [] when there is none.

    A last line without a line end (the run was killed while writing it) is ignored.
    Raises RlpostError for a broken line elsewhere, naming its number.
    """
    return list(iter_metrics(path, kind))


def iter_metrics(path: Path, kind: Kind | None = None) -> Iterator[MetricRow]:
    """As `read_metrics`, one row at a time: the rows of a long run take a gigabyte."""
    for place, line in enumerate(_complete_lines(path), start=1):
        if kind is not None and (head := _HEAD.match(line)) is not None and head[2].decode() != kind:
            continue
        row = _parse(line)
        if row is None:
            raise RlpostError(
                f"{path}, line {place} is not a metrics row (a JSON object with a whole number under `step`). The file "
                "was changed or damaged after it was written: remove that line, or move the file away."
            )
        if kind is None or row.get("kind", "train") == kind:
            yield row


def drop_partial_line(path: Path) -> None:
    """Cuts a last line that has no line end, which a killed run leaves behind."""
    if not path.exists():
        return
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        place, tail = end, b""
        while place and b"\n" not in tail:
            begin = max(0, place - _TAIL_BYTES)
            file.seek(begin)
            tail, place = file.read(place - begin) + tail, begin
    whole = place + tail.rfind(b"\n") + 1
    if whole < end:
        os.truncate(path, whole)


def step_of(line: bytes) -> int | None:
    """The optimizer step of a line of `metrics.jsonl`; None where it is no row, as far as its ends tell."""
    head = _HEAD.match(line)
    if head is not None and line.endswith(b"}"):
        return int(head[1])
    row = _parse(line)
    return None if row is None else int(row["step"])


def keep_rows(path: Path, keep: Callable[[bytes], bool], aside: Path) -> None:
    """Rewrites a metrics file, atomically, with the lines for which `keep` holds, byte for byte as they were. The others are
    added to the file `aside` first."""
    if all(map(keep, _complete_lines(path))):
        return
    try:
        with aside.open("ab") as file:
            file.writelines(line + b"\n" for line in _complete_lines(path) if not keep(line))
    except OSError as error:
        raise _unwritable(aside, error) from error
    write_atomically(path, (line + b"\n" for line in _complete_lines(path) if keep(line)))


def write_atomically(path: Path, text: str | Iterable[bytes]) -> None:
    """Writes a file (a text, or pieces of one) so that readers see the old one or the new one. Raises TrainingError when that
    fails."""
    temporary: str | None = None
    try:
        path.parent.mkdir(exist_ok=True)  # and no parents: a run's folder that was removed is not made again
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            # A byte-level tokenizer can cut a character in two; backslashreplace keeps such text valid JSON.
            file.writelines([text.encode("utf-8", "backslashreplace")] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _complete_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file without their ends, one at a time; a last one that has none is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        yield from (line[:-1] for line in file if line.endswith(b"\n"))


def _parse(line: bytes) -> MetricRow | None:
    try:
        row = json.loads(line.decode("utf-8", "replace"))
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _unwritable(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"Cannot write {path}: {in_words(error)}. Free space there or make the folder writable, then start the "
        "same command again with resume=auto; the last checkpoint is intact."
    )

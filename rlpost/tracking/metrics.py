"""`metrics.jsonl`: one JSON object per line, flat keys, written as the run goes and read back by resume and report."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from rlpost.errors import RlpostError, TrainingError

Kind = Literal["train", "eval"]
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
            self._written = {(str(row.get("kind", "train")), int(row["step"])) for row in read_metrics(self.path)}
        return self._written


def read_metrics(path: Path, kind: Kind | None = None) -> list[MetricRow]:
    """The rows of a metrics file, oldest first; [] when there is none.

    A last line without a line end (the run was killed while writing it) is ignored.
    Raises RlpostError for a broken line elsewhere, naming its number.
    """
    if not path.exists():
        return []
    rows = []
    for place, line in enumerate(_complete_lines(path), start=1):
        row = _parse(line)
        if row is None:
            raise RlpostError(
                f"{path}, line {place} is not a metrics row (a JSON object with a whole number under `step`). The file "
                "was changed or damaged after it was written: remove that line, or move the file away."
            )
        if kind is None or row.get("kind", "train") == kind:
            rows.append(row)
    return rows


def drop_partial_line(path: Path) -> None:
    """Cuts a last line that has no line end, which a killed run leaves behind."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def keep_rows(path: Path, keep: Callable[[MetricRow], bool], aside: Path) -> None:
    """Rewrites a metrics file, atomically, with the rows for which `keep` holds, byte for byte as they were. The others are
    added to the file `aside` first."""
    if not path.exists():
        return
    kept, cut = list[str](), list[str]()
    for line in _complete_lines(path):
        row = _parse(line)
        (kept if row is not None and keep(row) else cut).append(line)
    if cut:
        try:
            with aside.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in cut)
        except OSError as error:
            raise _unwritable(aside, error) from error
    write_atomically(path, "".join(line + "\n" for line in kept))


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that readers see the old one or the new one. Raises TrainingError when that fails."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            # A byte-level tokenizer can cut a character in two; backslashreplace keeps such text valid JSON.
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _complete_lines(path: Path) -> Iterable[str]:
    return path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]


def _parse(line: str) -> MetricRow | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _unwritable(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"Cannot write {path}: {error.strerror or error}. Free space there or make the folder writable, then start the "
        "same command again with resume=auto; the last checkpoint is intact."
    )

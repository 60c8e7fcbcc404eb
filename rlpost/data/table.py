"""Prompts in an Arrow file that is mapped into memory: a run's memory does not grow with their number, and processes of one
machine share what they read of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from rlpost.experience import Demonstration, Prompt

if TYPE_CHECKING:
    import pyarrow

ROWS = 1000  # a record batch: every one of a file has as many, but for the last
MARK_BYTES = 16  # of a text's hash: two texts with one mark do not occur
_FILE, _ABOUT = "prompts.arrow", "about.json"
Places = NDArray[np.int64]


class Unkept(Exception):
    """A value that JSON would not give back as it is."""


def write_table(folder: Path, name: str, prompts: Iterable[Prompt], about: Callable[[], dict[str, Any]]) -> None:
    """Writes prompts with the ids `<name>/0`, `<name>/1` and so on into `folder`, in one pass; `about` is asked for what
    belongs to all of them (`columns`: the names of all columns) behind the last. Raises Unkept, and OSError."""
    import pyarrow as pa

    rows, count = iter(prompts), 0
    schema = _schema()
    with pa.OSFile(str(folder / _FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        while batch := list(islice(rows, ROWS)):
            file.write_batch(pa.record_batch(_columns(batch), schema=schema))
            count += len(batch)
    told = {"name": name, "rows": count, **about()}
    (folder / _ABOUT).write_text(json.dumps(told), encoding="utf-8")


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("text", pa.large_string()),
            ("token_ids", pa.large_list(pa.int32())),
            ("mark", pa.binary(MARK_BYTES)),
            ("solved", pa.bool_()),
            ("rest", pa.large_string()),
        ]
    )


def _columns(batch: Sequence[Prompt]) -> list[list[Any]]:
    return [
        [prompt.text for prompt in batch],
        [prompt.token_ids for prompt in batch],
        [mark(prompt.text) for prompt in batch],
        [prompt.demonstration is not None for prompt in batch],
        [_rest(prompt) for prompt in batch],
    ]


def _rest(prompt: Prompt) -> str:
    solution = None if prompt.demonstration is None else prompt.demonstration.text
    rest = [list(prompt.messages), dict(prompt.columns), solution, dict(prompt.options), prompt.is_text]
    if not _exact(rest):
        raise Unkept(f"row {prompt.id} has values that only Python knows")
    return json.dumps(rest, ensure_ascii=False)


def _exact(value: Any) -> bool:
    """Whether JSON gives a value back as it is, types included."""
    kind = type(value)
    if kind is str or kind is int or kind is float or kind is bool or value is None:
        return True
    if kind is dict:
        return all(type(key) is str and _exact(one) for key, one in value.items())
    return kind is list and all(map(_exact, value))


def mark(text: str) -> bytes:
    """What tells a text from all others."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=MARK_BYTES).digest()


class _File:
    """The mapped file, and what belongs to all of its rows."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self.about: dict[str, Any] = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        reader = pa.ipc.open_file(pa.memory_map(str(folder / _FILE)))
        self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]

    def column(self, name: str, place: int) -> Any:
        return self.batches[place // ROWS].column(name)[place % ROWS]

    def whole(self, read: Callable[[pyarrow.RecordBatch], NDArray[Any]]) -> NDArray[Any]:
        """What `read` takes of every batch, in one array."""
        return np.concatenate([read(batch) for batch in self.batches])


class PromptTable(Sequence[Prompt]):
    """Prompts of a file by their places in it, each made when it is asked for."""

    def __init__(self, file: _File, places: Places) -> None:
        self._file, self._places = file, places
        self._fingerprint: str | None = None

    @classmethod
    def open(cls, folder: Path) -> PromptTable:
        """All prompts of a folder that `write_table` has written. Raises OSError and ValueError for another one."""
        file = _File(folder)
        return cls(file, np.arange(file.about["rows"], dtype=np.int64))

    @property
    def about(self) -> Mapping[str, Any]:
        """What was written of all rows of the file."""
        return self._file.about

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptTable: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptTable:
        if isinstance(index, slice):
            return PromptTable(self._file, self._places[index])
        return self._prompt(int(self._places[index]))

    def take(self, places: Places) -> PromptTable:
        """The prompts at these places among these, in this order."""
        return PromptTable(self._file, self._places[places])

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every prompt."""
        lengths = self._file.whole(lambda batch: batch.column("token_ids").value_lengths().to_numpy())
        return lengths[self._places].astype(np.int64)

    def marks(self) -> NDArray[np.bytes_]:
        """The marks of the texts."""

        def read(batch: pyarrow.RecordBatch) -> NDArray[Any]:
            column = batch.column("mark")
            return np.frombuffer(column.buffers()[1], dtype=f"S{MARK_BYTES}")[column.offset :][: len(column)]

        return self._file.whole(read)[self._places]

    def solved(self) -> PromptTable:
        """Those that have a worked solution."""
        having = self._file.whole(lambda batch: batch.column("solved").to_numpy(zero_copy_only=False))
        return self.take(np.flatnonzero(having[self._places]))

    def fingerprint(self) -> str:
        """As `fingerprint_of`; counted once."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self._identities())
        return self._fingerprint

    def _identities(self) -> Iterator[tuple[str, str]]:
        ends = np.flatnonzero(np.diff(self._places // ROWS)) + 1
        for places in np.split(self._places, ends):
            if len(places):
                texts = self._file.batches[int(places[0]) // ROWS].column("text").take(_indices(places % ROWS))
                yield from zip(map(self._id, places.tolist()), texts.to_pylist(), strict=True)

    def _id(self, place: int) -> str:
        return f"{self._file.about['name']}/{place}"

    def _prompt(self, place: int) -> Prompt:
        messages, columns, solution, options, is_text = json.loads(self._file.column("rest", place).as_py())
        for name in self._file.about["columns"]:  # a row that lacks a column has None in it
            columns.setdefault(name, None)
        return Prompt(
            self._id(place),
            tuple(messages),
            self._file.column("text", place).as_py(),
            tuple(self._file.column("token_ids", place).values.to_numpy().tolist()),
            columns,
            None if solution is None else Demonstration(solution),
            is_text=is_text,
            options=options,
        )


def _indices(places: Places) -> pyarrow.Array:
    import pyarrow as pa

    return pa.array(places)


def fingerprint_of(prompts: Iterable[tuple[str, str]]) -> str:
    """A short hash of ids and texts in their order."""
    digest = blake2b(digest_size=8)
    for name, text in prompts:
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()


def lengths_of(prompts: Sequence[Prompt]) -> NDArray[np.int64]:
    """Tokens of every prompt."""
    if isinstance(prompts, PromptTable):
        return prompts.lengths()
    return np.fromiter((len(prompt.token_ids) for prompt in prompts), np.int64, len(prompts))


def marks_of(prompts: Sequence[Prompt]) -> NDArray[np.bytes_]:
    """The marks of the texts: equal where texts are equal."""
    if isinstance(prompts, PromptTable):
        return prompts.marks()
    return np.array([mark(prompt.text) for prompt in prompts], dtype=f"S{MARK_BYTES}")


def take(prompts: Sequence[Prompt], places: Places) -> Sequence[Prompt]:
    """The prompts at these places, in this order."""
    if isinstance(prompts, PromptTable):
        return prompts.take(places)
    return tuple(prompts[place] for place in places.tolist())


def solved(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Those that have a worked solution."""
    if isinstance(prompts, PromptTable):
        return prompts.solved()
    return [prompt for prompt in prompts if prompt.demonstration is not None]

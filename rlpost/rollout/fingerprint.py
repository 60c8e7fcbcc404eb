"""Fingerprints of tensors: do the bits that an engine holds equal those that the learner sent?

A tensor is a matrix here: its last dimension is the columns, all others together are the rows (one row without others). Its
bits are read 16 at a time, and the fingerprint is the sum over these words of

    word * odd(row) * odd(column)          modulo 2^32,

where `odd` gives each place an odd number of its own. So whatever one word is changed to, the fingerprint changes, and any
other fault escapes with the chance of one in tens of thousands at the worst (changes of nothing but signs; there are 16 bits
above them so that those do not cancel). The fingerprints of parts, taken at their places in the whole, add up to that of the
whole: it does not matter that an engine fuses query, key and value, pads a vocabulary, or cuts a tensor among GPUs. It is
exact at any learning rate, in any precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_WORDS = 2**18  # at once on a CPU: they and their products stay in its cache
_WORDS_OF_A_CARD = 2**26
_MOST = 2**32


def as_matrix(tensor: Tensor) -> Tensor:
    """The tensor as it is counted here: [rows, columns]."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(-1, tensor.shape[-1])


@torch.no_grad()
def fingerprint(part: Tensor, row: int = 0, column: int = 0) -> int:
    """Of a part [rows, columns] of a matrix, whose first element is at (row, column) of the whole."""
    if part.numel() == 0:
        return 0
    kind = torch.int8 if part.element_size() == 1 else torch.int16
    width = part.shape[1] * (part.element_size() // kind.itemsize)
    columns = _odd(column * width // part.shape[1], width, 1, part.device)
    at_once = _WORDS if part.device.type == "cpu" else _WORDS_OF_A_CARD
    rows = min(len(part), max(1, at_once // width))
    room = torch.empty(rows, width, dtype=torch.int32, device=part.device)
    total = torch.zeros((), dtype=torch.int32, device=part.device)
    for start in range(0, len(part), rows):
        words = _bits(part[start : start + rows], kind)
        products = room[: len(words)].copy_(words).mul_(columns)
        sums = products.sum(1, dtype=torch.int32)
        total += (sums * _odd(row + start, len(sums), 0, part.device)).sum(dtype=torch.int32)
    return int(total) % _MOST


def _bits(rows: Tensor, kind: torch.dtype) -> Tensor:
    if rows.stride(1) == 1 and len(rows) > 1:
        return rows.view(kind)
    return rows.contiguous().reshape(-1).view(kind).view(len(rows), -1)  # a single row may lie with any stride


@lru_cache(maxsize=256)
def _odd(start: int, count: int, of: int, device: torch.device) -> Tensor:
    """int32 [count]: an odd number for each place from `start` on; `of`: 0 for rows, 1 for columns."""
    x = torch.arange(start, start + count, dtype=torch.int64, device=device) * 2 + of
    for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13)):
        x = x * factor % _MOST
        x = x ^ (x >> shift)
    x = x | 1
    return torch.where(x >= _MOST // 2, x - _MOST, x).to(torch.int32)


@dataclass(frozen=True, slots=True)
class Sent:
    """What is known of a tensor that the learner sent."""

    rows: int
    columns: int
    values: Mapping[str, int]
    """By precision: of the tensor as it was sent, and as it becomes in the engine's."""


def sent(tensor: Tensor, engine: torch.dtype | None) -> Sent:
    """`engine`: the precision that the engine casts to; None: it casts to none."""
    matrix = as_matrix(tensor)
    dtypes = {tensor.dtype} | ({engine} if engine is not None and tensor.is_floating_point() else set())
    rows, columns = matrix.shape
    return Sent(rows, columns, {_name(dtype): fingerprint(matrix.to(dtype)) for dtype in sorted(dtypes, key=str)})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Held:
    """A part of a sent tensor as one process of an engine holds it."""

    name: str
    row: int
    column: int
    rows: int
    columns: int
    dtype: str
    value: int

    @classmethod
    def of(cls, name: str, box: tuple[int, int, int, int], part: Tensor) -> Held:
        """`box`: row, column, rows, columns in the sent tensor. `part`: what is held of it, in that order."""
        return cls(name, *box, _name(part.dtype), fingerprint(part, box[0], box[1]))


@dataclass(frozen=True, slots=True)
class Compared:
    wrong: tuple[str, ...]  # names of tensors that differ
    unseen: tuple[str, ...]  # and of those of which nothing can be said


def compare(sent: Mapping[str, Sent], workers: Iterable[Sequence[Held]]) -> Compared:
    """What was sent beside what all processes of one engine hold of it. Several may hold the same part."""
    parts: dict[str, dict[tuple[int, int, int, int, str], set[int]]] = {name: {} for name in sent}
    for held in workers:
        for part in held:
            key = (part.row, part.column, part.rows, part.columns, part.dtype)
            parts.setdefault(part.name, {}).setdefault(key, set()).add(part.value)
    wrong, unseen = [], []
    for name, tensor in sent.items():
        match _equal(tensor, parts[name]):
            case None:
                unseen.append(name)
            case False:
                wrong.append(name)
    return Compared(tuple(wrong), tuple(unseen))


def _equal(tensor: Sent, parts: Mapping[tuple[int, int, int, int, str], set[int]]) -> bool | None:
    """None where the parts are not the whole, or are in a precision that was not counted."""
    if any(len(values) > 1 for values in parts.values()):
        return False  # two processes hold the same part, and one of them holds it wrongly
    dtypes = {dtype for *_, dtype in parts}
    if len(dtypes) != 1 or not dtypes <= tensor.values.keys():
        return None
    if sum(rows * columns for _, _, rows, columns, _ in parts) != tensor.rows * tensor.columns or _meet(list(parts)):
        return None
    total = sum(value for values in parts.values() for value in values)
    return total % _MOST == tensor.values[dtypes.pop()]


def _meet(parts: Sequence[tuple[int, int, int, int, str]]) -> bool:
    """Whether two of the parts have an element in common."""
    in_order = sorted(parts)
    return any(
        a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
        for i, a in enumerate(in_order)
        for b in _while_near(in_order[i + 1 :], a[0] + a[2])
    )


def _while_near(parts: Sequence[tuple[int, int, int, int, str]], end: int) -> Iterator[tuple[int, int, int, int, str]]:
    for part in parts:
        if part[0] >= end:
            return
        yield part


def as_json(held: Held) -> list[Any]:
    """For the way from the engine's process to the learner's."""
    return [held.name, held.row, held.column, held.rows, held.columns, held.dtype, held.value]


def from_json(row: Any) -> Held:
    """Raises ValueError for what `as_json` does not make."""
    try:
        name, *numbers, dtype, number = row
        row, column, rows, columns = map(int, numbers)
        return Held(str(name), row, column, rows, columns, str(dtype), int(number))
    except TypeError as error:
        raise ValueError(f"{row!r} is no fingerprint") from error

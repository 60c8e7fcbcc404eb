"""Whether a program's result depends on timing: vector clocks over its lanes (Fidge 1988, Mattern 1989); and whether it does
all of an update."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from rlpost.offload.program import LANES, STATE, Op, Program, Use


class Race(NamedTuple):
    """Two operations that use the same elements, one of them writing, in an order that nothing fixes."""

    first: int
    second: int
    buffer: str


def races(program: Program) -> list[Race]:
    """Races for every timing that lanes and waits allow, each pair once; no pair: there is none.

    Of several operations of one lane that race with the same other one over the same elements, the latest is named. Takes time
    in proportion to the operations, unless pieces overlap: some milliseconds for a thousand.
    """
    clocks, places = _clocks(program)
    lane = {name: i for i, name in enumerate(LANES)}
    bounds = _bounds(program)
    last: dict[tuple[str, int, bool], dict[int, int]] = {}  # buffer, part, wrote -> lane -> its last operation there
    pairs: dict[Race, None] = {}
    for i, op in enumerate(program.ops):
        touched = [(key, writes) for use, writes in _of(op) for key in _parts(use, bounds[use.buffer])]
        for (buffer, part), writing in touched:
            for wrote in (True, False) if writing else (True,):
                for at, j in last.get((buffer, part, wrote), {}).items():
                    if clocks[i][at] < places[j]:
                        pairs[Race(j, i, buffer)] = None
        for (buffer, part), writing in touched:
            last.setdefault((buffer, part, writing), {})[lane[op.lane]] = i
    return list(pairs)


def gaps(program: Program, elements: int) -> list[str]:
    """What a program of ONE update of `elements` elements leaves out, in words; nothing: it does all.

    Every element of weights, master weights and moments is written once. And what lies in a staging set or a ring belongs to
    one piece: an operation reads there only what an operation of its own piece has written, and all that is written is read.
    """
    missing = [gap for buffer in STATE for gap in _not_once(program, buffer, elements)]
    holder: dict[
        str, tuple[int, bool]
    ] = {}  # scratch buffer -> piece that was written there last, and whether it was read
    for i, op in enumerate(program.ops):
        for buffer in (use.buffer for use in op.reads if _is_scratch(use)):
            if holder.get(buffer, (None, False))[0] != op.piece:
                missing.append(f"{describe(program, i)} reads {buffer}, where no operation of that piece has written")
            holder[buffer] = (op.piece, True)
        for buffer in (use.buffer for use in op.writes if _is_scratch(use)):
            if buffer in holder and not holder[buffer][1]:
                missing.append(f"{describe(program, i)} overwrites {buffer}, which nothing has read")
            holder[buffer] = (op.piece, False)
    return missing + [f"nothing reads {buffer} at last" for buffer, (_, read) in holder.items() if not read]


def describe(program: Program, number: int) -> str:
    """An operation in words."""
    op = program.ops[number]
    return f"{op.name} on lane {op.lane}" + (f" of piece {op.piece}" if op.piece >= 0 else "")


def describe_race(program: Program, race: Race) -> str:
    """A race in words, for the error that it is."""
    first, second = (describe(program, number) for number in (race.first, race.second))
    return f"nothing orders {first} and {second}, which both use {race.buffer}"


def implied(program: Program, op: int, event: int) -> bool:
    """Whether operation `op` comes after operation `event` also without waiting for it, by lanes and other waits."""
    clocks, places = _clocks(program.without(op, event))
    return clocks[op][LANES.index(program.ops[event].lane)] >= places[event]


def _clocks(program: Program) -> tuple[list[list[int]], list[int]]:
    """By operation: how far every lane is known to be when it ends; and its place in its own lane, from 0."""
    clocks: list[list[int]] = []
    places: list[int] = []
    last: dict[str, int] = {}
    done = [0] * len(LANES)
    for i, op in enumerate(program.ops):
        clock = [-1] * len(LANES)
        for before in _before(op, last):
            clock = [max(pair) for pair in zip(clock, clocks[before], strict=True)]
        own = LANES.index(op.lane)
        places.append(done[own])
        clock[own] = done[own]
        done[own] += 1
        clocks.append(clock)
        last[op.lane] = i
    return clocks, places


def _before(op: Op, last: dict[str, int]) -> tuple[int, ...]:
    return (*op.after, last[op.lane]) if op.lane in last else op.after


def _of(op: Op) -> Iterator[tuple[Use, bool]]:
    """What an operation uses, and whether it writes it."""
    yield from ((use, False) for use in op.reads)
    yield from ((use, True) for use in op.writes)


def _bounds(program: Program) -> dict[str, list[int]]:
    """Where uses of each buffer begin and end, in order: between two of them all elements have one history."""
    bounds: dict[str, set[int]] = {}
    for op in program.ops:
        for use, _ in _of(op):
            bounds.setdefault(use.buffer, set()).update((use.start, use.stop))
    return {buffer: sorted(at) for buffer, at in bounds.items()}


def _parts(use: Use, bounds: list[int]) -> Iterator[tuple[str, int]]:
    """The parts of its buffer, between two bounds each, that a use is made of."""
    for part in range(bisect_left(bounds, use.start), bisect_left(bounds, use.stop)):
        yield use.buffer, part


def _is_scratch(use: Use) -> bool:
    """Whether pieces take turns in the buffer."""
    return use.buffer not in (*STATE, "gradients")


def _not_once(program: Program, buffer: str, elements: int) -> Iterator[str]:
    """Runs of a buffer's elements that are not written exactly once."""
    writes = [(use, i) for i, op in enumerate(program.ops) for use in op.writes if use.buffer == buffer]
    bounds = sorted({0, elements, *(at for use, _ in writes for at in (use.start, use.stop))})
    times = dict.fromkeys(bounds, 0)
    for use, _ in writes:
        for at in bounds[bisect_left(bounds, use.start) : bisect_left(bounds, use.stop)]:
            times[at] += 1
    for start, stop in pairwise(bounds):
        if times[start] != 1:
            yield f"elements {start} to {stop} of {buffer} are written {times[start]} times, not once"

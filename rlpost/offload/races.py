"""Whether a program's result depends on timing: vector clocks over its lanes (Fidge 1988, Mattern 1989)."""

from __future__ import annotations

from typing import NamedTuple

from rlpost.offload.program import LANES, Op, Program


class Race(NamedTuple):
    """Two operations that use the same elements, one of them writing, in an order that nothing fixes."""

    first: int
    second: int
    buffer: str


def races(program: Program) -> list[Race]:
    """All races, for every timing that lanes and waits allow. A program of a thousand operations takes milliseconds."""
    clocks, places = _clocks(program)
    lane = {name: i for i, name in enumerate(LANES)}
    touched: dict[str, list[tuple[int, int, int, bool]]] = {}
    found: list[Race] = []
    for i, op in enumerate(program.ops):
        uses = [(use, False) for use in op.reads] + [(use, True) for use in op.writes]
        for (buffer, start, stop), writing in uses:
            for j, begin, end, wrote in touched.get(buffer, ()):
                ordered = clocks[i][lane[program.ops[j].lane]] >= places[j]
                if j != i and (writing or wrote) and begin < stop and start < end and not ordered:
                    found.append(Race(j, i, buffer))
            touched.setdefault(buffer, []).append((i, start, stop, writing))
    return list(dict.fromkeys(found))


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

"""How long a program takes on a machine of given rates: a fluid simulation of its events.

Each lane runs one operation at a time, in order. Running operations share what they need together, the host's memory and each
direction of the link, max-min fairly (progressive filling: Bertsekas & Gallager, Data Networks, 6.5.2): the speeds of all, as
shares of what each has alone, rise together until one runs as fast as it can or something that it needs is used up. So who
asks for more of the memory gets more of it, in proportion. Between events speeds are constant.

A model, not a measurement: no launch latency, no start-up of a copy, no caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlpost.offload.program import Op, Program

_DONE = 1e-9  # of an operation, or of a resource: what rounding leaves


@dataclass(frozen=True, slots=True)
class Rates:
    """What one process gets of its machine: bytes a second of the link (each direction) and of the host's memory, elements a
    second of AdamW on either side and of the cast to the weights' precision, each while nothing else runs."""

    up: float
    down: float
    memory: float
    gpu_adam: float
    cpu_adam: float
    cast: float

    def __post_init__(self) -> None:
        wrong = [name for name in self.__slots__ if not getattr(self, name) > 0]
        if wrong:
            raise ValueError(f"a machine whose {' and '.join(wrong)} is not above 0 never ends an update")

    def slower(self, factor: float) -> Rates:
        """The machine on which every program takes `factor` times as long."""
        return Rates(**{name: getattr(self, name) / factor for name in self.__slots__})


class Load(NamedTuple):
    """What an operation needs: seconds if nothing limits it but its own lane, and bytes of what it shares with others."""

    seconds: float
    up: float = 0.0
    down: float = 0.0
    memory: float = 0.0


SHARED = ("up", "down", "memory")


def load_of(op: Op, rates: Rates, *, gradient_bytes: int = 4, weight_bytes: int = 2) -> Load:
    """What an operation of `build_update` needs. `gradient_bytes` and `weight_bytes`: of an element on the accelerator.

    A copy moves its bytes over the link and through the host's memory once. AdamW on the CPU reads p, m, v and the gradient
    and writes p, m, v; the cast reads four bytes an element and writes the weight; in one operation p is not read again.
    Raises ValueError for other operations.
    """
    n, state = op.size, 12 * op.size
    match op.lane, op.name:
        case "fetch", "fetch":
            return Load(state / rates.up, up=state, memory=state)
        case "flush", "flush":
            return Load(state / rates.down, down=state, memory=state)
        case "gpu", "step":
            return Load(n / rates.gpu_adam)
        case "down", "gradients":
            moved = gradient_bytes * n
            return Load(moved / rates.down, down=moved, memory=moved)
        case "cpu", "step":
            return Load(n / rates.cpu_adam, memory=(24 + gradient_bytes) * n)
        case "cpu", "step and cast":
            return Load(n / rates.cpu_adam, memory=(24 + gradient_bytes + weight_bytes) * n)
        case "cast", "cast":
            return Load(n / rates.cast, memory=(4 + weight_bytes) * n)
        case "up", "weights":
            moved = weight_bytes * n
            return Load(moved / rates.up, up=moved, memory=moved)
        case _:
            raise ValueError(
                f"how long {op.name} on lane {op.lane} takes is not known: give `simulate` a load of your own"
            )


class Span(NamedTuple):
    """When an operation runs, in seconds from the program's start."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each operation of the program runs."""

    program: Program
    spans: Sequence[Span]

    @property
    def total(self) -> float:
        """Seconds until all is done."""
        return max((span.end for span in self.spans), default=0.0)

    def until(self, needed: Callable[[Op], bool]) -> float:
        """Seconds until all operations are done that somebody needs; say, all but the flushes."""
        ends = [span.end for op, span in zip(self.program.ops, self.spans, strict=True) if needed(op)]
        return max(ends, default=0.0)

    def busy(self) -> dict[str, float]:
        """Seconds in which each lane has an operation under way, slowed down by others or not."""
        seconds: dict[str, float] = {}
        for op, span in zip(self.program.ops, self.spans, strict=True):
            seconds[op.lane] = seconds.get(op.lane, 0.0) + span.seconds
        return seconds


def simulate(program: Program, rates: Rates, load: Callable[[Op], Load] | None = None) -> Timeline:
    """When each operation runs on such a machine, and so how long the program takes.

    `load` says what an operation needs, by default `load_of`. Raises RuntimeError for a program that waits for itself.
    """
    loads = [load_of(op, rates) if load is None else load(op) for op in program.ops]
    capacity = {name: getattr(rates, name) for name in SHARED}
    lanes: dict[str, list[int]] = {}
    for i, op in reversed(list(enumerate(program.ops))):
        lanes.setdefault(op.lane, []).append(i)  # its next operation last
    left, started, ended = [1.0] * len(loads), [0.0] * len(loads), dict[int, float]()
    now, under_way = 0.0, set[int]()
    while len(ended) < len(loads):
        for waiting in lanes.values():
            if waiting and waiting[-1] not in under_way and all(a in ended for a in program.ops[waiting[-1]].after):
                under_way.add(waiting[-1])
                started[waiting[-1]] = now
        if not under_way:
            raise RuntimeError("no operation of the program can go on: it waits for itself")
        speeds = _fair({i: loads[i] for i in under_way}, capacity)
        step = min(left[i] * loads[i].seconds / speeds[i] for i in under_way)
        now += step
        for i in list(under_way):
            left[i] -= step * speeds[i] / loads[i].seconds if loads[i].seconds else left[i]
            if left[i] < _DONE:
                ended[i] = now
                under_way.discard(i)
                lanes[program.ops[i].lane].pop()
    return Timeline(program, [Span(started[i], ended[i]) for i in range(len(loads))])


def _fair(loads: Mapping[int, Load], capacity: Mapping[str, float]) -> dict[int, float]:
    """The speed of each operation, as a share of that at which it runs alone."""
    # Bytes a second of each shared thing at full speed; an operation that takes no time needs nothing while it does.
    demand = {
        i: {name: getattr(load, name) / load.seconds for name in SHARED if load.seconds and getattr(load, name)}
        for i, load in loads.items()
    }
    speed, rising, rest = dict.fromkeys(loads, 0.0), set(loads), dict(capacity)
    while rising:
        wanted = {name: sum(demand[i].get(name, 0.0) for i in rising) for name in rest}
        room = [rest[name] / rate for name, rate in wanted.items() if rate > 0]
        rise = max(0.0, min([1.0 - speed[i] for i in rising] + room))
        for i in rising:
            speed[i] += rise
        for name, rate in wanted.items():
            rest[name] -= rise * rate
        full = {name for name in rest if rest[name] <= _DONE * capacity[name]}
        rising = {i for i in rising if speed[i] < 1.0 - _DONE and not full & demand[i].keys()}
    return speed

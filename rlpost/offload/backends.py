"""What runs a program: in order, by an adversary, or on lanes that really run at once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from rlpost.offload.program import HOST, LANES, Lane, Program


def run_in_order(program: Program) -> None:
    """One operation after the other, as they were issued: what every other way must equal."""
    for op in program.ops:
        for part in op.parts:
            part()


def run_adversary(program: Program, seed: int) -> None:
    """Any order that lanes and waits allow, drawn from `seed`, part by part.

    Copies are torn, and one lane may be always first, so that what nothing orders comes as late or as early as it can. Raises
    RuntimeError for a program that waits in a circle.
    """
    drawn = random.Random(seed)
    waiting = {lane: [i for i, op in enumerate(program.ops) if op.lane == lane][::-1] for lane in LANES}
    part, done = dict.fromkeys(LANES, 0), set[int]()
    favourite = drawn.choice([None, *LANES])
    while len(done) < len(program.ops):
        ready = [lane for lane in LANES if waiting[lane] and done.issuperset(program.ops[waiting[lane][-1]].after)]
        if not ready:
            raise RuntimeError("no operation of the program can go on: it waits for itself")
        lane = favourite if favourite in ready and drawn.random() < 0.9 else drawn.choice(ready)
        assert lane is not None
        number = waiting[lane][-1]
        op = program.ops[number]
        op.parts[part[lane]]()
        part[lane] += 1
        if part[lane] == len(op.parts):
            done.add(number)
            waiting[lane].pop()
            part[lane] = 0


class Device(Protocol):
    """What lanes of an accelerator are made of."""

    def on(self, lane: Lane) -> Any:
        """A context manager: what is called in it is issued to the lane's stream."""
        ...

    def record(self, lane: Lane) -> Any:
        """An event at the end of what was issued to the lane."""
        ...

    def wait(self, lane: Lane, event: Any) -> None:
        """The lane's next operations begin after the event; the calling thread does not wait."""
        ...

    def synchronize(self, event: Any) -> None:
        """The calling thread waits for the event."""
        ...


class CudaDevice:
    """Streams and events of the current CUDA device. NOT RUN YET: no GPU was at hand when this was written."""

    def __init__(self) -> None:
        self._streams = {lane: torch.cuda.Stream() for lane in LANES if lane not in HOST}
        for stream in self._streams.values():
            stream.wait_stream(torch.cuda.current_stream())  # gradients and the clip factor are computed there

    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        with torch.cuda.stream(self._streams[lane]):
            yield

    def record(self, lane: Lane) -> torch.cuda.Event:
        return self._streams[lane].record_event()

    def wait(self, lane: Lane, event: torch.cuda.Event) -> None:
        self._streams[lane].wait_event(event)

    def synchronize(self, event: torch.cuda.Event) -> None:
        event.synchronize()


class LateDevice:
    """An accelerator's lanes on a CPU, for tests: each operation is done when its call returns, after a drawn delay."""

    def __init__(self, seed: int, delay_s: float = 2e-4) -> None:
        self._drawn, self._delay = random.Random(seed), delay_s

    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        if self._drawn.random() < 0.3:
            time.sleep(self._drawn.random() * self._delay)
        yield

    def record(self, lane: Lane) -> None:
        return

    def wait(self, lane: Lane, event: Any) -> None:
        return

    def synchronize(self, event: Any) -> None:
        return


class _Broken(Exception):
    """Another lane failed."""


def run_on_lanes(program: Program, device: Device) -> None:
    """A thread a lane: those of host lanes compute, those of an accelerator's lanes issue. Returns when all is done.

    An operation of the accelerator waits for another's event on its stream; one of the host waits for it in its thread. What
    a host lane computes is waited for by the thread that issues what needs it, so no other lane is held up. Raises what the
    first lane that failed raised.
    """
    issued = [threading.Event() for _ in program.ops]
    events: list[Any] = [None] * len(program.ops)
    failures: list[BaseException] = []

    def wait_for(number: int, lane: Lane) -> None:
        issued[number].wait()
        if failures:
            raise _Broken
        if program.ops[number].lane in HOST:
            return  # then it is done
        if lane in HOST:
            device.synchronize(events[number])
        else:
            device.wait(lane, events[number])

    def work(lane: Lane) -> None:
        for number, op in enumerate(program.ops):
            if op.lane != lane:
                continue
            for before in op.after:
                wait_for(before, lane)
            if lane in HOST:
                for part in op.parts:
                    part()
            else:
                with device.on(lane):
                    for part in op.parts:
                        part()
                events[number] = device.record(lane)
            issued[number].set()

    def guarded(lane: Lane) -> None:
        try:
            work(lane)
        except _Broken:
            return
        except BaseException as error:
            failures.append(error)
            for event in issued:
                event.set()

    used = [lane for lane in LANES if any(op.lane == lane for op in program.ops)]
    threads = [threading.Thread(target=guarded, args=(lane,), name=f"rlpost-{lane}") for lane in used]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    for number, op in enumerate(program.ops):
        if op.lane not in HOST:
            device.synchronize(events[number])

"""What runs a program: in order, by an adversary, or on lanes that really run at once.

Lanes of the accelerator are issued through a protocol of six calls (`Device`). CUDA is one of its implementations; the other is
made of threads that are late on purpose, so that a CPU tests the code that issues.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

import torch

from rlpost.offload.program import HOST, LANES, Lane, Program


def run_in_order(program: Program) -> None:
    """One operation after the other, as they were issued: what every other way must equal."""
    for op in program.ops:
        for part in op.parts:
            part()


def run_adversary(program: Program, seed: int) -> None:
    """Any order that lanes and waits allow, drawn from `seed`, part by part: copies are torn.

    Lanes have priorities in a random order, which is drawn anew about twice in a run. So of two operations that nothing orders,
    one comes as early as it can and the other as late (Burckhardt et al., A Randomized Scheduler with Probabilistic Guarantees
    of Finding Bugs, ASPLOS 2010). Raises RuntimeError for a program that waits in a circle.
    """
    drawn = random.Random(seed)
    waiting = {lane: [i for i, op in enumerate(program.ops) if op.lane == lane][::-1] for lane in LANES}
    part, done, parts = dict.fromkeys(LANES, 0), set[int](), sum(len(op.parts) for op in program.ops)
    favoured = drawn.sample(LANES, len(LANES))
    while len(done) < len(program.ops):
        ready = [lane for lane in favoured if waiting[lane] and done.issuperset(program.ops[waiting[lane][-1]].after)]
        if not ready:
            raise RuntimeError("no operation of the program can go on: it waits for itself")
        lane = ready[0] if drawn.random() < 0.9 else drawn.choice(ready)
        if drawn.random() * parts < 2.0:
            favoured = drawn.sample(LANES, len(LANES))
        number = waiting[lane][-1]
        op = program.ops[number]
        if op.parts:
            op.parts[part[lane]]()
            part[lane] += 1
        if part[lane] == len(op.parts):
            done.add(number)
            waiting[lane].pop()
            part[lane] = 0


class Device(Protocol):
    """What an accelerator's lanes are made of: streams, which run behind the caller's back what they are given, in its order,
    and events, each a point in what a stream was given. No call but `synchronize` waits."""

    def stream(self, lane: Lane) -> Any:
        """The lane's stream."""
        ...

    def event(self) -> Any:
        """An event that no stream has been given yet; waiting for it is no wait."""
        ...

    def submit(self, stream: Any, part: Callable[[], None]) -> None:
        """The part (a copy, a kernel) becomes the stream's last."""
        ...

    def record(self, stream: Any, event: Any) -> None:
        """The event happens when all that the stream was given so far is done."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """What the stream is given from now on begins after the event, as it was recorded last."""
        ...

    def synchronize(self, event: Any) -> None:
        """The calling thread waits for the event, as it was recorded last."""
        ...


class CudaDevice:
    """Streams and events of the current CUDA device.

    On an H100, 200 random programs on streams that were made late had the bits of one operation after the other
    (`tests/test_offload_cuda.py`).

    Parts must copy with `non_blocking=True`, host memory be pinned, and all tensors live until the program has ended: the
    caching allocator does not know on which streams they are used.
    """

    # Kept for good: what a kernel allocates for itself comes from a pool of its stream, and new streams would leave many.
    _streams: ClassVar[dict[tuple[int, Lane], torch.cuda.Stream]] = {}

    def __init__(self) -> None:
        self._before = torch.cuda.current_stream().record_event()  # gradients and the clip factor are computed there

    def stream(self, lane: Lane) -> torch.cuda.Stream:
        place = torch.cuda.current_device(), lane
        if place not in self._streams:
            self._streams[place] = torch.cuda.Stream()
        self._streams[place].wait_event(self._before)
        return self._streams[place]

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def submit(self, stream: torch.cuda.Stream, part: Callable[[], None]) -> None:
        with torch.cuda.stream(stream):  # of this thread; it also makes the stream's device the thread's
            part()

    def record(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        event.record(stream)

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def synchronize(self, event: torch.cuda.Event) -> None:
        event.synchronize()


class _LateEvent:
    def __init__(self) -> None:
        self.point: threading.Event | None = None  # in a stream; None until it is recorded


class _LateStream:
    """A thread that lives while there is something to do, and now and then sleeps before it does it."""

    def __init__(self, drawn: random.Random, delay_s: float) -> None:
        self._drawn, self._delay = drawn, delay_s * drawn.choice([0.0, 1.0, 5.0])
        self._waiting: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._lock, self._left = threading.Lock(), 0
        self.failure: BaseException | None = None

    def put(self, part: Callable[[], Any]) -> None:
        with self._lock:
            self._waiting.put(part)
            self._left += 1
            if self._left == 1:
                threading.Thread(target=self._run, name="rlpost-late-stream", daemon=True).start()

    def _run(self) -> None:
        while True:
            part = self._waiting.get()
            if self._drawn.random() < 0.3:
                time.sleep(self._drawn.random() * self._delay)
            try:
                part()
            except BaseException as error:
                self.failure = self.failure or error
            with self._lock:
                self._left -= 1
                if self._left == 0:
                    return


class LateDevice:
    """CUDA's rules on a CPU, for tests: a thread a stream, each late by delays drawn from `seed`; some streams are slower."""

    def __init__(self, seed: int, delay_s: float = 2e-4) -> None:
        self._drawn, self._delay = random.Random(seed), delay_s
        self._streams: list[_LateStream] = []

    def stream(self, lane: Lane) -> _LateStream:
        self._streams.append(_LateStream(random.Random(self._drawn.random()), self._delay))
        return self._streams[-1]

    def event(self) -> _LateEvent:
        return _LateEvent()

    def submit(self, stream: _LateStream, part: Callable[[], None]) -> None:
        stream.put(part)

    def record(self, stream: _LateStream, event: _LateEvent) -> None:
        event.point = threading.Event()
        stream.put(event.point.set)

    def wait(self, stream: _LateStream, event: _LateEvent) -> None:
        if event.point is not None:
            stream.put(event.point.wait)

    def synchronize(self, event: _LateEvent) -> None:
        """Raises what a part of any stream raised."""
        if event.point is not None:
            event.point.wait()
        for stream in self._streams:
            if stream.failure is not None:
                raise stream.failure


class _Broken(Exception):
    """Another lane failed."""


class Running:
    """A program under way: a thread a lane. Those of host lanes compute, those of an accelerator's lanes issue.

    Where an operation of the accelerator waits for another one there, its stream waits; an operation of the host waits in its
    lane's thread. Where an operation of the accelerator needs what the host computes, the thread that issues it waits: that
    holds up its own lane and no other.
    """

    def __init__(self, program: Program, device: Device, pause: Callable[[Lane], None] | None = None) -> None:
        """Starts it. `pause` is called before each part of a host lane; tests sleep there."""
        self._program, self._device, self._pause = program, device, pause
        self._issued = [threading.Event() for _ in program.ops]  # of host lanes: done
        self._events: list[Any] = [device.event() for _ in program.ops]
        self._failures: list[BaseException] = []
        used = [lane for lane in LANES if any(op.lane == lane for op in program.ops)]
        self._streams = {lane: device.stream(lane) for lane in used if lane not in HOST}
        self._threads = [threading.Thread(target=self._guarded, args=(lane,), name=f"rlpost-{lane}") for lane in used]
        for thread in self._threads:
            thread.start()

    def wait(self, numbers: Iterable[int]) -> None:
        """The calling thread waits for these operations. Raises what the first lane that failed raised."""
        for number in numbers:
            self._issued[number].wait()
            if self._failures:
                raise self._failures[0]
            self._device.synchronize(self._events[number])

    def finish(self) -> None:
        """Waits for all, threads included, also where some failed: then nothing touches the buffers any more. Raises as `wait`
        does."""
        for thread in self._threads:
            thread.join()
        for event in self._events:
            try:
                self._device.synchronize(event)
            except Exception as error:
                self._failures.append(error)
        if self._failures:
            raise self._failures[0]

    def _guarded(self, lane: Lane) -> None:
        try:
            with torch.no_grad():  # it holds for one thread
                self._work(lane)
        except _Broken:
            return
        except BaseException as error:
            self._failures.append(error)
            for event in self._issued:
                event.set()

    def _work(self, lane: Lane) -> None:
        for number, op in enumerate(self._program.ops):
            if op.lane != lane:
                continue
            for before in op.after:
                self._wait_for(before, lane)
            for part in op.parts:
                if lane in HOST:
                    if self._pause is not None:
                        self._pause(lane)
                    part()
                else:
                    self._device.submit(self._streams[lane], part)
            if lane not in HOST:
                self._device.record(self._streams[lane], self._events[number])
            self._issued[number].set()

    def _wait_for(self, number: int, lane: Lane) -> None:
        """What operations of this lane wait for before they may be issued, or on a host lane computed."""
        self._issued[number].wait()
        if self._failures:
            raise _Broken
        if self._program.ops[number].lane in HOST:
            return  # then it is done
        if lane in HOST:
            self._device.synchronize(self._events[number])
        else:
            self._device.wait(self._streams[lane], self._events[number])


def run_on_lanes(program: Program, device: Device, pause: Callable[[Lane], None] | None = None) -> None:
    """Runs it with a thread a lane; returns when all is done, raises what the first lane that failed raised."""
    Running(program, device, pause).finish()


def run_threads(program: Program, seed: int, delay_s: float = 2e-4) -> None:
    """Really at once on a CPU, for tests: streams and host lanes are late by delays drawn from `seed`."""
    drawn = {lane: random.Random(f"{seed} {lane}") for lane in HOST}

    def pause(lane: Lane) -> None:
        if drawn[lane].random() < 0.3:
            time.sleep(drawn[lane].random() * delay_s)

    run_on_lanes(program, LateDevice(seed, delay_s), pause)

"""What this machine's lanes do: measured for a few seconds, one by one and then all at once.

All processes of a node are to measure at the same time, since they share the host's memory. On a CPU the copies are copies
within its memory, and AdamW "on the accelerator" is that of the same cores: such a machine runs a program in order. The part
for a GPU (`_cuda_lanes`) HAS NOT RUN YET: no GPU was at hand when this was written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlpost.offload.arithmetic import Arithmetic, Hyper, Step
from rlpost.offload.simulate import Rates
from rlpost.offload.update import host_vector

ELEMENTS = 2**22
"""Of one call: 48 MiB of state, which no cache holds, and a few hundredths of a second of a core."""
SECONDS = 0.2
"""For which each lane is measured, at the least."""
_STEP = Step(1, 1.0, (Hyper(0.0, (0.9, 0.999), 1e-8, 0.0),))


class Work(NamedTuple):
    """One call of a lane, which returns when it is done: elements or bytes of it, and bytes that pass the host's memory."""

    run: Callable[[], None]
    amount: int
    memory: int


def calibrate(
    device: torch.device,
    arithmetic: Arithmetic,
    *,
    weights: torch.dtype,
    elements: int = ELEMENTS,
    seconds: float = SECONDS,
) -> Rates:
    """The rates of this process's lanes. `weights`: the precision of the model's."""
    lanes = _host_lanes(arithmetic, weights, elements, pinned=device.type == "cuda")
    lanes |= _cuda_lanes(device, arithmetic, elements) if device.type == "cuda" else _copies(elements)
    alone = {name: work.amount * _calls({name: work}, seconds)[name] for name, work in lanes.items()}
    alone.setdefault("gpu_adam", alone["cpu_adam"])
    # The link and the CPU's AdamW, as in an update: what they get together of the host's memory is what there is of it. A
    # machine on which they do not slow each other down has more, and a limit that is never met does not matter.
    together = {name: lanes[name] for name in ("up", "down", "cpu_adam")}
    calls = _calls(together, seconds)
    return Rates(**alone, memory=sum(together[name].memory * rate for name, rate in calls.items()))


def _calls(lanes: Mapping[str, Work], seconds: float) -> dict[str, float]:
    """Calls a second of each lane, while all are at work."""
    found, failures = dict[str, float](), list[BaseException]()
    barrier = threading.Barrier(len(lanes))

    def work(name: str, run: Callable[[], None]) -> None:
        try:
            with torch.no_grad():
                run()  # the first call allocates, and starts threads
                barrier.wait(timeout=60)
                began, count = time.perf_counter(), 0
                while count < 2 or time.perf_counter() - began < seconds:
                    run()
                    count += 1
                found[name] = count / (time.perf_counter() - began)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [
        threading.Thread(target=work, args=(name, lane.run), name=f"rlpost-{name}") for name, lane in lanes.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return found


def _host_lanes(arithmetic: Arithmetic, weights: torch.dtype, n: int, *, pinned: bool) -> dict[str, Work]:
    p, m, v, g = (_zeros(n, torch.float32, pinned=pinned) for _ in range(4))
    w = _zeros(n, weights, pinned=pinned)
    width = w.element_size()
    return {
        "cpu_adam": Work(lambda: arithmetic.update(p, m, v, g, None, _STEP, 0), n, 28 * n),
        "cast": Work(lambda: w.copy_(p), n, (4 + width) * n),
    }


def _copies(n: int) -> dict[str, Work]:
    """Up and down where there is no link: copies within the host's memory, which read and write it."""
    pairs = {name: (torch.zeros(n), torch.zeros(n)) for name in ("up", "down")}
    return {
        name: Work(lambda to=to, source=source: to.copy_(source), 4 * n, 8 * n)  # type: ignore[misc]
        for name, (to, source) in pairs.items()
    }


def _cuda_lanes(device: torch.device, arithmetic: Arithmetic, n: int) -> dict[str, Work]:
    def on_stream(action: Callable[[], object]) -> Callable[[], None]:
        stream = torch.cuda.Stream(device)

        def run() -> None:
            with torch.cuda.stream(stream):
                action()
            stream.synchronize()

        return run

    host = {name: _zeros(n, torch.float32, pinned=True) for name in ("up", "down")}
    there = {name: torch.zeros(n, device=device) for name in ("up", "down")}
    p, m, v, g = (torch.zeros(n, device=device) for _ in range(4))
    up = on_stream(lambda: there["up"].copy_(host["up"], non_blocking=True))
    down = on_stream(lambda: host["down"].copy_(there["down"], non_blocking=True))
    adam = on_stream(lambda: arithmetic.update(p, m, v, g, None, _STEP, 0))
    torch.cuda.synchronize(device)
    return {"up": Work(up, 4 * n, 4 * n), "down": Work(down, 4 * n, 4 * n), "gpu_adam": Work(adam, n, 0)}


def _zeros(n: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    return host_vector(n, dtype, pinned=pinned).zero_()

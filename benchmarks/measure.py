"""What all measurements share: clocks, peak memory, the machine's description, fresh processes, medians with ranges."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


@dataclass(slots=True)
class StepClock:
    """CPU seconds (of all threads) and wall seconds of each step, without what happens inside `paused`."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    _start: tuple[float, float] = (0.0, 0.0)
    _pause: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        synchronize()
        self._start, self._pause = now(), (0.0, 0.0)

    def stop(self) -> None:
        synchronize()
        end = now()
        self.cpu.append(end[0] - self._start[0] - self._pause[0])
        self.wall.append(end[1] - self._start[1] - self._pause[1])

    @contextmanager
    def paused(self) -> Iterator[None]:
        synchronize()
        begin = now()
        yield
        synchronize()
        end = now()
        self._pause = (self._pause[0] + end[0] - begin[0], self._pause[1] + end[1] - begin[1])


def now() -> tuple[float, float]:
    """(CPU seconds of this process, wall seconds)."""
    return time.process_time(), time.perf_counter()


def synchronize() -> None:
    """Waits for the GPU, if torch is loaded and there is one: its work is not done when a call returns."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    """Forgets the peak so far (Linux lets a process do that; elsewhere the peak includes start-up)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        print(f"peak memory includes start-up: {error}", file=sys.stderr)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mib() -> float:
    """Peak memory since the last reset in MiB: of the GPU where there is one, else resident memory of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(text for text in status.read_text().splitlines() if text.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    info: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: _version(name) for name in ("torch", "transformers", "accelerate", "trl", "rlpost")},
    }
    import torch

    from rlpost.policy.precision import has_bfloat16

    info["bfloat16_instructions"] = has_bfloat16()
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "count": len(values)}


def show(numbers: dict[str, float], digits: int = 2) -> str:
    """ "12.3 (11.9-13.0)"."""
    median, low, high = (f"{numbers[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def fresh_process(job: Any, *, threads: int, timeout: float = 3600) -> dict[str, Any]:
    """Runs a job of `benchmarks.worker` in a process of its own and returns its result. Raises RuntimeError."""
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    places = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **dict.fromkeys(variables, str(threads)), **quiet, "PYTHONPATH": places}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(job)), str(result)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode or not result.is_file():
            raise RuntimeError(f"a measurement failed ({job}):\n{done.stderr[-4000:]}")
        return json.loads(result.read_text())


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


def update_share(run_dir: Path) -> dict[str, float]:
    """How much of a finished run's steps was the update (`metrics.jsonl`; the first two steps left out): the share of
    all steps together, and the spread over steps. Saving and evaluation are in neither."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][2:]
    times = [
        {
            k: v
            for k, v in row.items()
            if k.startswith("time/") and k not in ("time/step", "time/checkpoint", "time/eval")
        }
        for row in rows
    ]
    times = [t for t in times if "time/update" in t]
    if not times:
        raise ValueError(f"{run_dir} has no more than two optimizer steps, so there is no share to tell")
    shares = [t["time/update"] / sum(t.values()) for t in times]
    total = sum(t["time/update"] for t in times) / sum(sum(t.values()) for t in times)
    return {"share": total, **spread(shares)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

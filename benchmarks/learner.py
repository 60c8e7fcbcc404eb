"""rlpost's learner on frozen rollouts: layouts, precisions, dead groups, and each mechanism switched off by itself.

    python -m benchmarks.learner --model FOLDER            # CPU, SmolLM2-135M: about an hour on two cores
    python -m benchmarks.learner --model FOLDER --scale small --repeats 1
    python -m benchmarks.learner --gpu qwen-1.5b           # random weights of that size on a CUDA device

Every number comes from a process of its own; cases take turns within a repeat. The first step is dropped. Tokens per
second: useful = completion tokens of the whole rollout (skipped groups included: they are dealt with, too), real =
positions that are not padding, padded = all positions sent through the model. MFU (GPU only) counts 6 x parameters a
real token, attention left out, over the device's dense bfloat16 peak.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.frozen import SCALES, RolloutSpec, make_rollout
from benchmarks.measure import fresh_process, machine, show, spread, table, write_result
from benchmarks.models import QWEN, make_qwen, vocabulary_of
from benchmarks.worker import Job

# Dense bfloat16 peaks in TFLOP/s by what the device's name contains, from the makers' data sheets.
PEAKS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}

PRECISIONS: dict[str, dict[str, str]] = {
    "fp32": {"autocast": "none"},
    "bf16": {"autocast": "bfloat16"},
}


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table. `part`: layouts (the grid) or ablation (one mechanism off)."""

    part: str
    name: str
    dead_share: float
    setting: dict[str, Any]


LAYOUTS: dict[str, dict[str, str]] = {layout: {"layout": layout} for layout in ("tree", "sorted", "padded")}
# On a GPU trees are computed by FlexAttention, as a run there chooses by itself; beside it by SDPA with a dense mask.
GPU_LAYOUTS: dict[str, dict[str, str]] = {
    "tree": {"layout": "tree", "attention": "flex_attention"},
    "tree, dense mask": {"layout": "tree"},
    "sorted": {"layout": "sorted"},
    "padded": {"layout": "padded"},
}


def cases_of(
    budget: int, shares: list[float], precisions: Sequence[str] = tuple(PRECISIONS), *, gpu: bool = False
) -> list[Case]:
    """The grid of layout x precision x share of dead groups, then the default with one mechanism taken away at a time."""
    layouts = GPU_LAYOUTS if gpu else LAYOUTS
    grid = [
        Case("layouts", f"{name}, {dtype}", share, {**layout, **precision, "micro_batch_tokens": budget})
        for share in shares
        for name, layout in layouts.items()
        for dtype, precision in ((name, PRECISIONS[name]) for name in precisions)
    ]
    # The ablation in the precision that the machine is fast in, which is the last one named.
    base: dict[str, Any] = {**layouts["tree"], "micro_batch_tokens": budget, **PRECISIONS[precisions[-1]]}
    plain = {"attention": "sdpa"}
    ablations: dict[str, dict[str, Any]] = {
        "default (tree, skipping, chunked head)": {},
        "sorted rows instead of trees": layouts["sorted"] | plain,
        "padded rows instead of trees": layouts["padded"] | plain,
        "dead groups not skipped": {"skip_dead": False},
        "head: backward computes all scores again (chunks of 64)": {"head_chunk_tokens": 64},
        "head: forward keeps all scores (one chunk)": {"head_chunk_tokens": 1 << 30},
        "head: full logits and autograd": {"head": "full"},
        "all three off": {**layouts["padded"], **plain, "skip_dead": False, "head": "full"},
    }
    return grid + [Case("ablation", name, 0.5, {**base, **change}) for name, change in ablations.items()]


def measure(cases: list[Case], base: RolloutSpec, model: str, args: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """[case] -> one result a repeat; none of a repeat that failed, which is printed."""
    found: list[list[dict[str, Any]]] = [[] for _ in cases]
    for repeat in range(args.repeats):
        order = range(len(cases)) if repeat % 2 == 0 else reversed(range(len(cases)))
        for i in order:
            spec = replace(base, dead_share=cases[i].dead_share)
            job = Job("rlpost", model, spec.as_dict(), cases[i].setting, steps=args.steps, threads=args.threads)
            try:
                found[i].append(fresh_process(job, threads=args.threads))
            except RuntimeError as error:  # out of memory, say: the others' numbers must not be lost
                print(f"repeat {repeat + 1} {cases[i].part} {cases[i].name}: FAILED\n{error}", flush=True)
                continue
            seconds = found[i][-1]["wall_s"][-1]
            print(f"repeat {repeat + 1} {cases[i].part} {cases[i].name}: {seconds:.2f} s", flush=True)
    return found


def summarise(
    case: Case, results: list[dict[str, Any]], useful: float, peak_tflops: float | None, clock: str
) -> dict[str, Any]:
    """Medians and ranges over processes, and rates from the median of `clock`: cpu_s or wall_s."""
    cpu, wall = (spread([sum(r[name]) / len(r[name]) for r in results]) for name in ("cpu_s", "wall_s"))
    first, seconds = results[0], (cpu if clock == "cpu_s" else wall)["median"]
    summary: dict[str, Any] = {
        "part": case.part,
        "name": case.name,
        "dead_share": case.dead_share,
        "setting": case.setting,
        "cpu_s": cpu,
        "wall_s": wall,
        "peak_mib": spread([r["peak_mib"] for r in results]),
        "useful_per_s": useful / seconds,
        "real_per_s": first["real"] / seconds,
        "padded_per_s": first["padded"] / seconds,
        "padding_share": 1 - first["real"] / first["padded"],
        "micro_batches": first["micro_batches"],
    }
    if peak_tflops:
        summary["mfu"] = 6 * first["parameters"] * first["real"] / seconds / (peak_tflops * 1e12)
    return summary


def render(rows: list[dict[str, Any]], part: str, clock: str) -> str:
    """One part as a table; `clock`: cpu_s or wall_s."""
    chosen = [row for row in rows if row["part"] == part]
    base = chosen[0][clock]["median"]
    with_mfu = any("mfu" in row for row in chosen)
    head = ["case", "dead", "s a step", "x first line", "useful/s", "real/s", "padded/s", "padding", "peak GiB"]
    lines = [
        [
            row["name"],
            f"{row['dead_share']:.0%}",
            show(row[clock]),
            f"{row[clock]['median'] / base:.2f}",
            *(f"{row[key]:.0f}" for key in ("useful_per_s", "real_per_s", "padded_per_s")),
            f"{row['padding_share']:.0%}",
            f"{row['peak_mib']['median'] / 1024:.2f}",
            *([f"{row['mfu']:.1%}"] if with_mfu else []),
        ]
        for row in chosen
    ]
    return table([*head, "MFU"] if with_mfu else head, lines)


def device_peak() -> float | None:
    """Dense bfloat16 TFLOP/s of the CUDA device, where known."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder in Hugging Face layout")
    parser.add_argument("--gpu", choices=list(QWEN), help="random weights of this size, long completions; needs CUDA")
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--part", choices=["layouts", "ablation"], help="only this part")
    parser.add_argument("--dead", type=float, nargs="+", default=[0.0, 0.5], help="shares of dead groups")
    parser.add_argument(
        "--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS), help="the last is the ablation's"
    )
    parser.add_argument("--micro-batch-tokens", type=int, help="positions a pass; 4096, on a GPU 16384")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="per process; the first is dropped")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/learner.json"))
    args = parser.parse_args()
    if (args.model is None) == (args.gpu is None):
        parser.error("give exactly one of --model and --gpu")
    return args


def main() -> int:
    args = arguments()
    described, peak = machine(), device_peak()
    if args.gpu and "gpu" not in described:
        print("--gpu needs a CUDA device, and torch sees none; use --model on a CPU.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_qwen(args.gpu, Path(folder))) if args.gpu else str(Path(args.model).resolve())
        scale = SCALES["gpu"] if args.gpu else SCALES[args.scale]
        base = replace(scale, vocabulary=vocabulary_of(model))
        budget = args.micro_batch_tokens or (16384 if args.gpu else 4096)
        cases = [
            case
            for case in cases_of(budget, args.dead, args.precisions, gpu=bool(args.gpu))
            if args.part in (None, case.part)
        ]
        found = measure(cases, base, model, args)
    useful = make_rollout(base).counts()["completion"]
    clock = "wall_s" if args.gpu else "cpu_s"
    measured = [(case, results) for case, results in zip(cases, found, strict=True) if results]
    rows = [summarise(case, results, useful, peak, clock) for case, results in measured]
    for part in dict.fromkeys(case.part for case, _ in measured):
        print(f"\n{part}\n{render(rows, part, clock)}")
    result = {
        "what": "rlpost's optimizer step on frozen rollouts",
        "model": args.gpu or Path(model).name,
        "rollout": base.as_dict(),
        "tokens": make_rollout(base).counts(),
        "clock": clock,
        "repeats": args.repeats,
        "steps_counted": args.steps - 1,
        "threads": args.threads,
        "peak_tflops": peak,
        "machine": described,
        "rows": rows,
        "failed": [case.name for case, results in zip(cases, found, strict=True) if not results],
    }
    write_result(args.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

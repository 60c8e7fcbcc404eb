"""Time of an optimizer step: rlpost against TRL at its fastest micro-batch, on the same frozen rollouts.

    python -m benchmarks.trl --model FOLDER                # SmolLM2-135M: hours; the result stands after every repeat
    python -m benchmarks.trl --model FOLDER --scale medium --autocast none   # where a CPU emulates bfloat16
    python -m benchmarks.trl --model FOLDER --scale small --repeats 2

Every number comes from a process of its own; the sides take turns within a repeat, and the order is reversed in every
second one. Both sides: bfloat16 autocast over float32 weights (float32 alone with --autocast none), no activation
checkpointing, fused AdamW, constant rate,
gradient norm clipped at 1, log-prob and entropy of every token, token-mean PPO loss with one step a rollout. The first
step of each process is dropped. TRL's generation, scoring and padding of the batch are not counted, rlpost's building of
rows is. The result is VOID, and the exit code 1, unless the float32 gradients of both sides agree on the same rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: this folder's `trl.py` must not stand in for the package of that name
    sys.path[0] = str(ROOT)

from dataclasses import asdict, dataclass, replace  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks.frozen import FULL, SCALES, RolloutSpec, make_rollout  # noqa: E402
from benchmarks.measure import fresh_process, machine, show, spread, table, update_share, write_result  # noqa: E402
from benchmarks.trl_parity import TOLERANCE, Agreement, report  # noqa: E402
from benchmarks.worker import Job  # noqa: E402

MICRO_BATCHES = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: a kind of rollout, and the factor that issue 4 asks for."""

    name: str
    title: str
    spec: RolloutSpec
    wanted: float | None = None


def rows_of(base: RolloutSpec) -> list[Row]:
    """The four kinds of rollouts at the scale of `base`."""
    long = replace(base, prompt_tokens=max(4, base.mean_tokens // 10))
    return [
        Row("half_dead", "lognormal lengths, half the groups dead", replace(base, dead_share=0.5), 6.0),
        Row("no_dead", "lognormal lengths, no dead group", base, 3.0),
        Row("equal", "equal lengths, no dead group", replace(base, lengths="equal"), 1.8),
        Row("long", "lognormal, completions about 10 times the prompt, no dead group", long),
    ]


def sides_of(
    layouts: list[str], budget: int, autocast: str, micro_batches: Sequence[int] = MICRO_BATCHES
) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is measured: name -> (side, setting)."""
    sides: dict[str, tuple[str, dict[str, Any]]] = {
        f"trl micro-batch {n}": ("trl", {"micro_batch": n, "autocast": autocast}) for n in micro_batches
    }
    for layout in layouts:
        setting = {"layout": layout, "micro_batch_tokens": budget, "autocast": autocast}
        if clock() == "wall_s" and layout == "tree":  # what a run on a GPU chooses by itself
            setting["attention"] = "flex_attention"
        sides[f"rlpost {layout}"] = ("rlpost", setting)
    return sides


def measure(
    rows: list[Row], sides: dict[str, tuple[str, dict[str, Any]]], model: str, args: argparse.Namespace
) -> Iterator[dict[str, dict[str, list[dict[str, Any]]]]]:
    """After every repeat [row][side] -> one result a repeat; of TRL's micro-batches only the fastest of the first repeat is
    repeated."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {row.name: {name: [] for name in sides} for row in rows}
    for repeat in range(args.repeats):
        for row in rows:
            slower = [] if repeat == 0 else slower_of_trl(found[row.name])
            order = [name for name in sides if name not in slower]
            order = order if repeat % 2 == 0 else order[::-1]
            for name in order:
                side, setting = sides[name]
                job = Job(side, model, row.spec.as_dict(), setting, steps=args.steps, threads=args.threads)
                result = fresh_process(job, threads=args.threads)
                found[row.name][name].append(result)
                cpu = sum(result["cpu_s"]) / len(result["cpu_s"])
                memory = result["peak_mib"] / 1024
                print(
                    f"repeat {repeat + 1} {row.name:10} {name:18} {cpu:7.2f} CPU s a step, {memory:.2f} GiB", flush=True
                )
        yield found


@cache
def clock() -> str:
    """What counts: CPU seconds of all threads on a CPU, which other programs do not stretch; wall seconds on a GPU."""
    import torch

    return "wall_s" if torch.cuda.is_available() else "cpu_s"


def verdicts(summary: dict[str, Any]) -> list[str]:
    """Whether the default layout is as fast as wanted and takes no more memory than TRL's leanest setting, in words."""
    lines = []
    for part in summary.values():
        side = next(side for name, side in part["sides"].items() if name.startswith("rlpost"))
        times, memory = side["times_less"]["of_medians"], side["memory_of_leanest"]
        wanted = "" if part["wanted"] is None else f" (wanted {part['wanted']}: {_met(times >= part['wanted'])})"
        lines.append(
            f"{part['title']}: {times:.2f} times less{wanted}; {memory:.2f} of the memory of TRL's leanest setting (wanted 1: "
            f"{_met(memory <= 1)})"
        )
    return lines


def _met(yes: bool) -> str:
    return "met" if yes else "NOT met"


def slower_of_trl(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """TRL's sides but for the one with the fastest first process."""
    seconds = {name: sum(results[0][clock()]) for name, results in found.items() if name.startswith("trl")}
    return [name for name in seconds if name != min(seconds, key=lambda n: seconds[n])]


def summarise(row: Row, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and ranges over processes, TRL's fastest setting, and how many times less time rlpost takes than it."""
    sides: dict[str, Any] = {}
    for name, results in found.items():
        sides[name] = {
            "cpu_s": spread([sum(r["cpu_s"]) / len(r["cpu_s"]) for r in results]),
            "wall_s": spread([sum(r["wall_s"]) / len(r["wall_s"]) for r in results]),
            "peak_mib": spread([r["peak_mib"] for r in results]),
        }
    theirs = {name: side for name, side in sides.items() if name.startswith("trl")}
    fastest = next(name for name in theirs if name not in slower_of_trl(found))
    leanest = min(theirs, key=lambda name: theirs[name]["peak_mib"]["median"])
    for name, side in sides.items():
        pairs = zip(found[fastest], found[name], strict=False)  # TRL's slower settings have one process only
        ratios = [sum(a[clock()]) / sum(b[clock()]) for a, b in pairs]
        side["times_less"] = {**spread(ratios), "of_medians": _ratio(sides[fastest], side)}
        side["memory_of_leanest"] = side["peak_mib"]["median"] / sides[leanest]["peak_mib"]["median"]
    return {
        "title": row.title,
        "wanted": row.wanted,
        "rollout": row.spec.as_dict(),
        "tokens": make_rollout(row.spec).counts(),
        "trl_fastest": fastest,
        "trl_leanest": leanest,
        "sides": sides,
    }


def _ratio(fastest: dict[str, Any], side: dict[str, Any]) -> float:
    return fastest[clock()]["median"] / side[clock()]["median"]


def render(summary: dict[str, Any]) -> str:
    """One table for all rows."""
    lines = []
    for part in summary.values():
        for name, side in part["sides"].items():
            mark = " (fastest)" if name == part["trl_fastest"] else ""
            lines.append(
                [
                    part["title"],
                    name + mark,
                    show(side["cpu_s"]),
                    show(side["wall_s"]),
                    show(side["times_less"]) if name != part["trl_fastest"] else "1",
                    f"{side['peak_mib']['median'] / 1024:.2f}",
                ]
            )
    return table(["rollout", "side", "CPU s a step", "wall s", "times less than TRL's fastest", "peak GiB"], lines)


def draw(summary: dict[str, Any], path: Path) -> None:
    """Bars of CPU seconds a step with their ranges."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(summary), figsize=(4 * len(summary), 3.2), squeeze=False)
    for axis, part in zip(axes[0], summary.values(), strict=True):
        names = list(part["sides"])
        medians = [part["sides"][n][clock()]["median"] for n in names]
        below = [m - part["sides"][n][clock()]["low"] for m, n in zip(medians, names, strict=True)]
        above = [part["sides"][n][clock()]["high"] - m for m, n in zip(medians, names, strict=True)]
        colours = ["#9aa5b1" if n.startswith("trl") else "#2f6fde" for n in names]
        axis.barh(names, medians, xerr=[below, above], color=colours, capsize=3)
        axis.invert_yaxis()
        axis.set_title(textwrap.fill(part["title"], 34), fontsize=9)
        axis.set_xlabel(f"{'CPU s' if clock() == 'cpu_s' else 'wall s'} a step (median, range)", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def gate(rows: list[Row], model: str, threads: int, micro_batch: int) -> list[Agreement]:
    """Gradients of both sides in float32, on every row's own rollout."""
    found = []
    for row in rows:
        job = Job("parity", model, row.spec.as_dict(), {"micro_batch": micro_batch}, threads=threads)
        found.append(replace(Agreement(**fresh_process(job, threads=threads)), name=row.name))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="a folder in Hugging Face layout, or qwen-0.5b, qwen-1.5b: random"
    )
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in rows_of(FULL)])
    parser.add_argument("--layouts", nargs="+", default=["tree"], choices=["tree", "sorted", "padded"])
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", default=list(MICRO_BATCHES), help="TRL's, in completions"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="rlpost's positions a pass")
    parser.add_argument(
        "--autocast",
        choices=["bfloat16", "none"],
        default="bfloat16",
        help="of both sides; none (float32) on a CPU without bfloat16 instructions, which emulates them slowly",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="per process; the first is dropped")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run-dir", type=Path, help="a finished run, to say how much of a step the update is")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/trl.json"))
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from benchmarks.models import QWEN, make_qwen

    with tempfile.TemporaryDirectory() as folder:
        model = make_qwen(args.model, Path(folder) / args.model) if args.model in QWEN else Path(args.model).resolve()
        return run(args, str(model))


def run(args: argparse.Namespace, model: str) -> int:
    """Measures on the model in a folder; returns the exit code."""
    from benchmarks.models import vocabulary_of

    base = replace(SCALES[args.scale], vocabulary=vocabulary_of(model))
    rows = [row for row in rows_of(base) if args.rows is None or row.name in args.rows]
    described = machine()
    agreements = gate(rows, model, args.threads, max(args.micro_batches))
    print(report(agreements, TOLERANCE, only_norm=True))
    valid = all(a.norm_error <= TOLERANCE for a in agreements)
    if not valid:
        print("VOID: the two sides do not take the same step, so their times cannot be compared.", file=sys.stderr)
        return 1
    sides = sides_of(args.layouts, args.micro_batch_tokens, args.autocast, args.micro_batches)
    # Written after every repeat: hours of measuring must not be lost to whatever ends the last of them.
    for done, found in enumerate(measure(rows, sides, model, args), start=1):
        summary = {row.name: summarise(row, found[row.name]) for row in rows}
        save(args, model, described, agreements, summary, done)
        print(render(summary))
        print("\n".join(verdicts(summary)))
    return 0


def save(
    args: argparse.Namespace,
    model: str,
    described: dict[str, Any],
    agreements: list[Agreement],
    summary: dict[str, Any],
    repeats: int,
) -> None:
    """The result so far as JSON and as a picture."""
    result = {
        "what": "optimizer step on frozen rollouts, rlpost against TRL",
        "valid": True,  # else nothing would have been timed
        "model": Path(model).name,
        "scale": args.scale,
        "repeats": repeats,
        "steps_counted": args.steps - 1,
        "threads": args.threads,
        "autocast": args.autocast,
        "clock": clock(),
        "machine": described,
        "gradients": [asdict(a) for a in agreements],
        "rows": summary,
        "update_share_of_a_step": update_share(args.run_dir) if args.run_dir else None,
    }
    write_result(args.output, result)
    draw(summary, args.output.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())

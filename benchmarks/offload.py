"""DeepSpeed's ways of keeping the optimizer's state on the host, and ours: all arms in one run, in an order that changes.

    python -m benchmarks.offload                      # a tiny model, two processes on CPU: tries the harness, proves nothing
    python -m benchmarks.offload --gpu                # 1.5B (random weights), one GPU: about ten minutes
    python -m benchmarks.offload --gpu --arms "ours" "ZeRO-3"

Every repeat visits all arms in another order; a visit makes the engine anew, steps once unmeasured, and then times forward,
backward, update (`engine.step`, with norm and clipping) and the gathering of all weights that a sync begins with. An arm that
cannot start, dies or hangs is written down with the reason. The reference is ZeRO-3 without offload: losses and the bits of
weights and master weights are compared with its own. On a CPU there is no link and no other kernel, so its times say nothing
of what offload is worth. What is measured is kept as it comes, beside --out (`.jsonl`), and a benchmark that is stopped
(Ctrl-C, SIGTERM) still writes what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import ROOT, machine, show, spread, table, write_result
from benchmarks.offload_arms import REFERENCE, arms

PARTS = ("forward", "backward", "update", "sync")
FORMS: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": "tiny", "processes": 2, "tokens": 64, "micro_batches": 2, "warmup": 1, "steps": 2, "repeats": 2,
        "piece_size": 2000, "checkpointing": False, "threads": 1, "minutes": 5.0, "limit": 60.0, "build": 30.0,
    },
    "gpu": {
        "model": "qwen-1.5b", "processes": 1, "tokens": 4096, "micro_batches": 8, "warmup": 1, "steps": 3, "repeats": 2,
        "piece_size": 2**25, "checkpointing": True, "threads": 0, "minutes": 9.0, "limit": 180.0, "build": 150.0,
    },
}  # fmt: skip


def visits(count: int, repeats: int, seed: int = 0) -> list[tuple[int, int]]:
    """(repeat, arm's number): all arms in every repeat, each time in another order; the reference first, for the others to be
    compared with from the start."""
    drawn, found = random.Random(seed), []
    for repeat in range(repeats):
        rest = list(range(1, count))
        drawn.shuffle(rest)
        found += [(repeat, number) for number in (0, *rest)]
    return found


def measure(
    form: dict[str, Any], wanted: list[tuple[int, int]], environment: dict[str, str], kept: Path
) -> list[dict[str, Any]]:
    """What the processes wrote down of these visits, into the file `kept`. They are started again, without the arm that was
    under way, when they end early or nothing comes for `limit` seconds. A stop (Ctrl-C, SIGTERM) ends the measuring only."""
    lines: list[dict[str, Any]] = []
    until, stopped = time.time() + 60 * form["minutes"], False
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("")
    with tempfile.TemporaryDirectory() as folder:
        while wanted and time.time() < until and not stopped:
            job, before = Path(folder) / "job.json", len(kept.read_text())
            job.write_text(json.dumps({**form, "visits": wanted, "results": str(kept.resolve()), "until": until}))
            try:
                why = _start(job, kept, form, environment)
            except (KeyboardInterrupt, SystemExit):
                why, stopped = "the benchmark was stopped", True
            found = [json.loads(line) for line in kept.read_text()[before:].splitlines() if line.endswith("}")]
            lines += found
            if any("ended" in line for line in found):
                break
            begun = next((line for line in reversed(found) if "begun" in line), None)
            if begun is None:
                raise RuntimeError(f"the processes of the benchmark did not come up: {why}")
            if found[-1] is begun:
                lines.append({"arm": begun["begun"], "repeat": begun["repeat"], "cannot": why})
            done = {(line["repeat"], line["arm"]) for line in lines if "arm" in line}
            broken = {line["arm"] for line in lines if "cannot" in line}
            wanted = [visit for visit in wanted if visit not in done and visit[1] not in broken]
    return lines


BUILD = """
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(8))])
"""


def build_cpu_adam(environment: dict[str, str], limit: float) -> str:
    """Has DeepSpeed build its AdamW for the CPU, once and before anything is timed; what kept it from that ("": nothing)."""
    folder = Path(environment["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # compilers, too
        process.communicate()
        for lock in folder.rglob("lock"):  # else all who ask for it from now on wait
            lock.unlink()
        return f"was not built within {limit:.0f} s"
    return "" if process.returncode == 0 else f"was not built: {' '.join(said.split())[-300:]}"


def _start(job: Path, results: Path, form: dict[str, Any], environment: dict[str, str]) -> str:
    """Runs the processes to their end; why they ended, where that was early."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(form["processes"])]
    command = [sys.executable, *launcher, "-m", "benchmarks.offload_side", str(job)]
    log = results.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        size, since, early = -1, time.monotonic(), ""
        try:
            while process.poll() is None:
                time.sleep(0.2)
                now = results.stat().st_size
                if now != size:
                    size, since = now, time.monotonic()
                elif time.monotonic() - since > form["limit"]:
                    early = f"nothing came of it for {form['limit']:.0f} s, so it was ended"
                    break
        finally:  # it and its workers have sessions of their own, so that a stop of this process reaches none of them
            if process.poll() is None:
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                process.wait()
    return early or f"its process ended with code {process.returncode}: {cause(log.read_text())}"


def cause(log: str) -> str:
    """The first line that names an error, with what follows; else the end of the log. A launcher's own words come last, and
    say nothing of the cause."""
    said = re.search(r"^.*\b\w*(?:Error|Exception): .*$", log, re.MULTILINE)
    return " ".join((log[said.start() :][:600] if said else log[-600:]).split())


def summary(lines: list[dict[str, Any]], form: dict[str, Any], *, gpu: bool) -> dict[str, Any]:
    """By arm: medians with their spread over all measured steps, and whether results are the reference's."""
    about = next((line for line in lines if "rates" in line), {})
    known = arms(about.get("parameters_a_process", 1), form["piece_size"])
    made: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        if "arm" in line:
            made.setdefault(line["arm"], []).append(line)
    reference = next((visit for visit in made.get(0, []) if "times" in visit), None)
    found: dict[str, Any] = {}
    for number, arm in enumerate(known):
        each = [visit for visit in made.get(number, []) if "times" in visit]
        broken = next((visit["cannot"] for visit in made.get(number, []) if "cannot" in visit), None)
        if not each:
            found[arm.name] = {"ran": False, "why": broken or "not visited: no time was left, or it was not asked for"}
            continue
        entry: dict[str, Any] = {"ran": True, "exact": arm.exact, "visits": len(each)}
        entry |= {part: spread([s for visit in each for s in visit["times"][part]]) for part in PARTS}
        whole = [sum(parts) for visit in each for parts in zip(*(visit["times"][p] for p in PARTS[:3]), strict=True)]
        entry["step"] = spread(whole)
        entry["peak_mib"] = max(size for visit in each for size in visit["peak_mib"])
        entry |= {k: each[0][k] for k in ("way", "predicted_s", "park_s", "unpark_s") if k in each[0]}
        if gpu and "up_bytes" in each[0]:
            seconds = entry["update"]["median"]
            entry["link_gb_s"] = {way: each[0][f"{way}_bytes"] / seconds / 1e9 for way in ("up", "down")}
        if broken is not None:
            entry["later"] = broken
        if reference is not None:
            entry |= _compared(
                each, reference, expected=arm.bits or (not gpu and (arm.ours is not None or arm.planned))
            )
        found[arm.name] = entry
    return {**{k: about.get(k) for k in ("rates", "parameters_a_process", "processes", "planned")}, "arms": found}


def _compared(visits_made: list[dict[str, Any]], reference: dict[str, Any], *, expected: bool) -> dict[str, Any]:
    """`expected`: whether the bits must be equal here."""
    gaps = [abs(a - b) for visit in visits_made for a, b in zip(visit["losses"], reference["losses"], strict=True)]
    return {
        "losses_equal": all(visit["losses"] == reference["losses"] for visit in visits_made),
        "bits_equal": all(visit["bits"] == reference["bits"] for visit in visits_made),
        "bits_must_be_equal": expected,
        "largest_loss_difference": max(gaps),
    }


def wrong(result: dict[str, Any]) -> list[str]:
    """Arms whose results had to be the reference's, and are not."""
    return [
        name
        for name, entry in result["arms"].items()
        if entry.get("bits_must_be_equal") and not (entry["losses_equal"] and entry["bits_equal"])
    ]


def shown(result: dict[str, Any]) -> str:
    """The table of all arms, and those that did not run."""
    head = ("arm", *(f"{part}, s" for part in (*PARTS, "step")), "peak, MiB", "losses", "bits")
    rows, notes = [], []
    for name, entry in result["arms"].items():
        if not entry["ran"]:
            notes.append(f"did not run: {name}: {entry['why']}")
            continue
        times = [show(entry[part], 3) for part in (*PARTS, "step")]
        same = ["equal" if entry.get(f"{what}_equal") else "differ" for what in ("losses", "bits")]
        label = f"{name} ({entry['way']})" if name == "ours, planned" else name
        rows.append((label, *times, f"{entry['peak_mib']:.0f}", *same))
    return "\n".join([table(head, rows), *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument(
        "--arms", nargs="*", default=(), metavar="PART", help="only arms whose names have one of these in them"
    )
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--minutes", type=float, help="no visit begins later than this")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/offload.json"))
    options = parser.parse_args()
    form = dict(FORMS["gpu" if options.gpu else "cpu"])
    form["repeats"], form["minutes"] = options.repeats or form["repeats"], options.minutes or form["minutes"]
    form["threads"] = form["threads"] or max(1, len(os.sched_getaffinity(0)) // form["processes"])
    names = [arm.name for arm in arms(1, form["piece_size"])]
    asked = [i for i, name in enumerate(names) if i == 0 or not options.arms or any(p in name for p in options.arms)]
    wanted = [visit for visit in visits(len(names), form["repeats"]) if visit[1] in asked]
    described = {**machine(), "deepspeed": importlib.metadata.version("deepspeed")}
    place = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": str(form["threads"]), "PYTHONPATH": place}
    if not options.gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment.setdefault("TORCH_EXTENSIONS_DIR", str((options.out.parent / "extensions").resolve()))
    form["cpu_adam"] = build_cpu_adam(environment, form["build"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    lines = measure(form, wanted, environment, options.out.with_suffix(".jsonl"))
    result = {
        "what": "random 1.5B on one GPU" if options.gpu else "harness only: a tiny model on a CPU, which has no link",
        "machine": described,
        "form": form,
        **summary(lines, form, gpu=options.gpu),
    }
    print(shown(result))
    write_result(options.out, result)
    if found := wrong(result):
        sys.exit(f"results differ from {REFERENCE} where they must not: {', '.join(found)}")


if __name__ == "__main__":
    main()

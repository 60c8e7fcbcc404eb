"""Sampling beside learning against taking turns, in whole runs on one machine.

    python -m benchmarks.overlap [--recipe recipes/quickstart.yaml] [--repeats 3] [section.key=value ...]

Three arms, each a run of the recipe with a vLLM worker in a process of its own, in reversed order in every second repeat:

- `turns, one core each`: staleness 0; the learner on core 0, vLLM on core 1. What each side takes alone.
- `overlap`: staleness 1 on the same cores.
- `turns, both cores`: staleness 0, both cores for whoever's turn it is.

Of every run the first rollouts are left out (compilation, filling the pipeline). A step is `time/step` of metrics.jsonl. Two
figures: overlap's step over max(rollout, update) / 0.95 + sync of the first arm, which is what it may take; and the third
arm's step over overlap's. Linux only: cores are bound.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, show, spread, table, write_result

ARMS: dict[str, dict[str, Any]] = {
    "turns, one core each": {"staleness": 0, "learner": (0,), "worker": (1,)},
    "overlap": {"staleness": 1, "learner": (0,), "worker": (1,)},
    "turns, both cores": {"staleness": 0, "learner": (0, 1), "worker": (0, 1)},
}
LEFT_OUT = 3


def run(arm: dict[str, Any], recipe: str, rollouts: int, overrides: list[str]) -> list[dict[str, float]]:
    """The rows of a run in a fresh process, without the first `LEFT_OUT`. Raises RuntimeError when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlpost", recipe, f"output_dir={folder}/run", f"learner.rollouts={rollouts}"]
        command += ["rollout.engine.where=worker", f"rollout.engine.cores={list(arm['worker'])}", "rollout.probe=null"]
        command += [
            f"rollout.staleness={arm['staleness']}",
            "evaluation.prompts=0",
            "checkpoint.every=0",
            "tracking.report=false",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(arm["learner"])), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [*command, *overrides],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, arm["learner"]),
        )
        if done.returncode:
            raise RuntimeError(f"a run failed ({arm}):\n{(done.stdout + done.stderr)[-4000:]}")
        metrics = next(Path(folder).rglob("metrics.jsonl"))
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"][LEFT_OUT:]


def seconds(rows: list[dict[str, float]], name: str) -> float:
    """The median over a run's steps of a phase, 0 where it does not occur."""
    return statistics.median(row.get(f"time/{name}", 0.0) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/overlap.json"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    described = machine()
    phases = ("step", "rollout", "beside_rollout", "score", "update", "sync", "wait")
    found: dict[str, dict[str, list[float]]] = {arm: {phase: [] for phase in phases} for arm in ARMS}
    bounds, gains = [], []
    for repeat in range(options.repeats):
        here: dict[str, dict[str, float]] = {}
        for name in list(ARMS) if repeat % 2 == 0 else list(ARMS)[::-1]:
            rows = run(ARMS[name], options.recipe, options.rollouts, options.overrides)
            here[name] = {phase: seconds(rows, phase) for phase in phases}
            print(
                f"repeat {repeat + 1}, {name}: " + ", ".join(f"{p} {v:.2f} s" for p, v in here[name].items() if v),
                flush=True,
            )
            for phase in phases:
                found[name][phase].append(here[name][phase])
        alone, both, overlap = (here[name] for name in ("turns, one core each", "turns, both cores", "overlap"))
        bounds.append(overlap["step"] / (max(alone["rollout"], alone["update"]) / 0.95 + alone["sync"]))
        gains.append(both["step"] / overlap["step"])
    result = {
        "machine": described,
        "setting": {
            "recipe": options.recipe,
            "rollouts": options.rollouts,
            "overrides": options.overrides,
            "arms": ARMS,
        },
        "seconds": {arm: {phase: spread(values) for phase, values in found[arm].items()} for arm in ARMS},
        "overlap_over_bound": spread(bounds),
        "both_cores_over_overlap": spread(gains),
    }
    print(table(("arm", *phases), [(arm, *(show(result["seconds"][arm][phase]) for phase in phases)) for arm in ARMS]))
    print(f"overlap over max(rollout, update) / 0.95 + sync: {show(result['overlap_over_bound'])}")
    print(f"turns with both cores over overlap: {show(result['both_cores_over_overlap'])}")
    write_result(options.out, result)


if __name__ == "__main__":
    main()

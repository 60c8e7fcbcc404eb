"""Whether it matters where completions are sampled: one recipe, trained colocated, with a worker and with a server.

    python -m benchmarks.places [--recipe recipes/quickstart.yaml] [--rollouts 5] [section.key=value ...]

All in float32 and with one thread on each side, so that the arithmetic is the same; the runs follow each other and differ in
`rollout.engine.where` (and the server's address) alone. Compared to the bit are every metric but times, every completion
and the final weights. Reported are the largest gaps to the learner after a sync and the seconds of a sync.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, show, spread, table, write_result

FLOAT32 = ("model.dtype=float32", "model.autocast=none", "rollout.engine.dtype=float32")
PLACES = ("colocated", "worker", "server")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


def run(where: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What one run left. Raises RuntimeError when it fails."""
    overrides = [f"learner.rollouts={options.rollouts}", f"rollout.engine.where={where}", *FLOAT32, *options.overrides]
    server = None
    if where == "server":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        overrides.append(f"rollout.engine.urls=[http://127.0.0.1:{port}]")
        serve = [sys.executable, "-m", "rlpost", "serve", options.recipe, *overrides, "--port", str(port)]
        with (folder / "server.log").open("w") as log:
            server = subprocess.Popen(serve, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    try:
        command = [sys.executable, "-m", "rlpost", options.recipe, f"output_dir={folder}/run", *overrides]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    finally:
        if server is not None:
            server.terminate()
            server.wait(60)
    if done.returncode:
        raise RuntimeError(f"the run failed ({where}):\n{(done.stdout + done.stderr)[-4000:]}")
    return outcome(next(folder.rglob("metrics.jsonl")).parent)


def outcome(run_dir: Path) -> dict[str, Any]:
    """Metrics without times, what was sampled, a hash of the final weights; gaps and seconds of every sync."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    weights = hashlib.sha256()
    for file in sorted(max((run_dir / "checkpoints").glob("step_*")).glob("*.safetensors")):
        weights.update(file.read_bytes())
    completions = hashlib.sha256()
    files = sorted((run_dir / "completions").iterdir())
    for file in files:
        completions.update(file.read_bytes())
    train = [row for row in rows if row["kind"] == "train"]
    gaps = {name: [row[key] for row in train for key in (f"mismatch/{name}", f"sync/{name}") if key in row]
            for name in ("mean_abs_gap", "max_abs_gap")}  # fmt: skip
    return {
        "metrics": [{k: v for k, v in row.items() if not k.startswith("time") and k != "kind"} for row in rows],
        "completions": completions.hexdigest(),
        "completion_files": len(files),
        "weights": weights.hexdigest(),
        "mean_gap": max(gaps["mean_abs_gap"]),
        "max_gap": max(gaps["max_abs_gap"]),
        "gaps": len(gaps["mean_abs_gap"]),
        "sync_s": [row["time/sync"] for row in train if "time/sync" in row],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--rollouts", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/places.json"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    outcomes = {}
    for where in PLACES:
        with tempfile.TemporaryDirectory() as folder:
            outcomes[where] = run(where, Path(folder), options)
    first = outcomes[PLACES[0]]
    rows = []
    for where, one in outcomes.items():
        same = [key for key in ("metrics", "completions", "weights") if one[key] == first[key]]
        one["same_as_colocated"] = same
        gap = f"{one['mean_gap']:.2g}, {one['max_gap']:.2g}"
        rows.append((where, ", ".join(same), gap, str(one["gaps"]), show(spread(one["sync_s"]), 2)))
    print(table(("where", "to the bit as colocated", "worst mean and largest gap, nats", "gaps seen", "sync, s"), rows))
    setting = {"recipe": options.recipe, "rollouts": options.rollouts, "overrides": [*FLOAT32, *options.overrides]}
    told = {where: {k: v for k, v in one.items() if k != "metrics"} for where, one in outcomes.items()}
    write_result(options.out, {"machine": machine(), "setting": setting, "outcomes": told})
    sys.exit(0 if all(len(one["same_as_colocated"]) == 3 for one in outcomes.values()) else 1)


if __name__ == "__main__":
    main()

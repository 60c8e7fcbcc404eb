"""What samples of older weights do to learning: whole runs at several lags, three seeds each.

    python -m benchmarks.staleness [--recipe recipes/quickstart.yaml] [--seeds 3] [--rollouts 20] [section.key=value ...]

Arms: `rollout.staleness` 0, 1 and 4, and 4 with `rollout.in_flight`, all with a vLLM worker on the same cores, the same prompts
and seeds. Reported are the mean reward over the run, held-out accuracy before and after, and the mean
age of the tokens. Arms take turns within a seed. Nothing is said of speed here: see `benchmarks.overlap`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, show, spread, table, write_result

ARMS: dict[str, tuple[str, ...]] = {
    "staleness 0": ("rollout.staleness=0",),
    "staleness 1": ("rollout.staleness=1",),
    "staleness 4": ("rollout.staleness=4",),
    "staleness 4, in flight": ("rollout.staleness=4", "rollout.in_flight=true"),
}


def run(arm: tuple[str, ...], recipe: str, rollouts: int, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The curve of one run in a fresh process. Raises RuntimeError when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlpost", recipe, f"output_dir={folder}/run", f"learner.rollouts={rollouts}"]
        command += [f"seed={seed}", "rollout.engine.where=worker", "checkpoint.every=0", "tracking.report=false"]
        done = subprocess.run([*command, *arm, *overrides], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"a run failed ({arm}):\n{(done.stdout + done.stderr)[-4000:]}")
        rows = [json.loads(line) for line in next(Path(folder).rglob("metrics.jsonl")).read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    accuracy = [row["eval/accuracy"] for row in rows if row["kind"] == "eval"]
    return {
        "seed": seed,
        "reward": [row["reward/mean"] for row in train],
        "age": [row.get("staleness/mean", 0.0) for row in train],
        "gap": [row.get("mismatch/mean_abs_gap", 0.0) for row in train],
        "truncated_share": [row.get("mismatch/truncated_share", 0.0) for row in train],
        "accuracy_before": accuracy[0],
        "accuracy_after": accuracy[-1],
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Over the seeds of an arm."""
    tail = max(1, len(runs[0]["reward"]) // 4)
    return {
        "reward, whole run": spread([statistics.fmean(one["reward"]) for one in runs]),
        "reward, last quarter": spread([statistics.fmean(one["reward"][-tail:]) for one in runs]),
        "accuracy before": spread([one["accuracy_before"] for one in runs]),
        "accuracy after": spread([one["accuracy_after"] for one in runs]),
        "age, steps": spread([statistics.fmean(one["age"]) for one in runs]),
        "gap, nats": spread([statistics.fmean(one["gap"]) for one in runs]),
    }


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Mean reward of every arm over rollouts: the mean of its seeds, and the range between them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for (arm, runs), color in zip(found.items(), ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True):
        curves = list(zip(*(one["reward"] for one in runs), strict=True))
        steps = range(1, len(curves) + 1)
        axes.plot(steps, [statistics.fmean(c) for c in curves], color=color, linewidth=2, label=arm)
        axes.fill_between(
            steps, [min(c) for c in curves], [max(c) for c in curves], color=color, alpha=0.12, linewidth=0
        )
    axes.set_xlabel("rollout")
    axes.set_ylabel("mean reward")
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/staleness.json"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    described = machine()
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm, settings in ARMS.items():
            one = run(settings, options.recipe, options.rollouts, seed, options.overrides)
            found[arm].append(one)
            said = f"accuracy {one['accuracy_before']:.3f} to {one['accuracy_after']:.3f}"
            print(f"seed {seed}, {arm}: reward {statistics.fmean(one['reward']):.3f}, {said}", flush=True)
    summary = {arm: summarise(runs) for arm, runs in found.items()}
    names = list(next(iter(summary.values())))
    print(table(("arm", *names), [(arm, *(show(summary[arm][name], 3) for name in names)) for arm in ARMS]))
    setting = {"recipe": options.recipe, "rollouts": options.rollouts, "overrides": options.overrides}
    write_result(options.out, {"machine": described, "setting": setting, "summary": summary, "runs": found})
    draw(found, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

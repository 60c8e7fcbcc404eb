"""What a start costs with very much data and a very long run behind it:

    python -m benchmarks.growth [--rows 1000000] [--metrics 100000] [--before CHECKOUT]

<<<<<<< HEAD
Each number is of a fresh process. `data, first start` builds the prompts of a JSONL file with nothing kept of it, `data, next
start` (and every other process of a run) with what the first start left; `resume` opens a run's folder with so many metric rows
and writes the next row; `report` draws its page. `--before` names a checkout of another version (`git worktree add`), which is
measured in turns with this one; what is printed as a ratio is of the same run of this script. SmolLM2's tokenizer and chat
template.
=======
Each number is of a fresh process. `data, first start` builds the prompts of a JSONL file with nothing kept of it; `data, next
start` (and every other process of a run) does with what the first start left; `resume` opens a run's folder with so many
metric rows and writes the next row; `report` draws its page. `--before` names a checkout of another version (`git worktree
add`), which is measured in turns with this one. SmolLM2's tokenizer and chat template.
>>>>>>> 97147a8690ca50168a006edfbd3e38e527d1425a
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, table, write_result

KEYS = 51  # numbers of a metric row beside its step and kind
JOBS = ("data, first start", "data, next start", "resume", "report")
_NAMES = (
    *("reward/mean", "reward/max", "completions/length_mean", "completions/truncated_share", "policy/entropy"),
    *("policy/clip_fraction", "optimizer/grad_norm", "time/step", "time/rollout", "time/update", "tokens/completion"),
)


def write_rows(path: Path, number: int) -> None:
    """Word problems of some sixty tokens, no two alike."""
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(number):
            question = (
                f"Question {i}: a shop sells {draw.randrange(999)} apples a day at {draw.randrange(99)} cents each and buys "
                f"{draw.randrange(999)} pears. How much does it earn in {draw.randrange(30)} days?"
            )
            file.write(json.dumps({"prompt": question, "answer": str(draw.randrange(10**6)), "level": i % 5}) + "\n")


def write_metrics(path: Path, number: int) -> None:
    """A run's rows, as it would have written them, with an evaluation every 1,000 steps."""
    draw = random.Random(0)
    names = [*_NAMES, *(f"group{i % 4}/metric_{i}" for i in range(KEYS - len(_NAMES)))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for step in range(1, number + 1):
            row = {"step": step, "kind": "train", **{name: draw.random() for name in names}}
            file.write(json.dumps(row | {"completions/truncated_share": 0.1, "policy/clip_fraction": 0.1}) + "\n")
            if step % 1000 == 0:
                file.write(json.dumps({"step": step, "kind": "eval", "eval/accuracy": draw.random()}) + "\n")


def run_job(job: str, rows: Path, run_dir: Path) -> dict[str, Any]:
    """In the process that is measured. Uses only what all versions have."""
    action = _data(rows) if job.startswith("data") else _report(run_dir) if job == "report" else _resume(run_dir)
    memory, cpu, start = anonymous_mib(), time.process_time(), time.perf_counter()
    result = action()
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": used, "memory_mib": anonymous_mib() - memory, "result": result}


def _data(rows: Path) -> Any:
    from rlpost.data.prompts import build_prompts
    from rlpost.data.tokenizer import load_tokenizer
    from rlpost.recipe.sections.data import DataSection
    from rlpost.recipe.sections.model import ModelSection

    tokenizer = load_tokenizer(ModelSection(path="package:smollm2-135m"))
    section = DataSection.model_validate({"train": {"type": "dataset", "path": str(rows)}})
    global kept  # so that its memory counts

    def build() -> str:
        global kept
        kept = build_prompts(section, tokenizer, max_context=2048)
        return f"{kept.fingerprint} {kept.note()}"

    return build


kept: Any = None


def _resume(run_dir: Path) -> Any:
    from rlpost.recipe.load import load_recipe
    from rlpost.tracking.rundir import RunDirectory
    from rlpost.tracking.tracker import Tracker

    settings = ["tracking.wandb.mode=disabled", "tracking.console=false"]
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "quickstart.yaml", settings).recipe
    last = int(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"])

    def resume() -> int:
        with RunDirectory.open(run_dir, fresh=False) as run:
            run.truncate_after(last)
            global kept
            kept = Tracker(run, recipe, is_main=True)
            kept.step(last + 1, {"reward/mean": 0.5})
        return last

    return resume


def _report(run_dir: Path) -> Any:
    import matplotlib as _  # noqa: F401 - what is measured is the report

    from rlpost.tracking.report import write_report

    return lambda: write_report(run_dir).name


def anonymous_mib() -> float:
    """Memory that is this process's own: what is mapped from files is shared, and the system may take it back."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def measure(job: str, checkout: Path, cache: Path, rows: Path, run_dir: Path, limit: float) -> dict[str, Any]:
    """A job in a fresh process of a version. One that takes longer than `limit` seconds has no numbers."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{ROOT}", "RLPOST_CACHE": str(cache)}
    command = [sys.executable, str(Path(__file__).resolve()), "--job", job, str(rows), str(run_dir)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"seconds": None, "note": f"not done in {limit:.0f} s"}
    if done.returncode:
        raise RuntimeError(f"{job} of {checkout} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(
    versions: dict[str, Path], folder: Path, rows: int, metrics: int, limit: float
) -> dict[str, dict[str, Any]]:
    """All jobs of all versions, job after job, the versions in turns."""
    data = folder / "rows.jsonl"
    write_rows(data, rows)
    found: dict[str, dict[str, Any]] = {job: {} for job in JOBS}
    for job in JOBS:
        for name, checkout in versions.items():
            run_dir = folder / name / "run"
            if job == "resume":
                write_metrics(run_dir / "metrics.jsonl", metrics)
            found[job][name] = measure(job, checkout, _cache(folder / name), data, run_dir, limit)
            print(job, name, found[job][name], flush=True)
    return found


def _cache(folder: Path) -> Path:
    """A cache of its own, with the models that are unpacked already."""
    cache, usual = folder / "cache", Path(os.environ.get("RLPOST_CACHE") or Path.home() / ".cache" / "rlpost")
    cache.mkdir(parents=True, exist_ok=True)
    for name in ("models", "described"):
        if (usual / name).is_dir() and not (cache / name).exists():
            (cache / name).symlink_to((usual / name).resolve())
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--metrics", type=int, default=100_000)
    parser.add_argument("--before", type=Path, help="a checkout of the version to compare with")
    parser.add_argument(
        "--limit", type=float, default=3600.0, help="seconds for one job; a longer one is said to be longer"
    )
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job, rows, run_dir = arguments.job
        print(json.dumps(run_job(job, Path(rows), Path(run_dir))))
        return
    versions = {"before": arguments.before} if arguments.before else {}
    versions["now"] = ROOT
    about = machine()
    with tempfile.TemporaryDirectory() as scratch:
        found = compare(versions, Path(scratch), arguments.rows, arguments.metrics, arguments.limit)
    lines = [
        [job, name, *(f"{one.get(key) or 0:.1f}" for key in ("seconds", "cpu_seconds", "memory_mib"))]
        for job, of in found.items()
        for name, one in of.items()
    ]
    print(table(("job", "version", "seconds", "CPU seconds", "own memory, MiB"), lines))
    result = {"machine": about, "rows": arguments.rows, "metrics": arguments.metrics, "jobs": found}
    write_result(ROOT / "benchmarks" / "results" / "growth.json", result)


if __name__ == "__main__":
    main()

"""Whether a change leaves every result as it was: python -m benchmarks.same_bits record FOLDER, before and after it; then
`compare BEFORE AFTER`.

`record` trains a tiny random model once with every preset, in two processes, under ZeRO-3 and with a resume in the middle of a
rollout, and the quickstart for five steps, by the command line of the working tree, and keeps metrics (without times) and a
hash of the final weights. `compare` names every run that differs. `--resume-from BEFORE` also goes on from a checkpoint that
another `record` saved, so that checkpoints written before a change are shown to load after it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

REWARD = '''
def reward(completions, **columns):
    """Graded, so that a random model's groups differ: the share of printable ASCII characters."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [sum(" " <= c <= "~" for c in text) / max(1, len(text)) for text in texts]
'''
PRESETS = [
    "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "capo", "dr_capo", "rein_capo", "ghpo", "hpt", "sft",
    "ppo", "safe", "rpo_average",
]  # fmt: skip
PAIRS = ["dpo", "rpo"]
CURVATURE = "{type: curvature, verify_every: 1, thresholds: {type: fixed, max_kl: 0.001}}"


def base_recipe(model: str, folder: Path) -> dict[str, Any]:
    """A recipe that trains the tiny model in seconds, with several optimizer steps a rollout."""
    return {
        "name": "run",
        "output_dir": str(folder),
        "model": {"path": model, "dtype": "float32", "autocast": "none"},
        "data": {
            "train": {"type": "arithmetic", "size": 40},
            "held_out": 4,
            "max_prompt_tokens": 64,
            "max_demonstration_tokens": 120,
        },
        "rollout": {
            "engine": {"type": "transformers"},
            "prompts_per_step": 4,
            "completions_per_prompt": 4,
            "max_completion_tokens": 8,
        },
        "rewards": [{"function": str(folder / "graded.py"), "deadline_s": 120.0}],
        "scoring": {"workers": 1},
        "method": {"preset": "grpo", "overlong": {"filter": False}},
        "learner": {"rollouts": 3, "minibatches": 2, "learning_rate": 1e-3},
        "evaluation": {"prompts": 4},
        "tracking": {"wandb": {"mode": "disabled"}, "console": False, "report": False},
    }


def train(recipe: Path, *overrides: str, launch: str | None = None) -> None:
    """One run by the command line, as a user starts it. Raises with what it printed when it fails."""
    head = [sys.executable, "-m", "rlpost"]
    if launch:
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        head = [sys.executable, accelerate, "launch", "--config_file", f"launch/{launch}", "-m", "rlpost"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(Path.cwd()),
    }
    done = subprocess.run(
        [*head, str(recipe), *overrides], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"{recipe} {' '.join(overrides)} failed:\n{done.stdout}\n{done.stderr}")


def outcome(run: Path) -> dict[str, Any]:
    """A run's metrics without times, and the hash of its last checkpoint's weights."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in row.items() if not k.startswith("time/") and k != "timestamp"} for row in rows]
    last = max((run / "checkpoints").glob("step_*"))
    digest = hashlib.sha256()
    for file in sorted(last.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return {"metrics": metrics, "weights": digest.hexdigest(), "checkpoint": last.name}


def record(folder: Path, *, quickstart: bool, resume_from: Path | None) -> None:
    """Makes all runs and writes `results.json` into `folder`."""
    sys.path.insert(0, str(Path("tests").resolve()))
    from conftest import save_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    model = str((resume_from or folder) / "model")
    if resume_from is None:
        save_tiny_model(folder / "model")
    (folder / "graded.py").write_text(REWARD)
    base = base_recipe(model, folder)
    recipe, pairs = folder / "recipe.yaml", folder / "pairs.yaml"
    recipe.write_text(yaml.safe_dump(base))
    rows = [{"prompt": f"{i} + 1 =", "chosen": str(i + 1), "rejected": str(i)} for i in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    of_pairs = {**base, "data": {**base["data"], "train": {"type": "preference", "path": str(folder / "pairs.jsonl")}}}
    of_pairs |= {"rewards": [], "method": {"preset": "dpo"}}
    pairs.write_text(yaml.safe_dump(of_pairs))
    results: dict[str, Any] = {}

    def run(name: str, path: Path, *overrides: str, launch: str | None = None) -> None:
        train(path, f"name={name}", *overrides, launch=launch)
        results[name] = outcome(folder / name)
        print(name, results[name]["weights"][:12], flush=True)

    for preset in PRESETS:
        extra = [f"method.masks=[{CURVATURE}]"] if preset == "capo" else []
        run(preset, recipe, f"method.preset={preset}", *extra)
    for preset in PAIRS:
        run(preset, pairs, f"method.preset={preset}")
    run("rpo_online", recipe, "method.preset=rpo", "learner.minibatches=1")
    run("dynamic", recipe, "method.dynamic_sampling.enabled=true", "learner.epochs=2")
    run("straight", recipe, "checkpoint.every=1", "checkpoint.keep=9")
    start = (resume_from or folder) / "straight" / "checkpoints" / "step_000003"
    run("resumed", recipe, f"resume={start}")
    run("two-processes", recipe, launch="cpu2.yaml")
    run("zero3", recipe, launch="cpu-zero3.yaml")
    if quickstart:
        run(
            "quickstart",
            Path("recipes/quickstart.yaml"),
            f"output_dir={folder}",
            "learner.rollouts=5",
            "evaluation.prompts=16",
        )
    (folder / "results.json").write_text(json.dumps(results, indent=1))


def compare(before: Path, after: Path) -> int:
    """Prints a line a run; returns how many differ."""
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (before, after))
    bad = 0
    for name in sorted(one.keys() | two.keys()):
        if name not in one or name not in two:
            said = "only in one of the two"
        elif one[name] == two[name]:
            print(
                f"{name:16} same metrics ({len(one[name]['metrics'])} rows), same weights {one[name]['weights'][:12]}"
            )
            continue
        else:
            said = difference(one[name], two[name])
        bad += 1
        print(f"{name:16} DIFFERS: {said}")
    print(f"{len(one.keys() | two.keys()) - bad} runs the same, {bad} differ")
    return bad


def difference(one: dict[str, Any], two: dict[str, Any]) -> str:
    """Where two outcomes differ first."""
    keys = sorted({
        key
        for a, b in zip(one["metrics"], two["metrics"], strict=False)
        for key in a.keys() | b.keys()
        if a.get(key) != b.get(key) and not (a.get(key) != a.get(key) and b.get(key) != b.get(key))
    })  # fmt: skip
    rows = (
        f"{len(one['metrics'])} and {len(two['metrics'])} rows; " if len(one["metrics"]) != len(two["metrics"]) else ""
    )
    weights = "same weights" if one["weights"] == two["weights"] else "other weights"
    return f"{rows}{weights}; metrics {', '.join(keys[:8]) or 'the same'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--quickstart", action="store_true", help="also five steps of the quickstart, with vLLM")
    parser.add_argument("--resume-from", type=Path, help="a folder that `record` wrote before the change")
    arguments = parser.parse_args()
    folders = [folder.resolve() for folder in arguments.folders]
    if arguments.action == "compare":
        sys.exit(compare(*folders) > 0)
    shutil.rmtree(folders[0], ignore_errors=True)
    record(
        folders[0],
        quickstart=arguments.quickstart,
        resume_from=arguments.resume_from and arguments.resume_from.resolve(),
    )


if __name__ == "__main__":
    main()

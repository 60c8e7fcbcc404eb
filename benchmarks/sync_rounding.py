"""How much of a small step reaches a bfloat16 engine, with weights rounded to the nearest and by chance.

    python -m benchmarks.sync_rounding --model FOLDER [--learning-rate 1e-6] [--steps 5] [--autocast bfloat16|none]
    python -m benchmarks.sync_rounding --runs [--seeds 3]

The first: GRPO steps from one rollout (sums as prompts, the model's own completions, rewards that mean nothing), AdamW on
float32 weights. After every step the weights go to engines (transformers) by either rounding, and the rollout's own completions
are scored. `arrived` is the least-squares slope of the change of log-probs since the start, engine on learner: 1 when the
change arrived, 0 when none did. Its standard error allows for noise that differs from token to token (White). Compared are

- the weights themselves, and how many differ from those of the start;
- log-probs by rounded weights in float32 products: what rounding does, without the noise of bfloat16 products;
- a bfloat16 engine, with a learner in float32 products and with one under autocast in bfloat16, as users run them.

The second: whole runs of a tiny random model whose weights lie on the grid of bfloat16, and their mean reward: a
float32 engine, and bfloat16 ones of either rounding, learner under autocast or not.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.frozen import FrozenRollout, RolloutSpec
from benchmarks.measure import machine, spread, table, write_result
from rlpost.experience import Group, Outcome, Prompt, Score
from rlpost.rollout.engine import SamplingRequest, SamplingSettings
from rlpost.rollout.rounding import rounded

ROUNDINGS = ("nearest", "stochastic")
SPEC = RolloutSpec(prompts=8, completions=8, prompt_tokens=0, max_completion_tokens=24, mean_tokens=24)
REWARD = """
def reward(completions, **columns):
    return [sum(" " <= c <= "~" for c in c[-1]["content"]) / max(1, len(c[-1]["content"])) for c in completions]
"""


def arrival(model: str, *, steps: int, learning_rate: float, autocast: Any, seed: int = 0) -> list[dict[str, Any]]:
    """A row a step: what arrived by either rounding."""
    import torch

    from benchmarks.rlpost_side import RlpostSetting, RlpostSide
    from rlpost.learner.learner import token_logprobs

    exact, coarse = _engine(model, "float32"), _engine(model, "bfloat16")
    rollout = _sample(model, exact, seed)
    side = RlpostSide(model, rollout, RlpostSetting(autocast=autocast, learning_rate=learning_rate), method={})
    sequences = [(g.prompt.token_ids, c.token_ids) for g in rollout.groups for c in g.completions]
    rows = side.updater.rows(side.buffer, None, skip_dead=False)

    def learner(precision: Any) -> list[float]:
        kept, side.policy.autocast = side.policy.autocast, precision
        try:
            with torch.no_grad():
                return token_logprobs(side.policy, rows, side.buffer.tokens).tolist()
        finally:
            side.policy.autocast = kept

    def engine(it: Any, weights: Iterable[tuple[str, Any]]) -> list[float]:
        it.load_weights(weights)
        scored = it.logprobs([p + c for p, c in sequences])
        return [x for (_, c), row in zip(sequences, scored, strict=True) for x in row[-len(c) :]]

    def look(version: int) -> dict[str, list[float]]:
        found = {"float32": learner(None), "autocast": learner(torch.bfloat16)}
        for how in ROUNDINGS:
            found[f"{how}, float32 products"] = engine(exact, _float(_sent(side.policy, how, seed, version)))
            found[f"{how}, bfloat16 engine"] = engine(coarse, _sent(side.policy, how, seed, version))
        return found

    start = {name: tensor.clone() for name, tensor in side.policy.named_weights()}
    before, found = look(0), []
    for step in range(1, steps + 1):
        side.step(step - 1)
        after = look(step)
        row: dict[str, Any] = {"step": step, "tokens": len(after["float32"])}
        row["rms_change"] = math.sqrt(statistics.fmean(x * x for x in _change(before, after, "float32")))
        row["autocast learner"] = _slope(before, after, "float32", "autocast")
        for how in ROUNDINGS:
            row[f"weights, {how}"] = _weights(start, side.policy, how, seed, step)
            for what in ("float32 products", "bfloat16 engine"):
                row[f"{how}, {what}"] = _slope(before, after, "float32", f"{how}, {what}")
            row[f"{how}, bfloat16 engine"]["gap_autocast"] = _gap(after, "autocast", f"{how}, bfloat16 engine")
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return found


def _sent(policy: Any, how: str, seed: int, version: int) -> Iterator[tuple[str, Any]]:
    import torch

    weights = policy.named_weights()
    return rounded(weights, seed, version) if how == "stochastic" else ((n, t.to(torch.bfloat16)) for n, t in weights)


def _float(weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    return ((name, tensor.float()) for name, tensor in weights)


def _weights(start: dict[str, Any], policy: Any, how: str, seed: int, version: int) -> dict[str, float]:
    """Of the weights' own change: what arrived, and the share of weights that are others than at the start."""
    product = square = 0.0
    changed = number = 0
    for (name, now), (_, sent) in zip(policy.named_weights(), _sent(policy, how, seed, version), strict=True):
        held = start[name]
        engine = sent.float() - held.bfloat16().float()  # by nearest at the start, as it loads the checkpoint
        product += float(((now - held).double() * engine.double()).sum())
        square += float((now - held).double().square().sum())
        changed += int((engine != 0).sum())
        number += now.numel()
    return {"arrived": product / square, "changed": changed / number}


def _slope(before: Any, after: Any, learner: str, engine: str) -> dict[str, float]:
    pairs = list(zip(_change(before, after, learner), _change(before, after, engine), strict=True))
    square = math.fsum(x * x for x, _ in pairs)
    value = math.fsum(x * y for x, y in pairs) / square
    error = math.sqrt(math.fsum((x * (y - value * x)) ** 2 for x, y in pairs)) / square
    return {"arrived": value, "error": error, "gap": _gap(after, learner, engine)}


def _change(before: dict[str, list[float]], after: dict[str, list[float]], name: str) -> list[float]:
    return [b - a for a, b in zip(before[name], after[name], strict=True)]


def _gap(said: dict[str, list[float]], learner: str, engine: str) -> float:
    return statistics.fmean(abs(a - b) for a, b in zip(said[learner], said[engine], strict=True))


def _engine(model: str, dtype: Any) -> Any:
    from transformers import AutoTokenizer

    from rlpost.recipe.sections.rollout import TransformersEngine
    from rlpost.rollout.transformers_engine import TransformersRolloutEngine

    tokenizer = AutoTokenizer.from_pretrained(model)
    section = TransformersEngine(dtype=dtype)
    return TransformersRolloutEngine.from_path(model, tokenizer, section, max_model_len=256)


def _sample(model: str, engine: Any, seed: int) -> FrozenRollout:
    """Sums, the model's own answers to them, and rewards that mean nothing: every group has both."""
    import random

    from transformers import AutoTokenizer

    rng, tokenizer, groups = random.Random(seed), AutoTokenizer.from_pretrained(model), []
    for i in range(SPEC.prompts):
        text = f"What is {rng.randint(0, 20)} + {rng.randint(0, 20)}?"
        asked = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        requests = [SamplingRequest(tuple(ids), 1000 * i + k) for k in range(SPEC.completions)]
        completions = engine.sample(requests, SamplingSettings(SPEC.max_completion_tokens, 1.0))
        rewards = [float(k % 2) for k in range(SPEC.completions)]
        scores = tuple((Score(Outcome.SCORED, reward),) for reward in rewards)
        groups.append(Group(Prompt(str(i), (), text, tuple(ids)), tuple(completions), scores))
    return FrozenRollout(SPEC, tuple(groups))


def runs(seeds: int, *, rollouts: int, learning_rate: float) -> dict[str, dict[str, Any]]:
    """By arm: mean reward of the first and of the last quarter of a run, for every seed."""
    from rlpost.recipe.load import load_recipe
    from rlpost.run.loop import train

    arms = {"float32 engine": ("float32", "nearest", "none")} | {
        f"{how}, {name}": ("bfloat16", how, autocast)
        for autocast, name in (("none", "float32 learner"), ("bfloat16", "autocast learner"))
        for how in ROUNDINGS
    }
    found: dict[str, dict[str, Any]] = {name: {"first": [], "last": [], "gap": []} for name in arms}
    with tempfile.TemporaryDirectory() as folder:
        model = _tiny(Path(folder) / "model")
        (Path(folder) / "printable.py").write_text(REWARD)
        for seed in range(seeds):
            for name, (dtype, how, autocast) in arms.items():
                tree = _recipe(Path(folder), model, rollouts, learning_rate, seed)
                tree["model"]["autocast"] = autocast
                tree["rollout"] |= {"engine": {"type": "transformers", "dtype": dtype}, "sync": {"rounding": how}}
                tree["name"] = f"{seed}-{name.replace(', ', '-').replace(' ', '-')}"
                path = Path(folder) / "recipe.yaml"
                path.write_text(json.dumps(tree))
                train(load_recipe(path))
                rows = _rows(Path(folder) / tree["name"] / "metrics.jsonl")
                quarter = len(rows) // 4
                found[name]["first"].append(statistics.fmean(r["reward/mean"] for r in rows[:quarter]))
                found[name]["last"].append(statistics.fmean(r["reward/mean"] for r in rows[-quarter:]))
                found[name]["gap"].append(statistics.fmean(r["mismatch/mean_abs_gap"] for r in rows))
                print(name, seed, {k: v[-1] for k, v in found[name].items()}, file=sys.stderr, flush=True)
    return found


def _rows(path: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def _tiny(folder: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from conftest import save_tiny_model

    save_tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.float().save_pretrained(folder)  # a learner's precision, on bfloat16's grid
    return str(folder)


def _recipe(folder: Path, model: str, rollouts: int, learning_rate: float, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "seed": seed,
        "model": {"path": model, "dtype": "float32"},
        "data": {"train": {"type": "arithmetic", "size": 8 * rollouts}, "held_out": 0, "max_prompt_tokens": 64},
        "rollout": {"prompts_per_step": 8, "completions_per_prompt": 8, "max_completion_tokens": 8},
        "rewards": [{"function": str(folder / "printable.py"), "deadline_s": 60.0}],
        "scoring": {"workers": 1},
        "method": {"preset": "grpo"},
        "learner": {"rollouts": rollouts, "learning_rate": learning_rate},
        "checkpoint": {"every": 0},
        "evaluation": {"prompts": 0},
        "tracking": {"wandb": {"mode": "disabled"}, "console": False, "report": False},
    }


def _percent(found: dict[str, float]) -> str:
    error = f" +- {100 * found['error']:.1f}" if "error" in found else ""
    return f"{100 * found['arrived']:.1f}{error}"


def show_arrival(rows: Sequence[dict[str, Any]]) -> str:
    columns = [f"{how}, {what}" for what in ("float32 products", "bfloat16 engine") for how in ROUNDINGS]
    head = ["step", "rms change, nats", "autocast learner"]
    head += [f"weights, {how}: arrived (differ)" for how in ROUNDINGS] + columns
    head += [f"gap to {w} learner, {how}" for w in ("float32", "autocast") for how in ROUNDINGS]
    body = []
    for row in rows:
        line = [str(row["step"]), f"{row['rms_change']:.4f}", _percent(row["autocast learner"])]
        held = [row[f"weights, {how}"] for how in ROUNDINGS]
        line += [f"{_percent(h)} ({100 * h['changed']:.2f})" for h in held] + [_percent(row[c]) for c in columns]
        line += [f"{row[f'{h}, bfloat16 engine'][g]:.4f}" for g in ("gap", "gap_autocast") for h in ROUNDINGS]
        body.append(line)
    return table(head, body)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder in Hugging Face layout")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, help="default: 1e-6, with --runs 1e-4")
    parser.add_argument("--autocast", choices=["bfloat16", "none"], default="bfloat16", help="of the update")
    parser.add_argument("--runs", action="store_true", help="whole runs of a tiny model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=48)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/sync_rounding.json"))
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    described: dict[str, Any] = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(args).items()}}
    if args.runs:
        found = runs(args.seeds, rollouts=args.rollouts, learning_rate=args.learning_rate or 1e-4)
        shown = [
            [name, *(" ".join(f"{x:.3f}" for x in sorted(arm[key])) for key in ("first", "last", "gap"))]
            for name, arm in found.items()
        ]
        print(table(["arm", "reward, first quarter", "last quarter", "mean gap, nats"], shown))
        spreads = {name: {key: spread(values) for key, values in arm.items()} for name, arm in found.items()}
        write_result(args.output, {"what": "reward by rounding", **described, "runs": found, "spread": spreads})
        return 0
    if args.model is None:
        parser.error("--model is needed, or --runs")
    rows = arrival(args.model, steps=args.steps, learning_rate=args.learning_rate or 1e-6, autocast=args.autocast)
    print(show_arrival(rows))
    write_result(args.output, {"what": "share of a step that arrives", **described, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

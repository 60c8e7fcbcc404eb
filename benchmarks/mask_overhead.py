"""The curvature mask's share of an optimizer step, measured in one run with steps with and without it taking turns.

    python -m benchmarks.mask_overhead --model FOLDER

Every pair of steps is one with CAPO's mask (Adam step model, limits calibrated) and one without, on the same policy,
optimizer and frozen rollout, in an order that changes from pair to pair. CPU seconds; the median over pairs of
(with - without) / with, and its range. Steps scatter by more than the mask takes, so the CPU time spent in the mask's own
calls inside these steps is counted, too, and given as a share of the same step: what the limit is held against is the
larger one of the two. The rollout has the quickstart's shape: 8 prompts of 45 tokens, 8 completions of 24
each, of the ids in a run's completions with --run, else random ones (the model's top tokens are then more varied than in
training, so more rows of the head are looked at: the harder case). Exits with 1 when the median is not below --limit.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.frozen import FrozenRollout, RolloutSpec, make_rollout
from benchmarks.measure import machine, show, spread, table, write_result
from benchmarks.models import vocabulary_of
from rlpost.experience import Completion, Group, Outcome, Prompt, Score

# Without the occasional check of the prediction, which is one more forward pass every so many steps.
MASK: dict[str, Any] = {"type": "curvature", "step": "adam", "verify_every": 0}
TRACKER = "rlpost.methods.capo:CurvatureTracker"
# Where the mask's time goes: (module[:class], function). The statistics' first read of the scores brings them into the cache,
# which a step without the mask pays for elsewhere: so this is rather too much.
PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "statistics of the head": (("rlpost.policy.head:_Collected", "take_logits"),),
    "prediction": ((TRACKER, "predict"),),
    "limits and metrics": (("rlpost.methods.masking", "_curvature_rejects"),),
    "row gradients": ((TRACKER, "accumulate"),),
    "moments": ((TRACKER, "finish_step"),),
}
QUICKSTART = RolloutSpec(
    prompts=8, completions=8, prompt_tokens=45, max_completion_tokens=24, mean_tokens=24, lengths="equal"
)


def measure(
    model: str, rollout: FrozenRollout, mask: dict[str, Any], *, pairs: int, tokens: int, autocast: str = "bfloat16"
) -> dict[str, Any]:
    """CPU seconds of steps with and without the mask, in pairs; the first two of each are dropped."""
    from benchmarks.rlpost_side import RlpostSetting, RlpostSide

    setting = RlpostSetting(micro_batch_tokens=tokens, learning_rate=1e-5, autocast=autocast)
    side = RlpostSide(model, rollout, setting, method={})
    updaters = {"with": side.with_masks([mask]), "without": side.updater}
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    calls: dict[str, list[float]] = {name: [] for name in PARTS}
    for pair in range(pairs + 2):
        order = ("with", "without") if pair % 2 else ("without", "with")
        for name in order:
            with counted_calls() as counted:
                start = time.process_time()
                side.step(pair, updaters[name])
                seconds[name].append(time.process_time() - start)
            if name == "with":
                for part, spent in counted.items():
                    calls[part].append(spent)
    with_, without = seconds["with"][2:], seconds["without"][2:]
    shares = [(a - b) / a for a, b in zip(with_, without, strict=True)]
    own = [sum(parts) / step for *parts, step in zip(*(calls[part][2:] for part in PARTS), with_, strict=True)]
    return {
        "share": spread(shares),
        "share_of_own_calls": spread(own),
        "own_calls_s": {part: spread(calls[part][2:]) for part in PARTS},
        "share_of_medians": 1 - statistics.median(without) / statistics.median(with_),
        "with_s": spread(with_),
        "without_s": spread(without),
        "raw": {"with": with_, "without": without},
    }


@contextmanager
def counted_calls() -> Iterator[dict[str, float]]:
    """CPU seconds spent in the mask's own calls, by part, while open. A call inside another counts once."""
    spent, kept, inside = dict.fromkeys(PARTS, 0.0), [], [False]

    def counting(part: str, call: Any) -> Any:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            if inside[0]:
                return call(*arguments, **keywords)
            inside[0], start = True, time.process_time()
            try:
                return call(*arguments, **keywords)
            finally:
                inside[0] = False
                spent[part] += time.process_time() - start

        return wrapped

    try:
        for part, places in PARTS.items():
            for path, name in places:
                module, _, owner = path.partition(":")
                place = importlib.import_module(module)
                place = getattr(place, owner) if owner else place
                kept.append((place, name, getattr(place, name)))
                setattr(place, name, counting(part, getattr(place, name)))
        yield spent
    finally:
        for place, name, call in kept:
            setattr(place, name, call)


def sampled_rollout(run_dir: Path, model: str, spec: RolloutSpec) -> FrozenRollout:
    """A run's first groups whose rewards differ, with those rewards. Texts are tokenised again: ids may differ a bit."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    live: list[list[dict[str, Any]]] = []
    for path in sorted((run_dir / "completions").glob("step_*.jsonl")):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        by_prompt: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            by_prompt.setdefault(record["prompt_id"], []).append(record)
        live += [group for group in by_prompt.values() if len({r["reward"] for r in group}) > 1]
    live = live[: spec.prompts]

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    groups = []
    for records in live:
        made = [Completion(ids(r["completion"]) or (0,), (), "", "stop") for r in records]
        filled = [replace(c, sampler_logprobs=(math.nan,) * len(c.token_ids)) for c in made]
        prompt = Prompt(records[0]["prompt_id"], (), records[0]["prompt"], ids(records[0]["prompt"]))
        groups.append(Group(prompt, tuple(filled), tuple((Score(Outcome.SCORED, r["reward"]),) for r in records)))
    return FrozenRollout(spec, tuple(groups))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder in Hugging Face layout")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--step", choices=["adam", "sgd"], default="adam")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--autocast", choices=["bfloat16", "none"], default="bfloat16", help="as in benchmarks.trl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=0.03)
    parser.add_argument(
        "--run", type=Path, help="a finished run whose first completions are used instead of random ids"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/mask_overhead.json"))
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    spec = RolloutSpec(**{**QUICKSTART.as_dict(), "vocabulary": vocabulary_of(args.model)})
    rollout = sampled_rollout(args.run, args.model, spec) if args.run else make_rollout(spec)
    mask = {**MASK, "step": args.step, "top_k": args.top_k}
    found = measure(args.model, rollout, mask, pairs=args.pairs, tokens=args.micro_batch_tokens, autocast=args.autocast)
    shares = {name: {k: 100 * v for k, v in found[name].items()} for name in ("share", "share_of_own_calls")}
    median = max(found[name]["median"] for name in shares)
    print(
        table(
            ["mask", "share of a step: by steps", "by its own calls", "step with, CPU s", "without"],
            [[args.step, *(show(s) + " %" for s in shares.values()), show(found["with_s"]), show(found["without_s"])]],
        )
    )
    print(
        table(
            ["part", "CPU ms"],
            [[n, show({k: 1000 * v for k, v in s.items()}, 1)] for n, s in found["own_calls_s"].items()],
        )
    )
    met = median < args.limit
    print(f"median {100 * median:.2f} %: {'below' if met else 'NOT below'} the limit of {100 * args.limit:g} %")
    described = {"mask": mask, "rollout": spec.as_dict(), "limit": args.limit, "met": met, "machine": machine()}
    write_result(args.output, {"what": "curvature mask's share of an optimizer step", **described, **found})
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

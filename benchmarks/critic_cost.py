"""What a critic adds to an optimizer step, measured in one run with steps with and without it taking turns.

    python -m benchmarks.critic_cost --model FOLDER [--critic separate]

Every pair of steps is one of PPO with its critic and one of the same recipe without, on the same policy, optimizer and
frozen rollout, in an order that changes from pair to pair. CPU seconds of the optimizer step, and of the pass that reads
values before it (which a critic always needs; without one the pass is needed only where a rollout has several updates);
peak memory of each. Medians over pairs of with - without, as shares of the step without, and their ranges. No group is
flat here, so none is skipped on either side: with a critic none ever is. The rollout has the quickstart's shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.frozen import FrozenRollout, RolloutSpec, make_rollout
from benchmarks.mask_overhead import QUICKSTART
from benchmarks.measure import machine, peak_memory_mib, reset_peak_memory, show, spread, table, write_result
from benchmarks.models import vocabulary_of

MIB = 2**20


def measure(
    model: str, rollout: FrozenRollout, critic: dict[str, Any], *, pairs: int, tokens: int, autocast: str = "none"
) -> dict[str, Any]:
    """CPU seconds and peak MiB of steps with and without the critic, in pairs; the first pair is dropped."""
    from benchmarks.rlpost_side import RlpostSetting, RlpostSide

    setting = RlpostSetting(micro_batch_tokens=tokens, learning_rate=1e-5, autocast=autocast)
    # Without a critic and a centre the advantage is the reward itself.
    side = RlpostSide(model, rollout, setting, method={"preset": "ppo", "controller": None, "critic": None})
    side.buffer.dead = (False,) * len(side.buffer.groups)
    steps = {"with": side.with_critic(model, critic), "without": side.without_critic()}
    found: dict[str, dict[str, list[float]]] = {name: {"step_s": [], "peak_mib": [], "values_s": []} for name in steps}
    for pair in range(pairs + 1):
        for name in ("with", "without") if pair % 2 else ("without", "with"):
            take, read = steps[name]
            start = time.process_time()
            read()
            middle = time.process_time()
            reset_peak_memory()
            take(pair)
            numbers = {
                "values_s": middle - start,
                "step_s": time.process_time() - middle,
                "peak_mib": peak_memory_mib(),
            }
            for key, value in numbers.items():
                found[name][key].append(value)
            told = ", ".join(f"{key} {value:.2f}" for key, value in numbers.items())
            print(f"pair {pair}, {name}: {told}", file=sys.stderr)
    found = {name: {key: values[1:] for key, values in kept.items()} for name, kept in found.items()}
    return summarise(found, side.critic_state_bytes)


def summarise(found: dict[str, dict[str, list[float]]], state_bytes: int) -> dict[str, Any]:
    """Differences pair by pair. `state_bytes`: the critic's weights, gradients and moments, which lie there in both."""
    with_, without = found["with"], found["without"]
    base = without["step_s"]
    extra = [a - b for a, b in zip(with_["step_s"], base, strict=True)]
    both = [e + v for e, v in zip(extra, with_["values_s"], strict=True)]
    memory = [a - b for a, b in zip(with_["peak_mib"], without["peak_mib"], strict=True)]
    return {
        "step_share": spread([e / b for e, b in zip(extra, base, strict=True)]),
        "step_and_values_share": spread([e / b for e, b in zip(both, base, strict=True)]),
        "share_of_medians": statistics.median(with_["step_s"]) / statistics.median(base) - 1,
        "with_s": spread(with_["step_s"]),
        "without_s": spread(base),
        "values_s": spread(with_["values_s"]),
        "extra_peak_mib": spread(memory),
        "without_peak_mib": spread(without["peak_mib"]),
        "state_mib": state_bytes / MIB,
        "raw": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder in Hugging Face layout")
    parser.add_argument("--critic", choices=["trunk", "separate"], default="trunk")
    parser.add_argument("--heads", type=int, choices=[1, 2], default=1, help="2: SAFE's, with soft_min")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument(
        "--autocast", choices=["bfloat16", "none"], default="none", help="none: float32, fast on every CPU"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/critic_cost.json"))
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    spec = RolloutSpec(**{**QUICKSTART.as_dict(), "vocabulary": vocabulary_of(args.model), "dead_share": 0.0})
    critic: dict[str, Any] = {"model": args.critic, "heads": args.heads}
    critic |= {"aggregate": "soft_min"} if args.heads == 2 else {}
    options = {"pairs": args.pairs, "tokens": args.micro_batch_tokens, "autocast": args.autocast}
    found = measure(args.model, make_rollout(spec), critic, **options)
    percent = {
        key: show({k: 100 * v for k, v in found[key].items()}, 1) for key in ("step_share", "step_and_values_share")
    }
    row = [
        f"{args.critic}, {args.heads} head(s)",
        percent["step_share"] + " %",
        percent["step_and_values_share"] + " %",
        show(found["without_s"]),
        show(found["extra_peak_mib"], 0) + f" + {found['state_mib']:.1f}",
        show(found["without_peak_mib"], 0),
    ]
    heads = ["critic", "step", "step and values", "step without, CPU s", "more MiB (peak + state)", "MiB without"]
    print(table(heads, [row]))
    described = {"critic": critic, "autocast": args.autocast, "rollout": spec.as_dict(), "machine": machine()}
    write_result(args.output, {"what": "a critic's cost in an optimizer step", **described, **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())

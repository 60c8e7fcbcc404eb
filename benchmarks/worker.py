"""One measurement in a process of its own: `python -m benchmarks.worker JOB RESULT_FILE` (see `fresh_process`)."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.frozen import RolloutSpec, make_rollout
from benchmarks.measure import StepClock, peak_memory_mib, reset_peak_memory


@dataclass(frozen=True, slots=True)
class Job:
    """`steps` optimizer steps of one side; the first is not counted."""

    side: str  # trl, rlpost, or parity: both in float32, gradients compared
    model: str
    spec: dict[str, Any]
    setting: dict[str, Any]
    steps: int = 3
    threads: int = 1


def run(job: Job) -> dict[str, Any]:
    """Seconds of every counted step, and peak memory after the first step; for parity an `Agreement`."""
    import torch

    torch.set_num_threads(job.threads)
    rollout = make_rollout(RolloutSpec(**job.spec))
    if job.side == "parity":
        from benchmarks.trl_parity import compare

        return asdict(compare("dapo", job.model, rollout, **job.setting))
    if job.side == "trl":
        from benchmarks.trl_side import TrlSetting, run_trl

        clock = run_trl(job.model, rollout, TrlSetting(**job.setting), steps=job.steps, loss={"epsilon": 0.2}).clock
        extra: dict[str, float] = {}
    else:
        clock, extra = _rlpost(job, rollout)
    return {"cpu_s": clock.cpu[1:], "wall_s": clock.wall[1:], "peak_mib": peak_memory_mib(), **extra}


def _rlpost(job: Job, rollout: Any) -> tuple[StepClock, dict[str, float]]:
    from benchmarks.rlpost_side import RlpostSetting, RlpostSide

    # TRL's default loss is a token mean over the whole batch, clipped at 0.2 here.
    side = RlpostSide(
        job.model, rollout, RlpostSetting(**job.setting), method={"preset": "grpo", "reduction": {"type": "token"}}
    )
    clock, metrics = StepClock(), {}
    for index in range(job.steps):
        clock.start()
        metrics = side.step(index)
        clock.stop()
        if index == 0:
            reset_peak_memory()
    tokens = {name: metrics[f"tokens/{name}"] for name in ("useful", "real", "padded", "micro_batches")}
    return clock, {**tokens, "parameters": float(sum(p.numel() for p in side.policy.parameters()))}


if __name__ == "__main__":
    result = run(Job(**json.loads(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(result))

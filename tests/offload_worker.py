"""Started by test_offload_zero3.py in two processes: the learner with its state on the host against plain ZeRO-3.

Not a test by itself: starting processes takes longer than all the comparisons, so they share one start.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import zero_worker as worker

from rlpost.learner.deepspeed import DeepSpeedLearner
from rlpost.learner.process import Processes
from rlpost.offload.backends import LateDevice, run_adversary, run_in_order, run_on_lanes
from rlpost.offload.update import Update
from rlpost.policy.critic import make_critic
from rlpost.recipe.sections.learner import LearnerSection
from rlpost.recipe.sections.model import ModelSection
from rlpost.run.ending import ends_at_once

MIDDLE = 5  # the step before which a run is saved and taken up

OFFLOADS = {
    "streamed": {"type": "streamed", "piece_size": 1000},
    "streamed, one piece": {"type": "streamed", "piece_size": 10**9},
    "interleaved": {"type": "interleaved", "piece_size": 1000},
    "interleaved, small": {"type": "interleaved", "piece_size": 64, "gpu_of": 2, "every": 3},
    "streamed, parked": {"type": "streamed", "piece_size": 640},
    "resident": {"type": "resident", "piece_size": 1000},
    "state parked": {"type": "parked", "piece_size": 640},
    "a share resident": {"type": "interleaved", "piece_size": 640, "gpu_of": 1, "every": 3, "resident": 0.4},
    "a share resident, parked": {"type": "interleaved", "piece_size": 192, "gpu_of": 1, "every": 2, "resident": 0.7},
    "interleaved, small, parked": {"type": "interleaved", "piece_size": 64, "gpu_of": 2, "every": 3},
    "interleaved, parked": {"type": "interleaved", "piece_size": 1000},
    "resident, parked": {"type": "resident", "piece_size": 1000},
    "all on the CPU": {"type": "interleaved", "piece_size": 5000, "gpu_of": 0},
}  # "parked" in a name: before every step
FEW = (
    "streamed",
    "streamed, parked",
    "interleaved",
    "state parked",
    "a share resident, parked",
)  # in bfloat16 and with a critic
SHORT = {  # in the short test, which `make test` runs: (offload, backend) by precision
    "float32": (
        ("streamed, parked", "in order"),
        ("interleaved, small", "in order"),
        ("interleaved, small", "adversary"),
        ("state parked", "in order"),
    ),
    "bfloat16": (("streamed", "in order"), ("interleaved", "lanes"), ("a share resident, parked", "in order")),
    "critic": (("interleaved", "adversary"), ("a share resident", "lanes")),
}
BACKENDS = {
    "in order": lambda program, number: run_in_order(program),
    "adversary": run_adversary,
    "lanes": lambda program, number: run_on_lanes(program, LateDevice(number)),
}


RELAY = (  # who takes the long run's legs: each begins from the checkpoint that the one before it left
    ("streamed, parked", "in order"),
    (None, "in order"),
    ("interleaved, small, parked", "adversary"),
    ("a share resident, parked", "in order"),
    ("state parked", "in order"),
    (None, "in order"),
    ("resident, parked", "in order"),
    ("interleaved, parked", "lanes"),
)


def combinations(name: str, every: bool) -> list[tuple[str, str]]:
    """(offload, backend) of all that are compared with plain ZeRO-3."""
    if not every:
        return list(SHORT[name])
    offloads = OFFLOADS if name == "float32" else FEW
    many = ("interleaved", "a share")
    return [(o, b) for o in offloads for b in (BACKENDS if o.startswith(many) else ("in order",))]


def section(offload: dict | None, dtype: str, steps: int) -> LearnerSection:
    tokens = 16 if dtype == "float32" else 48
    changes = {"offload": offload, "rollouts": steps // 2, "micro_batch_tokens": tokens}
    return LearnerSection.model_validate(worker.SECTION.model_dump() | changes)


def make(path: str, processes: Processes, dtype: str, offload: dict | None, steps: int, critic: bool = False):
    policy = worker.policy(path, dtype)
    if critic:
        made = make_critic(
            worker.ACTOR_CRITIC.critic, ModelSection(path=path, dtype=dtype), path, policy.config.hidden_size, seed=1
        )
        policy.critic = made
    return DeepSpeedLearner(policy, section(offload, dtype, steps), processes)


def backend(name: str) -> None:
    """What runs the programs from now on."""
    number = iter(range(10**9))

    def run(update: Update, step) -> None:
        update.step = step
        BACKENDS[name](update.program, next(number))

    Update.run = run


def flat_state(learner) -> dict[str, torch.Tensor]:
    """This process's shard: master weights, moments, weights, and the number of steps."""
    optimizer = learner._engine.optimizer
    if hasattr(optimizer, "update"):
        optimizer.update.bring_home()
    flats = optimizer.fp32_partitioned_groups_flat
    names = ("exp_avg", "exp_avg_sq")
    found = {n: torch.cat([optimizer.optimizer.state[f][n].reshape(-1).float() for f in flats]) for n in names}
    found |= {"p": torch.cat([f.data for f in flats]), "weights": optimizer.lp_param_buffer.clone()}
    found = {name: value[real(optimizer)] for name, value in found.items()}
    return found | {"steps": torch.stack([optimizer.optimizer.state[f]["step"].reshape(()).float() for f in flats])}


def real(optimizer) -> torch.Tensor:
    """[n] bool: no padding. DeepSpeed cuts every weight into equal shares and leaves the rest of the last as it is."""
    found = []
    for parameter in (parameter for group in optimizer.fp16_groups for parameter in group):
        share = parameter.ds_tensor.ds_numel
        left = parameter.ds_numel - torch.distributed.get_rank() * share
        found.append(torch.arange(share) < left)
    return torch.cat(found)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """The names of what is not equal to the bit."""
    assert first.keys() == second.keys()
    return [n for n in first if not torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8))]


def relay(path: str, folder: Path, processes: Processes, dtype: str, steps: int) -> dict:
    """A run of plain ZeRO-3, and the same run handed on from one way to the next, parked before every step."""
    plain_section = section(None, dtype, steps)
    plain = make(path, processes, dtype, None, steps)
    expected, wanted, legs = [], [], []
    bounds = [steps * i // len(RELAY) for i in range(len(RELAY) + 1)]
    for first, last in pairwise(bounds):
        expected.append(worker.run(plain, first=first, last=last, section=plain_section))
        wanted.append(flat_state(plain))
    checkpoint, ours = folder, make(path, processes, dtype, OFFLOADS[RELAY[0][0]], steps)
    for leg, ((way, how), (first, last)) in enumerate(zip(RELAY, pairwise(bounds), strict=True)):
        backend(how)
        offload = None if way is None else OFFLOADS[way]
        own = section(offload, dtype, steps)
        if leg:
            ours = DeepSpeedLearner(worker.policy(str(checkpoint), dtype), own, processes)
            ours.load(checkpoint, world=processes.world)
        run = partial(worker.run if way is None else run_parked, ours)
        metrics = run(first=first, last=last, section=own)
        same = {"metrics": repr(metrics) == repr(expected[leg]), "state": equal(flat_state(ours), wanted[leg])}
        legs.append({"way": way, "backend": how, "processes": processes.gather(same)})
        checkpoint = folder / f"{dtype}-{leg}"
        save(ours, checkpoint, processes)
    steps_taken = [step for part in expected for step in part]
    skipped = [i for i, step in enumerate(steps_taken) if step["skipped"]]
    rates = len({step["learning_rate"] for step in steps_taken})
    micro_batches = [step["micro_batches"] for step in steps_taken]
    return {"legs": legs, "skipped": skipped, "rates": rates, "micro_batches": [min(micro_batches), max(micro_batches)],
            "groups": len(ours._engine.optimizer.param_groups), "steps": len(steps_taken)}  # fmt: skip


def compare(
    path: str, folder: Path, processes: Processes, name: str, dtype: str, steps: int, critic: bool, every: bool
) -> dict:
    """Plain ZeRO-3 and every offload; a run saved in the middle by either is taken up by the other."""
    method = worker.ACTOR_CRITIC if critic else worker.METHOD
    plain = make(path, processes, dtype, None, steps, critic)
    plain_section = section(None, dtype, steps)
    expected = worker.run(plain, last=MIDDLE, method=method, section=plain_section)
    checkpoint = folder / f"{name}-plain"
    save(plain, checkpoint, processes)
    expected += worker.run(plain, first=MIDDLE, last=steps, method=method, section=plain_section)
    wanted = flat_state(plain)
    found = {}
    for offload_name, backend_name in combinations(name, every):
        offload = OFFLOADS[offload_name]
        backend(backend_name)
        ours = make(path, processes, dtype, offload, steps, critic)
        own = section(offload, dtype, steps)
        run = partial(run_parked, ours) if "parked" in offload_name else partial(worker.run, ours)
        metrics = run(first=0, last=MIDDLE, method=method, section=own)
        saved = folder / f"{name}-{offload_name}-{backend_name}"
        save(ours, saved, processes)
        metrics += run(first=MIDDLE, last=steps, method=method, section=own)
        result = {"metrics": repr(metrics) == repr(expected), "state": equal(flat_state(ours), wanted)}
        if backend_name == "in order" and not critic:
            result |= taken_up(
                path, processes, dtype, steps, offload, saved, checkpoint, repr(expected[MIDDLE:]), wanted
            )
        result["pieces"] = len(ours._engine.optimizer.update.pieces)
        found[f"{offload_name}, {backend_name}"] = processes.gather(result)
    return {"skipped": [step["skipped"] for step in expected], "found": found}


def run_parked(learner, *, first: int, last: int, **settings) -> list[dict]:
    """As `zero_worker.run`, parked before every step; what a freed buffer held is overwritten with garbage meanwhile."""
    found, optimizer = [], learner._engine.optimizer
    flat = optimizer.flat
    state = (flat.p, flat.m, flat.v) if optimizer.offload.parks_state else optimizer.update.abroad
    for step in range(first, last):
        with learner.parked():
            sizes = [buffer.untyped_storage().nbytes() for buffer in (flat.weights, flat.gradients, *state)]
            assert not any(sizes)
            garbage = [torch.full((flat.p.numel(),), float("nan")) for _ in range(6)]
        del garbage
        found += worker.run(learner, first=step, last=step + 1, **settings)
    return found


def save(learner, checkpoint: Path, processes: Processes) -> None:
    if processes.is_main:
        (checkpoint / "trainer").mkdir(parents=True)
    processes.barrier()
    worker.save(learner, checkpoint)
    processes.barrier()


def taken_up(path, processes, dtype, steps, offload, ours: Path, plain: Path, expected: str, wanted) -> dict:
    """Plain ZeRO-3 goes on from our checkpoint, and other pieces than were saved, too; ours goes on from plain ZeRO-3's."""
    found = {}
    other = {"type": "interleaved", "piece_size": 192, "gpu_of": 1, "every": 3}
    for name, changed, checkpoint in (
        ("ours -> plain", None, ours),
        ("plain -> ours", offload, plain),
        ("ours -> other pieces", other, ours),
    ):
        learner = DeepSpeedLearner(worker.policy(str(checkpoint), dtype), section(changed, dtype, steps), processes)
        learner.load(checkpoint, world=processes.world)
        metrics = worker.run(learner, first=MIDDLE, last=steps, section=section(changed, dtype, steps))
        found[name] = repr(metrics) == expected and not equal(flat_state(learner), wanted)
    return found


def from_the_start(path: str, folder: Path, processes: Processes) -> list[bool]:
    """A checkpoint of plain ZeRO-3 from before its first step, when torch's optimizer has no moments yet."""
    plain = make(path, processes, "float32", None, 8)
    checkpoint = folder / "start"
    save(plain, checkpoint, processes)
    expected = worker.run(plain, last=2, section=section(None, "float32", 8))
    own = section(OFFLOADS["interleaved"], "float32", 8)
    ours = DeepSpeedLearner(worker.policy(str(checkpoint), "float32"), own, processes)
    worker.run(ours, last=1, section=own)  # so that there is something to forget
    ours.load(checkpoint, world=processes.world)
    same = repr(worker.run(ours, last=2, section=own)) == repr(expected)
    return processes.gather(same and not equal(flat_state(ours), flat_state(plain)))


def main(path: str, folder: Path, steps: int, mode: str) -> None:
    faulthandler.dump_traceback_later(float(os.environ.get("DEADLINE", "540")), exit=True)
    torch.set_num_threads(1)
    processes = Processes()
    worker.launch_settings(3, False, folder)
    results = {}
    if mode == "relay":
        for dtype in ("float32", "bfloat16"):
            results[dtype] = relay(path, folder, processes, dtype, steps)
            if processes.is_main:
                print(json.dumps(results[dtype]), flush=True)
    else:
        for name, dtype, critic in (
            ("float32", "float32", False),
            ("bfloat16", "bfloat16", False),
            ("critic", "float32", True),
        ):
            results[name] = compare(path, folder, processes, name, dtype, steps, critic, mode == "every")
        results["from the start"] = from_the_start(path, folder, processes)
    if processes.is_main:
        (folder / "results.json").write_text(json.dumps(results))
    processes.close()


if __name__ == "__main__":
    with ends_at_once():
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

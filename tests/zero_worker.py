"""Started by test_deepspeed.py in two processes: compares DeepSpeed learners with one plain learner, writes what it found.

Not a test by itself: starting processes takes longer than all the comparisons, so they share one start.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from peft import load_peft_weights, set_peft_model_state_dict

from rlpost.ending import ends_at_once
from rlpost.experience import Completion, Group, Prompt
from rlpost.gradient.types import Counts
from rlpost.learner.buffer import RolloutBuffer
from rlpost.learner.checkpoint import file_writer
from rlpost.learner.deepspeed import DeepSpeedLearner
from rlpost.learner.learner import DataParallelLearner, token_logprobs
from rlpost.learner.process import Processes
from rlpost.learner.update import Updater
from rlpost.policy.model import load_policy
from rlpost.recipe.learner import LearnerSection
from rlpost.recipe.method import MethodSection
from rlpost.recipe.model import LoraSection, ModelSection

STEPS = 8  # optimizer steps, two to a rollout
NAN_STEP, EMPTY_STEP = 3, 4
SECTION = LearnerSection(
    steps=4,
    minibatches=2,
    learning_rate=3e-3,
    warmup_steps=3,
    schedule="linear",
    micro_batch_tokens=48,
    weight_decay=0.1,
    max_grad_norm=0.5,
)
LORA = LoraSection(rank=4, alpha=8.0)


class Alone(Processes):
    """One process that does not know of the other."""

    def __init__(self) -> None:
        self.rank, self.world, self.local_rank, self.device, self._group = 0, 1, 0, torch.device("cpu"), None


def rollout(step: int, rank: int, world: int) -> RolloutBuffer:
    """Rollout `step`: four prompts, two to a minibatch, of which each of two processes has one.

    Prompt 3 has long completions (many micro-batches); prompt 1 of the first rollout is dead, so that process 1 has
    nothing to do in its first minibatch; both of the minibatch of EMPTY_STEP are; NAN_STEP has an advantage that is NaN.
    """
    draw = random.Random(step)
    groups, dead, advantages = [], [], []
    for place in range(4):
        length = 16 if place == 3 else 5
        completions = tuple(
            Completion(tuple(draw.choices(range(2, 250), k=draw.randint(1, length))), (), "", "stop") for _ in range(4)
        )
        completions = tuple(replace(c, sampler_logprobs=(-5.0,) * len(c.token_ids)) for c in completions)
        prompt = Prompt(f"p{step}{place}", (), "", tuple(draw.choices(range(2, 250), k=6)))
        groups.append(Group(prompt, completions, tuple(() for _ in completions)))
        minibatch_step = 2 * step + place // 2
        dead.append(minibatch_step == EMPTY_STEP or (step == 0 and place == 1))
        advantage = [0.0] * 4 if dead[-1] else [draw.gauss(0.0, 1.0) for _ in completions]
        advantages.append([float("nan")] * 4 if minibatch_step == NAN_STEP and place == 3 else advantage)
    counts = tuple(
        Counts(sum(len(c.token_ids) for g in groups[2 * m : 2 * m + 2] for c in g.completions), 8, 2, None, 16)
        for m in range(2)
    )
    own = [place for place in range(4) if world == 1 or place % 2 == rank]
    return RolloutBuffer(
        step=step,
        groups=tuple(groups[i] for i in own),
        minibatch=tuple(i // 2 for i in own),
        dead=tuple(dead[i] for i in own),
        advantage=torch.tensor([a for i in own for a in advantages[i]]),
        counts=counts,
    )


def policy(path: str, dtype: str = "float32", lora: bool = False):
    """The tiny model, with adapters that are not zero if wanted."""
    torch.manual_seed(0)
    made = load_policy(ModelSection(path=path, dtype=dtype, autocast="none", lora=LORA if lora else None), path)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return made


def run(learner, *, first: int = 0, last: int = STEPS) -> list[dict]:
    """Takes optimizer steps; per step loss, gradient norm, learning rate, skipped, and the policy's log-probs before it."""
    method = MethodSection.model_validate({"preset": "dr_grpo"})
    updater = Updater(learner, method, SECTION, "tree", 0, None, 0)
    found = []
    for step in range(first, last):
        buffer = rollout(step // 2, learner.processes.rank, learner.processes.world)
        buffer.updates_done = step % 2
        if step > 1:
            token_logprobs(learner.policy, updater.rows(rollout(step // 2, 0, 1), None), 1000)  # as for old_logp
        metrics = updater.update(buffer, step)
        names = ("loss", "grad_norm", "learning_rate", "skipped")
        found.append({name: metrics[f"optimizer/{name}"] for name in names})
    return found


def weights(learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.named_weights()}


def held(learner) -> int:
    """How many weights this process holds at the moment."""
    return sum(parameter.data.numel() for parameter in learner.policy.parameters())


def most_held_while_syncing(learner) -> int:
    """The largest number of weights that this process holds at once while `named_weights` goes through all of them."""
    return max(held(learner) for _ in learner.named_weights())


def gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of weights with the same names."""
    assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)


def launch_settings(stage: int, offload: bool, folder: Path) -> None:
    """As accelerate's launcher hands them on. At stage 3 no weight is small enough to be kept whole everywhere."""
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file) if stage == 3 else "none"
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = "cpu" if offload else "none"


def save(learner, checkpoint: Path) -> None:
    """As `save_checkpoint` does."""
    middle = learner.full_state_dict()
    file_writer(learner.own_state(), snapshot=False)(checkpoint / "trainer")
    if learner.processes.is_main:
        learner.policy.save(checkpoint, state_dict=middle)
    learner.processes.barrier()


def taken_up(path: str, checkpoint: Path, dtype: str, lora: bool):
    """As `build_policy` does."""
    if not lora:
        return policy(str(checkpoint), dtype)
    made = policy(path, dtype, lora)
    set_peft_model_state_dict(made.model, load_peft_weights(str(checkpoint), device="cpu"))
    return made


def compare(path: str, folder: Path, processes: Processes, stage: int, offload: bool, dtype: str, lora: bool) -> dict:
    """One configuration: the trajectory, the same with a restart in the middle, and the weights of both."""
    launch_settings(stage, offload, folder)
    plain = DataParallelLearner(policy(path, dtype, lora), SECTION, Alone())
    start = weights(plain)
    expected = run(plain)
    sharded = DeepSpeedLearner(policy(path, dtype, lora), SECTION, processes)
    assert gap(weights(sharded), start) == 0.0
    found = run(sharded, last=5)
    checkpoint = folder / f"zero{stage}{offload}{dtype}{lora}"
    if processes.is_main:
        (checkpoint / "trainer").mkdir(parents=True)
    processes.barrier()
    save(sharded, checkpoint)
    found += run(sharded, first=5)
    final = weights(sharded)
    resumed = DeepSpeedLearner(taken_up(path, checkpoint, dtype, lora), SECTION, processes)
    resumed.load(checkpoint, world=processes.world)
    again = run(resumed, first=5)
    return {
        "expected": expected,
        "found": found,
        "held": held(sharded),
        "held_while_syncing": most_held_while_syncing(sharded),
        "moved": gap(weights(plain), start),
        "weights_gap": gap(final, weights(plain)),
        "resumed": again,
        "resumed_gap": gap(weights(resumed), final),
        "checkpoint": str(checkpoint),
    }


CONFIGURATIONS = {
    "zero1": (1, False, "float32", False),
    "zero2": (2, False, "float32", False),
    "zero3": (3, False, "float32", False),
    "zero2-offload": (2, True, "float32", False),
    "zero3-offload": (3, True, "float32", False),
    "zero2-lora": (2, False, "float32", True),
    "zero3-lora": (3, False, "float32", True),
    "zero1-bf16": (1, False, "bfloat16", False),
    "zero2-bf16": (2, False, "bfloat16", False),
    "zero3-bf16": (3, False, "bfloat16", False),
}


def main(path: str, folder: Path, only: list[str]) -> None:
    faulthandler.dump_traceback_later(float(os.environ.get("DEADLINE", "240")), exit=True)
    torch.set_num_threads(1)
    processes = Processes()
    results = {}
    for name, configuration in CONFIGURATIONS.items():
        if only and name not in only:
            continue
        results[name] = compare(path, folder, processes, *configuration)
    if processes.is_main:
        (folder / "results.json").write_text(json.dumps(results))
    processes.close()


if __name__ == "__main__":
    with ends_at_once():
        main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

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

from rlpost.experience import Completion, Group, Prompt
from rlpost.gradient.types import Counts
from rlpost.learner.buffer import RolloutBuffer
from rlpost.learner.checkpoint import file_writer
from rlpost.learner.deepspeed import DeepSpeedLearner
from rlpost.learner.learner import DataParallelLearner, token_logprobs
from rlpost.learner.process import Processes
from rlpost.learner.update import Updater
from rlpost.methods.capo import make_tracker
from rlpost.policy.critic import make_critic
from rlpost.policy.model import load_policy
from rlpost.recipe.sections.learner import LearnerSection
from rlpost.recipe.sections.method import MethodSection
from rlpost.recipe.sections.model import LoraSection, ModelSection
from rlpost.run.ending import ends_at_once

STEPS = 8  # optimizer steps, two to a rollout
NAN_STEP, EMPTY_STEP = 3, 4
NAN_EVERY = 64  # long runs have such a step again
SECTION = LearnerSection(
    steps=4,
    minibatches=2,
    learning_rate=3e-3,
    warmup_steps=3,
    schedule="linear",
    micro_batch_tokens=16,  # so that a step has several on every process, whose gradients must add up
    weight_decay=0.1,
    max_grad_norm=0.5,
)
LORA = LoraSection(rank=4, alpha=8.0)
METHOD = MethodSection.model_validate({"preset": "dr_grpo"})
CRITIC = {"learning_rate": 3e-2, "max_grad_norm": None}
ACTOR_CRITIC = MethodSection.model_validate({"preset": "ppo", "controller": None, "critic": CRITIC})


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
        advantages.append([float("nan")] * 4 if minibatch_step % NAN_EVERY == NAN_STEP and place == 3 else advantage)
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


def policy(path: str, dtype: str = "float32", lora: bool = False, checkpointing: bool = False):
    """The tiny model, with adapters that are not zero if wanted. `dtype` "mixed": bfloat16 products of float32 weights."""
    torch.manual_seed(0)
    precision = (
        {"dtype": "float32", "autocast": "bfloat16"} if dtype == "mixed" else {"dtype": dtype, "autocast": "none"}
    )
    section = ModelSection(path=path, **precision, lora=LORA if lora else None)
    made = load_policy(section.model_copy(update={"gradient_checkpointing": checkpointing}), path)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return made


def with_values(buffer: RolloutBuffer) -> RolloutBuffer:
    """The rollout with a target for every token's value; by prompt, so that it does not depend on who has it."""
    draws = [random.Random(group.prompt.id) for group in buffer.groups]
    pairs = zip(buffer.groups, draws, strict=True)
    target = [draw.gauss(0.0, 1.0) for group, draw in pairs for c in group.completions for _ in c.token_ids]
    buffer.target, buffer.old_values = torch.tensor(target), torch.zeros(len(target), 1)
    buffer.known = torch.ones(len(target), dtype=torch.bool)
    return buffer


def run(learner, *, first: int = 0, last: int = STEPS, method=METHOD, section=SECTION) -> list[dict]:
    """Takes optimizer steps; per step loss, gradient norm, learning rate, skipped, and the policy's log-probs before it."""
    updater = Updater(learner, method, section, "tree", 0, None, 0)
    found = []
    for step in range(first, last):
        buffer = with_values(rollout(step // 2, learner.processes.rank, learner.processes.world))
        buffer.updates_done = step % 2
        if step > 1:
            # As for old_logp: the processes have unequal numbers of micro-batches here, too.
            token_logprobs(learner.policy, updater.rows(buffer, None), buffer.tokens)
        metrics = updater.update(buffer, step)
        names = ("loss", "grad_norm", "learning_rate", "skipped")
        micro_batches = {"micro_batches": metrics["tokens/micro_batches"]}
        found.append({name: metrics[f"optimizer/{name}"] for name in names} | micro_batches)
    return found


CAPO = {
    "preset": "dr_capo",
    "masks": [{"type": "curvature", "verify_every": 2, "thresholds": {"type": "calibrated", "steps": 2}}],
}


def run_capo(learner) -> tuple[dict, list[dict]]:
    """The curvature tracker's state after a run whose processes have unequal shares, and what was rejected on the way."""
    method = MethodSection.model_validate(CAPO)
    tracker = make_tracker(method, 258, 64)
    updater = Updater(learner, method, SECTION, "tree", 0, None, 0, tracker)
    found = []
    for step in range(STEPS):
        buffer = rollout(step // 2, learner.processes.rank, learner.processes.world)
        buffer.updates_done = step % 2
        metrics = updater.update(buffer, step)
        found.append({name: value for name, value in metrics.items() if name.startswith("mask/")})
    return tracker.state_dict(), found


def flat(state: dict) -> dict[str, torch.Tensor]:
    """The numbers of a tracker's state by name."""
    moments, calibration = state["moments"], state["calibration"]
    found = {name: torch.as_tensor(moments[name]).double() for name in ("steps", "ids", "first", "second")}
    return found | {
        "limits": torch.tensor(calibration["limits"]).double(),
        "observed": torch.tensor([calibration["steps"]]),
    }


def compare_capo(path: str, folder: Path, processes: Processes) -> dict:
    """CAPO's tracker under ZeRO-3 in two processes: against the other process, and against one plain process."""
    launch_settings(3, False, folder)
    alone, expected = run_capo(DataParallelLearner(policy(path), SECTION, Alone()))
    own, found = run_capo(DeepSpeedLearner(policy(path), SECTION, processes))
    alone, everyone = flat(alone), [flat(state) for state in processes.gather(own)]
    return {
        "same_on_all": all(torch.equal(everyone[0][name], other[name]) for other in everyone for name in other),
        "ids_equal": torch.equal(everyone[0]["ids"], alone["ids"]),
        "steps": [float(state["steps"]) for state in (alone, everyone[0])],
        "gap": max(
            float(((everyone[0][n] - alone[n]).abs() / alone[n].abs().max()).max())
            for n in ("first", "second", "limits")
        ),
        "found": found,
        "expected": expected,
    }


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


def taken_up(path: str, checkpoint: Path, dtype: str, lora: bool, checkpointing: bool):
    """As `build_policy` does."""
    if not lora:
        return policy(str(checkpoint), dtype, lora, checkpointing)
    made = policy(path, dtype, lora, checkpointing)
    set_peft_model_state_dict(made.model, load_peft_weights(str(checkpoint), device="cpu"))
    return made


def compare(
    path: str,
    folder: Path,
    processes: Processes,
    stage: int,
    offload: bool,
    dtype: str,
    lora: bool,
    checkpointing: bool = False,
) -> dict:
    """One configuration: the trajectory, the same with a restart in the middle, and the weights of both."""
    launch_settings(stage, offload, folder)
    # Rounding of many small bfloat16 gradients would hide that of the weights, which is what is compared there.
    section = SECTION if dtype != "bfloat16" or lora else SECTION.model_copy(update={"micro_batch_tokens": 48})
    plain = DataParallelLearner(policy(path, dtype, lora), section, Alone())
    start = weights(plain)
    expected = run(plain, section=section)
    sharded = DeepSpeedLearner(policy(path, dtype, lora, checkpointing), section, processes)
    assert gap(weights(sharded), start) == 0.0
    found = run(sharded, last=5, section=section)
    checkpoint = folder / f"zero{stage}{offload}{dtype}{lora}{checkpointing}"
    if processes.is_main:
        (checkpoint / "trainer").mkdir(parents=True)
    processes.barrier()
    save(sharded, checkpoint)
    found += run(sharded, first=5, section=section)
    final = weights(sharded)
    resumed = DeepSpeedLearner(taken_up(path, checkpoint, dtype, lora, checkpointing), section, processes)
    resumed.load(checkpoint, world=processes.world)
    again = run(resumed, first=5, section=section)
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
        "trained": sorted(
            {str(getattr(p, "ds_tensor", p).dtype) for p in sharded.policy.parameters() if p.requires_grad}
        ),
    }


def count_gathers(path: str, folder: Path, processes: Processes) -> dict:
    """How often ZeRO-3 gathers the weight of the output layer (not tied to the embedding; no weight is kept from forward to
    backward), and how many passes and chunks of the head there were, from the second optimizer step on: in the first
    DeepSpeed takes its trace."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    untied = folder / "untied"
    if processes.is_main:
        config = AutoModelForCausalLM.from_pretrained(path).config
        config.tie_word_embeddings = False
        LlamaForCausalLM(config).save_pretrained(untied)
    processes.barrier()
    launch_settings(3, False, folder)
    names = ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")
    settings = {"stage": 3, **{f"stage3_{name}": 0 for name in names}}
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": settings}))
    processes.barrier()
    learner = DeepSpeedLearner(policy(str(untied)), SECTION, processes)
    learner.policy.head_chunk_tokens = 2
    head = learner.policy.causal_lm.get_output_embeddings().weight
    found = {"passes": 0, "chunks": 0, "forward": 0, "backward": 0}
    name = "_PartitionedParameterCoordinator__all_gather_params_"
    original = getattr(Coordinator, name)

    def counting(self, params, forward, *arguments, **keywords):
        params = list(params)
        gathered = any(p is head and p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in params)
        found["forward" if forward else "backward"] += gathered
        return original(self, params, forward, *arguments, **keywords)

    def count_pass(_module, arguments):
        found["passes"] += 1
        found["chunks"] += -(-arguments[0].target.numel() // 2)

    run(learner, last=1)
    setattr(Coordinator, name, counting)
    hook = learner.policy.register_forward_pre_hook(count_pass)
    updater = Updater(learner, METHOD, SECTION, "tree", 0, None, 0)
    for step in (1, 2):
        buffer = rollout(step // 2, processes.rank, processes.world)
        buffer.updates_done = step % 2
        updater.update(buffer, step)
    hook.remove()
    setattr(Coordinator, name, original)
    return found


def compare_critics(path: str, folder: Path, processes: Processes) -> dict:
    """A critic with a rate of its own, under ZeRO-2 and plain, and then a warm-up, in which the policy must not move although
    its weights decay. Nothing is clipped, for DeepSpeed clips once."""
    launch_settings(2, False, folder)
    section, made = SECTION.model_copy(update={"max_grad_norm": None}), []
    only_critic = ACTOR_CRITIC.model_copy(
        update={"critic": ACTOR_CRITIC.critic.model_copy(update={"warmup_rollouts": 99})}
    )
    for kind, where in ((DataParallelLearner, Alone()), (DeepSpeedLearner, processes)):
        actor = policy(path)
        actor.critic = make_critic(ACTOR_CRITIC.critic, ModelSection(path=path), path, actor.config.hidden_size, seed=1)
        learner = kind(actor, section, where)
        start = (weights(learner), critic_weights(learner))
        run(learner, last=3, method=ACTOR_CRITIC, section=section)
        middle = (weights(learner), critic_weights(learner))
        run(learner, first=3, method=only_critic, section=section)
        made.append((start, middle, (weights(learner), critic_weights(learner))))
    (start, middle, end), (_, other_middle, other_end) = made
    return {
        "moved": [gap(*parts) for parts in zip(middle, start, strict=True)],  # policy, critic
        "gaps": [gap(*parts) for parts in zip(end, other_end, strict=True)],
        "policy_moved_in_warmup": [gap(end[0], middle[0]), gap(other_end[0], other_middle[0])],  # plain, sharded
        "critic_moved_in_warmup": gap(end[1], middle[1]),
    }


def critic_weights(learner) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learner.policy.critic.named_parameters()}


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
    "zero2-lora-bf16": (2, False, "bfloat16", True),
    "zero3-lora-bf16": (3, False, "bfloat16", True),
    "zero2-mixed": (2, False, "mixed", False),
    "zero3-mixed": (3, False, "mixed", False),
    "zero3-lora-mixed": (3, False, "mixed", True),
    "zero3-mixed-checkpointing": (3, False, "mixed", False, True),
    "zero2-checkpointing": (2, False, "float32", False, True),
    "zero3-checkpointing": (3, False, "float32", False, True),
}


def main(path: str, folder: Path, only: list[str]) -> None:
    faulthandler.dump_traceback_later(float(os.environ.get("DEADLINE", "480")), exit=True)
    torch.set_num_threads(1)
    processes = Processes()
    results = {}
    for name, configuration in CONFIGURATIONS.items():
        if only and name not in only:
            continue
        results[name] = compare(path, folder, processes, *configuration)
    if not only or "capo" in only:
        results["capo"] = compare_capo(path, folder, processes)
    if not only or "gathers" in only:
        results["gathers"] = count_gathers(path, folder, processes)
    if not only or "critic" in only:
        results["critic"] = compare_critics(path, folder, processes)
    if processes.is_main:
        (folder / "results.json").write_text(json.dumps(results))
    processes.close()


if __name__ == "__main__":
    with ends_at_once():
        main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

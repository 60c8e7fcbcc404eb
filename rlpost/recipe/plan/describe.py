"""`rlpost plan`: what a recipe means, before a model is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlpost.errors import RecipeError, printable
from rlpost.policy.local_config import local_config
from rlpost.recipe.load import LoadedRecipe, leaves
from rlpost.recipe.plan.memory import GIB, MemoryLine, estimate, find_model_size
from rlpost.recipe.plan.places import describe_places
from rlpost.recipe.plan.slots import slot_sections
from rlpost.recipe.plan.update import describe_update
from rlpost.recipe.rules.check import advise, check, training_prompts
from rlpost.recipe.rules.pairs import describe_baseline, layout_in_use
from rlpost.recipe.rules.setting import Setting, processes_from_environment
from rlpost.recipe.secrets import conceal
from rlpost.recipe.sections.describe import describe_settings
from rlpost.recipe.sections.guidance import either_or
from rlpost.recipe.sections.method import describe_order
from rlpost.recipe.sections.reward import Reward, RewardModelSection
from rlpost.recipe.sections.root import Recipe

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Value:
    """One value of the recipe and where it came from."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch arithmetic. Token counts are the worst case: every prompt, completion and solution at its limit, every group
    sampled again at every level of hints and in every round of dynamic sampling."""

    processes: int
    prompts_per_step: int
    prompts_per_process: int
    completions_per_prompt: int
    completions_per_step: int
    tokens_sampled_per_step: int  # at the most
    samplings: int  # of a group, at the most: the first, one a level of hints, one a round of dynamic sampling
    tokens_per_process_and_update: int
    micro_batches_per_update: int
    updates_per_rollout: int
    rollouts: int
    optimizer_steps: int
    training_prompts: int | None
    data_epochs: float | None
    what: str = "preference pairs"  # what a step takes where it samples nothing


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `rlpost plan` says."""

    path: str
    run_dir: str
    values: tuple[Value, ...]
    batch: Batch
    places: tuple[str, ...]  # who samples where
    attention: str
    layout: str
    order: tuple[str, ...]
    settings: tuple[str, ...]  # of every slot in force, all of them
    memory: tuple[MemoryLine, ...]
    memory_source: str
    update: tuple[str, ...]  # the optimizer's state on the host
    disk: str
    advice: tuple[str, ...]
    problems: tuple[str, ...]


def make_plan(loaded: LoadedRecipe, *, processes: int | None = None, zero_stage: int = 0) -> Plan:
    """The plan for so many processes (default: those of the launcher)."""
    recipe, count = loaded.recipe, processes or processes_from_environment()
    setting = Setting(count, loaded.path.resolve().parent, zero_stage)
    from rlpost.run.rehearse import Rehearsal, rehearse

    problems = check(recipe, setting)
    # Where a rule is broken already, what comes of reading the data would only say it again.
    seen = Rehearsal() if problems else rehearse(loaded, zero_stage)
    size, source = find_model_size(recipe.model)
    memory = tuple(estimate(recipe, size, processes=count, zero_stage=zero_stage)) if size else ()
    return Plan(
        path=str(loaded.path),
        run_dir=str(recipe.run_dir),
        values=_values(recipe, loaded.origins),
        batch=_batch(recipe, count),
        places=describe_places(recipe, count),
        attention=_attention(recipe),
        layout=": ".join(filter(None, layout_in_use(recipe))),
        order=_order(recipe),
        settings=_settings(recipe, loaded.origins),
        memory=memory,
        memory_source=source,
        update=describe_update(recipe, size, count, zero_stage),
        disk=seen.disk,
        advice=(*loaded.notes, *advise(recipe, setting), *seen.notes),
        problems=(*problems, *seen.problems),
    )


def print_plan(plan: Plan, *, as_json: bool = False) -> None:
    """Prints the plan as tables, or as one JSON object."""
    if as_json:
        print(json.dumps(asdict(plan), indent=2, default=str))
        return
    from rich.console import Console

    console = Console()
    _print_values(console, plan)
    _print_batch(console, plan.batch)
    for line in plan.places:
        console.print(
            f"  who samples: {line}" if line is plan.places[0] else f"    {line}", markup=False, highlight=False
        )
    console.print(f"  rows of the learner: {plan.layout}", markup=False, highlight=False)
    console.print(f"  attention of the learner: {plan.attention}", markup=False, highlight=False)
    console.rule("Order of the method's slots", align="left")
    for i, step in enumerate(plan.order, start=1):
        console.print(f"{i:3}. {step}", markup=False, highlight=False)
    console.rule("Settings of the slots in force", align="left")
    for line in plan.settings:
        console.print(f"  {line}", markup=False, highlight=False)
    _print_memory(console, plan)
    if plan.update:
        console.rule("Optimizer's state on the host", align="left")
        for line in plan.update:
            console.print(f"  {line}", markup=False, highlight=False)
    if plan.disk:
        console.rule("Disk", align="left")
        console.print(f"  {plan.disk}", markup=False, highlight=False)
    for note in plan.advice:
        console.print(f"note: {printable(note)}.", style="yellow", markup=False, highlight=False)
    for problem in plan.problems:
        console.print(f"problem: {printable(problem)}.", style="bold red", markup=False, highlight=False)
    if not plan.problems:
        console.print("No problems found.", style="green")


def _values(recipe: Recipe, origins: Mapping[str, str]) -> tuple[Value, ...]:
    values = leaves(recipe)
    plain = conceal(leaves_as_json(values))
    return tuple(Value(key, plain[key], origins.get(key, "default")) for key in values)


def _settings(recipe: Recipe, origins: Mapping[str, str]) -> tuple[str, ...]:
    """One line a slot: every setting, and where it came from."""
    sections = slot_sections(recipe.method).items()
    return tuple(f"{key}: {describe_settings(section, origins, f'{key}.')}" for key, section in sections)


def leaves_as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values as lists, mappings, numbers and text."""
    from pydantic_core import to_jsonable_python

    return {key: to_jsonable_python(value) for key, value in values.items()}


def _batch(recipe: Recipe, processes: int) -> Batch:
    rollout, learner = recipe.rollout, recipe.learner
    method, sampling = recipe.method, not recipe.data.has_pairs and recipe.method.samples
    completions = rollout.prompts_per_step * rollout.completions_per_prompt if sampling else 0
    samplings = 1 + (len(method.guidance.ratios) if method.guidance is not None else 0)
    samplings += method.dynamic_sampling.max_rounds if method.dynamic_sampling.enabled else 0
    per_process = math.ceil(rollout.prompts_per_step / processes)
    per_update = math.ceil(per_process / learner.minibatches)
    tokens = per_update * _tokens_per_prompt(recipe)
    available = training_prompts(recipe)
    used = rollout.prompts_per_step * learner.planned_rollouts
    return Batch(
        processes=processes,
        prompts_per_step=rollout.prompts_per_step,
        prompts_per_process=per_process,
        completions_per_prompt=rollout.completions_per_prompt if sampling else 0,
        completions_per_step=completions,
        tokens_sampled_per_step=completions * rollout.max_completion_tokens * samplings,
        samplings=samplings,
        tokens_per_process_and_update=tokens,
        micro_batches_per_update=math.ceil(tokens / learner.micro_batch_tokens),
        updates_per_rollout=learner.steps_per_rollout,
        rollouts=learner.planned_rollouts,
        optimizer_steps=recipe.optimizer_steps,
        training_prompts=available,
        data_epochs=used / available if available and available > 0 else None,
        what="preference pairs" if recipe.data.has_pairs else "worked solutions",
    )


def _attention(recipe: Recipe) -> str:
    """The learner's attention kernel on this machine, as far as that is known before the model is here."""
    model, layout = recipe.model, recipe.learner.layout
    config = local_config(model)
    if config is None and model.attention != "auto":
        return model.attention
    import torch

    from rlpost.policy.family import choose_attention

    on_gpu, flex = torch.cuda.is_available(), model.attention == "auto" and layout == "tree"
    try:
        device = "cuda" if on_gpu else "cpu"
        chosen = "sdpa"  # of a model that is not on this machine
        if config is not None:
            chosen, _ = choose_attention(
                model.attention, config, device=device, layout=layout, longest=recipe.longest_sequence
            )
    except RecipeError:
        return "none (see the problems)"
    if flex and not on_gpu:
        return (
            f"{chosen} (model.attention=auto; on a CUDA device flex_attention, where the model takes tree rows and it)"
        )
    if flex and config is None:
        return "flex_attention if the model takes tree rows and it, else sdpa (model.attention=auto)"
    return chosen


def _tokens_per_prompt(recipe: Recipe) -> int:
    """The most positions that one prompt can take in an update: its completions, its demonstration, or both."""
    data, gate, limit = recipe.data, recipe.method.gate, recipe.rollout.max_completion_tokens
    g = 2 if recipe.method.pairs is not None else recipe.rollout.completions_per_prompt  # pairs: whatever is sampled
    # A tree row has the prompt once per group, other rows once per completion.
    samples = (1 if layout_in_use(recipe)[0] == "tree" else g) * data.max_prompt_tokens + g * limit
    if gate is None:
        return samples
    demonstration = data.max_prompt_tokens + recipe.demonstration_limit
    if not recipe.method.samples:
        return demonstration
    return max(samples, demonstration) if either_or(gate) else samples + demonstration


def _order(recipe: Recipe) -> tuple[str, ...]:
    if recipe.data.has_pairs:
        steps = ["take pairs, and the reference's log-probs of them", *describe_order(recipe.method)]
        return (*([text] if (text := describe_baseline(recipe)) else []), *steps)
    if not recipe.method.samples:
        return ("take prompts and their worked solutions", *describe_order(recipe.method))
    steps = [
        "sample completions",
        "score: " + (" + ".join(map(_reward, recipe.rewards)) or "nothing"),
    ]
    if recipe.method.pairs is not None:
        steps.append("pair the best completion of every group with its worst")
    steps += describe_order(recipe.method)
    if recipe.method.pairs is not None:
        return tuple(steps)
    if recipe.learner.steps_per_rollout == 1 and recipe.method.clip.type == "ppo":
        steps.append("(one update per rollout: the ratio is 1 and the clip never acts)")
    return tuple(steps)


def _reward(reward: Reward) -> str:
    if isinstance(reward, RewardModelSection):
        name = f"reward model {reward.path}"
    else:
        name = reward.name or reward.function
    return name if reward.weight == 1 else f"{reward.weight:g} x {name}"


def _print_values(console: Console, plan: Plan) -> None:
    from rich.table import Table
    from rich.text import Text

    console.rule(f"{plan.path} -> {plan.run_dir}", align="left")
    table = Table(box=None, padding=(0, 1))
    for heading in ("key", "value", "from"):
        table.add_column(heading)
    for value in plan.values:
        style = "dim" if value.origin == "default" else "bold" if value.origin == "command line" else ""
        table.add_row(
            Text(value.key), Text(json.dumps(value.value, ensure_ascii=False)), Text(value.origin), style=style
        )
    console.print(table)


def _print_batch(console: Console, b: Batch) -> None:
    console.rule("Batch", align="left")
    epochs = (
        "unknown before the data is loaded"
        if b.data_epochs is None
        else f"{b.data_epochs:.2f} ({b.training_prompts} prompts)"
    )
    sampled = [
        f"{b.processes} process(es) x {b.prompts_per_process} prompts x {b.completions_per_prompt} completions "
        f"= {b.completions_per_step} completions a step",
        f"at most {b.tokens_sampled_per_step:,} tokens sampled a step"
        + (f" (every group up to {b.samplings} times)" if b.samplings > 1 else ""),
    ]
    given = [f"{b.processes} process(es) x {b.prompts_per_process} = {b.prompts_per_step} {b.what} a step, not sampled"]
    lines = [
        *(sampled if b.completions_per_step else given),
        f"at most {b.tokens_per_process_and_update:,} tokens per process and update, "
        f"in about {b.micro_batches_per_update} micro-batches",
        f"{b.rollouts} rollouts x {b.updates_per_rollout} updates = {b.optimizer_steps} optimizer steps",
        f"passes over the data: {epochs}",
    ]
    for line in lines:
        console.print(f"  {line}", markup=False, highlight=False)


def _print_memory(console: Console, plan: Plan) -> None:
    console.rule("Memory per process, estimated", align="left")
    console.print(f"  model size from: {plan.memory_source}", markup=False, highlight=False)
    for line in plan.memory:
        console.print(f"  {line.bytes / GIB:8.2f} GiB  {line.what}: {line.formula}", markup=False, highlight=False)
    if plan.memory:
        total = sum(line.bytes for line in plan.memory)
        console.print(f"  {total / GIB:8.2f} GiB  in total, without the libraries' own", markup=False, highlight=False)
    else:
        console.print(
            "  weights + gradients + AdamW = 16 bytes a parameter in float32 (8 in bfloat16), the engine 2 more",
            markup=False,
            highlight=False,
        )

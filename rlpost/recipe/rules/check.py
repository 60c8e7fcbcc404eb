"""Cross-field rules: what is wrong with a recipe although every value is fine by itself. No model is loaded."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.errors import DataError, RecipeError, RewardError
from rlpost.recipe.places import candidates
from rlpost.recipe.rules.actor import critic_advice, kl_advice
from rlpost.recipe.rules.model import (
    adapter_problems,
    capped_logits,
    family_problems,
    flex_problems,
    quantization_advice,
    quantization_problems,
    rotary_advice,
)
from rlpost.recipe.rules.offload import offload_advice, offload_problems
from rlpost.recipe.rules.pairs import pair_problems
from rlpost.recipe.rules.paths import model_problems
from rlpost.recipe.rules.rollout import engine_problems, sync_problems
from rlpost.recipe.rules.setting import Rule, Setting, processes_from_environment, zero_stage_from_environment
from rlpost.recipe.sections.data import ArithmeticSource, DatasetSource, ReasoningGymSource, Source
from rlpost.recipe.sections.preference import PreferenceSource
from rlpost.recipe.sections.reward import RewardModelSection
from rlpost.recipe.sections.root import Recipe

if TYPE_CHECKING:
    from rlpost.recipe.load import LoadedRecipe


def check(recipe: Recipe, setting: Setting) -> list[str]:
    """Every problem, as a sentence that names the fields and a fix. Empty for a sound recipe."""
    return [problem for rule in RULES for problem in rule(recipe, setting)]


def advise(recipe: Recipe, setting: Setting) -> list[str]:
    """What is allowed but seldom meant."""
    return [note for rule in ADVICE for note in rule(recipe, setting)]


def refuse_unsound(loaded: LoadedRecipe, processes: int | None = None, *, learns: bool = True) -> None:
    """Raises RecipeError listing every problem of the recipe, if there is any."""
    setting = Setting(
        processes or processes_from_environment(),
        loaded.path.resolve().parent,
        zero_stage_from_environment(),
        learns,
    )
    problems = check(loaded.recipe, setting)
    if problems:
        head = f"{loaded.path}: " if len(problems) == 1 else f"{loaded.path} has {len(problems)} problems:\n  - "
        raise RecipeError(head + "\n  - ".join(problems))


def known_size(source: Source) -> int | None:
    """How many prompts a source gives, where that is known without loading it."""
    if isinstance(source, ReasoningGymSource | ArithmeticSource):
        return source.size
    from rlpost.data.files import is_local
    from rlpost.data.readers import count_rows

    count = count_rows(source.path) if is_local(source.path) else None
    return None if count is None else min(count, source.limit or count)


def training_prompts(recipe: Recipe) -> int | None:
    """How many prompts are trained on: `data.train` without what is held out of it; None: not known yet."""
    size = known_size(recipe.data.train)
    if size is None:
        return None
    return size - (recipe.data.held_out if recipe.data.eval is None else 0)


def _group_of_one(r: Recipe, _: Setting) -> Iterator[str]:
    center = r.method.advantage.center
    if not r.method.samples:
        return
    if r.method.pairs is None and r.rollout.completions_per_prompt == 1 and center in ("group", "leave_one_out"):
        yield (
            f"rollout.completions_per_prompt=1 with method.advantage.center={center}: a completion compared with "
            "itself has no advantage, so nothing would be learned. Sample at least 2 per prompt, or use center batch or none"
        )


def _division(r: Recipe, s: Setting) -> Iterator[str]:
    prompts, minibatches = r.rollout.prompts_per_step, r.learner.minibatches
    parts = minibatches * s.processes
    if prompts % parts == 0:
        return
    fits = max(parts, prompts - prompts % parts)
    if prompts % s.processes:
        what = f"the {s.processes} processes of this launch (WORLD_SIZE)"
    elif prompts % minibatches:
        what = f"learner.minibatches={minibatches}"
    else:
        what = f"learner.minibatches={minibatches} in each of the {s.processes} processes"
    yield (
        f"rollout.prompts_per_step={prompts} cannot be divided evenly among {what}. Set "
        f"rollout.prompts_per_step to {fits} or {fits + parts}"
    )


def _row_fits(r: Recipe, _: Setting) -> Iterator[str]:
    longest = r.data.max_prompt_tokens + r.rollout.max_completion_tokens
    if r.learner.micro_batch_tokens < longest:
        yield (
            f"learner.micro_batch_tokens={r.learner.micro_batch_tokens} is less than data.max_prompt_tokens="
            f"{r.data.max_prompt_tokens} plus rollout.max_completion_tokens={r.rollout.max_completion_tokens}: the "
            f"longest completion would not fit. Set learner.micro_batch_tokens to at least {longest}, or lower a limit"
        )


def _warmup(r: Recipe, _: Setting) -> Iterator[str]:
    if r.learner.warmup_steps and r.learner.warmup_steps >= r.optimizer_steps:
        yield (
            f"learner.warmup_steps={r.learner.warmup_steps} is not below the run's {r.optimizer_steps} optimizer steps "
            "(learner.rollouts x minibatches x epochs): the peak learning rate would never be reached. Lower it"
        )


def _temperature(r: Recipe, _: Setting) -> Iterator[str]:
    if r.rollout.temperature != 1 and not r.method.samples and not r.data.has_pairs:
        yield (
            f"rollout.temperature={r.rollout.temperature:g} with method.preset={r.method.preset}, which samples nothing in "
            "training: the likelihood of the worked solutions would be that of another distribution than the model's. Set it "
            "to 1 (evaluation.temperature is for evaluation)"
        )


def _one_token(r: Recipe, _: Setting) -> Iterator[str]:
    if r.rollout.top_k == 1 and r.method.samples and not r.data.has_pairs:
        yield (
            "rollout.top_k=1: every completion of a prompt is the same, so no group tells right from wrong. Raise it, or set "
            "it to -1"
        )


def _stop_after(r: Recipe, _: Setting) -> Iterator[str]:
    if r.learner.stop_after is not None and r.learner.stop_after > r.learner.rollouts:
        yield (
            f"learner.stop_after={r.learner.stop_after} is more than learner.rollouts={r.learner.rollouts}, where the "
            "schedule ends: set it to less, or to null"
        )


def _evaluation(r: Recipe, _: Setting) -> Iterator[str]:
    e = r.evaluation
    if e.prompts == 0:
        return
    if max(e.k, default=1) > e.samples:
        yield f"evaluation.k={max(e.k)} is more than evaluation.samples={e.samples}. Take more samples, or a smaller k"
    if r.data.eval is None and r.data.held_out == 0:
        yield (
            f"evaluation.prompts={e.prompts} but data.held_out=0 and no data.eval: there is nothing to evaluate on. "
            "Set data.held_out or data.eval, or switch evaluation off with evaluation.prompts=0"
        )
    if not r.data.has_pairs and not any(reward.accuracy for reward in r.rewards):
        yield (
            f"evaluation.prompts={e.prompts} but no reward has accuracy=true, so nothing says which answers are right. "
            "Set accuracy=true on the reward that does, or switch evaluation off with evaluation.prompts=0"
        )


def _rewards(r: Recipe, s: Setting) -> Iterator[str]:
    if not r.rewards and not r.data.has_pairs and r.method.samples:
        yield f"rewards is empty, but method.preset={r.method.preset} learns from rewards. Name at least one function or model"
    from rlpost.scoring.describe import describe_reward
    from rlpost.scoring.load import check_arguments

    names: list[str] = []
    for i, reward in enumerate(r.rewards):
        if isinstance(reward, RewardModelSection):
            names.append(reward.name)
            continue
        try:
            loaded = describe_reward(reward.function, s.base)
            check_arguments(loaded, reward.arguments)
        except RewardError as error:
            yield f"rewards.{i}.function: {error}".rstrip(".")
            continue
        names.append(reward.name or loaded.name)
        if reward.accuracy and reward.timeout_score is not None and reward.timeout_score >= r.scoring.threshold:
            yield (
                f"rewards.{i}.timeout_score={reward.timeout_score:g} is not below scoring.threshold={r.scoring.threshold:g}: "
                "a completion on which the verifier hangs would count as right. Lower it, or set accuracy=false"
            )
    for name, times in Counter(names).items():
        if times > 1:
            yield f"rewards: {times} of them are named {name}, so their metrics would mix. Give each a rewards.N.name"


def _data_size(r: Recipe, _: Setting) -> Iterator[str]:
    prompts = training_prompts(r)
    if prompts is not None and prompts < r.rollout.prompts_per_step:
        held = f" after data.held_out={r.data.held_out}" if r.data.eval is None and r.data.held_out else ""
        yield (
            f"data.train has {max(prompts, 0)} prompts{held}, fewer than rollout.prompts_per_step="
            f"{r.rollout.prompts_per_step}. Use more data, a smaller step, or fewer held-out prompts"
        )


def _flash_attention(r: Recipe, _: Setting) -> Iterator[str]:
    if r.model.attention != "flash_attention_2":
        return
    if importlib.util.find_spec("flash_attn") is None:
        yield "model.attention=flash_attention_2, but the package flash-attn is not installed. Install it, or use sdpa"
    if r.model.dtype == "float32" and r.model.autocast == "none":
        yield (
            "model.attention=flash_attention_2 with model.dtype=float32 and model.autocast=none: it computes in 16 "
            "bits only. Set model.autocast=bfloat16, or model.attention=sdpa"
        )
    import torch  # a second or two, and only for recipes that need the answer

    if not torch.cuda.is_available():
        yield "model.attention=flash_attention_2 needs a CUDA GPU, and torch sees none here. Use model.attention=sdpa"


def _solutions(r: Recipe, _: Setting) -> Iterator[str]:
    if not r.method.needs_demonstrations:
        return
    slots = " and ".join(f"method.{name}" for name in ("guidance", "gate") if getattr(r.method, name) is not None)
    train = r.data.train
    if isinstance(train, DatasetSource) and train.demonstration is None:
        yield (
            f"{slots} learns from worked solutions, but data.train.demonstration is null: no column of {train.path} is "
            "mapped. Name the column that holds them, such as data.train.demonstration=solution"
        )
    if isinstance(train, ReasoningGymSource):
        from rlpost.data.solutions import SOLVERS

        if train.task not in SOLVERS:
            yield (
                f"{slots} learns from worked solutions, but data.train.task={train.task} comes without. Tasks with "
                f"solutions: {', '.join(SOLVERS)}"
            )
    guidance = r.method.guidance
    if guidance is not None and guidance.wrong_at_most is not None and guidance.wrong_at_most >= guidance.threshold:
        yield (
            f"method.guidance.wrong_at_most={guidance.wrong_at_most:g} is not below the threshold {guidance.threshold:g} of "
            "right completions (method.guidance.threshold, by default scoring.threshold): right ones would be wrong too. "
            "Lower it, or set it to null"
        )
    if r.method.samples and not any(reward.accuracy for reward in r.rewards):
        yield (
            f"{slots} needs to know which completions are right, but no reward has accuracy=true. Set it on the one that "
            "says so"
        )
    longest = r.data.max_prompt_tokens + (r.data.max_demonstration_tokens or 0)
    if r.method.gate is not None and r.learner.micro_batch_tokens < longest:
        yield (
            f"learner.micro_batch_tokens={r.learner.micro_batch_tokens} is less than data.max_prompt_tokens="
            f"{r.data.max_prompt_tokens} plus data.max_demonstration_tokens={r.data.max_demonstration_tokens}: the longest "
            f"worked solution would not fit. Set learner.micro_batch_tokens to at least {longest}, or lower a limit"
        )


def _resume(r: Recipe, _: Setting) -> Iterator[str]:
    if r.resume != "never" and r.overwrite:
        yield f"resume={r.resume} with overwrite=true: one goes on from what the other deletes. Set one of them only"
    if r.resume not in ("never", "auto") and not Path(r.resume).expanduser().is_dir():
        there = sorted(r.run_dir.glob("checkpoints/step_*"), key=lambda p: (len(p.name), p.name))
        known = f"{r.run_dir} has {', '.join(p.name for p in there)}" if there else f"{r.run_dir} has no checkpoints"
        yield f"resume={r.resume}: there is no such folder ({known}). Name one, or use auto or never"


def _files(r: Recipe, s: Setting) -> Iterator[str]:
    from rlpost.data.files import find_files, is_local

    for key, source in (("data.train", r.data.train), ("data.eval", r.data.eval)):
        if isinstance(source, DatasetSource | PreferenceSource) and is_local(source.path):
            try:
                find_files(source.path, key, s.base)
            except DataError as error:
                yield str(error).rstrip(".")
    if r.model.chat_template is not None and not Path(r.model.chat_template).expanduser().is_file():
        places = candidates(r.model.chat_template, s.base)
        looked = " or ".join(str(place) for place in places)
        if folder := next((place for place in places if place.is_dir()), None):
            yield f"model.chat_template={r.model.chat_template}: {folder} is a folder. Name the Jinja file in it"
        else:
            yield f"model.chat_template={r.model.chat_template}: no such file ({looked}). Correct the path, or set it to null"
    if r.run_dir.exists() and not r.run_dir.is_dir():
        yield f"output_dir and name give {r.run_dir}, which is a file. Choose another name"


def _low_precision(r: Recipe, setting: Setting) -> Iterator[str]:
    if r.model.dtype == "bfloat16" and r.model.lora is None and not setting.zero_stage:
        yield (
            f"model.dtype=bfloat16 with learner.learning_rate={r.learner.learning_rate:g}: weights near 0.02 change in "
            "steps of about 1e-4 there, so smaller updates are lost. model.dtype=float32 is the safe choice"
        )


def _lora_dropout(r: Recipe, _: Setting) -> Iterator[str]:
    if r.model.lora is not None and r.model.lora.dropout > 0:
        yield (
            f"model.lora.dropout={r.model.lora.dropout:g}: the update's log-probs would not be those of the policy that "
            "sampled, which has no dropout. Set it to 0"
        )


def _tree_attention(r: Recipe, _: Setting) -> Iterator[str]:
    if r.learner.layout == "tree" and r.model.attention == "flash_attention_2":
        yield "learner.layout=tree needs a mask, which model.attention=flash_attention_2 does not take: sorted is used"


def _greedy_evaluation(r: Recipe, _: Setting) -> Iterator[str]:
    e = r.evaluation
    if e.prompts and e.samples == 1 and e.temperature != 1 and not r.data.has_pairs:
        yield f"evaluation.temperature={e.temperature:g} with evaluation.samples=1, which is greedy: it is not used"


def _rewritten_run(r: Recipe, _: Setting) -> Iterator[str]:
    if r.overwrite and (r.run_dir / "metrics.jsonl").is_file():
        yield f"overwrite=true: the run in {r.run_dir} will be deleted"


def _sequence_parallel(r: Recipe, setting: Setting) -> Iterator[str]:
    size = r.learner.sequence_parallel
    if size == 1:
        return
    if setting.processes % size:
        yield (
            f"learner.sequence_parallel={size} does not divide the {setting.processes} process(es) of the run: choose a "
            f"divisor, or start a multiple of {size} (accelerate's --num_processes)"
        )
    if r.model.attention == "eager":
        yield (
            f"learner.sequence_parallel={size} with model.attention=eager, which cannot share heads between processes: use "
            "sdpa, flex_attention or flash_attention_2"
        )
    if r.method.critic is not None and r.method.critic.model == "separate":
        yield (
            f"learner.sequence_parallel={size} with method.critic.model=separate, whose rows are not shared and would need "
            "the memory that sharing saves: use the critic on the trunk, or learner.sequence_parallel=1"
        )


RULES: tuple[Rule, ...] = (
    _files,
    model_problems,
    _rewards,
    _group_of_one,
    _division,
    _row_fits,
    _sequence_parallel,
    pair_problems,
    _solutions,
    _warmup,
    _temperature,
    _one_token,
    _stop_after,
    _evaluation,
    _data_size,
    engine_problems,
    sync_problems,
    offload_problems,
    _flash_attention,
    flex_problems,
    family_problems,
    capped_logits,
    quantization_problems,
    adapter_problems,
    _lora_dropout,
    _resume,
)
ADVICE: tuple[Rule, ...] = (
    _low_precision,
    quantization_advice,
    rotary_advice,
    offload_advice,
    _tree_attention,
    kl_advice,
    critic_advice,
    _greedy_evaluation,
    _rewritten_run,
)

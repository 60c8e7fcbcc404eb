"""Puts a run together from its recipe, cheapest checks first: nothing slow happens before everything else is known good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rlpost.errors import CheckpointError, DataError, RecipeError
from rlpost.experience import Group, Prompt
from rlpost.learner.actor_critic import ActorCritic
from rlpost.learner.checkpoint import CheckpointStore
from rlpost.learner.factory import check_launch, loading_device, make_learner
from rlpost.learner.learner import Learner
from rlpost.learner.process import Processes
from rlpost.learner.rng import seed_everything
from rlpost.learner.shape import check_adapter, check_shape
from rlpost.learner.update import Updater
from rlpost.learner.watch import Phases
from rlpost.methods.capo import CurvatureTracker, make_tracker
from rlpost.policy.attention import choose_layout
from rlpost.policy.loading import load_config
from rlpost.policy.model import Policy, load_policy
from rlpost.policy.precision import decide_precision
from rlpost.policy.rows import Layout
from rlpost.policy.sequence_parallel import SequenceParallel, refuse_unshareable
from rlpost.recipe.sections.root import Recipe
from rlpost.rollout.engine import RolloutEngine, SamplingSettings
from rlpost.run.state import check_world, read_counters
from rlpost.scoring.factory import ChecksColumns, GroupScorer, make_scorer
from rlpost.source.baseline import with_baselines
from rlpost.tracking.rundir import RunDirectory
from rlpost.tracking.tracker import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlpost.data.pairs import PairSets
    from rlpost.data.prompts import PromptSets
    from rlpost.data.sampler import PromptSampler
    from rlpost.evaluation.accuracy import EvaluationResult
    from rlpost.policy.critic import Critic
    from rlpost.recipe.load import LoadedRecipe

T = TypeVar("T")


@dataclass(slots=True)
class Parts:
    """What a run is made of."""

    recipe: Recipe
    processes: Processes
    run: RunDirectory
    tracker: Tracker
    phases: Phases
    store: CheckpointStore
    resume_from: Path | None
    tokenizer: PreTrainedTokenizerBase
    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    sampler: PromptSampler
    scorer: GroupScorer
    engine: RolloutEngine
    learner: Learner
    updater: Updater
    sampling: SamplingSettings
    model_path: str
    _reference: Policy | None = field(default=None)

    def phase(self, name: str, action: Callable[[], T]) -> T:
        """Runs `action` under a name, a clock and the watchdog."""
        with self.phases(name):
            return action()

    @contextmanager
    def reference(self) -> Iterator[Policy]:
        """The policy before any training: the frozen model under an adapter, else a second copy, loaded when first used."""
        policy = self.learner.policy
        if policy.has_adapter:
            with policy.disable_adapter():
                yield policy
            return
        if self._reference is None:
            self._reference = load_reference(self.recipe, self.model_path, self.processes.device)
        yield self._reference

    def forget_reference(self) -> None:
        """Frees the second copy, where one was loaded."""
        self._reference = None

    def evaluate(self) -> EvaluationResult:
        """Held-out accuracy of the policy as it stands in the engine; each process takes its share of the prompts."""
        return judge(self.recipe, self.engine, self.scorer, self.held_out, self.processes)

    def close(self, status: str) -> None:
        """Ends everything that was started."""
        self.store.close()
        self.scorer.close()
        self.tracker.close("finished" if status == "finished" else "stopped" if status == "interrupted" else "failed")
        self.engine.close()
        self.run.close()
        self.processes.close()


@dataclass(frozen=True, slots=True)
class JointScorer:
    """Scores on all processes at once: a reward that breaks on one of them ends all."""

    scorer: GroupScorer
    processes: Processes

    def score(self, groups: Sequence[Group]) -> list[Group]:
        return self.processes.together(lambda: self.scorer.score(groups))


def judge(
    recipe: Recipe, engine: RolloutEngine, scorer: GroupScorer, held_out: Sequence[Prompt], processes: Processes
) -> EvaluationResult:
    """Held-out accuracy of the weights in the engine; each process takes its share of the prompts."""
    from rlpost.evaluation.accuracy import evaluate

    return evaluate(
        engine,
        JointScorer(scorer, processes),
        held_out,
        recipe.evaluation,
        recipe.rollout,
        seed=recipe.seed,
        weights=tuple(r.weight for r in recipe.rewards),
        accuracy_rewards=[r.accuracy for r in recipe.rewards],
        rank=processes.rank,
        world_size=processes.world,
        gather=lambda groups: [group for part in processes.gather(groups) for group in part],
    )


def assemble(loaded: LoadedRecipe) -> Parts:
    """Builds all parts. Raises an RlpostError for whatever is wrong with recipe, data, rewards, model or machine."""
    from rlpost.data.sampler import PromptSampler

    processes = Processes()
    recipe, precision_notes = decide_precision(loaded.recipe)
    seed_everything(recipe.seed)
    scorer = processes.together(lambda: make_scorer(recipe.rewards, recipe.scoring, loaded.path.parent))
    started: list[Callable[[], Any]] = [scorer.close]
    try:
        run, resume_from = open_run(recipe, processes)
        started.append(run.close)
        tokenizer, sets = processes.together(lambda: load_prompts(recipe, scorer))
        tracker = processes.together(lambda: Tracker(run, recipe, is_main=processes.is_main))
        tracker.note(sets.note())
        if recipe.method.needs_demonstrations:
            tracker.note(processes.together(lambda: note_demonstrations(sets, recipe, tokenizer)))
        started.insert(0, lambda: tracker.close("failed"))
        processes.together(lambda: check_critic(recipe, len(tokenizer)))
        model_path, policy = processes.together(lambda: build_policy(recipe, resume_from, processes))
        share_rows(recipe, policy, processes)
        sets, sampled = with_baselines(recipe, sets, model_path, tokenizer, processes)
        engine = build_engine(recipe, model_path, tokenizer, processes)
        started.insert(0, engine.close)
        curvature = build_curvature(recipe, policy, processes)  # before ZeRO shards the head, whose shape it needs
        learner = make_learner(policy, recipe.learner, processes)
        layout, note = layout_for(policy, recipe.learner.layout, recipe.longest_sequence)
        for line in filter(None, (*precision_notes, *policy.notes, sampled, note)):
            tracker.note(line)
    except BaseException:
        for close in started:
            close()
        raise
    return Parts(
        recipe=recipe,
        processes=processes,
        run=run,
        tracker=tracker,
        phases=Phases(recipe.learner.watchdog_s),
        store=CheckpointStore(
            run.checkpoints, recipe.checkpoint.keep, processes, asynchronous=recipe.checkpoint.asynchronous
        ),
        resume_from=resume_from,
        tokenizer=tokenizer,
        prompts=sets.train,
        held_out=sets.held_out if recipe.evaluation.prompts else (),
        sampler=PromptSampler(len(sets.train), recipe.seed, recipe.data.shuffle, sets.fingerprint),
        scorer=scorer,
        engine=engine,
        learner=learner,
        updater=build_updater(recipe, learner, layout, tokenizer.pad_token_id, curvature),
        sampling=sampling_settings(recipe),
        model_path=model_path,
    )


def build_updater(
    recipe: Recipe, learner: Learner, layout: Layout, pad_id: int, curvature: CurvatureTracker | None
) -> Updater:
    """What takes optimizer steps."""
    method = recipe.method
    return Updater(
        learner=learner,
        method=method,
        section=recipe.learner,
        layout=layout,
        pad_id=pad_id,
        probe=recipe.rollout.probe,
        seed=recipe.seed,
        curvature=curvature,
        actor_critic=ActorCritic.of(method) if method.critic or method.controller else None,
    )


def open_run(recipe: Recipe, processes: Processes) -> tuple[RunDirectory, Path | None]:
    """The run's folder, locked by the main process, and the checkpoint to go on from."""
    fresh = recipe.resume == "never"

    def open_on_main() -> tuple[RunDirectory, Path | None]:
        if not processes.is_main:
            return RunDirectory.at(recipe.run_dir), None
        run = RunDirectory.open(recipe.run_dir, fresh=fresh, overwrite=recipe.overwrite)
        try:
            resume_from = find_checkpoint(recipe, run, processes)
            if not fresh:
                step = check_resume(resume_from, recipe, processes) if resume_from is not None else -1
                # In this order: killed in between, the run goes on from a checkpoint whose metrics are all there.
                CheckpointStore(run.checkpoints, recipe.checkpoint.keep, processes).set_aside_after(step)
                run.truncate_after(step)
        except BaseException:
            run.close()
            raise
        return run, resume_from

    run, found = processes.together(open_on_main)
    return run, processes.gather(found)[0]


def check_resume(path: Path, recipe: Recipe, processes: Processes) -> int:
    """The optimizer step of a checkpoint that recipe and launch can go on from. Raises CheckpointError."""
    counters = read_counters(path)
    check_shape(path, counters.get("shape", {}), recipe, in_rollout=counters["in_rollout"])
    check_world(path, counters["world"], processes.world, in_rollout=counters["in_rollout"])
    check_launch(path, counters["world"], processes)
    return counters["optimizer_step"]


def find_checkpoint(recipe: Recipe, run: RunDirectory, processes: Processes) -> Path | None:
    """The checkpoint that `resume` means."""
    if recipe.resume == "never":
        return None
    store = CheckpointStore(run.checkpoints, recipe.checkpoint.keep, processes)
    store.recover()
    if recipe.resume == "auto":
        return store.latest()
    path = Path(recipe.resume).expanduser()
    if not path.is_dir():
        raise CheckpointError(
            f"resume: there is no folder {path}. Name a folder such as {run.checkpoints}/step_000010, or use resume=auto."
        )
    return path


def context_window(recipe: Recipe) -> int | None:
    """How many tokens the model can attend to, from its configuration; None where that does not say."""
    from rlpost.data.packaged import resolve_model_path
    from rlpost.policy.loading import load_config

    config, _notes = load_config(recipe.model, resolve_model_path(recipe.model.path))
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_prompts(recipe: Recipe, scorer: ChecksColumns) -> tuple[PreTrainedTokenizerBase, PromptSets | PairSets]:
    """The tokenizer and the prompts, checked. Raises DataError, RecipeError and RewardError."""
    from rlpost.data.pairs import build_pairs
    from rlpost.data.prompts import build_prompts
    from rlpost.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    build = build_pairs if recipe.data.has_pairs else build_prompts
    sets: PromptSets | PairSets = build(
        recipe.data,
        tokenizer,
        max_context=context_window(recipe),
        seed=recipe.seed,
        max_completion_tokens=recipe.rollout.max_completion_tokens,
    )
    check_prompts(sets, recipe, scorer)
    return tokenizer, sets


def check_prompts(sets: PromptSets | PairSets, recipe: Recipe, scorer: ChecksColumns) -> None:
    """What can only be judged once the prompts are there."""
    if not sets.train:
        raise DataError(
            f"No training prompt is left ({sets.note()}). Raise data.max_prompt_tokens, or give more data in data.train."
        )
    scorer.check(sets.train[0].columns.keys())


def note_demonstrations(sets: PromptSets | PairSets, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """A line about the worked solutions that the method needs. Raises DataError when it cannot do with them."""
    from rlpost.data.demonstrations import check_demonstrations
    from rlpost.teaching.teacher import make_hinter, make_reader

    context = context_window(recipe)
    reader, hinter = make_reader(recipe, tokenizer, context), make_hinter(recipe, tokenizer, context)
    return check_demonstrations(sets.train, recipe.method, recipe.data, reader, hinter)


def build_policy(recipe: Recipe, resume_from: Path | None, processes: Processes) -> tuple[str, Policy]:
    """The path of the original model, and the policy: the original, or as a checkpoint left it."""
    from rlpost.data.packaged import resolve_model_path

    if resume_from is not None:
        check_adapter(resume_from, recipe.model.lora)
    model_path = resolve_model_path(recipe.model.path)
    refuse_unshareable(load_config(recipe.model, model_path)[0], recipe.learner.sequence_parallel)
    weights_from = model_path if resume_from is None or recipe.model.lora is not None else str(resume_from)
    policy = load_policy(
        recipe.model,
        weights_from,
        device=loading_device(recipe.model, processes),
        temperature=recipe.rollout.temperature,
        head_chunk_tokens=recipe.learner.head_chunk_tokens,
        layout=recipe.learner.layout,
        longest=recipe.longest_sequence,
        runs_on=processes.device,
    )
    if recipe.method.critic is not None:
        policy.critic = build_critic(recipe, model_path, policy)
    if resume_from is not None and recipe.model.lora is not None:
        load_adapter(policy, resume_from, processes.device)
    return model_path, policy


def load_adapter(policy: Policy, folder: Path, device: torch.device) -> None:
    """Puts the adapter that lies in `folder` into the policy's. Raises CheckpointError where it has another shape."""
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        set_peft_model_state_dict(policy.model, load_peft_weights(str(folder), device=str(device)))
    except (RuntimeError, ValueError, KeyError) as error:
        first = next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__).strip()
        raise CheckpointError(
            f"The adapter in {folder} does not fit the recipe's model.lora (rank and targets): {first}. Set model.lora as in "
            "the run that saved it (its recipe.yaml says how)."
        ) from error


def share_rows(recipe: Recipe, policy: Policy, processes: Processes) -> None:
    """Has processes share rows where the recipe says so (`learner.sequence_parallel`). Collective."""
    size = recipe.learner.sequence_parallel
    if size > 1:
        policy.sequence_parallel = SequenceParallel(size, rank=processes.rank, world=processes.world)
        policy.sequence_parallel.attach(policy.causal_lm)


def check_critic(recipe: Recipe, words: int) -> None:
    """Raises RecipeError where a separate critic cannot read what a tokenizer of so many words writes; nothing is loaded."""
    from rlpost.data.packaged import resolve_model_path

    critic = recipe.method.critic
    if critic is None or critic.path is None:
        return
    known = load_config(recipe.model, resolve_model_path(critic.path))[0].get_text_config().vocab_size
    if known < words:
        raise RecipeError(
            f"method.critic.path={critic.path} knows {known} tokens, but the tokenizer of model.path={recipe.model.path} has "
            f"{words}: the critic reads the policy's tokens. Name a model with that tokenizer, or null for the policy's own."
        )


def layout_for(policy: Policy, wanted: Layout, longest: int) -> tuple[Layout, str | None]:
    """The layout that the policy can take and a separate critic too, and a line saying why where it is not the wanted one.
    `longest`: how many tokens a sequence has at the most, which a sliding window must hold."""
    layout, note = choose_layout(policy.config, wanted, policy.config._attn_implementation, longest)
    trunk = None if policy.critic is None else policy.critic.trunk
    if note is not None or trunk is None:
        return layout, note
    layout, note = choose_layout(trunk.config, wanted, trunk.config._attn_implementation, longest)
    return layout, None if note is None else f"{note} (the critic's model)"


def build_critic(recipe: Recipe, model_path: str, policy: Policy) -> Critic:
    """The critic as it begins; a checkpoint's is loaded with the optimizer."""
    from rlpost.data.packaged import resolve_model_path
    from rlpost.policy.critic import make_critic

    section = recipe.method.critic
    assert section is not None
    path = model_path if section.path is None else resolve_model_path(section.path)
    width = policy.config.get_text_config().hidden_size
    return make_critic(section, recipe.model, path, width, device=policy.device, seed=recipe.seed)


def build_engine(
    recipe: Recipe, model_path: str, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> RolloutEngine:
    """The rollout engine of the run, or what stands for it where nothing is sampled."""
    if not recipe.samples:
        from rlpost.rollout.none import NoEngine

        return NoEngine()
    return start_engine(recipe, model_path, tokenizer, processes)


def start_engine(
    recipe: Recipe, model_path: str, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> RolloutEngine:
    """The rollout engine; several CPU processes take turns with their threads by having one each."""
    from rlpost.rollout.factory import make_engine

    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_completion_tokens
    return make_engine(
        recipe.rollout.engine,
        recipe.model,
        model_path,
        tokenizer,
        # Prompts that leave no room for a completion in the model's window are dropped or refused: no more is needed.
        max_model_len=min(longest, context_window(recipe) or longest),
        seed=recipe.seed,
        device=str(processes.device),
    )


def build_curvature(recipe: Recipe, policy: Policy, processes: Processes) -> CurvatureTracker | None:
    """The moments of the LM head's rows, for methods with a curvature mask."""
    vocabulary, width = policy.causal_lm.get_output_embeddings().weight.shape
    section = recipe.learner
    return make_tracker(recipe.method, vocabulary, width, betas=section.betas, eps=section.eps, device=processes.device)


def load_reference(recipe: Recipe, path: str, device: torch.device) -> Policy:
    """A frozen copy of the original model."""
    section = recipe.model.model_copy(update={"lora": None, "gradient_checkpointing": False})
    policy = load_policy(
        section,
        path,
        device=device,
        temperature=recipe.rollout.temperature,
        head_chunk_tokens=recipe.learner.head_chunk_tokens,
        layout=recipe.learner.layout,
        longest=recipe.longest_sequence,
    )
    return policy.requires_grad_(False)


def sampling_settings(recipe: Recipe) -> SamplingSettings:
    """The recipe's sampling, as engines take it."""
    rollout = recipe.rollout
    return SamplingSettings(
        max_completion_tokens=rollout.max_completion_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=rollout.stop,
    )

"""Builds a run's parts from its recipe: policy, critic, reference, rollout engine, updater."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlpost.data.packaged import described_by, resolve_model_path
from rlpost.errors import CheckpointError
from rlpost.learner.actor_critic import ActorCritic
from rlpost.learner.factory import loading_device
from rlpost.learner.learner import Learner
from rlpost.learner.process import Processes
from rlpost.learner.shape import check_adapter
from rlpost.learner.update import Updater
from rlpost.methods.capo import CurvatureTracker, make_tracker
from rlpost.policy.family import choose_layout
from rlpost.policy.loading import load_config
from rlpost.policy.model import Policy, load_policy
from rlpost.policy.rows import Layout
from rlpost.policy.sequence_parallel import SequenceParallel, refuse_unshareable
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.rollout import ProbeSection
from rlpost.recipe.sections.root import Recipe
from rlpost.rollout.engine import RolloutEngine, SamplingSettings
from rlpost.rollout.verify import level, precision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlpost.policy.critic import Critic


def context_window(recipe: Recipe) -> int | None:
    """How many tokens the model can attend to, from its configuration; None where that does not say."""

    config, _notes = load_config(recipe.model, described_by(recipe.model.path))
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def vocabulary(recipe: Recipe) -> int:
    """How many tokens the model knows: its embedding's rows, from its configuration."""
    return int(load_config(recipe.model, described_by(recipe.model.path))[0].get_text_config().vocab_size)


def build_policy(recipe: Recipe, resume_from: Path | None, processes: Processes) -> tuple[str, Policy]:
    """The path of the original model, and the policy: the original, or as a checkpoint left it."""

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
        from rlpost.learner.deepspeed_import import import_deepspeed  # seconds, and only for those who need it

        backend = torch.distributed.get_backend()
        import_deepspeed().init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        policy.sequence_parallel = SequenceParallel(size, rank=processes.rank, world=processes.world)
        policy.sequence_parallel.attach(policy.causal_lm)


def build_critic(recipe: Recipe, model_path: str, policy: Policy) -> Critic:
    """The critic as it begins; a checkpoint's is loaded with the optimizer."""
    from rlpost.policy.critic import make_critic

    critic = recipe.method.critic
    assert critic is not None
    path = model_path if critic.path is None else resolve_model_path(critic.path)
    width = policy.config.get_text_config().hidden_size
    longest = recipe.longest_sequence
    return make_critic(critic, recipe.model, path, width, device=policy.device, seed=recipe.seed, longest=longest)


def layout_for(policy: Policy, wanted: Layout, longest: int) -> tuple[Layout, str | None]:
    """The layout that the policy can take and a separate critic too, and a line saying why where it is not the wanted one.
    `longest`: how many tokens a sequence has at the most, which a sliding window must hold."""
    layout, note = choose_layout(policy.config, wanted, policy.config._attn_implementation, longest)
    trunk = None if policy.critic is None else policy.critic.trunk
    if note is not None or trunk is None:
        return layout, note
    layout, note = choose_layout(trunk.config, wanted, trunk.config._attn_implementation, longest)
    return layout, None if note is None else f"{note} (the critic's model)"


def load_reference(recipe: Recipe, path: str, device: torch.device) -> Policy:
    """A frozen copy of the original model."""
    model = recipe.model.model_copy(update={"lora": None, "gradient_checkpointing": False})
    policy = load_policy(
        model,
        path,
        device=device,
        temperature=recipe.rollout.temperature,
        head_chunk_tokens=recipe.learner.head_chunk_tokens,
        layout=recipe.learner.layout,
        longest=recipe.longest_sequence,
    )
    return policy.requires_grad_(False)


def build_engine(
    recipe: Recipe, model_path: str, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> RolloutEngine:
    """The rollout engine of the run, or what stands for it where nothing is sampled."""
    if not recipe.samples:
        from rlpost.rollout.none import NoEngine

        return NoEngine()
    return start_engine(recipe, model_path, tokenizer, processes)


def max_model_len(recipe: Recipe) -> int:
    """How many tokens of prompt and completion an engine must hold."""
    longest = recipe.longest_sequence  # the learner's: both choose rotary frequencies by it where they depend on length
    # Prompts that leave no room for a completion in the model's window are dropped or refused: no more is needed.
    return min(longest, context_window(recipe) or longest)


def adapter_rank(recipe: Recipe) -> int | None:
    """Of adapters that are sent by themselves; None where they are merged, or there are none."""
    lora = recipe.model.lora
    match recipe.rollout.sync.lora:
        case "merged":
            return None
        case "adapter":
            return None if lora is None else lora.rank
        case _:
            raise unknown_choice("rollout.sync.lora", recipe.rollout.sync.lora)


def start_engine(
    recipe: Recipe, model_path: str, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> RolloutEngine:
    """This process's rollout engine, which takes weights as `rollout.sync.rounding` says."""
    from rlpost.rollout.factory import make_engine
    from rlpost.rollout.place import Place
    from rlpost.rollout.rounding import with_rounding

    engine = make_engine(
        recipe.rollout.engine,
        recipe.model,
        model_path,
        tokenizer,
        max_model_len=max_model_len(recipe),
        seed=recipe.seed,
        device=str(processes.device),
        place=Place(processes.rank, processes.local_rank, processes.gather, recipe.run_dir / "rollout"),
        in_flight=recipe.rollout.in_flight,
        transfer=recipe.rollout.sync.transfer,
        adapter_rank=adapter_rank(recipe),
    )
    return with_rounding(engine, recipe.rollout.sync, recipe.seed)


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


def build_curvature(recipe: Recipe, policy: Policy, processes: Processes) -> CurvatureTracker | None:
    """The moments of the LM head's rows, for methods with a curvature mask."""
    rows, width = policy.causal_lm.get_output_embeddings().weight.shape
    adamw = recipe.learner
    return make_tracker(recipe.method, rows, width, betas=adamw.betas, eps=adamw.eps, device=processes.device)


def decided_probe(recipe: Recipe) -> ProbeSection | None:
    """The settings of the probe of a rollout's own samples, its limit in nats. None: there is no probe, or the samples come
    from other weights than those that the learner has when it begins to learn from them (`rollout.staleness`)."""
    probe = recipe.rollout.probe
    if probe is None or recipe.rollout.staleness:
        return None
    return probe.model_copy(update={"max_mean_gap": level(probe.max_mean_gap, precision(recipe))})


def build_updater(
    recipe: Recipe, learner: Learner, layout: Layout, pad_id: int, curvature: CurvatureTracker | None
) -> Updater:
    """What takes optimizer steps."""
    method = recipe.method
    return Updater(
        learner=learner,
        method=method,
        settings=recipe.learner,
        layout=layout,
        pad_id=pad_id,
        probe=decided_probe(recipe),
        seed=recipe.seed,
        curvature=curvature,
        actor_critic=ActorCritic.of(method) if method.critic or method.controller else None,
        exact_engine=precision(recipe) == "float32",
    )

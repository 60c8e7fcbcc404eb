"""The learner on DeepSpeed ZeRO: optimizer state, gradients and, at stage 3, weights sharded over the processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlpost.errors import CheckpointError, RecipeError
from rlpost.learner.deepspeed_import import import_deepspeed
from rlpost.learner.learner import CRITIC, StepReport, collect_weights, critic_rate
from rlpost.learner.optimizer import learning_rate, make_optimizer, set_learning_rate
from rlpost.learner.process import Processes
from rlpost.offload.forecast import Forecast
from rlpost.policy.model import Policy
from rlpost.policy.weights import Form
from rlpost.recipe.sections.learner import LearnerSection
from rlpost.recipe.sections.offload import AutoOffload


class DeepSpeedLearner:
    """`deepspeed.initialize` called directly: under a DeepSpeed configuration accelerate's own wrapper does not see the
    processes of a CPU run. Gradient accumulation is ours (the loop knows which micro-batch is the last)."""

    def __init__(
        self, policy: Policy, learner: LearnerSection, processes: Processes, forecast: Forecast | None = None
    ) -> None:
        """`forecast`: of the updates of `learner.offload`, which it is told the times of."""
        self._forecast = forecast
        self._deepspeed = import_deepspeed()
        self.policy = policy
        policy.maximum = processes.maximum  # ZeRO gathers and reduces in the passes: no process may make fewer of them
        self.processes = processes
        self._settings = learner
        # Of what is trained: float32 adapters on frozen bfloat16 weights are not to be rounded to bfloat16.
        trained = next(p for p in policy.parameters() if p.requires_grad)
        config = zero_config(learner, trained.dtype, launcher_settings())
        critic = policy.critic
        optimizer = make_optimizer(  # before the weights lose their shapes
            learner,
            policy.parameters(),
            () if critic is None else critic.parameters(),
        )
        self.stage: int = config["zero_optimization"]["stage"]
        with redirect_stdout(StringIO()):  # parts of DeepSpeed print
            if self.stage == 3:
                # Tensor by tensor, from where the model was loaded: the accelerator never holds the whole of it.
                self._deepspeed.zero.Init(module=policy, config_dict_or_path=config)
                _move_buffers(policy, processes.device)
            with _state_on_host(learner, optimizer):
                self._engine, *_ = self._deepspeed.initialize(
                    model=policy,
                    optimizer=optimizer,
                    config=config,
                    dist_init_required=False,
                )
        if learner.offload is not None:
            policy.notes += self._engine.optimizer.notes

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # The engine's forward would do this, but the loop calls the policy itself. Without it ZeRO-3 takes every micro-batch
        # for the step's first, and writes its gradient over those before instead of adding it to them.
        self._engine.optimizer.clear_backward_seen_flag()
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over processes; our losses have global denominators and are to be summed.
        self._engine.backward(loss * self.processes.world, scale_wrt_gas=False)

    def step(self, index: int, *, scale: float = 1.0, critic_only: bool = False) -> StepReport:
        rate = scale * learning_rate(self._settings, index)
        critic = critic_rate(self._settings, self.policy, index, scale)
        set_learning_rate(self._engine.optimizer.param_groups, rate, critic, critic_only=critic_only)
        before = self._engine.skipped_steps
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        skipped = self._engine.skipped_steps > before or bool(getattr(self._engine.optimizer, "overflow", False))
        return StepReport(
            float("nan") if skipped or norm is None else float(norm), rate, skipped, self._observed_update()
        )

    def _observed_update(self) -> dict[str, float]:
        """How long the update of `learner.offload` took and was predicted to; {} for a step that was skipped."""
        if self._forecast is None:
            return {}
        seconds = self._engine.optimizer.take_updated_s()
        return {} if seconds is None else self._forecast.observe(seconds)

    def discard(self) -> None:
        self._engine.zero_grad()

    @contextmanager
    def parked(self) -> Iterator[None]:
        if self._settings.offload is None or not self._settings.offload.park:
            yield
            return
        self._engine.optimizer.park()
        try:
            yield
        finally:
            self._engine.optimizer.unpark()

    def named_weights(self, form: Form = "merged") -> Iterator[tuple[str, Tensor]]:
        """One layer's weights gathered at a time: no process ever holds the whole model."""
        return self.policy.named_weights(self._gather, form=form)

    def full_state_dict(self, *, copy: bool = False) -> dict[str, Tensor] | None:
        if self.stage < 3 and not copy:
            return None
        keep = self.processes.is_main
        if self.stage < 3:
            return collect_weights(self.policy) if keep else None
        return collect_weights(self.policy, self._gather, keep=keep)

    def own_state(self) -> dict[str, Any]:
        """This process's shard, as DeepSpeed's own optimizer gives it.

        Not through `engine.save_checkpoint`, which is collective: one process with a full disk would leave the others
        waiting for it. What else that saves, weights and counters, is in the checkpoint already or not used.
        """
        return {self._file: {"stage": self.stage, "optimizer": self._engine.optimizer.state_dict()}}

    def shared_state(self) -> dict[str, Any]:
        critic = self.policy.critic  # below stage 3 the optimizer's state does not bring a module's weights back
        return {} if critic is None or self.stage == 3 else {CRITIC: critic.state_dict()}

    def load(self, folder: Path, *, world: int) -> None:
        saved = self.processes.together(lambda: self._read(folder, world))
        optimizer = self._engine.optimizer
        shards = [None] * world
        shards[self.processes.rank] = saved
        with redirect_stdout(StringIO()):
            optimizer.load_state_dict(shards, load_optimizer_states=True, load_from_fp32_weights=True)
        if self.stage == 3:
            optimizer.checkpoint_event_epilogue()  # small weights are kept whole on every process: gather them again
        elif self.policy.critic is not None:
            critic = torch.load(folder / "trainer" / CRITIC, weights_only=True, map_location=self.processes.device)
            self.policy.critic.load_state_dict(critic)

    def _read(self, folder: Path, world: int) -> Any:
        """This process's shard. Raises CheckpointError when it is not one for this launch configuration."""
        check_shards(folder, world, self.processes.world, self.stage)
        file = folder / "trainer" / self._file
        return torch.load(file, weights_only=False, map_location="cpu")["optimizer"]  # vetted before (`learner.vetted`)

    @property
    def _file(self) -> str:
        return _shard_name(self.processes.rank)

    def _gather(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[object]:
        return self._deepspeed.zero.GatheredParameters(list(parameters), enabled=self.stage == 3)


def _state_on_host(learner: LearnerSection, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Around `deepspeed.initialize`: puts `learner.offload` into effect."""
    if learner.offload is None:
        return nullcontext()
    if isinstance(learner.offload, AutoOffload):
        raise RuntimeError("learner.offload.type=auto is settled before the learner is made (rlpost.run.offload)")
    from rlpost.offload.zero3 import host_state  # imports DeepSpeed

    return host_state(learner.offload, optimizer)


def check_shards(folder: Path, world: int, now: int, stage: int) -> None:
    """Raises CheckpointError for what `now` processes under this ZeRO stage cannot take up of `world` processes."""
    begin_new = f"or begin a new run from its weights with model.path={folder}."
    if world != now:
        raise CheckpointError(
            f"{folder} holds the state of {world} processes, which DeepSpeed cannot spread over {now}. Start as many "
            f"processes, with the launch configuration that the run had, {begin_new}"
        )
    file = folder / "trainer" / _shard_name(0)
    if not file.is_file():
        raise CheckpointError(
            f"{folder} was not saved by DeepSpeed. Start with the launch configuration that the run had, {begin_new}"
        )
    saved = torch.load(file, weights_only=False, map_location="cpu", mmap=True)["stage"]  # no tensor is read
    if saved != stage:
        raise CheckpointError(
            f"{folder} was saved by DeepSpeed ZeRO-{saved}; this is ZeRO-{stage}, which cuts the state into other pieces. "
            f"Start with the launch configuration that the run had, {begin_new}"
        )


def _shard_name(rank: int) -> str:
    return f"zero_rank_{rank}.pt"


def _move_buffers(policy: Policy, device: torch.device) -> None:
    for buffer in policy.buffers():
        buffer.data = buffer.data.to(device)


def launcher_settings() -> dict[str, str]:
    """What accelerate's launcher handed on of the `deepspeed_config` in the launch file."""
    prefix = "ACCELERATE_DEEPSPEED_"
    return {k.removeprefix(prefix).lower(): v for k, v in os.environ.items() if k.startswith(prefix)}


def zero_stage() -> int:
    """The ZeRO stage of the launch file."""
    return zero_section(launcher_settings())["stage"]


def zero_section(launcher: Mapping[str, str]) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization` from the launch file, whose `deepspeed_config_file` comes first."""
    zero: dict[str, Any] = {
        "stage": int(launcher.get("zero_stage", 2)),
        "overlap_comm": torch.cuda.is_available(),
    }
    for part in ("offload_optimizer", "offload_param"):
        device = launcher.get(f"{part}_device", "none")
        if device != "none":
            zero[part] = {"device": device, "pin_memory": torch.cuda.is_available()}
    zero |= config_file(launcher).get("zero_optimization", {})
    if zero["stage"] not in (1, 2, 3):
        raise RecipeError(
            f"zero_stage is {zero['stage']} in the launch configuration; it must be 1, 2 or 3. For plain data parallelism "
            f"use launch/gpus.yaml."
        )
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device", "none") not in ("none", "cpu"):
            raise RecipeError(
                f"{part}_device is {zero[part]['device']} in the launch configuration; rlpost saves and resumes what lies "
                f"in memory, so it must be none or cpu."
            )
    return zero


def zero_config(learner: LearnerSection, dtype: torch.dtype, launcher: Mapping[str, str]) -> dict[str, Any]:
    """DeepSpeed's configuration from the launch file and the recipe.

    A `deepspeed_config_file` in the launch file is taken as it is, except for what the recipe says: batch sizes,
    clipping, the optimizer, its schedule, and precision. Raises RecipeError.
    """
    zero = zero_section(launcher)
    config = {k: v for k, v in config_file(launcher).items() if k not in _OF_THE_RECIPE}
    bf16 = dtype == torch.bfloat16
    if bf16 and zero["stage"] > 1:  # the sum of many small micro-batches in bfloat16 would lose the later ones
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    return {
        **config,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": learner.max_grad_norm or 0.0,
        "zero_optimization": zero,
        # Master weights in float32; a step with a gradient that is not finite is skipped, as DeepSpeed does in float32.
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


# What a recipe decides, and a DeepSpeed file may hold for other trainers ("auto" for the most part).
_OF_THE_RECIPE = ("optimizer", "scheduler", "fp16", "bf16", "train_batch_size", "zero_optimization")


def config_file(launcher: Mapping[str, str]) -> dict[str, Any]:
    """What the launch file's `deepspeed_config_file` holds; {} without one. Raises RecipeError for one that cannot be read."""
    file = launcher.get("config_file", "none")
    if file == "none":
        return {}
    try:
        return json.loads(Path(file).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RecipeError(
            f"deepspeed_config_file {file} of the launch configuration cannot be read: {error}"
        ) from error

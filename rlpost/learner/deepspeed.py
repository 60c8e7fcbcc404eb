"""The learner on DeepSpeed ZeRO: optimizer state, gradients and, at stage 3, weights sharded over the processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlpost.errors import CheckpointError, RecipeError
from rlpost.learner.learner import StepReport
from rlpost.learner.optimizer import learning_rate, make_optimizer
from rlpost.learner.process import Processes
from rlpost.policy.model import Policy
from rlpost.recipe.learner import LearnerSection


class DeepSpeedLearner:
    """`deepspeed.initialize` called directly: under a DeepSpeed configuration accelerate's own wrapper does not see the
    processes of a CPU run. Gradient accumulation is ours (the loop knows which micro-batch is the last)."""

    # ZeRO gathers weights and reduces gradients in the passes themselves, so no process may make fewer of them.
    equal_passes = True

    def __init__(self, policy: Policy, section: LearnerSection, processes: Processes) -> None:
        self._deepspeed = import_deepspeed()
        self.policy = policy
        self.processes = processes
        self._section = section
        self._names = [name for name, _ in policy.causal_lm.named_parameters()]
        config = zero_config(section, policy, launcher_settings())
        self.stage: int = config["zero_optimization"]["stage"]
        self._engine, *_ = self._deepspeed.initialize(
            model=policy,
            optimizer=_optimizer(section, policy, config),
            config=config,
            dist_init_required=False,
        )

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over processes; our losses have global denominators and are to be summed.
        self._engine.backward(loss * self.processes.world, scale_wrt_gas=False)

    def step(self, index: int) -> StepReport:
        rate = learning_rate(self._section, index)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        before = self._engine.skipped_steps
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        skipped = self._engine.skipped_steps > before or bool(getattr(self._engine.optimizer, "overflow", False))
        return StepReport(float("nan") if skipped or norm is None else float(norm), rate, skipped)

    def discard(self) -> None:
        self._engine.zero_grad()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """One layer's weights gathered at a time: no process ever holds the whole model."""
        return self.policy.named_weights(self._gather)

    def save_own(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder / "trainer"), tag="deepspeed", save_latest=False)

    def save_shared(self, folder: Path) -> None:
        """Everything is in the processes' own files."""

    def load(self, folder: Path, *, world: int) -> None:
        if world != self.processes.world:
            raise CheckpointError(
                f"{folder} holds DeepSpeed ZeRO-{self.stage} state of {world} processes and cannot be spread over "
                f"{self.processes.world}. Start {world} processes, or begin a new run from its weights with "
                f"model.path={folder}."
            )
        if not (folder / "trainer" / "deepspeed").is_dir():
            raise CheckpointError(
                f"{folder} was not saved by DeepSpeed. Start with the launch configuration that the run had, or begin a "
                f"new run from its weights with model.path={folder}."
            )
        self._engine.load_checkpoint(str(folder / "trainer"), tag="deepspeed")

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """The policy's weights on the CPU of the main process; collective. None where the module has them all anyway."""
        if self.stage < 3:
            return None
        state: dict[str, Tensor] = {}
        for name, parameter in self.policy.model.named_parameters():
            with self._gather([parameter]):
                if self.processes.is_main:
                    state[name] = parameter.detach().cpu().clone()
        return state

    def _gather(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[object]:
        return self._deepspeed.zero.GatheredParameters(list(parameters), enabled=self.stage == 3)


def import_deepspeed() -> ModuleType:
    """DeepSpeed, told which device to use and not to compile a kernel that training never calls.

    On CPU it would build `deepspeed_shm_comm` at its first start with several processes: a minute with a compiler, an
    exception without one, and an endless wait where an earlier build was killed and left its lock behind. Only
    `inference_all_reduce` uses that kernel; gradients and weights travel over gloo.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as buildable

    buildable["deepspeed_shm_comm"] = False
    return deepspeed


def launcher_settings() -> dict[str, Any]:
    """What accelerate's launcher handed on of the `deepspeed_config` in the launch file."""
    prefix = "ACCELERATE_DEEPSPEED_"
    return {k.removeprefix(prefix).lower(): v for k, v in os.environ.items() if k.startswith(prefix)}


def zero_config(section: LearnerSection, policy: Policy, launcher: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration from the launch file and the recipe.

    A `deepspeed_config_file` in the launch file is taken as it is; batch sizes, clipping and precision are the recipe's.
    """
    from_file: dict[str, Any] = {}
    file = launcher.get("config_file", "none")
    if file != "none":
        import json

        try:
            from_file = json.loads(Path(file).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise RecipeError(
                f"deepspeed_config_file {file} of the launch configuration cannot be read: {error}"
            ) from error
    dtype = next(policy.parameters()).dtype
    zero = {"stage": int(launcher.get("zero_stage", 2)), "overlap_comm": torch.cuda.is_available()}
    device = launcher.get("offload_optimizer_device", "none")
    if device != "none":
        zero["offload_optimizer"] = {"device": device, "pin_memory": torch.cuda.is_available()}
    device = launcher.get("offload_param_device", "none")
    if device != "none":
        zero["offload_param"] = {"device": device, "pin_memory": torch.cuda.is_available()}
    return {
        **from_file,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": section.max_grad_norm or 0.0,
        "zero_optimization": {**zero, **from_file.get("zero_optimization", {})},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _optimizer(section: LearnerSection, policy: Policy, config: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW; DeepSpeed's own CPU kernel where the state lies on the CPU and a GPU does the rest."""
    optimizer = make_optimizer(section, policy.parameters())
    offloaded = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    if offloaded and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(optimizer.param_groups, lr=section.learning_rate, betas=section.betas, eps=section.eps)
    return optimizer

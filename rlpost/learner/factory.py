"""Makes the learner that the launch configuration asks for."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rlpost.learner.learner import DataParallelLearner, Learner, check_plain
from rlpost.learner.process import Processes
from rlpost.offload.forecast import Forecast
from rlpost.policy.model import Policy
from rlpost.recipe.sections.learner import LearnerSection
from rlpost.recipe.sections.model import ModelSection


def make_learner(
    policy: Policy, learner: LearnerSection, processes: Processes, forecast: Forecast | None = None
) -> Learner:
    """DeepSpeed when the launcher's configuration says so (`distributed_type: DEEPSPEED`), else plain data parallelism.
    `forecast`: of the updates of `learner.offload`, which must be settled."""
    if uses_deepspeed():
        from rlpost.learner.deepspeed import DeepSpeedLearner

        return DeepSpeedLearner(policy, learner, processes, forecast)
    return DataParallelLearner(policy, learner, processes)


def check_launch(folder: Path, world: int, processes: Processes) -> None:
    """Raises CheckpointError where this launch cannot take up the learner's state that `world` processes saved."""
    if uses_deepspeed():
        from rlpost.learner.deepspeed import check_shards, zero_stage

        check_shards(folder, world, processes.world, zero_stage())
    else:
        check_plain(folder)


def loading_device(model: ModelSection, processes: Processes) -> torch.device:
    """Where the policy is loaded: under ZeRO-3 on the host, from which the learner takes it over tensor by tensor, so that
    no accelerator ever holds the whole of it."""
    if not uses_deepspeed() or model.attention == "flash_attention_2":  # whose kernels exist on the accelerator only
        return processes.device
    from rlpost.learner.deepspeed import zero_stage

    return torch.device("cpu") if zero_stage() == 3 else processes.device


def uses_deepspeed() -> bool:
    """Whether the launch configuration asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"

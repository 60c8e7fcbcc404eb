"""Makes the learner that the launch configuration asks for."""

from __future__ import annotations

import os

from rlpost.learner.learner import DataParallelLearner, Learner
from rlpost.learner.process import Processes
from rlpost.policy.model import Policy
from rlpost.recipe.learner import LearnerSection


def make_learner(policy: Policy, section: LearnerSection, processes: Processes) -> Learner:
    """DeepSpeed when the launcher's configuration says so (`distributed_type: DEEPSPEED`), else plain data parallelism."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        from rlpost.learner.deepspeed import DeepSpeedLearner

        return DeepSpeedLearner(policy, section, processes)
    return DataParallelLearner(policy, section, processes)

"""Runs reward functions: found by name, checked before a model is loaded, called in processes that can be killed."""

from __future__ import annotations

from rlpost.scoring.contract import RewardFunction, TrainerState, Unparsable
from rlpost.scoring.describe import describe_reward
from rlpost.scoring.load import check_signature, list_rewards, load_reward
from rlpost.scoring.scorer import Scorer

__all__ = [
    "RewardFunction",
    "Scorer",
    "TrainerState",
    "Unparsable",
    "check_signature",
    "describe_reward",
    "list_rewards",
    "load_reward",
]

"""Advice on KL penalties and critics: what is allowed but seldom meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlpost.recipe.sections.root import Recipe

if TYPE_CHECKING:
    from rlpost.recipe.rules.setting import Setting


def kl_advice(r: Recipe, _: Setting) -> Iterator[str]:
    """Estimators whose expected gradient is not that of the KL where the penalty acts."""
    place, estimator, controller = r.method.kl_place, r.method.kl.estimator, r.method.controller
    acts = controller is None or controller.term != "released"
    if place == "loss" and estimator == "k1" and acts:
        yield (
            "method.kl.estimator=k1 with the penalty in the loss: its gradient is zero in expectation, so nothing holds the "
            "policy near its reference. Use k3 or k2 there, or put the penalty into the reward"
        )
    if place == "reward" and estimator != "k1":
        yield (
            f"method.kl.estimator={estimator} with the penalty in the reward: the expected gradient is not that of the KL. "
            "Use k1 there, or put the penalty into the loss"
        )


def critic_advice(r: Recipe, setting: Setting) -> Iterator[str]:
    """Where the critic's own limit on gradients does nothing: DeepSpeed clips all gradients together."""
    critic, limit = r.method.critic, r.learner.max_grad_norm
    if setting.zero_stage and critic is not None and critic.max_grad_norm not in (None, limit):
        yield (
            f"method.critic.max_grad_norm={critic.max_grad_norm:g} does nothing under DeepSpeed, which clips policy and critic "
            f"together at learner.max_grad_norm={'null' if limit is None else format(limit, 'g')}. Set it to null, or start "
            "plain processes (launch/gpus.yaml)"
        )

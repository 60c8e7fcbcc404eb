"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.learner import LearnerSection


def learning_rate(learner: LearnerSection, step: int, peak: float | None = None) -> float:
    """The learning rate of optimizer step `step` (counted from 0): linear warm-up, then the schedule. `peak` replaces
    `learner.learning_rate`, for what follows the same schedule at another rate.

    A pure function of the step, so that nothing about it has to be saved. The first warm-up step has rate peak / warmup,
    not zero: a step that does nothing would waste a rollout.
    """
    peak = learner.learning_rate if peak is None else peak
    if step < learner.warmup_steps:
        return peak * (step + 1) / learner.warmup_steps
    total = total_optimizer_steps(learner)
    progress = (step - learner.warmup_steps) / max(1, total - learner.warmup_steps)
    match learner.schedule:
        case "linear":
            return peak * max(0.0, 1.0 - progress)
        case "cosine":
            return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        case "constant":
            return peak
        case _:
            raise unknown_choice("learner.schedule", learner.schedule)


def later_rates(learner: LearnerSection, step: int) -> tuple[float, ...]:
    """The learning rates of the optimizer steps after `step`, to the end of the schedule."""
    return tuple(learning_rate(learner, later) for later in range(step + 1, total_optimizer_steps(learner)))


def total_optimizer_steps(learner: LearnerSection) -> int:
    """Optimizer steps of the whole run."""
    return learner.rollouts * learner.steps_per_rollout


def set_learning_rate(
    groups: Iterable[dict[str, Any]], rate: float, critic_rate: float | None = None, *, critic_only: bool = False
) -> None:
    """Gives an optimizer's parameter groups the policy's rate, and those of a critic `critic_rate` (None: the policy's); with
    `critic_only` 0 to those of the policy, whose weights then do not even decay."""
    for group in groups:
        of_critic = group.get("of_critic", False)
        held = critic_only and not of_critic
        group["lr"] = 0.0 if held else critic_rate if of_critic and critic_rate is not None else rate


def make_optimizer(
    learner: LearnerSection,
    parameters: Iterable[torch.nn.Parameter],
    critic: Iterable[torch.nn.Parameter] = (),
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay spares vectors (norms and biases), as is usual.

    The parameters of `critic`, which are among them, are in groups of their own, with `of_critic`: see `set_learning_rate`.
    """
    trainable = [p for p in parameters if p.requires_grad]
    own = {id(p) for p in critic}
    groups: list[dict[str, Any]] = []
    for mine in (False, True):
        part = [p for p in trainable if (id(p) in own) == mine]
        matrices, vectors = [p for p in part if p.ndim >= 2], [p for p in part if p.ndim < 2]
        for params, decay in ((matrices, learner.weight_decay), (vectors, 0.0)):
            groups.append({"params": params, "weight_decay": decay, "of_critic": mine})
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=learner.learning_rate,
        betas=learner.betas,
        eps=learner.eps,
        fused=all(p.is_floating_point() for p in trainable),
    )


@torch.no_grad()
def clip_gradients(parameters: Sequence[torch.nn.Parameter], limit: float | None) -> torch.Tensor:
    """Scales the gradients down to the 2-norm `limit` (None: never); returns their norm before that, a float32 scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([piece for g in gradients for piece in _pieces(g)])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _pieces(gradient: torch.Tensor) -> Sequence[torch.Tensor]:
    """On CPU torch adds up the squares of a whole tensor one after the other: over an embedding's tens of millions in
    float32 the sum is off by 1e-5 to 1e-3. Norms of pieces, then the norm of those, are exact to 1e-7."""
    return gradient.reshape(-1).split(65_536) if gradient.device.type == "cpu" else (gradient,)

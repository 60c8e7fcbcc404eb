"""Does a curvature mask predict what the step then does? Compares predicted shifts with realised log-ratios."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlpost.experience import TokenRows
from rlpost.gradient.curvature import rank_correlation
from rlpost.gradient.metrics import Mean, Metric, Total
from rlpost.gradient.types import TokenView
from rlpost.methods.capo import CurvatureTracker, moved_tokens
from rlpost.methods.context import StepContext
from rlpost.policy.model import Policy


@dataclass(slots=True)
class CurvatureCheck:
    """Follows the curvature mask through one optimizer step: what it cost and, now and then, whether it was right.

    `mask/curvature/rank_correlation_shift` is Spearman's correlation of the predicted change of log pi, s, with the
    realised one on the first micro-batch; `..._kl` that of m_F with half the squared realised log-ratio. The prediction
    is for the token's own step alone, so what is realised also holds all other tokens' steps.
    """

    tracker: CurvatureTracker
    context: StepContext
    started: float = field(default_factory=time.perf_counter)
    mask_seconds: float = 0.0
    rows: TokenRows | None = None
    before: Tensor | None = None  # [N] log-probs before the step
    shift: Tensor | None = None  # [N] predicted
    kl: Tensor | None = None  # [N] predicted
    counted: Tensor | None = None  # [N] bool

    @property
    def due(self) -> bool:
        every = self.tracker.mask.verify_every
        return every > 0 and self.context.optimizer_step % every == 0 and self.context.learning_rate > 0

    def remember(self, rows: TokenRows, view: TokenView) -> None:
        """Keeps the step's first micro-batch for the comparison."""
        if not self.due or self.rows is not None:
            return
        predicted = self.tracker.predict(view, self.context)
        self.rows, self.before, self.counted = rows, view.logp, moved_tokens(view)
        self.shift, self.kl = predicted.shift, predicted.kl

    @torch.no_grad()
    def compare(self, policy: Policy, spare: TokenRows) -> dict[str, Metric]:
        """Runs the policy once more on the remembered rows (on all processes alike: ZeRO-3 gathers in the pass)."""
        metrics: dict[str, Metric] = {}
        if self.due:
            after = policy(self.rows if self.rows is not None else spare).logp
            if self.before is not None and self.shift is not None and self.kl is not None and self.counted is not None:
                realised = (after - self.before)[self.counted].double()
                pairs = {"shift": (self.shift, realised), "kl": (self.kl, realised.square() / 2)}
                for name, (predicted, seen) in pairs.items():
                    value = rank_correlation(predicted[self.counted].double(), seen)
                    if value == value:  # NaN: nothing moved
                        metrics[f"mask/curvature/rank_correlation_{name}"] = Mean(value, 1.0)
        return metrics

    def cost(self) -> dict[str, Metric]:
        """Milliseconds of the mask (without the head's statistics) and its share of the update so far."""
        whole = time.perf_counter() - self.started
        return {"time/mask_ms": Total(1000 * self.mask_seconds), "time/mask_share": Mean(self.mask_seconds, whole)}

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Adds what happens inside the `with` block to the mask's cost."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.mask_seconds += time.perf_counter() - start

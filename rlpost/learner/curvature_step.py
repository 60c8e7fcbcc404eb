"""Drives CAPO's curvature mask through an optimizer step, and measures what it costs and whether it predicted well."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlpost.experience import TokenRows
from rlpost.gradient.curvature import rank_correlation
from rlpost.gradient.metrics import Mean, Metric, merge, values
from rlpost.gradient.step import Predicted, StepContext
from rlpost.gradient.types import Coefficients, Counts, TokenView
from rlpost.learner.process import Processes
from rlpost.methods.capo import CurvatureTracker, moved_tokens
from rlpost.methods.estimator import compute_coefficients
from rlpost.policy.model import Policy
from rlpost.policy.rows import spare_rows
from rlpost.recipe.sections.method import MethodSection


@dataclass(slots=True)
class CurvatureStep:
    """One optimizer step of the curvature mask: `coefficients` for every micro-batch, then `finish` or `forget`.

    Now and then (`verify_every`) it is looked at whether the mask was right.
    `mask/curvature/rank_correlation_shift` is Spearman's correlation of the predicted change of log pi, s, with the
    realised one on the first micro-batch; `..._kl` that of m_F with half the squared realised log-ratio. The prediction
    is for the token's own step alone, so what is realised also holds all other tokens' steps.
    """

    tracker: CurvatureTracker
    context: StepContext
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

    def coefficients(self, method: MethodSection, rows: TokenRows, view: TokenView, counts: Counts) -> Coefficients:
        """`compute_coefficients` for a micro-batch of the method, with the tracker's predictions; the tracker takes note."""
        with self._clock():
            predicted = self.tracker.predict(view, self.context)
        if self.due and self.rows is None:  # the step's first micro-batch is looked at again after the step
            self.rows, self.before, self.counted = rows, view.logp, moved_tokens(view)
            self.shift, self.kl = predicted.shift, predicted.kl
        context = replace(self.context, curvature=Predicted(predicted, self.tracker.limits()))
        coefficients = compute_coefficients(method, view, counts, context=context)
        with self._clock():
            self.tracker.accumulate(view, coefficients, self.context, predicted)
        return coefficients

    def finish(self, policy: Policy, processes: Processes) -> dict[str, float]:
        """After the optimizer's step: moves the tracker on; what the mask cost, and whether it predicted well. Collective."""
        with self._clock():
            self.tracker.finish_step(self.context, processes.sum_)
        measured = {**self.cost(), **self.compare(policy, spare_rows())}
        return {**values(merge(processes.gather(measured))), **self.tracker.report()}

    def forget(self) -> None:
        """In place of `finish`, where the optimizer skipped its step."""
        self.tracker.forget_step()

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
        """Milliseconds of prediction, row gradients and moments, as a mean over processes. The head's statistics ride on the
        forward pass, and the comparison is a pass of its own: neither is in."""
        return {"time/mask_ms": Mean(1000 * self.mask_seconds, 1.0)}

    @contextmanager
    def _clock(self) -> Iterator[None]:
        """Adds what happens inside the `with` block to the mask's cost."""
        self._wait()  # for what was begun before, which is not ours
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.mask_seconds += time.perf_counter() - start

    def _wait(self) -> None:
        """A GPU is only told what to do, and works on behind the caller's back."""
        device = self.tracker.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def mask_share(metrics: Mapping[str, float], phases: Mapping[str, float]) -> dict[str, float]:
    """`time/mask_share`: the mask's share of a training step whose `phases` took so many seconds; {} without a mask."""
    whole = sum(seconds for name, seconds in phases.items() if name != "time/step")
    return {"time/mask_share": metrics["time/mask_ms"] / 1000 / whole} if whole and "time/mask_ms" in metrics else {}

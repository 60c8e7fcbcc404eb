"""CAPO (arXiv 2510.00819): reject tokens whose own step on the LM head would move the policy or the objective too far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlpost.gradient.curvature import Curvature, sgd_curvature, shift_curvature
from rlpost.gradient.metrics import Mean, Metric, histogram_quantile, log_histogram, mean_of, quantiles_of
from rlpost.gradient.types import Coefficients, HeadStatistics, TokenView
from rlpost.methods.context import StepContext
from rlpost.methods.moments import AllReduce, MomentRows, RowMeans
from rlpost.recipe.masks import CalibratedThresholds, CurvatureMask, FixedThresholds
from rlpost.recipe.method import MethodSection


@dataclass(frozen=True, slots=True)
class Limits:
    """A token is kept when kl < max_kl and min_objective <= objective < max_objective."""

    max_kl: float = math.inf
    max_objective: float = math.inf
    min_objective: float = -math.inf

    def kl_rejects(self, curvature: Curvature) -> Tensor:
        """[N] bool. Written so that NaN is rejected."""
        return (
            ~(curvature.kl < self.max_kl)
            if self.max_kl < math.inf
            else torch.zeros_like(curvature.kl, dtype=torch.bool)
        )

    def objective_rejects(self, curvature: Curvature) -> Tensor:
        """[N] bool."""
        if self.max_objective == math.inf and self.min_objective == -math.inf:
            return torch.zeros_like(curvature.kl, dtype=torch.bool)
        return ~((curvature.objective >= self.min_objective) & (curvature.objective < self.max_objective))


class CurvatureTracker:
    """What CAPO remembers between optimizer steps: the head rows' moments, and the calibration of its limits.

    The order in a step: `compute_coefficients` (reads only) and `accumulate` for every micro-batch, then `finish_step`
    once on every process. Moments are of accepted tokens with a non-zero advantage, candidates are judged by the state
    before the step.
    """

    def __init__(
        self,
        mask: CurvatureMask,
        vocabulary: int,
        width: int,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.mask = mask
        self.moments = MomentRows(vocabulary, width, betas=betas, eps=eps, dtype=dtype, device=device)
        self._vocabulary, self._width, self._dtype, self._device = vocabulary, width, dtype, device
        self._pending = self._new_means()
        self._histograms: dict[str, Tensor] = {}  # this process's observations of the current step
        self._observed: dict[str, Tensor] = {}  # all processes' observations of the finished steps
        self._observed_steps = 0
        self._peak = 0.0
        self._limits_per_unit: dict[str, float] = {}
        self._latest: tuple[TokenView, float, Curvature] | None = None

    def predict(self, view: TokenView, context: StepContext) -> Curvature:
        """m_F, m_H and s of the view's tokens for a step at the context's learning rate. Chunked: holds two tensors of
        chunk_tokens x k x d at the most. The last view's answer is kept until `accumulate`, which asks again."""
        if self._latest is not None and self._latest[0] is view and self._latest[1] == context.learning_rate:
            return self._latest[2]
        curvature = self._predict(view, context)
        self._latest = (view, context.learning_rate, curvature)
        return curvature

    def _predict(self, view: TokenView, context: StepContext) -> Curvature:
        statistics = _statistics(view)
        if self.mask.step == "sgd":
            if statistics.sum_p2 is None or statistics.sum_p3 is None:
                raise ValueError("a curvature mask with `step: sgd` needs sum_p2 and sum_p3")
            square = (statistics.hidden * context.logit_slope).square().sum(-1)
            return sgd_curvature(
                view.logp,
                statistics.sum_p2,
                statistics.sum_p3,
                square,
                view.advantage,
                context.learning_rate,
                self.mask.kl,
            )
        parts = [self._predict_adam(view, statistics, part, context) for part in self._chunks(view.logp.numel())]
        return Curvature(
            torch.cat([part.shift for part in parts]),
            torch.cat([part.kl for part in parts]),
            torch.cat([part.objective for part in parts]),
        )

    def _predict_adam(
        self, view: TokenView, statistics: HeadStatistics, part: slice, context: StepContext
    ) -> Curvature:
        ids, p, own = _top(view, statistics, part)
        advantage = view.advantage[part].to(p.dtype)
        hidden = statistics.hidden[part] * context.logit_slope
        slope = advantage[:, None] * (own.to(p.dtype) - p)
        u = self.moments.candidate_shift(ids, slope, hidden, context.learning_rate)
        return shift_curvature(u, p, own, advantage, self.mask.kl, self.mask.form)

    def limits(self, context: StepContext) -> Limits:
        """The limits in force; none while calibrating."""
        rule = self.mask.thresholds
        if isinstance(rule, FixedThresholds):
            high = math.inf if rule.max_objective is None else rule.max_objective
            low = -high if rule.min_objective is None else rule.min_objective
            return Limits(math.inf if rule.max_kl is None else rule.max_kl, high, low)
        peak = context.peak_learning_rate or max(self._peak, context.learning_rate)
        max_kl = self._limits_per_unit.get("kl", math.inf)
        high = self._limits_per_unit.get("objective", math.inf)
        return Limits(
            max_kl * peak**2 if max_kl < math.inf else math.inf,
            high * peak if high < math.inf else math.inf,
            -high * peak if high < math.inf else -math.inf,
        )

    def accumulate(self, view: TokenView, coefficients: Coefficients, context: StepContext) -> None:
        """Takes note of a micro-batch whose coefficients were computed; changes nothing before `finish_step`."""
        counted = moved_tokens(view)
        if self._calibrating and context.learning_rate > 0:
            self._observe(self.predict(view, context), counted, context)
        self._latest = None
        if self.mask.step != "adam":
            return
        statistics, accepted = _statistics(view), coefficients.keep & counted
        ids, p, own = _top(view, statistics, slice(None))
        slope = view.advantage.to(p.dtype)[:, None] * (own.to(p.dtype) - p)
        self._pending.add(ids[accepted], slope[accepted], statistics.hidden[accepted] * context.logit_slope)

    def finish_step(self, context: StepContext, all_reduce: AllReduce | None = None) -> None:
        """Updates moments and calibration after the optimizer's step; every process must call it.

        `all_reduce` sums a tensor over processes and returns it, so that the state stays the same everywhere.
        """
        if self.mask.step == "adam":
            self.moments.apply(*self._pending.total(all_reduce))
            self._pending = self._new_means()
        self._latest = None  # it was judged by the moments before this step
        self._peak = max(self._peak, context.learning_rate)
        if self._calibrating and context.learning_rate > 0:
            self._finish_observation(all_reduce)

    @property
    def _calibrating(self) -> bool:
        rule = self.mask.thresholds
        return isinstance(rule, CalibratedThresholds) and self._observed_steps < rule.steps

    def _observe(self, curvature: Curvature, counted: Tensor, context: StepContext) -> None:
        # In units of a fresh row's step, so that warm-up and Adam's bias correction do not blur the quantiles.
        unit = context.learning_rate * (self.moments.unit() if self.mask.step == "adam" else 1.0)
        seen = {"kl": curvature.kl / unit**2, "objective": curvature.objective.abs() / unit}
        for name, scaled in seen.items():
            counts = log_histogram(scaled[counted])
            self._histograms[name] = self._histograms[name] + counts if name in self._histograms else counts

    def _finish_observation(self, all_reduce: AllReduce | None) -> None:
        rule = self.mask.thresholds
        assert isinstance(rule, CalibratedThresholds)
        for name in ("kl", "objective"):
            counts = self._histograms.get(name, log_histogram(torch.empty(0)))
            if all_reduce is not None:
                counts = all_reduce(counts.to(self._device)).cpu()
            self._observed[name] = self._observed[name] + counts if name in self._observed else counts
        self._histograms = {}
        self._observed_steps += 1
        if not self._calibrating:
            for name in rule.rules:
                found = histogram_quantile(self._observed[name], 1 - rule.target / len(rule.rules))
                if found:  # nothing was seen, or nothing moved: then there is no scale for a limit
                    self._limits_per_unit[name] = found

    def _chunks(self, tokens: int) -> list[slice]:
        # On a CPU a chunk that stays in the cache takes a third of the time of one that does not.
        size = min(self.mask.chunk_tokens, 16) if torch.device(self._device).type == "cpu" else self.mask.chunk_tokens
        return [slice(start, start + size) for start in range(0, tokens, size)] or [slice(0, 0)]

    def _new_means(self) -> RowMeans:
        return RowMeans(self._vocabulary, self._width, self._dtype, self._device)

    def state_dict(self) -> dict[str, Any]:
        """The state between two optimizer steps."""
        return {
            "moments": self.moments.state_dict(),
            "observed": dict(self._observed),
            "observed_steps": self._observed_steps,
            "peak": self._peak,
            "limits_per_unit": dict(self._limits_per_unit),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`'s state; the mask's settings and the model must be the same."""
        self.moments.load_state_dict(state["moments"])
        self._observed, self._observed_steps = dict(state["observed"]), int(state["observed_steps"])
        self._peak, self._limits_per_unit = float(state["peak"]), dict(state["limits_per_unit"])
        self._pending, self._histograms, self._latest = self._new_means(), {}, None


def make_tracker(
    method: MethodSection,
    vocabulary: int,
    width: int,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    device: torch.device | str = "cpu",
) -> CurvatureTracker | None:
    """The tracker that a method needs in `StepContext.curvature`, or None. `vocabulary` x `width` is the head's shape."""
    mask = method.curvature
    return None if mask is None else CurvatureTracker(mask, vocabulary, width, betas=betas, eps=eps, device=device)


def moved_tokens(view: TokenView) -> Tensor:
    """[N] bool: sampled tokens with a non-zero advantage, the only ones that a mask can do anything to."""
    return (view.advantage != 0) & ~view.demonstration[view.sequence]


def curvature_metrics(view: TokenView, curvature: Curvature, limits: Limits, counted: Tensor) -> dict[str, Metric]:
    """Rejection by rule, quantiles of |m_F|, |m_H| and |s|, and how likely rejected and kept tokens were."""
    by_kl, by_objective = limits.kl_rejects(curvature), limits.objective_rejects(curvature)
    rejected, p = by_kl | by_objective, view.logp.exp()
    name = "mask/curvature"
    metrics: dict[str, Metric] = {
        f"{name}/predicted_share": mean_of(rejected.double(), counted),
        f"{name}/rejected_by_kl": mean_of(by_kl.double(), counted),
        f"{name}/rejected_by_objective": mean_of(by_objective.double(), counted),
        f"{name}/probability_rejected": mean_of(p, counted & rejected),
        f"{name}/probability_kept": mean_of(p, counted & ~rejected),
        f"{name}/kl_mean": mean_of(curvature.kl, counted),
        f"{name}/objective_mean": mean_of(curvature.objective, counted),
        **quantiles_of(f"{name}/kl", curvature.kl[counted]),
        **quantiles_of(f"{name}/objective", curvature.objective[counted]),
        **quantiles_of(f"{name}/shift", curvature.shift[counted]),
    }
    for rule, limit in (("max_kl", limits.max_kl), ("max_objective", limits.max_objective)):
        if limit < math.inf:
            metrics[f"{name}/{rule}"] = Mean(limit, 1.0)
    return metrics


def _statistics(view: TokenView) -> HeadStatistics:
    if view.statistics is None:
        raise ValueError("a curvature mask needs TokenView.statistics (see needs_statistics)")
    return view.statistics


def _top(view: TokenView, statistics: HeadStatistics, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [n, k], p [n, k] renormalised over them, is it the sampled token [n, k])."""
    if statistics.top_ids is None or statistics.top_logits is None or view.token is None:
        raise ValueError("a curvature mask with `step: adam` needs top_ids, top_logits and TokenView.token")
    ids = statistics.top_ids[part]
    p = torch.softmax(statistics.top_logits[part].to(statistics.hidden.dtype), dim=-1)
    return ids, p, ids == view.token[part][:, None]

"""CAPO (arXiv 2510.00819): reject tokens whose own step on the LM head would move the policy or the objective too far."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlpost.gradient.curvature import Curvature, Limits, sgd_curvature, shift_curvature
from rlpost.gradient.metrics import Mean, Metric, mean_of, quantiles_of
from rlpost.gradient.step import StepContext
from rlpost.gradient.types import Coefficients, HeadStatistics, TokenView
from rlpost.methods.calibration import Calibration
from rlpost.methods.moments import AllReduce, MomentRows, RowMeans
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.masks import CalibratedThresholds, CurvatureMask, FixedThresholds
from rlpost.recipe.sections.method import MethodSection

CPU_CHUNK_TOKENS = 16
"""On a CPU a chunk that stays in the cache takes a third of the time of one that does not."""


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
        self.device = torch.device(device)
        self._vocabulary, self._width, self._dtype = vocabulary, width, dtype
        self._pending = self._new_means()
        rule = mask.thresholds
        match rule:
            case CalibratedThresholds():
                self._calibration: Calibration | None = Calibration(rule)
            case FixedThresholds():
                self._calibration = None
            case _:
                raise unknown_choice("masks.thresholds", rule)

    def predict(self, view: TokenView, context: StepContext) -> Curvature:
        """m_F, m_H and s of the view's tokens for a step at the context's learning rate. Chunked: holds two tensors of
        chunk_tokens x k x d at the most."""
        statistics = _statistics(view)
        if not self.mask.by_adam:
            if statistics.sum_p2 is None or statistics.sum_p3 is None:
                raise ValueError("a curvature mask with `step: sgd` needs sum_p2 and sum_p3")
            if callable(context.logit_slope):
                raise ValueError("a curvature mask with `step: sgd` has no form for capped logits: use `step: adam`")
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
        ids, p, own, inner = _top(view, statistics, part, context)
        advantage = view.advantage[part].to(p.dtype)
        slope = advantage[:, None] * (own.to(p.dtype) - p) * inner
        u = inner * self.moments.candidate_shift(ids, slope, statistics.hidden[part], context.learning_rate)
        return shift_curvature(u, p, own, advantage, self.mask.kl, self.mask.form)

    def limits(self) -> Limits:
        """The limits in force; none while calibrating."""
        rule = self.mask.thresholds
        if self._calibration is not None:
            return self._calibration.limits or Limits()
        assert isinstance(rule, FixedThresholds)
        high = math.inf if rule.max_objective is None else rule.max_objective
        low = -high if rule.min_objective is None else rule.min_objective
        return Limits(math.inf if rule.max_kl is None else rule.max_kl, high, low)

    def accumulate(
        self, view: TokenView, coefficients: Coefficients, context: StepContext, predicted: Curvature | None = None
    ) -> None:
        """Takes note of a micro-batch whose coefficients were computed; changes nothing before `finish_step`. `predicted` is
        what `predict` said of the view, where that is at hand."""
        counted = moved_tokens(view)
        if self.calibrating and self._calibration is not None and context.learning_rate > 0:
            predicted = self.predict(view, context) if predicted is None else predicted
            self._calibration.observe(predicted, counted, self._largest_ahead(context))
        if not self.mask.by_adam:
            return
        statistics, accepted = _statistics(view), coefficients.keep & counted
        ids, p, own, inner = _top(view, statistics, slice(None), context)
        slope = view.advantage.to(p.dtype)[:, None] * (own.to(p.dtype) - p) * inner
        self._pending.add(ids[accepted], slope[accepted], statistics.hidden[accepted])

    def finish_step(self, context: StepContext, all_reduce: AllReduce | None = None) -> None:
        """Updates moments and calibration after the optimizer's step; every process must call it.

        `all_reduce` sums a tensor over processes and returns it, so that the state stays the same everywhere.
        """
        if self.mask.by_adam:
            self.moments.apply(*self._pending.total(all_reduce))
            self._pending = self._new_means()
        if self.calibrating and self._calibration is not None and context.learning_rate > 0:
            self._calibration.finish_step(all_reduce, self.device)

    def forget_step(self) -> None:
        """Drops what was accumulated since the last `finish_step`: the optimizer skipped its step."""
        self._pending = self._new_means()
        if self._calibration is not None:
            self._calibration.forget_step()

    @property
    def calibrating(self) -> bool:
        """Whether limits are still looked for: then nothing is rejected, and `StepContext.later_rates` is needed."""
        return self._calibration is not None and self._calibration.limits is None

    def report(self) -> dict[str, float]:
        """How many limits are in force and, of calibrated ones, how many steps must still be observed."""
        metrics = {"mask/curvature/limits": float(self.limits().rules)}
        if self._calibration is not None:
            left = self._calibration.rule.steps - self._calibration.steps
            metrics["mask/curvature/steps_to_observe"] = float(max(0, left))
        return metrics

    def _largest_ahead(self, context: StepContext) -> float:
        """How many times larger than this optimizer step the largest step is that the calibrated limits will judge.

        The limits act on the steps that come after the observed ones. Both sizes are those of Adam's step on a row of the head
        without history. The largest step need not be that of the peak learning rate, because Adam's bias correction makes early
        steps smaller or larger than the learning rate says.
        """
        assert self._calibration is not None
        waiting = self._calibration.rule.steps - self._calibration.steps - 1
        waiting = waiting if waiting < len(context.later_rates) else 0  # the run is shorter than the calibration
        size = self.moments.unit if self.mask.by_adam else lambda ahead: 1.0
        now = context.learning_rate * size(0)
        later = [rate * size(1 + i) for i, rate in enumerate(context.later_rates) if i >= waiting]
        return max(later, default=now) / now

    def _chunks(self, tokens: int) -> list[slice]:
        size = self.mask.chunk_tokens
        if self.device.type == "cpu":
            size = min(size, CPU_CHUNK_TOKENS)
        return [slice(start, start + size) for start in range(0, tokens, size)] or [slice(0, 0)]

    def _new_means(self) -> RowMeans:
        return RowMeans(self._vocabulary, self._width, self._dtype, self.device)

    def state_dict(self) -> dict[str, Any]:
        """The state between two optimizer steps."""
        calibration = None if self._calibration is None else self._calibration.state_dict()
        return {"moments": self.moments.state_dict(), "calibration": calibration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`'s state; the mask's settings and the model must be the same."""
        self.moments.load_state_dict(state["moments"])
        if self._calibration is not None:
            self._calibration.load_state_dict(state["calibration"])
        self._pending = self._new_means()


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
    rejected = limits.rejects(curvature)
    name = "mask/curvature"
    metrics: dict[str, Metric] = {
        f"{name}/predicted_share": mean_of(rejected.double(), counted),
        f"{name}/rejected_by_kl": mean_of(by_kl.double(), counted),
        f"{name}/rejected_by_objective": mean_of(by_objective.double(), counted),
        **probability_metrics(name, view, rejected, counted),
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


def probability_metrics(name: str, view: TokenView, rejected: Tensor, counted: Tensor) -> dict[str, Metric]:
    """How likely the rejected and the kept ones of the `counted` tokens [N] were."""
    p = view.logp.exp()
    return {
        f"{name}/probability_rejected": mean_of(p, counted & rejected),
        f"{name}/probability_kept": mean_of(p, counted & ~rejected),
    }


def _statistics(view: TokenView) -> HeadStatistics:
    if view.statistics is None:
        raise ValueError("a curvature mask needs TokenView.statistics (see needs_statistics)")
    return view.statistics


def _top(
    view: TokenView, statistics: HeadStatistics, part: slice, context: StepContext
) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
    """(ids [n, k], p [n, k] renormalised over them, is it the sampled token [n, k], d score / d (W h) [n, k] or a number)."""
    if statistics.top_ids is None or statistics.top_logits is None or view.token is None:
        raise ValueError("a curvature mask with `step: adam` needs top_ids, top_logits and TokenView.token")
    ids, scores = statistics.top_ids[part], statistics.top_logits[part].to(statistics.hidden.dtype)
    inner = context.logit_slope(scores) if callable(context.logit_slope) else context.logit_slope
    return ids, torch.softmax(scores, dim=-1), ids == view.token[part][:, None], inner

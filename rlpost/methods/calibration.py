"""CAPO's limits from what the first steps of a run predict: together they reject a target share where steps are largest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlpost.gradient.curvature import Curvature, Limits
from rlpost.gradient.metrics import BINS_PER_DECADE, DECADES, log_bins, upper_edge
from rlpost.methods.moments import AllReduce
from rlpost.recipe.sections.masks import CalibratedThresholds

BINS = BINS_PER_DECADE * DECADES + 1


class Calibration:
    """Observes the first steps, then knows the limits.

    Predictions are scaled to the largest step ahead before they are counted: m_F grows with the square of a step's size,
    m_H with the size. How m_F and m_H go together is kept, so that the two rules reject the target share *together*.
    """

    def __init__(self, rule: CalibratedThresholds) -> None:
        self.rule = rule
        self.limits: Limits | None = None  # None: still observing
        self.steps = 0  # that had something to observe
        self._now = torch.zeros(0)  # this process's observations of the current step
        self._seen = torch.zeros(0)  # all processes' of the finished steps; [BINS * BINS], or empty

    def observe(self, curvature: Curvature, counted: Tensor, scale: float) -> None:
        """Takes note of a micro-batch. `scale`: size of the largest step that the limits will judge, over this one's."""
        kl, objective = curvature.kl[counted] * scale**2, curvature.objective[counted].abs() * scale
        pairs = torch.bincount(log_bins(kl) * BINS + log_bins(objective), minlength=BINS * BINS).double().cpu()
        self._now = self._now + pairs if self._now.numel() else pairs

    def finish_step(self, all_reduce: AllReduce | None, device: torch.device | str) -> None:
        """Ends a step; every process must call it. A step in which no process saw a token does not count."""
        counts = self._now if self._now.numel() else torch.zeros(BINS * BINS, dtype=torch.float64)
        self._now = torch.zeros(0)
        if all_reduce is not None:
            counts = all_reduce(counts.to(device)).cpu()
        if not counts.any():
            return
        self._seen = self._seen + counts if self._seen.numel() else counts
        self.steps += 1
        if self.steps >= self.rule.steps:
            self.limits = joint_limits(self._seen.view(BINS, BINS), self.rule.target, self.rule.rules)
            self._seen = torch.zeros(0)

    def forget_step(self) -> None:
        """Drops what was observed since the last `finish_step`."""
        self._now = torch.zeros(0)

    def state_dict(self) -> dict[str, Any]:
        """The state between two optimizer steps."""
        current = self.limits
        limits = None if current is None else (current.max_kl, current.max_objective, current.min_objective)
        places = self._seen.nonzero().squeeze(1)
        return {"steps": self.steps, "places": places, "counts": self._seen[places], "limits": limits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`'s state."""
        self.steps, self._seen = int(state["steps"]), torch.zeros(0)
        if state["places"].numel():
            self._seen = torch.zeros(BINS * BINS, dtype=torch.float64)
            self._seen[state["places"]] = state["counts"]
        self.limits = None if state["limits"] is None else Limits(*state["limits"])
        self.forget_step()


def joint_limits(counts: Tensor, target: float, rules: Sequence[str]) -> Limits:
    """Limits that together reject the share `target` of the observations `counts` [BINS of m_F, BINS of |m_H|].

    Each of two rules rejects the same share by itself. A rule whose observations are all about 0 gets no limit: there is
    no scale for one.
    """
    grown = counts.cumsum(0).cumsum(1) / counts.sum()  # the share that is in these bins or lower ones
    by_kl, by_objective = grown[:, -1].contiguous(), grown[-1].contiguous()
    last, places = float(BINS - 1), (0.0, 0.0)
    least, most = target / 2, target  # what each rule rejects: half where they never agree, all where they always do
    for _ in range(30):
        share = (least + most) / 2
        places = (
            (_place(by_kl, 1 - share) if "kl" in rules else 0.0) or last,
            (_place(by_objective, 1 - share) if "objective" in rules else 0.0) or last,
        )
        least, most = (share, most) if 1 - _between(grown, *places) < target else (least, share)
    max_kl, high = (math.inf if place == last else upper_edge(place) for place in places)
    return Limits(max_kl, high, -high)


def _place(grown: Tensor, share: float) -> float:
    """Where a distribution function [BINS] reaches `share`, in bins, linear within one; 0 if bin 0 holds that much."""
    place = int(torch.searchsorted(grown, share))
    if place == 0:
        return 0.0
    below, above = float(grown[place - 1]), float(grown[place])
    return place - 1 + (share - below) / (above - below)


def _between(grown: Tensor, row: float, column: float) -> float:
    """The value of `grown` at fractional places, linear in both."""
    top, left = min(int(row), BINS - 2), min(int(column), BINS - 2)
    down, right = row - top, column - left
    corners = grown[top : top + 2, left : left + 2]
    rows = corners[0] * (1 - down) + corners[1] * down
    return float(rows[0] * (1 - right) + rows[1] * right)

"""Checks of the cases about sampling."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

from rlpost.recipe.load import load_recipe
from rlpost.run.loop import train


def sampling_top_k(folder: Path) -> None:
    """Truncated sampling: learner and sampler give log-probs of one distribution, so the gap is rounding and the weight 1."""
    runpy.run_path(str(folder / "make_model.py"))
    variants = (
        ("top-k", []),
        ("top-p", ["rollout.top_k=-1", "rollout.top_p=0.7"]),
        ("both", ["rollout.top_p=0.6", "rollout.temperature=0.5"]),
    )
    for name, changes in variants:
        run = train(load_recipe(folder / "recipe.yaml", [f"name={name}", *changes])).run_dir
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2]
        assert all(row["mismatch/max_abs_gap"] < 2e-4 and row["mismatch/kl"] < 1e-6 for row in rows), name


CHECKS: dict[str, Callable[[Path], None]] = {"sampling-top-k": sampling_top_k}

"""Checks of the cases about rewards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlpost.errors import RewardError
from rlpost.experience import Completion, Group, Outcome, Prompt
from rlpost.recipe.sections.reward import RewardSection, ScoringSection
from rlpost.scoring import Scorer
from rlpost.scoring.tryout import try_reward


def _exits(folder: Path) -> None:
    """An outcome of the completion, by which the run goes on or stops; no end of the program."""
    prompt = Prompt("q/0", ({"role": "user", "content": "q"},), "q", (1,))
    group = Group(prompt, (Completion((5,), (0.0,), "a", "stop"),) * 2)
    with Scorer([RewardSection(function="reward.py")], ScoringSection(workers=1, max_failed_share=1.0)) as scorer:
        [found] = scorer.score([group])
    assert [row[0].outcome for row in found.scores] == [Outcome.CRASHED] * 2
    assert found.scores[0][0].detail.startswith("SystemExit: 1")
    strict = Scorer([RewardSection(function="reward.py")], ScoringSection(workers=1))
    with strict, pytest.raises(RewardError, match="2 crashed"):
        strict.score([group])


def _pool(folder: Path) -> None:
    rows = try_reward("reward.py", folder / "samples.jsonl", deadline_s=30.0)
    assert [row.score.value for row in rows] == [1.0, 1.0]


CHECKS: dict[str, Callable[[Path], None]] = {
    "async-reward-exits": _exits,
    "reward-process-pool": _pool,
    "reward-spawn-pool": _pool,
}

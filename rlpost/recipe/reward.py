"""`rewards` and `scoring`: what is rewarded, and how reward functions are run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rlpost.recipe.base import Section


class RewardSection(Section):
    """One reward function."""

    function: str
    """`path/to/file.py:function`, `package.module:function`, or the name of a file in rewards/ (such as `math`)."""
    weight: float = 1.0
    """Its share in the sum."""
    name: str | None = None
    """Its name in metrics; the function's name by default."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Fixed keyword arguments, next to the data set's columns."""
    deadline_s: PositiveFloat = 10.0
    """Seconds that one completion may take. After that its process is killed and the outcome is `timed_out`."""
    call: Literal["sample", "group", "batch"] = "sample"
    """What one call sees: one completion (a crash costs one), its whole group, or the whole batch."""
    accuracy: bool = True
    """Whether this reward says if the answer is right (format and length rewards do not); used by guidance and gates."""


class ScoringSection(Section):
    """The processes that run reward functions."""

    workers: PositiveInt = 2
    """Worker processes per learner process."""
    max_failed_share: float = Field(0.5, gt=0, le=1)
    """Stop when a larger share of a step's scores timed out, crashed or was unparsable: the reward is broken."""

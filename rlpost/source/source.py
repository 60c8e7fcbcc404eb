"""What a run learns from: the protocol that the loop knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rlpost.learner.buffer import RolloutBuffer
    from rlpost.tracking.completions import ScoredRollout


class Source(Protocol):
    """Gives the loop one rollout after the other. All calls are collective: every process makes them alike."""

    def next(self, rollout: int) -> RolloutBuffer:
        """Rollout number `rollout` (from 0) on this process, ready for optimizer steps: rows, advantages, denominators."""
        ...

    def ahead(self, rollout: int) -> None:
        """Begins what may be sampled while `rollout` is learned from (`rollout.staleness`), with the weights of now."""
        ...

    def settle(self) -> None:
        """Waits until nothing is sampled any more, so that the engine can be given new weights."""
        ...

    def record(self, buffer: RolloutBuffer) -> ScoredRollout | None:
        """What goes into `completions/` of a rollout that was just learned from for the first time; None: nothing."""
        ...

    def evaluate(self) -> tuple[float, dict[str, float]]:
        """(accuracy, metrics) of the policy as it is on held-out data. The accuracy is NaN where it is not known."""
        ...

    def bookmark(self) -> Callable[[], None]:
        """Called before `next`. Gives a function that undoes the `next`: the same rollout is then drawn again."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, as plain JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was called: the same calls of `next` then give the same rollouts."""
        ...

    def own_state(self) -> Any:
        """What this process has sampled ahead, to be pickled; None: nothing. `state_dict` is the place before it."""
        ...

    def load_own_state(self, state: Any) -> None:
        """Takes back what `own_state` gave, after `load_state_dict`. Left out where the number of processes has changed: what
        was sampled ahead is then sampled again."""
        ...

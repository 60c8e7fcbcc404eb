"""Who has a rollout made, and when: the protocol, and the plain way of making each when it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from rlpost.source.collect import Collector

if TYPE_CHECKING:
    from rlpost.run.parts import Parts
    from rlpost.teaching.teacher import Teaching


@dataclass(frozen=True, slots=True)
class Collected:
    """A rollout's scored groups on this process, and what is to be known of how they came about."""

    teaching: Teaching
    optimizer_step: int  # how many steps had made the weights when it was begun
    drawn: tuple[int, ...] = ()  # the prompts that were drawn for it, over all processes
    metrics: dict[str, float] = field(default_factory=dict)  # seconds that it took beside the learner


class Collects(Protocol):
    """Where a `SampledSource` gets its groups from. All calls are collective."""

    def collect(self, rollout: int, memory: Mapping[str, int]) -> Collected:
        """Rollout number `rollout`; waits until it is made."""
        ...

    def ahead(self, rollout: int, memory: Mapping[str, int]) -> None:
        """Begins what may be made while `rollout` is learned from, with the weights that are in the engine now."""
        ...

    def settle(self) -> None:
        """Waits until the engine may be given other weights."""
        ...

    def rest(self) -> None:
        """Waits until nothing is under way: engine and scorer may then be asked by others."""
        ...

    def bookmark(self) -> Callable[[], None]:
        """Called before `collect`. Gives a function that undoes the `collect`: the same rollout is then collected again."""
        ...

    def position(self) -> dict[str, Any]:
        """The prompt sampler's state before everything that was not learned from yet, as plain JSON."""
        ...

    def kept(self) -> Any:
        """What is made and not learned from yet, to be pickled; None: nothing. Waits for what is under way."""
        ...

    def load(self, position: Mapping[str, Any]) -> None:
        """Goes back to where `position` was taken; what was made since is forgotten."""
        ...

    def keep(self, kept: Any) -> None:
        """Takes back what `kept` gave, after `load`."""
        ...


class InTurn:
    """Makes every rollout when it is asked for, with the newest weights. A `Collects`."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.collector = parts, Collector(parts, parts.sampler.next)

    def collect(self, rollout: int, memory: Mapping[str, int]) -> Collected:
        with self.parts.learner.parked():
            return Collected(self.collector.collect(rollout, memory), self.parts.optimizer_step)

    def ahead(self, rollout: int, memory: Mapping[str, int]) -> None:
        return

    def settle(self) -> None:
        return

    def rest(self) -> None:
        return

    def bookmark(self) -> Callable[[], None]:
        position = self.position()
        return lambda: self.load(position)

    def position(self) -> dict[str, Any]:
        return self.parts.sampler.state_dict()

    def kept(self) -> None:
        return

    def load(self, position: Mapping[str, Any]) -> None:
        self.parts.sampler.load_state_dict(position)

    def keep(self, kept: Any) -> None:
        return  # of a run that sampled ahead and does so no longer: its prompts are drawn again

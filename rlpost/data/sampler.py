"""Which prompts come next: a sequence that depends on the run's seed only, and can be resumed anywhere."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping
from typing import Any

from rlpost.errors import CheckpointError


class PromptSampler:
    """Indices of n prompts, epoch after epoch, each epoch in a new order drawn from (seed, epoch).

    It yields global batches: all processes build the same sampler, and each takes its share of every batch, so the
    sequence does not depend on how many processes there are. A batch may reach into the next epoch.
    `fingerprint` (see `PromptSets.fingerprint`) lets a resumed run notice that its prompts have changed.
    """

    def __init__(self, n: int, seed: int, shuffle: bool = True, fingerprint: str = "") -> None:
        if n < 1:
            raise ValueError(f"a sampler needs at least one prompt, not {n}")
        self.n = n
        self.seed = seed
        self.shuffle = shuffle
        self.fingerprint = fingerprint
        self.epoch = 0
        self.position = 0  # how many prompts of this epoch are used up; below n
        self.returned: list[int] = []  # drawn before, and not learned from: they come first
        self._order = self._epoch_order()

    @property
    def epochs(self) -> float:
        """Passes over the prompts so far, with fraction."""
        return self.epoch + self.position / self.n

    def next(self, k: int) -> list[int]:
        """The next k indices."""
        if k < 0:
            raise ValueError(f"cannot take {k} prompts")
        batch, self.returned = self.returned[:k], self.returned[k:]
        while len(batch) < k:
            taken = self._order[self.position : self.position + k - len(batch)]
            batch += taken
            self.position += len(taken)
            if self.position == self.n:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._epoch_order()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here; a few numbers, the order itself is drawn again."""
        return {
            "n": self.n,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "fingerprint": self.fingerprint,
            "epoch": self.epoch,
            "position": self.position,
            "returned": list(self.returned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken. Raises CheckpointError when that sequence cannot be continued."""
        for key, what in (
            ("n", "number of training prompts"),
            ("seed", "run's seed"),
            ("shuffle", "setting data.shuffle"),
            ("fingerprint", "content of the training prompts"),
        ):
            mine, saved = getattr(self, key), state[key]
            if mine != saved:
                raise CheckpointError(
                    f"The checkpoint cannot be resumed: the {what} was {saved} when it was written and is {mine} now, "
                    "so the order of prompts would change. Restore the data set, the recipe's `data` section and the "
                    "seed, or start a new run from the checkpoint's weights (model.path)."
                )
        returned = state.get("returned", ())
        if not (0 <= state["position"] < self.n and state["epoch"] >= 0 and all(0 <= i < self.n for i in returned)):
            raise CheckpointError(
                f"The checkpoint's sampler is damaged: epoch {state['epoch']}, position {state['position']} of "
                f"{self.n} prompts. Resume from an earlier checkpoint."
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.returned = [int(index) for index in state.get("returned", ())]
        self._order = self._epoch_order()

    def _epoch_order(self) -> array[int]:
        order = array("q", range(self.n))  # a list of a million numbers takes five times as much
        if self.shuffle:
            random.Random(f"prompts/{self.seed}/{self.epoch}").shuffle(order)
        return order

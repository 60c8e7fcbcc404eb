"""Adam's moments of LM-head rows, kept only for the vocabulary ids that were ever touched, always in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]  # the elementwise sum over all processes, the same on each of them


class RowTable:
    """Rows [d] by vocabulary id; ids never written read as zeros. Grows by doubling, so it costs what was touched."""

    def __init__(self, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        # Slot 0 is the row of zeros that all unseen ids share.
        self.slot = torch.zeros(vocabulary, dtype=torch.int64, device=device)
        self.used = 1
        self.data = torch.zeros(1, width, dtype=dtype, device=device)

    def gather(self, ids: Tensor) -> Tensor:
        """[..., d] rows of `ids` [...]."""
        return self.data[self.slot[ids]]

    def open(self, ids: Tensor) -> Tensor:
        """[U] slots of the distinct `ids` [U], made where there were none."""
        new = ids[self.slot[ids] == 0]
        needed = self.used + new.numel()
        if needed > self.data.shape[0]:
            grown = self.data.new_zeros(max(needed, 2 * self.data.shape[0]), self.data.shape[1])
            grown[: self.used] = self.data[: self.used]
            self.data = grown
        self.slot[new] = torch.arange(self.used, needed, device=self.slot.device)
        self.used = needed
        return self.slot[ids]

    def ids(self) -> Tensor:
        """[U] the touched ids, ascending."""
        return self.slot.nonzero().squeeze(1)


class MomentRows:
    """First and second Adam moments of LM-head rows, after `steps` updates."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.betas, self.eps, self.steps = betas, eps, 0
        self._first = RowTable(vocabulary, width, dtype, device)
        self._second = RowTable(vocabulary, width, dtype, device)

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(M, V), each [..., d], of `ids` [...]; zeros where an id was never touched."""
        return self._first.gather(ids), self._second.gather(ids)

    def candidate_shift(self, ids: Tensor, slope: Tensor, hidden: Tensor, learning_rate: float) -> Tensor:
        """u [n, k]: the logit shifts of the next Adam step if row ids[n, k] had gradient slope[n, k] * hidden[n].

        Holds a few [n, k, d] tensors: call it in chunks of tokens. The sign is that of ascent.
        """
        (b1, b2), t = self.betas, self.steps + 1
        first, second = self.rows(ids)
        gradient = slope[..., None] * hidden[:, None, :]
        step = (b1 * first).add_(gradient, alpha=1 - b1).div_(1 - b1**t)
        size = (b2 * second).add_(gradient.square_(), alpha=1 - b2).div_(1 - b2**t).sqrt_().add_(self.eps)
        return learning_rate * step.div_(size).mul_(hidden[:, None, :]).sum(-1)

    def unit(self) -> float:
        """Size of the next step of a row without history, in learning rates: c(t) of the method's page; 1 for large t."""
        (b1, b2), t = self.betas, self.steps + 1
        return ((1 - b1) / (1 - b1**t)) / ((1 - b2) / (1 - b2**t)) ** 0.5

    def apply(self, ids: Tensor, gradient: Tensor) -> None:
        """One Adam update of the moments of the distinct `ids` [U] with `gradient` [U, d]; other rows stay as they are."""
        b1, b2 = self.betas
        gradient = gradient.to(self._first.data.dtype)
        first, second = self._first.open(ids), self._second.open(ids)
        self._first.data[first] = b1 * self._first.data[first] + (1 - b1) * gradient
        self._second.data[second] = b2 * self._second.data[second] + (1 - b2) * gradient**2
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything, as CPU tensors and numbers."""
        ids = self._first.ids()
        first, second = self.rows(ids)
        return {"steps": self.steps, "ids": ids.cpu(), "first": first.cpu(), "second": second.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces everything."""
        for name in ("first", "second"):
            old: RowTable = getattr(self, f"_{name}")
            table = RowTable(old.slot.numel(), old.data.shape[1], old.data.dtype, old.slot.device)
            slots = table.open(state["ids"].to(old.slot.device))
            table.data[slots] = state[name].to(old.data)
            setattr(self, f"_{name}", table)
        self.steps = int(state["steps"])


class RowMeans:
    """Mean gradient of every touched head row over its occurrences in an optimizer step, all processes together."""

    def __init__(self, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._sums = RowTable(vocabulary, width, dtype, device)
        self._counts = torch.zeros(vocabulary, dtype=torch.float64, device=device)

    def add(self, ids: Tensor, slope: Tensor, hidden: Tensor) -> None:
        """Adds slope[n, k] * hidden[n] to row ids[n, k], for all n and k; ids are distinct within a token n."""
        rows, place = ids.unique(return_inverse=True)
        if not rows.numel():
            return
        share = slope.new_zeros(rows.numel(), ids.shape[0])
        share[place, torch.arange(ids.shape[0], device=ids.device)[:, None].expand_as(place)] = slope
        slots = self._sums.open(rows)  # first: it may replace the table
        self._sums.data[slots] += (share @ hidden).to(self._sums.data.dtype)
        self._counts += torch.bincount(ids.flatten(), minlength=self._counts.numel()).double()

    def total(self, all_reduce: AllReduce | None) -> tuple[Tensor, Tensor]:
        """(ids [U] ascending, means [U, d]), the same on every process. Exchanges touched rows only."""
        counts = self._counts if all_reduce is None else all_reduce(self._counts)
        ids = counts.nonzero().squeeze(1)
        sums = self._sums.gather(ids)
        if all_reduce is not None:
            sums = all_reduce(sums)
        return ids, sums / counts[ids, None].to(sums.dtype)

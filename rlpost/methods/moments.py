"""Adam's moments of LM-head rows, kept only for the vocabulary ids that were ever touched, always in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
        rows = self.data.index_select(0, self.slot[ids].flatten())  # several times faster than data[slots] on a CPU
        return rows.view(*ids.shape, self.data.shape[1])

    def open(self, ids: Tensor) -> Tensor:
        """[U] slots of the distinct `ids` [U], made where there were none."""
        new = ids[self.slot[ids] == 0]
        needed = self.used + new.numel()
        if needed > self.data.shape[0]:
            room = min(2 * self.data.shape[0], self.slot.numel() + 1)  # never more than all of them
            grown = self.data.new_zeros(max(needed, room), self.data.shape[1])
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
        """u [n, k]: the logit shifts of the next Adam step if row ids[n, k] had gradient g = slope[n, k] * hidden[n].

        u = lr sum_d h M' / (sqrt(V') + eps), with M' = (b1 M + (1 - b1) g) / (1 - b1^t) and V' alike from g^2. The signs
        are those of ascent. Holds two [n, k, d] tensors: call it in chunks of tokens. Constant factors are moved out of
        the sum, so that every element is touched as few times as possible.
        """
        (b1, b2), t = self.betas, self.steps + 1
        # With betas of 0 there is no history; a tiny number in their place keeps the factors finite.
        keep1, keep2 = max(b1, 1e-30) / (1 - b1**t), max(b2, 1e-30) / (1 - b2**t)
        new1, new2 = (1 - b1) / (1 - b1**t), (1 - b2) / (1 - b2**t)
        step, size = self.rows(ids)
        step.addcmul_(slope[..., None], hidden[:, None], value=new1 / keep1)
        size.addcmul_(slope.square()[..., None], hidden.square()[:, None], value=new2 / keep2)
        size.sqrt_().add_(self.eps / keep2**0.5)
        scale = learning_rate * keep1 / keep2**0.5
        return step.div_(size).mul_(hidden[:, None]).sum(-1).mul_(scale)

    def unit(self, ahead: int = 0) -> float:
        """How large Adam's next step of a row without history is, in learning rates: c(t) on the method's page; 1 for large t.

        `ahead`: asks about the step that comes so many updates later.
        """
        (b1, b2), t = self.betas, self.steps + 1 + ahead
        return ((1 - b1) / (1 - b1**t)) / ((1 - b2) / (1 - b2**t)) ** 0.5

    def apply(self, ids: Tensor, gradient: Tensor) -> None:
        """One Adam update of the moments of the distinct `ids` [U] with `gradient` [U, d]; other rows stay as they are."""
        b1, b2 = self.betas
        gradient = gradient.to(self._first.data.dtype)
        first, second = self._first.open(ids), self._second.open(ids)
        for table, slots, new, decay in (
            (self._first.data, first, gradient, b1),
            (self._second.data, second, gradient**2, b2),
        ):
            table.index_copy_(0, slots, table.index_select(0, slots).mul_(decay).add_(new, alpha=1 - decay))
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
        """Adds slope[n, k] * hidden[n] to row ids[n, k], for all n and k; ids are distinct within a token n.

        A sparse [U, n] times dense [n, d] product: nothing of size n x k x d, and each row is written once.
        """
        if not ids.numel():
            return
        flat = ids.flatten()
        counts = torch.bincount(flat, minlength=self._counts.numel())
        rows = counts.nonzero().squeeze(1)
        order = flat.argsort(stable=True)  # by row, within a row by token
        starts = counts[rows].cumsum(0) - counts[rows]
        weights = slope.flatten()[order].to(hidden.dtype)
        part = functional.embedding_bag(
            order // ids.shape[1], hidden, starts, mode="sum", per_sample_weights=weights
        )  # row u is the weighted sum of its tokens' hidden states
        slots = self._sums.open(rows)  # first: it may replace the table
        table = self._sums.data
        table.index_copy_(0, slots, table.index_select(0, slots).add_(part.to(table.dtype)))
        self._counts += counts

    def total(self, all_reduce: AllReduce | None) -> tuple[Tensor, Tensor]:
        """(ids [U] ascending, means [U, d]), the same on every process. Exchanges touched rows only."""
        counts = self._counts if all_reduce is None else all_reduce(self._counts)
        ids = counts.nonzero().squeeze(1)
        sums = self._sums.gather(ids)
        if all_reduce is not None:
            sums = all_reduce(sums)
        return ids, sums / counts[ids, None].to(sums.dtype)

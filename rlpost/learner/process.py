"""The processes of a run: a thin layer over accelerate's state and torch.distributed."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlpost import errors
from rlpost.errors import RlpostError, TrainingError

T = TypeVar("T")


class Processes:
    """Rank, world size, device, and the few collectives that the loop needs. With one process all are no-ops."""

    def __init__(self) -> None:
        from accelerate import PartialState

        if not torch.cuda.is_available():
            os.environ.setdefault(
                "DS_ACCELERATOR", "cpu"
            )  # else DeepSpeed, which transformers imports, warns at length
        # On CPU accelerate only sees several processes when it is told so, also under a DeepSpeed config.
        state = PartialState() if torch.cuda.is_available() else PartialState(cpu=True)
        self.rank: int = state.process_index
        self.world: int = state.num_processes
        self.local_rank: int = state.local_process_index
        self.device: torch.device = torch.device("cpu") if not torch.cuda.is_available() else state.device
        self._group: Any = None
        self.watch: Callable[[str], AbstractContextManager[None]] | None = None
        """What ends this process, by name, when it waits too long for the others; set once a run is put together."""
        if self.world > 1 and dist.get_backend() != "gloo":
            # Python objects and control flags travel over gloo, so that they never wait behind GPU work.
            self._group = dist.new_group(backend="gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds `tensor` over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every process's `value`, by rank, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        try:
            with self._waiting():
                dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:  # gloo's word for a process that is gone
            raise TrainingError(
                f"Process {self.rank} has lost the other processes of the run: one of them ended, and its own message says "
                f"why ({str(error).splitlines()[0]}). Mend that, then start again with resume=auto."
            ) from error
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` on every process; collective. An RlpostError of one ends all, so that none waits for the others.

        `action` must not be collective itself, or must fail on all processes alike.
        """
        if self.world == 1:
            return action()
        result: T | None = None
        problem: RlpostError | None = None
        try:
            result = action()
        except RlpostError as error:
            problem = error
        for any_problem in self.gather(problem):
            if any_problem is not None:
                self.fail(any_problem)
        return result  # type: ignore[return-value]

    def fail(self, error: RlpostError) -> NoReturn:
        """For an error that all processes know of: the main one raises it, the others leave quietly with its exit code."""
        if self.is_main:
            raise error
        time.sleep(errors.LAST_WORD_S)
        raise SystemExit(error.exit_code)

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""
        return any(self.gather(flag)) if self.world > 1 else flag

    def maximum(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return max(self.gather(number))

    def apart(self) -> Processes:
        """The same processes with a channel of their own, for a thread beside the run's; collective."""
        other = copy.copy(self)
        other.watch = None  # the thread that it is for has a watchdog of its own
        if self.world > 1:
            other._group = dist.new_group(backend="gloo")
        return other

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world > 1:
            with self._waiting():
                dist.barrier(group=self._group)

    def _waiting(self) -> AbstractContextManager[None]:
        return nullcontext() if self.watch is None else self.watch("wait for the other processes")

    def close(self) -> None:
        """Leaves the process group."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def world_size_from_environment() -> int:
    """How many processes the launcher started, without touching torch.distributed."""
    return int(os.environ.get("WORLD_SIZE", "1"))

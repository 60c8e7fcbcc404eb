"""The update in the place of DeepSpeed's own: a subclass of its ZeRO-3 optimizer, which believes that nothing is offloaded.

Gradients are reduced, scattered and added up as DeepSpeed does it, on the accelerator; overflow, norm and loss scale are its
own, too. What is replaced is the loop over sub-groups: it is recorded, and the program of `rlpost.offload.update` takes the
step. Master weights and moments are three flat vectors, on the host or on the accelerator (`resident`, `parked`), of which
DeepSpeed's and torch's own tensors are views: checkpoints and `deepspeed.utils.safe_get_*` read and write the state itself.
Only where a share of `interleaved` is resident must `bring_home` come first; saving and parking do it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.runtime.zero import stage3

from rlpost.errors import CheckpointError, RecipeError, RlpostError
from rlpost.offload.arithmetic import make_arithmetic
from rlpost.offload.known import refuse_unknown
from rlpost.offload.layout import cut
from rlpost.offload.update import FlatState, StepSetting, Update, host_vector
from rlpost.recipe.sections.offload import NOTHING_GAINED, SettledOffload


class HostStateZero3(stage3.DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3 whose optimizer state lies where `offload` says and is updated by a program."""

    offload: SettledOffload
    device: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._factor: float | torch.Tensor = 1.0
        self._recorded: list[int] = []
        sizes = self.fp16_partitioned_groups_flat_numel
        n = sum(sizes)
        gradients, weights = self.grad_partitions_flat_buffer, self.lp_param_buffer
        if not n == gradients.numel() == weights.numel():
            raise RuntimeError(
                f"ZeRO-3 holds {weights.numel()} weights and {gradients.numel()} gradients for {n} of its state"
            )
        p, m, v = (self._vector(n, weights.device) for _ in range(3))
        m.zero_()
        v.zero_()
        self.flat = FlatState(p, m, v, weights, gradients)
        for flat, part in self._sub_groups():
            p[part].copy_(flat.data)
            flat.data = p[part]
            self.optimizer.state[flat] = {"step": torch.zeros(()), "exp_avg": m[part], "exp_avg_sq": v[part]}
        pieces = cut(
            sizes,
            [self.sub_group_to_group_id[i] for i in range(len(sizes))],
            self.offload.piece_size,
            gpu_of=self.offload.gpu_of,
            every=self.offload.every,
            resident=self.offload.resident,
        )
        arithmetic, trouble = make_arithmetic(self.offload.arithmetic, weights.device)
        nothing = None if weights.is_cuda else NOTHING_GAINED
        self.notes = tuple(filter(None, (trouble, nothing)))  # for the user
        self.update = Update(self.flat, pieces, arithmetic=arithmetic)
        self.parked = False
        self.updated_s: float | None = (
            None  # how long the last update took; None: nothing was updated since it was asked for
        )
        self._host: list[torch.Tensor] = []  # where the accelerator's p, m and v lie while it is parked

    def _vector(self, n: int, device: torch.device) -> torch.Tensor:
        """A vector of the state, where it is at home."""
        if self.offload.state_on == "accelerator":
            return torch.empty(n, device=device)
        return host_vector(n, torch.float32, pinned=device.type == "cuda")

    def _sub_groups(self) -> Iterator[tuple[torch.Tensor, slice]]:
        """DeepSpeed's float32 tensor of each sub-group, and its elements in the flat vectors."""
        start = 0
        for flat in self.fp32_partitioned_groups_flat:
            yield flat, slice(start, start + flat.numel())
            start += flat.numel()

    @contextmanager
    def _on_host(self) -> Iterator[None]:
        before, self.device = self.device, "cpu"
        try:
            yield
        finally:
            self.device = before

    def _create_fp32_partitions(self) -> None:
        with self._on_host():  # master weights never lie on the accelerator
            super()._create_fp32_partitions()

    def initialize_optimizer_states(self) -> None:
        with self._on_host():  # nor do the gradients that DeepSpeed makes for torch to allocate moments
            super().initialize_optimizer_states()

    def _prepare_sub_group(self, sub_group_id: int, timer_names: set[str]) -> None:
        """No float32 copy of the gradients is made: the update reads them where they are."""

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Any) -> None:
        """Keeps the factor that DeepSpeed would multiply gradients by; the same for all sub-groups."""
        scale = self.loss_scale
        if self.clip_grad > 0.0:
            clip = ((total_norm / self.loss_scale) + 1e-6) / self.clip_grad
            scale = torch.clamp(clip, min=1.0) * self.loss_scale
        self._factor = 1.0 / scale

    def _optimizer_step(self, sub_group_id: int) -> None:
        self._recorded.append(sub_group_id)

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        """The update writes the weights."""

    def _post_step(self, timer_names: set[str]) -> None:
        """Here the step is taken: all sub-groups are recorded, and small weights are about to be gathered."""
        if self._recorded != list(range(len(self.fp16_groups))):
            raise RuntimeError(f"DeepSpeed stepped sub-groups {self._recorded} of {len(self.fp16_groups)}: report this")
        self._recorded = []
        states = [self.optimizer.state[flat] for flat, _ in self._sub_groups()]
        number = int(states[0]["step"]) + 1
        setting = StepSetting(number, float(self._factor), self.optimizer.param_groups)  # waits for the gradients' norm
        began = time.perf_counter()
        self.update.run(setting)
        self.updated_s = time.perf_counter() - began
        for state in states:
            state["step"].fill_(float(number))
        super()._post_step(timer_names)

    def take_updated_s(self) -> float | None:
        """How long the update took that was made since this was called last, in seconds; None: there was none."""
        found, self.updated_s = self.updated_s, None
        return found

    def state_dict(self) -> Any:
        """As DeepSpeed gives it, of the newest state."""
        self.update.bring_home()
        return super().state_dict()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Loading gives torch's optimizer tensors of its own: their values are taken, and it is given the views again.

        Raises CheckpointError where the sub-groups have made different numbers of steps.
        """
        if self.parked:
            raise RlpostError("nothing can be loaded into a learner that is parked: its weights are not there")
        super().load_state_dict(*args, **kwargs)
        numbers = {float(self.optimizer.state[flat].get("step", 0.0)) for flat, _ in self._sub_groups()}
        if len(numbers) > 1:
            raise CheckpointError(
                f"the checkpoint's sub-groups have made {sorted(numbers)} steps, which learner.offload makes together. "
                "Leave it out to go on from there"
            )
        [number] = numbers
        for flat, part in self._sub_groups():
            loaded = self.optimizer.state[flat]  # empty if it was saved before the first step
            for name, home in (("exp_avg", self.flat.m), ("exp_avg_sq", self.flat.v)):
                home[part] = loaded.get(name, 0.0)
            self.flat.p[part].copy_(flat.data)
            flat.data = self.flat.p[part]
            moments = {"exp_avg": self.flat.m[part], "exp_avg_sq": self.flat.v[part]}
            self.optimizer.state[flat] = {"step": torch.tensor(number), **moments}
        self.update.take_up()

    def park(self) -> None:
        """Gives memory of the accelerator back: weights are a cast of the state, gradients are spent, and state that is
        `parked`, or a resident share, goes to the host. All views stay valid, and must not be touched before `unpark`. Raises
        RlpostError while gradients wait for their step."""
        if self.parked or self.micro_step_id or self._epilogue_ran_this_backward:
            raise RlpostError("a learner can be parked once, and not between a backward pass and the step that uses it")
        self.parked = True
        self.update.bring_home()
        if self.offload.parks_state:
            self._state_to_host()
        for buffer in self._freed():
            buffer.untyped_storage().resize_(0)

    def unpark(self) -> None:
        """Brings all back. Gradients are zeros: what no process writes (a shard's padding, a parameter that took no part in
        the pass) would count in the norm as it is found."""
        for buffer in self._freed():
            buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())
        if self.offload.parks_state:
            for vector, home in zip(self._state(), self._host, strict=True):
                vector.copy_(home, non_blocking=True)
        self.update.take_up()
        self.flat.weights.copy_(self.flat.p)
        self.flat.gradients.zero_()
        self.parked = False

    def _state(self) -> tuple[torch.Tensor, ...]:
        return self.flat.p, self.flat.m, self.flat.v

    def _freed(self) -> Iterator[torch.Tensor]:
        """What parking gives back."""
        yield from (self.flat.weights, self.flat.gradients, *self.update.abroad)
        if self.offload.parks_state:
            yield from self._state()

    def _state_to_host(self) -> None:
        if not self._host:  # kept from then on: registering memory with CUDA takes seconds
            pinned = self.flat.p.is_cuda
            self._host = [host_vector(self.flat.p.numel(), torch.float32, pinned=pinned) for _ in range(3)]
        for home, vector in zip(self._host, self._state(), strict=True):
            home.copy_(vector, non_blocking=True)
        if self.flat.p.is_cuda:
            torch.cuda.synchronize()  # before the memory that is read is given back


@contextmanager
def host_state(offload: SettledOffload | None, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Around `deepspeed.initialize`: what it takes for ZeRO-3 is then `HostStateZero3`. None: nothing is changed.

    Raises RecipeError where this DeepSpeed works otherwise than the one that this was written for, and where `optimizer`, which
    it is going to be given, is not AdamW.
    """
    if offload is None:
        yield
        return
    refuse_unknown(Path(stage3.__file__).read_text(), deepspeed.__version__)
    if optimizer is not None:
        refuse_other_optimizers(optimizer)
    ours = type("HostStateZero3", (HostStateZero3,), {"offload": offload})
    with patch.object(stage3, "DeepSpeedZeroOptimizer_Stage3", ours):
        yield


def refuse_other_optimizers(optimizer: torch.optim.Optimizer) -> None:
    """Raises RecipeError for what an update by AdamW would not be the update of."""
    variants = {"amsgrad", "maximize"}
    wrong = sorted(name for name in variants if any(group.get(name) for group in optimizer.param_groups))
    if type(optimizer) is not torch.optim.AdamW or wrong:
        which = " ".join([type(optimizer).__name__, *(f"with {name}" for name in wrong)])
        raise RecipeError(
            f"learner.offload makes the steps of AdamW, and the optimizer is {which}. Leave learner.offload out."
        )

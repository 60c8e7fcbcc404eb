"""The update in the place of DeepSpeed's own: a subclass of its ZeRO-3 optimizer, which believes that nothing is offloaded.

Gradients are reduced, scattered and added up as DeepSpeed does it, on the accelerator; overflow, norm and loss scale are its
own, too. What is replaced is the loop over sub-groups: it is recorded, and the program of `rlpost.offload.update` takes the
step. Master weights and moments are three flat vectors on the host, of which DeepSpeed's and torch's own tensors are views:
checkpoints and `deepspeed.utils.safe_get_*` read and write the state itself.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.runtime.zero import stage3

from rlpost.errors import RecipeError
from rlpost.offload.arithmetic import Hyper, Step, make_arithmetic
from rlpost.offload.layout import cut
from rlpost.offload.update import FlatState, Update, host_vector
from rlpost.recipe.sections.offload import Offload

_log = logging.getLogger(__name__)

FINGERPRINTS = {
    "__init__": "2ebc271180aa345f7a06274a0774e94811d03f5c480e825858c60c74aa6cf705",
    "_create_fp32_partitions": "2d22754c23f57f2968c8abdaa5aa3eaeb7b9e46c954fb4aa7684ac4cc4fc40ba",
    "initialize_optimizer_states": "e7929e87483515f88cbf98551c0d6928a309efea7802e545f22752763912abf0",
    "step": "89aab0f80f1a80b328a6b87b3cec95352b8973c4a69e3c805ac162950ff9f7fc",
    "_prepare_sub_group": "89aab0f80f1a80b328a6b87b3cec95352b8973c4a69e3c805ac162950ff9f7fc",
    "unscale_and_clip_grads": "89aab0f80f1a80b328a6b87b3cec95352b8973c4a69e3c805ac162950ff9f7fc",
    "_optimizer_step": "35f8511bba5ff760b250d0b0a7d062d28dda6adb699913a298de4b44dba17951",
    "_reassign_or_swap_out_partitioned_parameters": "89aab0f80f1a80b328a6b87b3cec95352b8973c4a69e3c805ac162950ff9f7fc",
    "_release_sub_group": "89aab0f80f1a80b328a6b87b3cec95352b8973c4a69e3c805ac162950ff9f7fc",
    "_post_step": "89aab0f80f1a80b328a6b87b3cec95352b8973c4a69e3c805ac162950ff9f7fc",
    "partition_grads": "89aab0f80f1a80b328a6b87b3cec95352b8973c4a69e3c805ac162950ff9f7fc",
    "_rigid_state_dict": "9a67500b2f2c4a7a30cfb97ba0045ff6390179b238c7bd967bce96717baa96d5",
    "_rigid_load_state_dict": "4e33833d717fd28b6ca98b8947dffed0b1d57f3df0640ea4f40813cba8ffb603",
    "state_dict": "3807080dd2927deb304782b579ce84ad7b36c201ee6db46fb981b49816529dd7",
    "load_state_dict": "092c666951ab079617a9fcea190299a4d11144876cd897d0a29ea260e8e4ca58",
}
"""By method of DeepSpeed's that is replaced or relied on: the SHA-256 of its source, of DeepSpeed 0.19.8."""


class HostStateZero3(stage3.DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3 whose optimizer state lies on the host and is updated by a program."""

    offload: Offload
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
        p, m, v = (host_vector(n, torch.float32, pinned=weights.is_cuda) for _ in range(3))
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
        )
        arithmetic, said = make_arithmetic(self.offload.arithmetic)
        if said is not None:
            _log.warning("rlpost: %s", said)
        self.update = Update(self.flat, pieces, arithmetic)

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
        groups = tuple(
            Hyper(g["lr"], tuple(g["betas"]), g["eps"], g["weight_decay"]) for g in self.optimizer.param_groups
        )
        self.update.run(Step(number, float(self._factor), groups))
        for state in states:
            state["step"].fill_(float(number))
        super()._post_step(timer_names)

    def park(self) -> None:
        """Gives the accelerator's memory of weights and gradients back, between steps: weights are the master weights' cast,
        and gradients are spent. Views of either stay valid, and may not be read until `unpark`."""
        for buffer in (self.flat.weights, self.flat.gradients):
            buffer.untyped_storage().resize_(0)
        if self.flat.weights.is_cuda:
            torch.cuda.empty_cache()  # so that others on the card can have it

    def unpark(self) -> None:
        """Makes weights and gradients again; the latter as zeros, since a step counts what nothing was added to."""
        for buffer in (self.flat.weights, self.flat.gradients):
            buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())
        self.flat.weights.copy_(self.flat.p)
        self.flat.gradients.zero_()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Loading gives torch's optimizer tensors of its own: their values are taken, and it is given the views again."""
        super().load_state_dict(*args, **kwargs)
        for flat, part in self._sub_groups():
            state = self.optimizer.state[flat]
            state["step"] = state["step"].detach().clone().cpu()
            for name, home in (("exp_avg", self.flat.m), ("exp_avg_sq", self.flat.v)):
                home[part].copy_(state[name])
                state[name] = home[part]
            self.flat.p[part].copy_(flat.data)
            flat.data = self.flat.p[part]


@contextmanager
def host_state(offload: Offload | None) -> Iterator[None]:
    """Around `deepspeed.initialize`: what it takes for ZeRO-3 is then `HostStateZero3`. None: nothing is changed.

    Raises RecipeError where this DeepSpeed works otherwise than the one that this was written for.
    """
    if offload is None:
        yield
        return
    check_fingerprints()
    ours = type("HostStateZero3", (HostStateZero3,), {"offload": offload})
    with patch.object(stage3, "DeepSpeedZeroOptimizer_Stage3", ours):
        yield


def check_fingerprints() -> None:
    """Raises RecipeError, naming what differs, where the installed DeepSpeed's methods are not those that were tested."""
    changed = [name for name, wanted in FINGERPRINTS.items() if fingerprint(name) != wanted]
    if changed:
        raise RecipeError(
            f"learner.offload replaces parts of DeepSpeed's ZeRO-3 optimizer, and {', '.join(changed)} of DeepSpeed "
            f"{deepspeed.__version__} differ from those of 0.19.8, with which it was tested. Install deepspeed==0.19.8, or "
            "leave learner.offload out and start with launch/zero3-offload.yaml, DeepSpeed's own offload."
        )


def fingerprint(name: str) -> str:
    """SHA-256 of a method's source; empty where there is none of that name."""
    method = getattr(stage3.DeepSpeedZeroOptimizer_Stage3, name, None)
    return "" if method is None else hashlib.sha256(inspect.getsource(method).encode()).hexdigest()

"""The learner: accumulates gradients over micro-batches and takes optimizer steps, alone or with other processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlpost.errors import CheckpointError
from rlpost.experience import TokenRows
from rlpost.learner.optimizer import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from rlpost.learner.process import Processes
from rlpost.policy.accumulation import accumulate_in_place
from rlpost.policy.model import Policy
from rlpost.policy.weights import Form, Gather, gather_nothing
from rlpost.recipe.sections.learner import LearnerSection

OPTIMIZER, CRITIC = "optimizer.pt", "critic.pt"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What an optimizer step did. A skipped step left weights and moments as they were."""

    grad_norm: float  # before clipping, over all processes
    learning_rate: float
    skipped: bool
    metrics: Mapping[str, float] = field(default_factory=dict)  # what else the learner has to say of it


class Learner(Protocol):
    """What the loop asks of a learner. Losses are sums with global denominators: gradients add up over processes."""

    policy: Policy
    processes: Processes

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates the gradient of `loss`; `last` marks the last micro-batch of the optimizer step."""
        ...

    def step(self, index: int, *, scale: float = 1.0, critic_only: bool = False) -> StepReport:
        """Optimizer step number `index` of the run (from 0), at `scale` times its learning rate: reduce, clip, update, clear
        gradients. With `critic_only` the policy stays as it is, weight decay or not."""
        ...

    def discard(self) -> None:
        """Forgets the gradients accumulated so far."""
        ...

    def parked(self) -> AbstractContextManager[None]:
        """Within it the policy's weights need not be there, and nothing may ask for them; between optimizer steps only."""
        ...

    def named_weights(self, form: Form = "merged") -> Iterator[tuple[str, Tensor]]:
        """The policy's full weights under Hugging Face names, one at a time; adapters as `form` says."""
        ...

    def full_state_dict(self, *, copy: bool = False) -> dict[str, Tensor] | None:
        """The policy's weights on the CPU of the main process, where its module does not hold them or `copy` says so;
        collective."""
        ...

    def own_state(self) -> dict[str, Any]:
        """This process's part of the optimizer state, by file name below `trainer`; not copied."""
        ...

    def shared_state(self) -> dict[str, Any]:
        """What is the same on all processes, by file name; the main process asks for it."""
        ...

    def load(self, folder: Path, *, world: int) -> None:
        """Takes back what was saved by `world` processes. Raises CheckpointError where that cannot be."""
        ...


class DataParallelLearner:
    """Every process holds the whole model; gradients are summed once per optimizer step.

    One flat all-reduce after the last micro-batch, not DDP's per-parameter hooks: processes may then have different
    numbers of micro-batches (dead groups are skipped), and the sum does not depend on how they were cut.
    """

    def __init__(self, policy: Policy, learner: LearnerSection, processes: Processes) -> None:
        self.policy = policy
        if policy.sequence_parallel is not None:
            policy.maximum = processes.maximum
        self.processes = processes
        self._settings = learner
        self._parameters = [p for p in policy.parameters() if p.requires_grad]
        accumulate_in_place(self._parameters)
        critic = policy.critic
        self._critic = [] if critic is None else [p for p in critic.parameters() if p.requires_grad]
        own = {id(p) for p in self._critic}
        self._actor = [p for p in self._parameters if id(p) not in own]
        self._optimizer = make_optimizer(learner, self._parameters, self._critic)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, index: int, *, scale: float = 1.0, critic_only: bool = False) -> StepReport:
        self._reduce_gradients()
        if critic_only:  # not zeros: AdamW would decay the weights, and count steps that its moments have not seen
            for p in self._actor:
                p.grad = None
        rate = scale * learning_rate(self._settings, index)
        norm = self._clip()
        skipped = not bool(torch.isfinite(norm))
        if not skipped:
            critic = critic_rate(self._settings, self.policy, index, scale)
            set_learning_rate(self._optimizer.param_groups, rate, critic)
            self._optimizer.step()
        self.discard()
        return StepReport(float(norm), rate, skipped)

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def parked(self) -> AbstractContextManager[None]:
        return nullcontext()

    def named_weights(self, form: Form = "merged") -> Iterator[tuple[str, Tensor]]:
        return self.policy.named_weights(form=form)

    def full_state_dict(self, *, copy: bool = False) -> dict[str, Tensor] | None:
        return collect_weights(self.policy) if copy and self.processes.is_main else None

    def own_state(self) -> dict[str, Any]:
        return {}

    def shared_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {OPTIMIZER: self._optimizer.state_dict()}
        return state if self.policy.critic is None else {**state, CRITIC: self.policy.critic.state_dict()}

    def load(self, folder: Path, *, world: int) -> None:
        check_plain(folder)
        state = torch.load(folder / "trainer" / OPTIMIZER, weights_only=True, map_location="cpu")
        self._optimizer.load_state_dict(state)
        if self.policy.critic is not None:
            critic = torch.load(folder / "trainer" / CRITIC, weights_only=True, map_location="cpu")
            self.policy.critic.load_state_dict(critic)

    def _clip(self) -> Tensor:
        """The norm of the policy's gradient, before clipping; the critic's is clipped apart. Not finite if either is not."""
        limit = self._settings.max_grad_norm
        norm = clip_gradients(self._actor, limit)
        if self.policy.critic is None:
            return norm
        most = self.policy.critic.settings.max_grad_norm
        critic = clip_gradients(self._critic, most)
        return norm if torch.isfinite(critic) else critic

    def _reduce_gradients(self) -> None:
        for p in self._parameters:
            if p.grad is None:  # this process had nothing to learn from; its share of the sum is zero
                p.grad = torch.zeros_like(p)
        if self.processes.world == 1:
            return
        for bucket in _buckets([p.grad for p in self._parameters if p.grad is not None]):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            self.processes.sum_(flat)
            for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                grad.copy_(part.view_as(grad))


def critic_rate(learner: LearnerSection, policy: Policy, index: int, scale: float) -> float | None:
    """The learning rate of a critic's own parameters in optimizer step `index`, where it has one of its own."""
    own = None if policy.critic is None else policy.critic.settings.learning_rate
    return None if own is None else scale * learning_rate(learner, index, own)


def check_plain(folder: Path) -> None:
    """Raises CheckpointError for what plain data parallelism cannot take up."""
    if not (folder / "trainer" / OPTIMIZER).is_file():
        raise CheckpointError(
            f"{folder} was saved by DeepSpeed, whose optimizer state only DeepSpeed reads. Start with the launch "
            f"configuration that the run had, or begin a new run from its weights with model.path={folder}."
        )


def _buckets(tensors: Sequence[Tensor], elements: int = 32 * 1024 * 1024) -> Iterator[list[Tensor]]:
    """Groups tensors of one dtype into buckets of about `elements` numbers: few messages, bounded extra memory."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > elements or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


@torch.no_grad()
def collect_weights(policy: Policy, gather: Gather = gather_nothing, *, keep: bool = True) -> dict[str, Tensor]:
    """Copies on the CPU of what `policy.save` writes (of a policy with an adapter: the adapter), tensor by tensor.

    A process that does not `keep` them still takes part in gathering.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in policy.model.named_parameters():
        if policy.has_adapter and "lora_" not in name:
            continue
        with gather([parameter]):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True)
    if keep and not policy.has_adapter:
        persistent = policy.model.state_dict().keys()
        state |= {n: b.detach().to("cpu", copy=True) for n, b in policy.model.named_buffers() if n in persistent}
    return state


@torch.no_grad()
def token_logprobs(policy: Policy, micro_batches: Sequence[TokenRows], tokens: int) -> Tensor:
    """Log-probs [tokens] (float32, CPU) of all completion tokens under the policy as it is now. Collective like `passes`."""
    logp = torch.zeros(tokens)
    for rows in policy.passes(micro_batches):
        row_logp = policy(rows).logp
        if rows.useful_tokens:
            logp[rows.token_index.cpu()] = row_logp.float().cpu()
    return logp

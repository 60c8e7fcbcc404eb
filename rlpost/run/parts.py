"""What a run is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from rlpost.experience import Prompt
from rlpost.learner.buffer import RolloutBuffer
from rlpost.learner.checkpoint import CheckpointStore
from rlpost.learner.learner import Learner
from rlpost.learner.process import Processes
from rlpost.learner.update import Updater
from rlpost.learner.watch import Phases
from rlpost.policy.model import Policy
from rlpost.policy.weights import Form
from rlpost.recipe.sections.root import Recipe
from rlpost.rollout.engine import RolloutEngine, SamplingSettings
from rlpost.run.build import adapter_rank, load_reference
from rlpost.run.closing import close_all
from rlpost.scoring.factory import GroupScorer
from rlpost.tracking.rundir import RunDirectory
from rlpost.tracking.timeline import Timeline
from rlpost.tracking.tracker import Status, Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlpost.data.sampler import PromptSampler

T = TypeVar("T")
CLOSE_S = 600.0  # W&B alone may take two minutes


@dataclass(slots=True)
class Parts:
    """What a run is made of."""

    recipe: Recipe
    processes: Processes
    run: RunDirectory
    tracker: Tracker
    phases: Phases
    store: CheckpointStore
    resume_from: Path | None
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    sampler: PromptSampler
    scorer: GroupScorer
    engine: RolloutEngine
    learner: Learner
    updater: Updater
    sampling: SamplingSettings
    model_path: str
    timeline: Timeline
    optimizer_step: int = 0  # how many were taken
    model_sent: bool = False  # to the engine, since this process began
    _reference: Policy | None = field(default=None)

    def recorded(self, action: Callable[[], None]) -> None:
        """What the main process writes for all, under the watchdog: the others wait for it."""
        with self.phases.watch("record"):
            self.processes.together(action)

    def weights_to_send(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's, as the engine takes them: where adapters go by themselves, the model under them is sent once."""
        form: Form = "merged"
        if adapter_rank(self.recipe) is not None:
            form = "adapters" if self.model_sent else "apart"
        self.model_sent = True
        return self.learner.named_weights(form)

    @property
    def policy_changed(self) -> bool:
        """Whether the policy may differ from the original model."""
        return self.resume_from is not None or self.optimizer_step > 0

    def phase(self, name: str, action: Callable[[], T]) -> T:
        """Runs `action` under a name, a clock and the watchdog."""
        with self.phases(name):
            return action()

    @contextmanager
    def reference(self) -> Iterator[Policy]:
        """The policy before any training: the frozen model under an adapter, else a second copy, loaded when first used."""
        policy = self.learner.policy
        if policy.has_adapter:
            with policy.disable_adapter():
                yield policy
            return
        if self._reference is None:
            self._reference = load_reference(self.recipe, self.model_path, self.processes.device)
        yield self._reference

    def forget_reference(self) -> None:
        """Frees the second copy, where one was loaded."""
        self._reference = None

    def logprobs(self, buffer: RolloutBuffer) -> Tensor:
        """Log-probs [N] of the rollout under the policy as it is; 0 for the tokens of dead groups."""
        return self.updater.logprobs(buffer, self.learner.policy)

    def reference_logprobs(self, buffer: RolloutBuffer) -> Tensor:
        """Log-probs [N] of the rollout under the policy before any training."""
        with self.reference() as reference:
            return self.updater.logprobs(buffer, reference)

    def close(self, status: str) -> None:
        """Ends everything that was started; what cannot be ended is said, and keeps the others from nothing."""
        ended: Status = "finished" if status == "finished" else "stopped" if status == "interrupted" else "failed"
        with self.phases.watch("close", at_least=CLOSE_S):
            self._close(ended)

    def _close(self, ended: Status) -> None:
        close_all(
            {
                "the checkpoints": self.store.close,
                "the scorer": self.scorer.close,
                "the tracker": lambda: self.tracker.close(ended),
                "the rollout engine": self.engine.close,
                "the run's folder": self.run.close,
                "the processes": self.processes.close,
            }
        )

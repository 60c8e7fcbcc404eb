"""`learner`, `checkpoint`, `evaluation`, `tracking`: how the policy is updated, saved, judged and watched."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlpost.recipe.sections.base import Section
from rlpost.recipe.sections.offload import Offload

Decay = Annotated[float, Field(ge=0, lt=1)]


class LearnerSection(Section):
    """The update."""

    rollouts: PositiveInt = 100
    """Rollouts of the run. Optimizer steps = rollouts * minibatches * epochs."""
    stop_after: PositiveInt | None = None
    """Rollouts after which the run ends early; the learning rate's schedule is still that of `rollouts`. null: none."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass over a rollout; prompts are divided evenly among them."""
    epochs: PositiveInt = 1
    """Passes over each rollout."""
    learning_rate: NonNegativeFloat = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What becomes of the learning rate after the warm-up: constant, or decayed to zero at the last optimizer step."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this norm; null: not clipped."""
    layout: Literal["tree", "sorted", "padded"] = "tree"
    """How completions stand in rows: one prompt with its completions as branches, length-sorted rows, or padded rows."""
    micro_batch_tokens: PositiveInt = 4096
    """Positions (rows x length) per forward and backward pass, padding included."""
    sequence_parallel: PositiveInt = 1
    """So many processes share the positions of every row, and in attention its heads (Ulysses), where one row's activations
    do not fit into one device. Slower than own rows where those fit. Must divide the processes and the attention heads."""
    head_chunk_tokens: PositiveInt = 1024
    """Completion tokens whose vocabulary-sized scores are held at once."""
    skip_nonfinite: PositiveInt = 5
    """Stop after so many optimizer steps in a row with a non-finite loss or gradient; each such step is skipped."""
    offload: Offload | None = None
    """Master weights and moments on the host, gradients on the accelerator; with DeepSpeed ZeRO-3. null: all where DeepSpeed's
    configuration says."""
    watchdog_s: PositiveFloat = 1800.0
    """A phase that takes longer than this dumps all stacks and ends the run."""

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, data: Any) -> Any:
        """`rollouts` was called `steps`, which elsewhere means optimizer steps."""
        if not isinstance(data, dict) or "steps" not in data:
            return data
        if "rollouts" in data:
            raise ValueError("`steps` is the former name of `rollouts`: give `rollouts` alone")
        return {("rollouts" if name == "steps" else name): value for name, value in data.items()}

    @property
    def planned_rollouts(self) -> int:
        """How many rollouts are made: `rollouts`, or fewer where the run is stopped early."""
        return self.rollouts if self.stop_after is None else min(self.stop_after, self.rollouts)

    @property
    def steps_per_rollout(self) -> int:
        """How many optimizer steps are taken on each rollout."""
        return self.minibatches * self.epochs


class CheckpointSection(Section):
    """What is saved."""

    every: NonNegativeInt = 0
    """Save every so many optimizer steps; 0: only at the end and at Ctrl-C."""
    keep: PositiveInt = 2
    """How many checkpoints are kept."""
    asynchronous: bool = False
    """Copy the state into host memory and write it while the run goes on. Needs room for a second copy of weights and
    optimizer state."""


class EvaluationSection(Section):
    """Held-out accuracy."""

    prompts: NonNegativeInt = 64
    """How many held-out prompts are used at the most; 0 switches evaluation off."""
    samples: PositiveInt = 1
    """Completions per prompt; 1 is greedy decoding."""
    k: tuple[PositiveInt, ...] = (1,)
    """The k of pass@k (unbiased estimator); each at most `samples`."""
    temperature: float = Field(1.0, ge=0.01)
    """Sampling temperature when `samples` > 1; top-k, top-p, stop strings and the token limit are those of `rollout`."""
    every: NonNegativeInt = 0
    """Evaluate every so many rollouts; 0: only before and after."""
    at_start: bool = True
    """Evaluate before the first update."""
    at_end: bool = True
    """Evaluate after the last update."""
    threshold: float = 1.0
    """A completion counts as right when its accuracy rewards sum to at least this; not given: `scoring.threshold`."""


class WandbSection(Section):
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    """online: live; offline: written to the run's folder, to be sent with `wandb sync`; disabled."""
    project: str = "rlpost"
    """The project's name."""
    entity: str | None = None
    """The team or user; the account's default if not given."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""


class TrackingSection(Section):
    """How the run can be watched. `metrics.jsonl` and `completions/` are always written."""

    wandb: WandbSection = Field(default_factory=WandbSection)
    """Weights & Biases."""
    console: bool = True
    """Live progress in the terminal; plain lines where there is none."""
    show_completion_every: NonNegativeInt = 10
    """Print one sampled completion every so many rollouts; 0: never."""
    report: bool = True
    """Draw the report at the end, a few seconds of work. `rlpost report RUN_DIR` draws it at any time."""

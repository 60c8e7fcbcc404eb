"""The recipe: the whole of what a run is told."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from rlpost.recipe.sections.base import Section
from rlpost.recipe.sections.data import DataSection
from rlpost.recipe.sections.learner import CheckpointSection, EvaluationSection, LearnerSection, TrackingSection
from rlpost.recipe.sections.method import MethodSection
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.reward import Reward, ScoringSection
from rlpost.recipe.sections.rollout import RolloutSection

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Recipe(Section):
    """A run. Everything that is not here is the same for all runs."""

    name: str
    """The run's name, and its folder's: letters, digits, `.`, `_` and `-`."""
    seed: NonNegativeInt = 0
    """Where all randomness comes from: sampling, shuffling, masks, new weights."""
    output_dir: str = "runs"
    """Where the run's folder is made."""
    resume: str = "never"
    """`never`: start anew; `auto`: go on from the run's newest checkpoint if there is one; or a checkpoint's folder."""
    overwrite: bool = False
    """Replace a run of the same name instead of refusing to start."""
    model: ModelSection
    """The policy."""
    data: DataSection
    """Prompts for training and for evaluation."""
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    """Sampling."""
    rewards: tuple[Reward, ...] = ()
    """Reward functions and reward models; their weighted sum is a completion's reward. Methods that do not sample need
    none."""
    scoring: ScoringSection = Field(default_factory=ScoringSection)
    """How reward functions are run."""
    method: MethodSection
    """How rewards become gradients: a preset, and slots that override it."""
    learner: LearnerSection = Field(default_factory=LearnerSection)
    """The update."""
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    """What is saved."""
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    """Held-out accuracy."""
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    """How the run can be watched."""

    @field_validator("name")
    @classmethod
    def _safe_folder_name(cls, name: str) -> str:
        if not _SAFE_NAME.fullmatch(name):
            raise ValueError(
                "must be usable as a folder's name: up to 100 letters, digits, '.', '_' and '-', "
                "the first a letter or digit"
            )
        return name

    @model_validator(mode="after")
    def _share_threshold(self) -> Recipe:
        """What is right for one is right for all: `scoring.threshold` where a section has no threshold of its own."""

        def shared(section: Section | None) -> dict[str, float]:
            own = section is None or "threshold" in section.model_fields_set
            return {} if own else {"threshold": self.scoring.threshold}

        method, slots = self.method, {}
        for name in ("guidance", "gate"):
            if update := shared(getattr(method, name)):
                slots[name] = getattr(method, name).model_copy(update=update)
        # The sections are frozen for others; here they are still in the making.
        if slots:
            self.__dict__["method"] = method.model_copy(update=slots)
        if update := shared(self.evaluation):
            self.__dict__["evaluation"] = self.evaluation.model_copy(update=update)
        return self

    @property
    def run_dir(self) -> Path:
        """`<output_dir>/<name>`: everything that the run writes."""
        return Path(self.output_dir).expanduser() / self.name

    @property
    def samples(self) -> bool:
        """Whether anything is sampled, in training or in evaluation; if not, there is no rollout engine."""
        return not self.data.has_pairs and (self.method.samples or self.evaluation.prompts > 0)

    @property
    def longest_sequence(self) -> int:
        """How many tokens a prompt with a completion or a demonstration may have at the most; hints are part of a prompt."""
        demonstration = self.demonstration_limit if self.method.gate is not None else 0
        return self.data.max_prompt_tokens + max(self.rollout.max_completion_tokens, demonstration)

    @property
    def demonstration_limit(self) -> int:
        """The most tokens of a worked solution that `method.gate` learns from, its end included. By default what fits a
        micro-batch: a solution is not sampled, so the limit of sampling says nothing about it."""
        own = self.data.max_demonstration_tokens
        return max(1, self.learner.micro_batch_tokens - self.data.max_prompt_tokens) if own is None else own

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run: rollouts x passes over each x minibatches of each."""
        return self.learner.planned_rollouts * self.learner.epochs * self.learner.minibatches

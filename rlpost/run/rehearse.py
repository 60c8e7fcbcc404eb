"""What `rlpost plan` reads beside the recipe: a local model's configuration and tokenizer, and the prompts of local data."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rlpost.data.packaged import described_by
from rlpost.errors import DataError, RlpostError
from rlpost.recipe.sections.data import ArithmeticSource, DatasetSource, ReasoningGymSource, Source
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.preference import PreferenceSource
from rlpost.recipe.sections.reward import RewardSection
from rlpost.recipe.sections.root import Recipe
from rlpost.run.before_model import CHECKS, Before, Check, of_a_sample, solutions
from rlpost.tracking.rundir import RunDirectory

if TYPE_CHECKING:
    from rlpost.recipe.load import LoadedRecipe

T = TypeVar("T")

SAMPLE = 2000  # rows of a source; a larger one is not read to its end
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(slots=True)
class Rehearsal:
    """What was found, and what could not be looked at."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    disk: str = ""

    def attempt(self, action: Callable[[], T], other_than: tuple[type[RlpostError], ...] = ()) -> T | None:
        """Runs a part of what a run does first; its error is a problem of the plan, except one of `other_than`."""
        try:
            return action()
        except RlpostError as error:
            if isinstance(error, other_than):
                raise
            self.problems.append(str(error).rstrip("."))
            return None


@dataclass(frozen=True, slots=True)
class Signatures:
    """Stands for the scorer where only the signatures of reward functions are looked at, without their processes."""

    recipe: Recipe
    base: Path

    def check(self, columns: Collection[str]) -> None:
        """Raises RewardError for a function that needs what neither the columns nor its arguments provide."""
        from rlpost.scoring.describe import describe_reward
        from rlpost.scoring.load import check_signature

        for reward in self.recipe.rewards:
            if isinstance(reward, RewardSection):
                check_signature(describe_reward(reward.function, self.base), columns, reward.arguments)


def rehearse(loaded: LoadedRecipe, zero_stage: int = 0) -> Rehearsal:
    """Does what a run does before it loads a model, as far as everything for it is on this machine."""
    rehearsal = Rehearsal()
    recipe, whole = sampled(loaded.recipe)
    signatures = Signatures(recipe, loaded.path.resolve().parent)
    model = _model(recipe.model, rehearsal)
    data = _local_data(recipe, rehearsal)
    if not whole:
        rehearsal.notes.append(f"data: only the first {SAMPLE} rows of every source were looked at")
    before = Before(_described(recipe) if model else recipe, signatures, zero_stage=zero_stage)
    for check in CHECKS:
        if (model or not check.model) and (data or not check.data):
            _attempt(check, before, rehearsal, whole)
    if model and not data:
        rehearsal.attempt(lambda: _tokenizer(before.recipe))
    elif data and not model and not recipe.data.has_pairs:
        rehearsal.attempt(lambda: _columns(recipe, signatures))
    if recipe.resume != "never":
        rehearsal.attempt(lambda: _checkpoint(recipe))
    if before.sets is not None and before.sets.dropped:
        rehearsal.notes.append(f"data: {before.sets.note()}")
    rehearsal.notes += before.notes
    rehearsal.disk = before.disk
    return rehearsal


def _described(recipe: Recipe) -> Recipe:
    """The recipe with folders for packaged models, which need not be unpacked to be looked at."""
    model = recipe.model.model_copy(update={"path": described_by(recipe.model.path)})
    return recipe.model_copy(update={"model": model})


def _attempt(check: Check, before: Before, rehearsal: Rehearsal, whole: bool) -> None:
    """One of a run's own checks; what is wrong with the solutions of a sample alone is no problem yet."""
    try:
        rehearsal.attempt(lambda: check.look(before), other_than=() if whole else (DataError,))
    except DataError as error:
        if check.look is solutions:
            rehearsal.notes.append(of_a_sample(error))
        else:
            rehearsal.problems.append(str(error).rstrip("."))


def _checkpoint(recipe: Recipe) -> None:
    """The checkpoint that `resume` means, as far as it does not depend on the launch."""
    from rlpost.learner.process import Processes
    from rlpost.learner.resume import check_changes, counters_or_offer
    from rlpost.learner.shape import check_adapter
    from rlpost.run.opening import find_checkpoint

    path = find_checkpoint(recipe, RunDirectory.at(recipe.run_dir), Processes())
    if path is None:
        return
    check_changes(path, counters_or_offer(path), recipe)
    check_adapter(path, recipe.model.lora)


def sampled(recipe: Recipe) -> tuple[Recipe, bool]:
    """The recipe with at most SAMPLE rows of every source, and whether these are all."""
    data = recipe.data
    train, eval_ = _cut(data.train), None if data.eval is None else _cut(data.eval)
    whole = train == data.train and eval_ == data.eval
    # Half of a sample may well have fewer distinct prompts than are to be held out of the whole.
    held_out = data.held_out if train == data.train else min(data.held_out, SAMPLE // 20)
    changed = data.model_copy(update={"train": train, "eval": eval_, "held_out": held_out})
    # Of a sample fewer prompts may be left than a step takes.
    rollout = recipe.rollout if whole else recipe.rollout.model_copy(update={"prompts_per_step": 1})
    return recipe.model_copy(update={"data": changed, "rollout": rollout}), whole


def _cut(source: Source) -> Source:
    from rlpost.recipe.rules.check import known_size

    size = known_size(source)
    if size is not None and size <= SAMPLE:
        return source
    if isinstance(source, ArithmeticSource | ReasoningGymSource):
        return source.model_copy(update={"size": SAMPLE})
    return source.model_copy(update={"limit": min(source.limit or SAMPLE, SAMPLE)})


def _model(model: ModelSection, rehearsal: Rehearsal) -> bool:
    """Whether the model's configuration and tokenizer can be read here; says what is wrong with the folder."""
    path = Path(model.path).expanduser()
    if model.path.startswith("package:"):
        return rehearsal.attempt(lambda: described_by(model.path)) is not None
    if not path.is_dir():
        rehearsal.notes.append(
            f"model.path={model.path} is a hub name: whether it is there, its tokenizer, its chat template and its context "
            "are checked when the run starts"
        )
        return False
    if rehearsal.attempt(lambda: _causal_config(model)) is None:
        return False
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        rehearsal.problems.append(
            f"model.path={model.path}: this folder has no weights ({', '.join(_WEIGHTS[::2])}). Copy them there, or name "
            "another model"
        )
    return True


def _causal_config(model: ModelSection) -> object:
    """The configuration of a local model that can be trained. Raises RecipeError."""
    from rlpost.policy.loading import load_config

    return load_config(model, str(Path(model.path).expanduser()))[0]


def _local_data(recipe: Recipe, rehearsal: Rehearsal) -> bool:
    """Whether all sources are generated, or files of this machine."""
    from rlpost.data.files import is_local

    local = True
    for key, source in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        if isinstance(source, DatasetSource | PreferenceSource) and not is_local(source.path):
            rehearsal.notes.append(
                f"{key}.path={source.path} is a hub name: its columns and the lengths of its prompts are checked when the run "
                "starts"
            )
            local = False
    return local


def _tokenizer(recipe: Recipe) -> None:
    from rlpost.data.prompts import require_template
    from rlpost.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    if not recipe.data.has_pairs:
        require_template(tokenizer)


def _columns(recipe: Recipe, signatures: Signatures) -> None:
    """Without a tokenizer: the rows, and what reward functions take of them."""
    from rlpost.data.sources import load_rows

    rows = load_rows(recipe.data.train, "data.train")
    if recipe.data.eval is not None:
        load_rows(recipe.data.eval, "data.eval")
    if rows:
        signatures.check(rows[0].columns.keys())

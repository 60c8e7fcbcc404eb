"""What `rlpost plan` reads beside the recipe: a local model's configuration and tokenizer, and the prompts of local data."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rlpost.errors import RlpostError
from rlpost.recipe.sections.data import ArithmeticSource, DatasetSource, ReasoningGymSource, Source
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.preference import PreferenceSource
from rlpost.recipe.sections.reward import RewardSection
from rlpost.recipe.sections.root import Recipe

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

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Runs a part of what a run does first; its error is a problem of the plan."""
        try:
            return action()
        except RlpostError as error:
            self.problems.append(str(error).rstrip("."))
            return None


@dataclass(frozen=True, slots=True)
class Signatures:
    """Stands for the scorer where only the signatures of reward functions are looked at, without their processes."""

    recipe: Recipe
    base: Path

    def check(self, columns: Collection[str]) -> None:
        """Raises RewardError for a function that needs what neither the columns nor its arguments provide."""
        from rlpost.scoring.load import check_signature, load_reward

        for reward in self.recipe.rewards:
            if isinstance(reward, RewardSection):
                check_signature(load_reward(reward.function, self.base), columns, reward.arguments)


def rehearse(loaded: LoadedRecipe) -> Rehearsal:
    """Does what a run does before it loads a model, as far as everything for it is on this machine."""
    found = Rehearsal()
    recipe, whole = sampled(loaded.recipe)
    signatures = Signatures(recipe, loaded.path.resolve().parent)
    model = _model(recipe.model, found)
    data = _local_data(recipe, found)
    if not whole:
        found.notes.append(f"data: only the first {SAMPLE} rows of every source were looked at")
    if model and data:
        found.attempt(lambda: _prompts(recipe, signatures, whole))
    elif model:
        found.attempt(lambda: _tokenizer(recipe))
    elif data and not recipe.data.has_pairs:
        found.attempt(lambda: _columns(recipe, signatures))
    return found


def sampled(recipe: Recipe) -> tuple[Recipe, bool]:
    """The recipe with at most SAMPLE rows of every source, and whether these are all."""
    data = recipe.data
    train, eval_ = _cut(data.train), None if data.eval is None else _cut(data.eval)
    whole = train == data.train and eval_ == data.eval
    # Half of a sample may well have fewer distinct prompts than are to be held out of the whole.
    held_out = data.held_out if train == data.train else min(data.held_out, SAMPLE // 20)
    changed = data.model_copy(update={"train": train, "eval": eval_, "held_out": held_out})
    return recipe.model_copy(update={"data": changed}), whole


def _cut(source: Source) -> Source:
    from rlpost.recipe.rules.check import known_size

    size = known_size(source)
    if size is not None and size <= SAMPLE:
        return source
    if isinstance(source, ArithmeticSource | ReasoningGymSource):
        return source.model_copy(update={"size": SAMPLE})
    return source.model_copy(update={"limit": min(source.limit or SAMPLE, SAMPLE)})


def _model(section: ModelSection, found: Rehearsal) -> bool:
    """Whether the model's configuration and tokenizer can be read here; says what is wrong with the folder."""
    from rlpost.recipe.plan.memory import local_config

    path = Path(section.path).expanduser()
    if section.path.startswith("package:"):
        if local_config(section) is None:
            found.notes.append(f"model.path={section.path} is unpacked by the first run, and was not looked at")
            return False
        return True
    if not path.is_dir():
        found.notes.append(
            f"model.path={section.path} is a hub name: whether it is there, its tokenizer, its chat template and its context "
            "are checked when the run starts"
        )
        return False
    if found.attempt(lambda: _causal_config(section)) is None:
        return False
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        found.problems.append(
            f"model.path={section.path}: this folder has no weights ({', '.join(_WEIGHTS[::2])}). Copy them there, or name "
            "another model"
        )
    return True


def _causal_config(section: ModelSection) -> object:
    """The configuration of a local model that can be trained. Raises RecipeError."""
    from rlpost.policy.loading import load_config

    return load_config(section, str(Path(section.path).expanduser()))[0]


def _local_data(recipe: Recipe, found: Rehearsal) -> bool:
    """Whether all sources are generated, or files of this machine."""
    from rlpost.data.files import is_local

    local = True
    for key, source in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        if isinstance(source, DatasetSource | PreferenceSource) and not is_local(source.path):
            found.notes.append(
                f"{key}.path={source.path} is a hub name: its columns and the lengths of its prompts are checked when the run "
                "starts"
            )
            local = False
    return local


def _prompts(recipe: Recipe, signatures: Signatures, whole: bool) -> None:
    from rlpost.run.assemble import load_prompts, note_demonstrations

    tokenizer, sets = load_prompts(recipe, signatures)
    if recipe.method.needs_demonstrations and whole:
        note_demonstrations(sets, recipe, tokenizer)


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

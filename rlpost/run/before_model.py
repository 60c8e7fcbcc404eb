"""What a run looks at before its model is loaded, in this order; `rlpost plan` goes through the same list.

So whatever is refused here is a problem of the plan, and whatever a run writes at its end has been tried at its start.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.errors import CheckpointError, DataError, RecipeError, RlpostError
from rlpost.recipe.plan.disk import CheckpointRoom, checkpoint_room, in_units
from rlpost.recipe.plan.memory import find_model_size
from rlpost.recipe.sections.root import Recipe
from rlpost.tracking.rundir import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlpost.data.pairs import PairSets
    from rlpost.data.prompts import PromptSets
    from rlpost.policy.model import Policy
    from rlpost.scoring.factory import ChecksColumns


@dataclass(slots=True)
class Before:
    """What is looked at, and what was found."""

    recipe: Recipe
    scorer: ChecksColumns
    is_main: bool = True
    zero_stage: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None
    sets: PromptSets | PairSets | None = None
    disk: str = ""  # what checkpoints take, and what is free
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Check:
    """One look. `model`, `data`: whether it needs the model's configuration and tokenizer, or the prompts, on this machine."""

    look: Callable[[Before], None]
    model: bool = False
    data: bool = False


def look_before(before: Before) -> Before:
    """Goes through all checks. Raises an RlpostError for the first that refuses the run."""
    for check in CHECKS:
        check.look(before)
    return before


def run_folder(before: Before) -> None:
    """The run's folder: a run of that name, one that holds it, a place that cannot be written to."""
    if before.is_main:
        recipe = before.recipe
        RunDirectory.look(recipe.run_dir, fresh=recipe.resume == "never", overwrite=recipe.overwrite)


def prompts(before: Before) -> None:
    """Tokenizer, chat template, prompts and their lengths, and what reward functions need of the columns."""
    from rlpost.run.checks import load_prompts

    before.tokenizer, before.sets = load_prompts(before.recipe, before.scorer)


def solutions(before: Before) -> None:
    """Whether methods that learn from worked solutions have any that they can use."""
    from rlpost.run.checks import note_demonstrations

    if before.recipe.method.needs_demonstrations and before.sets is not None and before.tokenizer is not None:
        before.notes.append(note_demonstrations(before.sets, before.recipe, before.tokenizer))


def critic(before: Before) -> None:
    """Whether a separate critic reads the policy's tokens."""
    from rlpost.run.checks import check_critic

    if before.tokenizer is not None:
        check_critic(before.recipe, len(before.tokenizer))


def configuration(before: Before) -> None:
    """Writes the configuration and tokenizer files of a checkpoint into a scratch folder."""
    from rlpost.data.packaged import described_by
    from rlpost.data.tokenizer import load_tokenizer
    from rlpost.policy.loading import load_config

    model = before.recipe.model
    tokenizer = before.tokenizer or load_tokenizer(model)
    config, _ = load_config(model, described_by(model.path))
    with tempfile.TemporaryDirectory() as scratch:
        for what, save in (("configuration", config.save_pretrained), ("tokenizer", tokenizer.save_pretrained)):
            try:
                save(scratch)
            except Exception as error:
                raise _unsaveable(model.path, what, error) from error


def room(before: Before) -> None:
    """Whether the disk holds one checkpoint, and all that are kept. Raises CheckpointError, or leaves a note."""
    size, _ = find_model_size(before.recipe.model)
    if size is None or not before.is_main:
        return
    needed = checkpoint_room(before.recipe, size, zero_stage=before.zero_stage)
    if not size.exact:
        before.disk = f"{needed}, if the model is as large as its name says"
        return
    before.disk, warning = check_room(needed, before.recipe)
    if warning:
        before.notes.append(warning)


def report(before: Before) -> None:
    """Whether the report can be drawn at the end; a note where not, for no run fails over its pictures."""
    if not before.recipe.tracking.report or not before.is_main:
        return
    try:
        import jinja2  # noqa: F401 - the page
        from matplotlib.figure import Figure

        Figure(figsize=(1, 1)).savefig(BytesIO(), format="png")
    except Exception as error:
        before.notes.append(
            f"tracking.report: the report cannot be drawn here ({type(error).__name__}: {error}). The run goes on without; "
            "install matplotlib and jinja2, or set tracking.report=false"
        )


CHECKS: tuple[Check, ...] = (
    Check(run_folder),
    Check(prompts, model=True, data=True),
    Check(solutions, model=True, data=True),
    Check(critic, model=True, data=True),
    Check(configuration, model=True),
    Check(room),
    Check(report),
)


def check_room(needed: CheckpointRoom, recipe: Recipe) -> tuple[str, str | None]:
    """A line about the room for checkpoints, and a warning where it is short. Raises CheckpointError where the disk does not
    hold a single one."""
    run = RunDirectory.at(recipe.run_dir)
    place = next(folder for folder in (run.path, *run.path.absolute().parents) if folder.exists())
    usage = shutil.disk_usage(place)
    free = usage.free
    if usage.total == 0:  # no place for files at all, such as /proc: the look at the folder says so
        return str(needed), None
    there = _size(run.path) if recipe.overwrite and recipe.resume == "never" else 0
    if needed.each > free + there:
        raise CheckpointError(
            f"There is no room for a checkpoint in {run.path}: {needed}, and {in_units(free)} are free there. Free "
            f"{in_units(needed.each - free - there)}, choose another output_dir, or train adapters (model.lora), whose "
            "checkpoints are small."
        )
    line = f"{needed}; {in_units(free)} are free for {run.path}"
    old = there or _size(run.checkpoints)  # earlier checkpoints make room for later ones
    if needed.most > free + old:
        return line, f"the disk will be full before the run ends: {line}. Lower checkpoint.keep, or free some room"
    return line, None


def try_saving(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves the policy in a scratch folder below `folder`, all but the weights themselves. Raises RecipeError."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing_") as scratch:
        try:
            policy.save(Path(scratch), tokenizer, state_dict={})
        except Exception as error:
            raise _unsaveable(str(folder), "checkpoint", error) from error


def _unsaveable(where: str, what: str, error: Exception) -> RlpostError:
    if isinstance(error, OSError):
        return CheckpointError(
            f"The {what} of {where} could not be written at the end ({error}). Make room, or choose another output_dir."
        )
    reason = " ".join(str(error).split())[:500]
    return RecipeError(
        f"model.path: the {what} of {where} could not be saved at the end ({type(error).__name__}: {reason}), so the run does "
        "not begin. Mend the model's files, or use another model."
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def of_a_sample(error: DataError) -> str:
    """What was found of the first rows alone: the others may have what these lack."""
    return f"of the rows looked at: {error}".rstrip(".")

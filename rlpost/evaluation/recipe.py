"""With which recipe a checkpoint is evaluated: what its run held out, and how its weights are held, is its run's to say."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rlpost.errors import CheckpointError, RecipeError, RlpostError
from rlpost.experience import Prompt
from rlpost.learner.checkpoint import MANIFEST, refuse_run_folder, verify
from rlpost.learner.resume import read_counters_unverified, saved_recipe
from rlpost.recipe.load import COMMAND_LINE, LoadedRecipe
from rlpost.recipe.secrets import resolve
from rlpost.recipe.sections.root import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_OF_THE_MODEL = ("model.path", "model.lora", "model.chat_template")
# What decides which prompts are held out, and how they are put.
_OF_THE_SPLIT = (
    "seed",
    "data.train",
    "data.eval",
    "data.held_out",
    "data.system_prompt",
    "data.max_prompt_tokens",
    "data.too_long",
    "data.template_options",
)
_SOURCE = ("type", "path", "name", "split", "task")  # what a source of data is, whatever is made of it


def open_checkpoint(checkpoint: Path) -> Path:
    """The folder of a checkpoint or of any model, verified where it has a manifest. Raises CheckpointError."""
    checkpoint = checkpoint.expanduser()
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"There is no folder {checkpoint}. Name a checkpoint such as runs/<name>/checkpoints/step_000010, or any folder "
            f"with a model in Hugging Face layout."
        )
    refuse_run_folder(checkpoint, "--checkpoint ")
    if (checkpoint / MANIFEST).is_file():
        verify(checkpoint)
    return checkpoint


def recipe_for(loaded: LoadedRecipe, checkpoint: Path) -> LoadedRecipe:
    """The recipe to evaluate `checkpoint` with.

    Model, adapters, and, where the recipe trains on the same data as the checkpoint's run, seed and data are those of that
    run, so that the prompts are the ones that it held out. What the command line says stands. Every difference is logged.
    Raises RecipeError where evaluation is switched off.
    """
    if loaded.recipe.evaluation.prompts == 0:
        raise RecipeError("evaluation.prompts=0 switches evaluation off. Set it, such as evaluation.prompts=64.")
    # Neither is about evaluation; and what a run resumed from may be gone since.
    recipe = loaded.recipe.model_copy(update={"resume": "auto", "overwrite": False})
    run = run_of(checkpoint)
    if run is None:
        return replace(loaded, recipe=_with_adapter(recipe, loaded, checkpoint))
    tree, theirs = recipe.model_dump(mode="json"), run.model_dump(mode="json")
    for key in (*_OF_THE_MODEL, *(_OF_THE_SPLIT if _same_data(tree, theirs) else ())):
        if any(o == COMMAND_LINE and (k == key or k.startswith(f"{key}.")) for k, o in loaded.origins.items()):
            continue
        mine, its = _get(tree, key), _get(theirs, key)
        # A set to evaluate on is what a recipe adds to the run's.
        if mine == its or (key == "data.eval" and mine is not None):
            continue
        _log.info("%s is that of the checkpoint's run: %s (the recipe: %s)", key, json.dumps(its), json.dumps(mine))
        _set(tree, key, its)
    return replace(loaded, recipe=Recipe.model_validate(tree))


def run_of(checkpoint: Path) -> Recipe | None:
    """The recipe of the run that saved a checkpoint; None for a folder of another kind, or one that cannot be read."""
    saved = saved_recipe(checkpoint, read_counters_unverified(checkpoint))
    if saved is None:
        return None
    try:
        return Recipe.model_validate(resolve(dict(saved)))
    except (ValidationError, RlpostError) as error:
        _log.warning(
            "The recipe of the run that saved %s cannot be read by this version of rlpost (%s): whether the prompts were held "
            "out there is not known.",
            checkpoint,
            str(error).splitlines()[0],
        )
        return None


def warn_of_trained_on(
    prompts: Sequence[Prompt], recipe: Recipe, checkpoint: Path, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """How many of the prompts that are evaluated are among those that the checkpoint's run trained on, said loudly where
    there are any; None where it is not known."""
    run = run_of(checkpoint)
    if run is None:
        return None
    mine, theirs = recipe.model_dump(mode="json"), run.model_dump(mode="json")
    # The longest completion is one of them: prompts that leave no room for it are dropped before the split.
    if all(
        _get(mine, key) == _get(theirs, key)
        for key in (*_OF_THE_SPLIT, *_OF_THE_MODEL, "rollout.max_completion_tokens")
    ):
        return 0
    from rlpost.data.pairs import build_pairs
    from rlpost.data.prompts import build_prompts
    from rlpost.run.build import context_window

    build = build_pairs if run.data.has_pairs else build_prompts
    try:
        trained = build(
            run.data,
            tokenizer,
            max_context=context_window(run),
            seed=run.seed,
            max_completion_tokens=run.rollout.max_completion_tokens,
        ).train
    except RlpostError as error:
        _log.warning(
            "WHETHER THESE PROMPTS WERE TRAINED ON IS NOT KNOWN: the run's own data cannot be read (%s)", error
        )
        return None
    seen = {_question(prompt) for prompt in trained}
    count = sum(_question(prompt) in seen for prompt in prompts)
    if count:
        _log.warning(
            "%d OF THE %d PROMPTS WERE TRAINED ON by the run that saved this checkpoint (its seed is %d, the recipe's %d): the "
            "figures say little about others. To evaluate on what that run held out, leave seed and data to it (no data.* or "
            "seed= on the command line).",
            count,
            len(prompts),
            run.seed,
            recipe.seed,
        )
    return count


def _question(prompt: Prompt) -> str:
    """What is asked, whatever stands before it."""
    return json.dumps([m for m in prompt.messages if m["role"] != "system"], default=str, sort_keys=True) or prompt.text


def _same_data(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    a, b = mine["data"]["train"], theirs["data"]["train"]
    return all(a.get(key) == b.get(key) for key in _SOURCE)


def _with_adapter(recipe: Recipe, loaded: LoadedRecipe, checkpoint: Path) -> Recipe:
    """With the adapter's shape from its own configuration, where a folder has one and the recipe does not speak of it."""
    file = checkpoint / "adapter_config.json"
    told = any(k.startswith("model.lora") and o != "default" for k, o in loaded.origins.items())
    if recipe.model.lora is not None or told or not file.is_file():
        return recipe
    from rlpost.recipe.sections.model import LoraSection

    adapter = json.loads(file.read_text(encoding="utf-8"))
    targets = adapter.get("target_modules") or "all-linear"
    lora = LoraSection(
        rank=adapter["r"],
        alpha=adapter["lora_alpha"],
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
    )
    _log.info("model.lora is that of %s: rank %d, alpha %g", file, lora.rank, lora.alpha)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": lora})})


def _get(tree: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for part in above:
        tree = tree[part]
    tree[last] = value

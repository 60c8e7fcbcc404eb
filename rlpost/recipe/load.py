"""Reads a recipe: YAML and `section.key=value` overrides in, a checked `Recipe` and the origin of every value out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlpost.errors import RecipeError
from rlpost.recipe.places import with_places
from rlpost.recipe.problems import describe_errors
from rlpost.recipe.secrets import dump, remember
from rlpost.recipe.sections.base import Section
from rlpost.recipe.sections.presets import fill_preset
from rlpost.recipe.sections.root import Recipe

COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe and where each of its values came from.

    `origins` maps every leaf's dotted path (`learner.rollouts`, `rewards.0.weight`) to "default", "preset", "recipe" or
    "command line".
    """

    recipe: Recipe
    origins: Mapping[str, str]
    path: Path
    notes: tuple[str, ...] = ()  # what the user should know of how it was written


FORMER_NAMES = {"learner.steps": "learner.rollouts"}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Reads and checks a recipe; raises RecipeError naming every problem at once.

    What can only be judged with the machine at hand (files, processes, GPUs) is checked by `rlpost.recipe.rules.check`.
    Relative paths in it are looked for in the working directory, then beside the recipe (`rlpost.recipe.places`).
    """
    path = Path(path).expanduser()
    config, given = _read(path), [_split(override) for override in overrides]
    notes = [_rename(config, given, former, now) for former, now in FORMER_NAMES.items()]
    tree = _with_overrides(config, given, path)
    changed = tuple(key for key, _ in given)
    problems, presets = _check_preset(tree)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += describe_errors(error, Recipe, changed)
    if problems:
        head = f"{path}: " if len(problems) == 1 else f"{path} has {len(problems)} problems:\n  - "
        raise RecipeError(head + "\n  - ".join(problems))
    recipe = with_places(recipe, path.parent)
    origins = {leaf: _origin(leaf, tree, changed, presets) for leaf in leaves(recipe)}
    return LoadedRecipe(recipe, origins, path, tuple(filter(None, notes)))


def parse_values(arguments: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs of the command line, values read as YAML; raises RecipeError for what is not such a pair."""
    return {key: _parse(key, text) for key, text in map(_split, arguments)}


def save_resolved(recipe: Recipe, path: Path) -> None:
    """Writes the recipe with every value filled in; loading the file gives the same recipe."""
    import yaml

    text = yaml.safe_dump(dump(recipe), sort_keys=False, allow_unicode=True, width=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "# Written by rlpost: the recipe as it was run, with every default filled in.\n" + text, encoding="utf-8"
    )


def leaves(section: Section, prefix: str = "") -> dict[str, Any]:
    """Every value of a recipe by its dotted path; lists of sections are opened, other lists and mappings are values."""
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        path = f"{prefix}{name}"
        if isinstance(value, Section):
            values |= leaves(value, f"{path}.")
        elif isinstance(value, tuple) and value and all(isinstance(item, Section) for item in value):
            for i, item in enumerate(value):
                values |= leaves(item, f"{path}.{i}.")
        else:
            values[path] = value
    return values


def recipe_files(folder: Path) -> list[Path]:
    """The recipes in a folder (not its hidden files), or next to the package if the folder has none."""
    shipped = Path(__file__).resolve().parents[1] / "_shipped" / "recipes"
    for place in (folder, Path("recipes"), Path(__file__).resolve().parents[2] / "recipes", shipped):
        if files := sorted(f for f in place.glob("*.yaml") if not f.name.startswith(".")):
            return files
    return []


def _read(path: Path) -> Any:
    """The YAML file as an OmegaConf mapping."""
    import yaml
    from omegaconf import DictConfig, OmegaConf

    if not path.is_file():
        known = ", ".join(str(p) for p in recipe_files(path.parent)) or "none found here"
        if path.is_dir():
            raise RecipeError(f"{path}: this is a folder, not a recipe file. Recipes that exist: {known}.")
        raise RecipeError(f"{path}: there is no such recipe file. Recipes that exist: {known}.")
    try:
        raw = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "an unknown place"
        what = str(error.problem or error.context or "it cannot be read").strip()
        raise RecipeError(f"{path}: not valid YAML at {where}: {what}. Correct that line.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a readable YAML text file: {error}. Save it as UTF-8 text.") from None
    except OSError as error:
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections (`name: ...`, `model: ...`), this is not: {error}."
        ) from None
    if not isinstance(raw, DictConfig):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections (`name: ...`, `model: ...`), but this file holds a list."
        )
    return raw


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    key = key.strip().replace("[", ".").replace("]", "")
    if not equals or not key or not all(key.split(".")):
        raise RecipeError(
            f"{override!r} is not an override; write it as section.key=value, such as learner.rollouts=20."
        )
    return key, value


def _rename(config: Any, given: list[tuple[str, str]], former: str, now: str) -> str | None:
    """Takes a key under its former name in the recipe and among the overrides; a line that says so."""
    from omegaconf import DictConfig

    section, _, name = former.rpartition(".")
    inside, new = config.get(section), now.rpartition(".")[2]
    used = any(key == former for key, _ in given)
    given[:] = [(now if key == former else key, text) for key, text in given]
    if isinstance(inside, DictConfig) and name in inside and new not in inside:
        inside[new] = inside.pop(name)
        used = True
    return f"{former} is the former name of {now}, which says what it counts; it is accepted" if used else None


def _parse(key: str, text: str) -> Any:
    import yaml
    from omegaconf import OmegaConf

    try:
        # OmegaConf's reading, for it takes 1e-6 as a number where plain PyYAML gives text.
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except yaml.YAMLError:
        raise RecipeError(f"{key}={text}: the value is not valid YAML; quote it, such as {key}='\"text\"'.") from None


def _with_overrides(config: Any, given: Sequence[tuple[str, str]], path: Path) -> dict[str, Any]:
    """The recipe's plain tree with the overrides put in and `${...}` references resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, text in given:
        value = _parse(key, text)
        try:
            OmegaConf.update(config, key, value, merge=False)
        except (OmegaConfBaseException, ValueError, TypeError, LookupError) as error:
            reason = str(error).splitlines()[0]
            raise RecipeError(
                f"{key}={text}: there is no such place in {path} ({reason}). List items are named by their index, "
                "from 0 to one less than their number, such as rewards.0.weight=2."
            ) from None
    try:
        tree = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        where = f" at {error.full_key}" if getattr(error, "full_key", None) else ""
        raise RecipeError(f"{path}: a ${{...}} reference{where} cannot be resolved: {reason}.") from None
    remember(OmegaConf.to_container(config, resolve=False), tree)
    return dict(tree)  # type: ignore[arg-type]


def _check_preset(tree: dict[str, Any]) -> tuple[list[str], Mapping[str, str]]:
    """What is wrong with `method.preset` (then replaced, so that other problems are found too), and slot origins."""
    method = tree.get("method")
    if not isinstance(method, dict):
        return [], {}
    try:
        return [], fill_preset(method)[1]
    except RecipeError as error:
        tree["method"] = {**method, "preset": "grpo"}
        return [str(error)], {}


def _origin(leaf: str, tree: Any, changed: Sequence[str], presets: Mapping[str, str]) -> str:
    """Where a leaf's value came from. `presets` has paths below `method`."""
    if any(leaf == key or leaf.startswith(f"{key}.") for key in changed):
        return COMMAND_LINE
    head, _, slot = leaf.partition(".")
    if head == "method" and slot:
        matches = [place for path, place in presets.items() if slot == path or slot.startswith(f"{path}.")]
        return matches[0] if matches else "default"
    for part in leaf.split("."):
        if isinstance(tree, list):
            tree = tree[int(part)]
        elif isinstance(tree, dict) and part in tree:
            tree = tree[part]
        else:
            return "default"
    return "recipe"

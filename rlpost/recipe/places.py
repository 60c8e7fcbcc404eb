"""Where a recipe's relative paths lead: to the working directory first, then to the recipe's own folder. One rule for all."""

from __future__ import annotations

from collections.abc import Mapping
from glob import glob, has_magic
from pathlib import Path
from typing import Any, TypeVar

from rlpost.recipe.sections.base import Section
from rlpost.recipe.sections.data import DatasetSource, Source
from rlpost.recipe.sections.preference import PreferenceSource
from rlpost.recipe.sections.reward import RewardModelSection
from rlpost.recipe.sections.root import Recipe

S = TypeVar("S", bound=Section)


def looks_local(path: str) -> bool:
    """Whether a path can only be one of this machine: hub names are `name` or `owner/name`."""
    return path.startswith(("/", "./", "../", "~")) or path.endswith("/") or path.count("/") > 1


def candidates(path: str, base: Path | None) -> list[Path]:
    """The places that a path may mean, in the order in which they are looked at."""
    place = Path(path).expanduser()
    if place.is_absolute() or base is None:
        return [place]
    return [place] if base.resolve() == Path.cwd() else [place, base / place]


def located(path: str, base: Path) -> str:
    """The path where it leads to something from the working directory, or to nothing at all (a hub name, a mistake); else
    what it leads to beside the recipe, as a path from the working directory. Globs lead to what they match."""
    here, *beside = candidates(path, base)
    if not path or here.exists() or _matches(here):
        return path
    return next((str(place) for place in beside if place.exists() or _matches(place)), path)


def with_places(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with every path as it leads from the working directory, so that a saved copy, which lies elsewhere, leads
    to the same files."""
    data = _changed(recipe.data, train=_source(recipe.data.train, base))
    if recipe.data.eval is not None:
        data = _changed(data, eval=_source(recipe.data.eval, base))
    template = recipe.model.chat_template
    model = _changed(
        recipe.model,
        path=located(recipe.model.path, base),
        chat_template=None if template is None else located(template, base),
    )
    method = recipe.method
    if method.critic is not None and method.critic.path is not None:
        method = _changed(method, critic=_changed(method.critic, path=located(method.critic.path, base)))
    rewards = tuple(
        _changed(reward, path=located(reward.path, base))
        if isinstance(reward, RewardModelSection)
        else _changed(reward, function=_function(reward.function, base))
        for reward in recipe.rewards
    )
    resume = recipe.resume if recipe.resume in ("auto", "never") else located(recipe.resume, base)
    return _changed(recipe, data=data, model=model, method=method, rewards=rewards, resume=resume)


def _source(source: Source, base: Path) -> Any:
    if isinstance(source, DatasetSource | PreferenceSource):
        return _changed(source, path=located(source.path, base))
    return source


def _function(spec: str, base: Path) -> str:
    """A reward's `file.py:function`; names of modules and of files in rewards/ are no paths."""
    place, colon, name = spec.partition(":")
    return f"{located(place, base)}{colon}{name}" if place.endswith(".py") or "/" in place else spec


def _changed(section: S, **values: Any) -> S:
    """The section with other values; the same one, where they are its own."""
    new: Mapping[str, Any] = {name: value for name, value in values.items() if getattr(section, name) != value}
    return section.model_copy(update=dict(new)) if new else section


def _matches(place: Path) -> bool:
    return has_magic(str(place)) and bool(glob(str(place), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute patterns

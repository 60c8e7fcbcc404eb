"""What the sections say about themselves: types in words, the JSON schema, and the reference of all keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from rlpost.recipe.sections.base import Section, members

_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "null", Any: "any value"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where an error points: the dotted path, the section it lies in, and the field there (None: no such key)."""

    path: str
    section: type[Section] | None
    field: FieldInfo | None


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold, be it directly, as one of several types, or as items of a list."""
    sections: list[type[Section]] = []
    for member in members(annotation):
        if isinstance(member, type) and issubclass(member, Section):
            sections.append(member)
        elif get_origin(member) in (tuple, list):
            sections += [s for item in get_args(member) if item is not Ellipsis for s in sections_of(item)]
    return sections


def type_names(section: type[Section]) -> tuple[str, ...]:
    """The values of `type` that choose this section; () where it is not one of several."""
    field = section.model_fields.get("type")
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()


def locate(root: type[Section], loc: tuple[int | str, ...]) -> Place:
    """Follows a pydantic error's location, which names the chosen `type` of a section and the tried type of a value."""
    path: list[str] = []
    options: list[type[Section]] = [root]
    section: type[Section] | None = root
    field: FieldInfo | None = None
    for part in loc:
        chosen = [s for s in options if part in type_names(s)]
        fitting = [s for s in options if isinstance(part, str) and part in s.model_fields]
        if len(options) > 1 and chosen:
            options = chosen
        elif isinstance(part, int):
            path.append(str(part))
        elif fitting:
            section, field = fitting[0], fitting[0].model_fields[part]
            path.append(part)
            options = sections_of(field.annotation)
        elif options:
            section, field, options = options[0], None, []
            path.append(str(part))
        elif field is not None and any(get_origin(m) is dict for m in members(field.annotation)):
            path.append(str(part))
    return Place(".".join(path), section, field)


def in_words(annotation: Any, metadata: tuple[Any, ...] | list[Any] = ()) -> str:
    """A type for people: "whole number above 0", "one of: tree, sorted, padded"."""
    if hasattr(annotation, "__metadata__"):
        return in_words(get_args(annotation)[0], [*annotation.__metadata__, *metadata])
    parts = list(members(annotation))
    if len(parts) > 1:
        inner = get_args(annotation)
        sections = [s for s in parts if isinstance(s, type) and issubclass(s, Section)]
        if sections:
            rest = ["null"] if NoneType in parts else []
            return " or ".join(["section", *rest])
        return " or ".join(dict.fromkeys(in_words(part, metadata if part is not NoneType else ()) for part in inner))
    origin = get_origin(annotation)
    if origin is Literal:
        values = [str(v) for v in get_args(annotation)]
        return values[0] if len(values) == 1 else "one of: " + ", ".join(values)
    if origin in (tuple, list):
        return _list_in_words(get_args(annotation))
    if origin is dict or annotation is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return " ".join([_WORDS.get(annotation, str(annotation)), _bounds(metadata)]).strip()


def _list_in_words(items: tuple[Any, ...]) -> str:
    if len(items) == 2 and items[1] is Ellipsis:
        return "list of " + ("sections" if sections_of(items[0]) else f"({in_words(items[0])})")
    return "list of " + ", ".join(in_words(item) for item in items)


def _bounds(metadata: tuple[Any, ...] | list[Any]) -> str:
    words = []
    for item in metadata:
        # FieldInfo inside Annotated carries its own metadata.
        for mark in [item, *getattr(item, "metadata", [])]:
            words += [
                f"{word} {getattr(mark, name)}"
                for name, word in _BOUNDS.items()
                if getattr(mark, name, None) is not None
            ]
    return " and ".join(words)


def field_in_words(field: FieldInfo) -> str:
    """What a field allows, for people."""
    return in_words(field.annotation, field.metadata)


def default_in_words(field: FieldInfo) -> str:
    """A field's default as it would stand in a recipe."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        kind = getattr(value, "type", None)
        return f"type {kind}" if kind else "see below"
    return json.dumps(value, ensure_ascii=False)


def json_schema() -> str:
    """The JSON schema of recipes, for editors."""
    from rlpost.recipe.sections.root import Recipe

    schema = Recipe.model_json_schema()
    schema["title"] = "rlpost recipe"
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def reference() -> str:
    """docs/recipe.md: every key, its type, default and meaning. Written from the sections themselves."""
    from rlpost.recipe.sections.root import Recipe

    lines = [
        "# Recipe reference",
        "",
        "Written by `rlpost recipe-docs`; do not edit. Any key can be set on the command line as `section.key=value`,",
        "list items by their index (`rewards.0.weight=2`), and `key=null` empties a key.",
        "",
    ]
    places: dict[type[Section], list[str]] = {}
    for path, section in _walk("", Recipe):
        places.setdefault(section, []).append(path)
    for section, paths in places.items():
        lines += [*_heading(paths, section), "| key | allowed | default | meaning |", "|---|---|---|---|"]
        lines += [_row(name, field) for name, field in section.model_fields.items()]
        lines.append("")
    return "\n".join(lines)


def _heading(paths: list[str], section: type[Section]) -> list[str]:
    title = "## " + (" and ".join(f"`{path}`" for path in paths) if paths != [""] else "Top level")
    kinds = type_names(section)
    if kinds:
        title += f" with `type: {kinds[0]}`"
    return [title, "", (section.__doc__ or "").strip().replace("\n    ", "\n"), ""]


def _row(name: str, field: FieldInfo) -> str:
    cells = [f"`{name}`", field_in_words(field), f"`{default_in_words(field)}`", field.description or ""]
    if cells[2] in ("`required`", "`see below`"):
        cells[2] = cells[2].strip("`")
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _walk(path: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    yield path, section
    for name, field in section.model_fields.items():
        below = f"{path}.{name}" if path else name
        if any(get_origin(m) is tuple for m in members(field.annotation)):
            below += "[]"
        for inner in sections_of(field.annotation):
            yield from _walk(below, inner)

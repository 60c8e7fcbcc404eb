"""Turns pydantic's findings into sentences: the dotted key, what was given, what is allowed, the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from rlpost.recipe.schema import Place, field_in_words, locate, sections_of, type_names
from rlpost.recipe.sections.base import Section, members

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails


def describe_errors(
    error: ValidationError, root: type[Section], changed: Sequence[str] = (), prefix: str = ""
) -> list[str]:
    """One sentence or two for every wrong key. `changed` are the dotted keys given on the command line; `prefix` is put
    before every key."""
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False):
        place = locate(root, item["loc"])
        key = ".".join(part for part in (prefix, place.path) if part)
        # A value that fits none of several types is reported once a type: one sentence is enough.
        if key not in problems:
            source = " (from the command line)" if any(_covers(c, key) for c in changed) else ""
            problems[key] = f"{_sentence(item, place, key, root)}{source}"
    return list(problems.values())


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that was probably meant: one that is spelled much alike, or `learning_rate` for `lr`."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    short = [one for one in known if "_" in one and "".join(part[:1] for part in one.split("_")) == word]
    return next(iter([*matches, *short]), None)


def _covers(changed: str, key: str) -> bool:
    return key == changed or key.startswith(f"{changed}.") or changed.startswith(f"{key}.")


def _sentence(item: ErrorDetails, place: Place, key: str, root: type[Section]) -> str:
    kind = item["type"]
    if kind == "extra_forbidden":
        return _unknown_key(place, key, root)
    if kind == "missing":
        if item["loc"] and isinstance(item["loc"][-1], int) and place.field:
            return f"{key} is missing: allowed is {field_in_words(place.field)}"
        meaning = f" ({place.field.description.rstrip('.')})" if place.field and place.field.description else ""
        return f"{key} is missing{meaning}"
    if kind == "union_tag_not_found":
        return f"{key}.type is missing; it must be one of: {', '.join(_types(place))}"
    if kind == "union_tag_invalid":
        given = str(item["ctx"].get("tag"))
        guess = _guess(given, _types(place))
        given = "null" if given == "None" else repr(given)
        return f"{key}.type: there is no {given}; it must be one of: {', '.join(_types(place))}{guess}"
    if kind in ("value_error", "assertion_error"):
        given = "" if isinstance(item["input"], Mapping) else _given(item)
        return f"{key}{given}: {item['ctx']['error']}"
    if kind in ("model_type", "model_attributes_type", "dict_type") and place.field is not None:
        return f"{key}{_given(item)}: it must be a mapping of keys to values{_form(key, item['input'])}"
    allowed = field_in_words(place.field) if place.field else item["msg"]
    hint = "; put the value in quotes" if kind == "string_type" and isinstance(item["input"], int | float) else ""
    return f"{key}{_given(item)}: allowed is {allowed}{hint}{_guess(item['input'], _choices(place))}"


def _form(key: str, given: Any) -> str:
    """How a section is written of which only the most important value was given."""
    name = {"model": "path", "method": "preset", "rewards": "function"}.get(key.partition(".")[0])
    if name is None or not isinstance(given, str):
        return ""
    dash = "- " if key.startswith("rewards") else ""
    return f", such as `{dash}{name}: {given}`"


def _unknown_key(place: Place, key: str, root: type[Section]) -> str:
    head, _, name = key.rpartition(".")
    fields = list(place.section.model_fields) if place.section else []
    where = f"{head}.{{}}" if head else "{}"
    near = nearest(name, fields)
    elsewhere = [path for path in _all_keys(root) if path.rpartition(".")[2] == name and path != key]
    if near and not elsewhere:
        return f"{key}: there is no such key; did you mean {where.format(near)}?"
    if elsewhere:
        shallow = min(path.count(".") for path in elsewhere)  # `learner.learning_rate`, not the critic's own
        meant = [path for path in elsewhere if path.count(".") == shallow]
        return f"{key}: there is no such key here; did you mean {' or '.join(meant[:3])}?"
    kinds = type_names(place.section) if place.section else ()
    kind = f" with type {kinds[0]}" if kinds else ""
    return f"{key}: there is no such key; {head or 'a recipe'}{kind} has: {', '.join(fields)}"


def _all_keys(section: type[Section], prefix: str = "", depth: int = 4) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if depth:
            for inner in sections_of(field.annotation):
                yield from _all_keys(inner, f"{prefix}{name}.", depth - 1)


def _types(place: Place) -> list[str]:
    options = sections_of(place.field.annotation) if place.field else []
    return [name for section in options for name in type_names(section)]


def _choices(place: Place) -> list[str]:
    annotation = place.field.annotation if place.field else None
    return [str(v) for m in members(annotation) if get_origin(m) is Literal for v in get_args(m)]


def _guess(given: Any, known: Sequence[str]) -> str:
    near = nearest(given, known) if isinstance(given, str) else None
    return f"; did you mean {near}?" if near else ""


def _given(item: ErrorDetails) -> str:
    text = "null" if item["input"] is None else repr(item["input"])
    return f" = {text if len(text) <= 80 else text[:77] + '...'}"

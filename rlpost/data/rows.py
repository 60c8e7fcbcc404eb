"""What every data source yields: rows with a stable id, a question, and whatever else the data set knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlpost.experience import Demonstration, Message


@dataclass(frozen=True, slots=True)
class Row:
    """One question, before the chat template.

    `id` is `<source>/<row>` and the same in every run. `columns` holds everything but the question itself; `options` are the
    row's own keywords of the chat template.
    """

    id: str
    question: str | tuple[Message, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    demonstration: Demonstration | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def nearest(name: str, names: Iterable[str]) -> str:
    """The sentence "The nearest names are `a`, `b`." for an error message; empty when no name is near."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    if not close:
        return ""
    listed = ", ".join(f"`{one}`" for one in close)
    return f" The nearest {'name is' if len(close) == 1 else 'names are'} {listed}."

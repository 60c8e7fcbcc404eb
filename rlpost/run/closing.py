"""Closes the parts of a run, each whatever becomes of the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)


def close_all(steps: Mapping[str, Callable[[], object]]) -> None:
    """Closes everything, whatever comes of the others: what has been saved is not undone by an engine that cannot end."""
    for name, close in steps.items():
        try:
            close()
        except Exception as error:
            logger.warning(
                "rlpost: %s could not be closed (%s); what was saved before stands.", name, first_line(error)
            )


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its text."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}".rstrip(": ")

"""The registry of data sources: one recipe section and one function each.

A new source is a section in `rlpost.recipe.sections.data` (added to the union `Source`) and a function that turns it into rows:

    load_rows.register(MySource, my_rows)       # my_rows(source: MySource, where: str) -> list[Row]
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from rlpost.data.arithmetic import arithmetic_rows
from rlpost.data.dataset import dataset_rows
from rlpost.data.procedural import reasoning_gym_rows
from rlpost.data.rows import Row
from rlpost.errors import DataError
from rlpost.recipe.sections.data import ArithmeticSource, DatasetSource, ReasoningGymSource

__all__ = ["Row", "load_rows"]


@singledispatch
def load_rows(source: Any, where: str = "data.train") -> list[Row]:
    """The rows of a data source, in a fixed order.

    `where` is the source's place in the recipe, for error messages. Raises DataError when the source is missing, empty,
    or lacks what the recipe names.
    """
    raise DataError(
        f"{where}: there is no loader for a source of type {type(source).__name__}. Register one with "
        f"rlpost.data.sources.load_rows.register({type(source).__name__}, function)."
    )


load_rows.register(DatasetSource, dataset_rows)
load_rows.register(ReasoningGymSource, reasoning_gym_rows)
load_rows.register(ArithmeticSource, arithmetic_rows)

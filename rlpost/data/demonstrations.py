"""Worked solutions as completions: tokenised, ended, and measured before a run starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlpost.data.solutions import SOLVERS
from rlpost.errors import DataError
from rlpost.experience import Prompt
from rlpost.recipe.data import DataSection, DatasetSource
from rlpost.recipe.method import MethodSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1000


@dataclass(frozen=True, slots=True)
class DemonstrationReader:
    """Turns a prompt's demonstration into the tokens that the policy should have answered with."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int

    def __call__(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...] | None]:
        """Token ids with the end-of-sequence token; None without a demonstration, or with more than `max_tokens`."""
        texts = [prompt.demonstration.text for prompt in prompts if prompt.demonstration is not None]
        made = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        end = int(self.tokenizer.eos_token_id)
        found = [None if prompt.demonstration is None else (*next(made), end) for prompt in prompts]
        return [ids if ids is not None and 1 < len(ids) <= self.max_tokens else None for ids in found]


def check_demonstrations(
    prompts: Sequence[Prompt], method: MethodSection, data: DataSection, reader: DemonstrationReader
) -> str:
    """A line about the training prompts' demonstrations. Raises DataError where there are none, or refuses long ones."""
    having = [prompt for prompt in prompts if prompt.demonstration is not None]
    slots = " and ".join(f"method.{name}" for name in ("guidance", "gate") if getattr(method, name) is not None)
    if not having:
        raise DataError(f"{slots} (preset {method.preset}) learns from worked solutions, but {_no_solutions(data)}.")
    note = f"{len(having)} of {len(prompts)} training prompts have a worked solution"
    if method.gate is None:
        return note
    long = sum(ids is None for i in range(0, len(having), BATCH) for ids in reader(having[i : i + BATCH]))
    if long and data.long_demonstrations == "refuse":
        raise DataError(
            f"{long} of {len(having)} worked solutions have more than {reader.max_tokens} tokens "
            "(data.max_demonstration_tokens; by default rollout.max_completion_tokens). Raise the limit, or set "
            "data.long_demonstrations: drop, which leaves these prompts to RL."
        )
    return f"{note}; {long} of them are longer than {reader.max_tokens} tokens and not learned from"


def demonstration_limit(data: DataSection, max_completion_tokens: int) -> int:
    """The longest demonstration in tokens, its end included."""
    return data.max_demonstration_tokens or max_completion_tokens


def _no_solutions(data: DataSection) -> str:
    if isinstance(data.train, DatasetSource):
        if data.train.demonstration is None:
            return (
                f"data.train.demonstration is not set. Name the column of `{data.train.path}` that holds the solutions, "
                "such as data.train.demonstration=solution"
            )
        return f"the column `{data.train.demonstration}` (data.train.demonstration) is empty in every row. Name another"
    return (
        f"the source `{data.train.type}` gives none here. Tasks with solutions are {', '.join(SOLVERS)}; or use a `dataset` "
        "with data.train.demonstration"
    )

"""Worked solutions as completions: tokenised, ended, and measured before a run starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlpost.data.answers import AnswerFault, Answers
from rlpost.data.hints import Hinter
from rlpost.data.solutions import SOLVERS
from rlpost.data.table import solved
from rlpost.data.template import ChatTemplate
from rlpost.errors import DataError
from rlpost.experience import Prompt
from rlpost.recipe.sections.data import DataSection, DatasetSource
from rlpost.recipe.sections.guidance import Gate, SftFirstGate, SolveRateGate
from rlpost.recipe.sections.method import MethodSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1000
FEW = 0.05
"""With less than this share of what a gate asks for, a run is refused: it would not be the method that was asked for."""
_FITS = "learner.micro_batch_tokens behind data.max_prompt_tokens"


@dataclass(slots=True)
class DemonstrationReader:
    """Turns a prompt's demonstration into the tokens that the policy should have answered with."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    context: int | None = None  # the model's, in tokens; None: not known
    template_options: Mapping[str, Any] = field(default_factory=dict)
    _answers: Answers | None = field(default=None, init=False)

    def __call__(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...] | None]:
        """Token ids with the end of the answer, as the chat template ends one; None without a demonstration, or with more
        than `limit` of them. Raises DataError for a solution that cannot be an answer under the template."""
        having = [prompt for prompt in prompts if prompt.demonstration is not None]
        bare = [prompt.bare for prompt in having]
        made = iter(
            self.answers.token_ids(
                [prompt.text for prompt in bare],
                [prompt.token_ids for prompt in bare],
                [self._whole(prompt) for prompt in having],
            )
        )
        token_ids = [None if prompt.demonstration is None else next(made) for prompt in prompts]
        return [
            ids if ids is not None and 1 < len(ids) <= self.limit(prompt) else None
            for prompt, ids in zip(prompts, token_ids, strict=True)
        ]

    @property
    def answers(self) -> Answers:
        """What knows how the chat template opens and ends an answer."""
        if self._answers is None:
            self._answers = answers_of(self.tokenizer, self.template_options)
        return self._answers

    def _whole(self, prompt: Prompt) -> str:
        assert prompt.demonstration is not None
        bare = prompt.bare
        try:
            return self.answers.whole(bare.text, bare.messages, prompt.demonstration.text, prompt.id, prompt.options)
        except AnswerFault as error:
            raise DataError(
                f"data.train.demonstration: the worked solution of row {prompt.id} {error}. Correct it, or leave it out (null)."
            ) from error

    def limit(self, prompt: Prompt) -> int:
        """The most tokens that a prompt's demonstration may have: behind the bare question it must fit the context too."""
        room = self.max_tokens if self.context is None else self.context - len(prompt.bare.token_ids)
        return min(self.max_tokens, room)


def answers_of(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> Answers:
    """Answers under the tokenizer's chat template; as bare texts, where it has none."""
    template = ChatTemplate(tokenizer, options) if getattr(tokenizer, "chat_template", None) else None
    return Answers(tokenizer, template)


def check_demonstrations(
    prompts: Sequence[Prompt],
    method: MethodSection,
    data: DataSection,
    reader: DemonstrationReader,
    hinter: Hinter | None = None,
) -> str:
    """A line about the training prompts' demonstrations. Raises DataError where there are none, or refuses long ones."""
    having = solved(prompts)
    slots = " and ".join(f"method.{name}" for name in ("guidance", "gate") if getattr(method, name) is not None)
    if not having:
        raise DataError(f"{slots} (preset {method.preset}) learns from worked solutions, but {_no_solutions(data)}.")
    notes = [f"{len(having)} of {len(prompts)} training prompts have a worked solution"]
    if hinter is not None:
        notes += _note_hints(having, data, hinter)
    if method.gate is not None:
        notes.append(_note_long(prompts, having, method.gate, data, reader))
        notes += reader.answers.notes()
    return "; ".join(notes)


def _note_long(
    prompts: Sequence[Prompt], having: Sequence[Prompt], gate: Gate, data: DataSection, reader: DemonstrationReader
) -> str:
    """How many solutions the gate cannot use, and what becomes of their prompts. Raises DataError where it can use hardly
    any: the run would learn nothing, or by another method than the one that was asked for."""
    long = sum(ids is None for batch in _batches(having) for ids in reader(batch))
    context = (
        "" if reader.context is None else f", or do not fit the model's context of {reader.context} behind the question"
    )
    limit = (
        f"more than {reader.max_tokens} tokens (data.max_demonstration_tokens; by default what fits {_FITS}){context}"
    )
    alone = isinstance(gate, SftFirstGate) and gate.rollouts is None
    of, whole = (len(prompts), "training prompts") if alone else (len(having), "worked solutions")
    if len(having) - long < FEW * of:
        missing = f", and {len(prompts) - len(having)} prompts have none" if len(having) < len(prompts) else ""
        raise DataError(
            f"method.gate learns from worked solutions{' alone' if alone else ''}, but can use only {len(having) - long} of "
            f"{of} {whole}: {long} of the {len(having)} solutions have {limit}{missing}. Raise data.max_demonstration_tokens "
            "(and learner.micro_batch_tokens with it), or give data with solutions that fit."
        )
    if long and data.long_demonstrations == "refuse":
        raise DataError(
            f"{long} of {len(having)} worked solutions have {limit}. Raise the limit, or set "
            "data.long_demonstrations: drop, which leaves these prompts to RL."
        )
    if not long:
        return f"all of them have at most {reader.max_tokens} tokens and fit behind their question"
    what = "their prompts are left to RL"
    if isinstance(gate, SftFirstGate):
        what = "their prompts are left out of SFT"
    elif isinstance(gate, SolveRateGate) and gate.gamma >= 1:
        what += " although method.gate.gamma=1 asks for SFT alone (data.long_demonstrations: refuse would stop here)"
    return f"{long} of them have more than {reader.max_tokens} tokens{context} and are not learned from: {what}"


def _note_hints(having: Sequence[Prompt], data: DataSection, hinter: Hinter) -> list[str]:
    """For how many solutions the longest hint leaves no room, and for how many even the shortest does."""
    first, last = hinter.settings.ratios[0], hinter.settings.ratios[-1]
    long = [prompt for batch in _batches(having) for prompt in hinter.too_long(batch, last)]
    if not long:
        return []
    never = sum(len(hinter.too_long(batch, first)) for batch in _batches(long))
    where = (
        f"{hinter.max_prompt_tokens} tokens (data.max_prompt_tokens, and the model's context without the completion)"
    )
    if len(having) - never < FEW * len(having):
        raise DataError(
            f"method.guidance could hardly ever help: {never} of {len(having)} prompts with even {first:.0%} of their worked "
            f"solution (method.guidance.ratios) have more than {where}. Raise data.max_prompt_tokens, or lower the ratios."
        )
    if data.long_demonstrations == "refuse":
        raise DataError(
            f"{len(long)} of {len(having)} prompts with {last:.0%} of their worked solution (method.guidance.ratios) have more "
            f"than {where}. Raise data.max_prompt_tokens, lower the ratios, or set data.long_demonstrations: drop, which does "
            "without the hints that do not fit."
        )
    return [f"{last:.0%} of it as a hint does not fit {where} for {len(long)} of them, {first:.0%} not for {never}"]


def _batches(prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    return (tuple(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH))


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

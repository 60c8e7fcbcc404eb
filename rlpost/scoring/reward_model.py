"""A reward model beside the reward functions: a Hugging Face sequence classifier, batched, that loads or fails loudly."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlpost.data.vocabulary import special_problem, tokens_beyond
from rlpost.errors import RewardError
from rlpost.experience import Group, Outcome, Score
from rlpost.policy.family import length_dependent_rope
from rlpost.policy.packing import stack_rows
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.reward import RewardModelSection
from rlpost.scoring.scorer import FailureTally

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RewardModel:
    """Scores completions with a sequence classifier; one score a completion. The interface is the scorer's.

    A conversation longer than `max_tokens`, or a score that is no finite number, has the outcome `unparsable`: unknown,
    never a substitute.
    """

    def __init__(self, settings: RewardModelSection, *, max_failed_share: float = 0.5) -> None:
        """Loads model and tokenizer.

        Raises RewardError where either is missing, incomplete or of the wrong kind: there is no fallback.
        """
        self.settings = settings
        self.names: tuple[str, ...] = (settings.name,)
        self.counts: dict[str, Counter[Outcome]] = {}
        self.slowest: dict[str, float] = {}
        self.logged: dict[str, float] = {}
        self._failures = FailureTally(max_failed_share)
        self.device = _device(settings.device)
        self.tokenizer = _load_tokenizer(settings)
        self.model: PreTrainedModel | None = _load_model(settings).to(self.device)
        rows = self.model.config.get_text_config().vocab_size
        self._unknown = frozenset(tokens_beyond(self.tokenizer, rows))
        if settings.text == "chat" and (problem := special_problem(self.tokenizer, rows)):
            raise RewardError(
                f"The reward model {settings.path} does not know all of its tokenizer's tokens: {problem}."
            )

    def check(self, columns: Collection[str]) -> None:
        """A reward model needs no columns."""

    def ahead(self, group: Group, step: int = 0, max_steps: int = 0) -> None:
        """All groups go through the model together."""

    def score(self, groups: Sequence[Group], step: int = 0, max_steps: int = 0, *, more: bool = False) -> list[Group]:
        """The same groups with one score a completion; `step` and `max_steps` change nothing.

        Raises RewardError when more than `max_failed_share` of the completions (with `more`: of these and those before)
        could not be scored, or memory ran out.
        """
        start = time.perf_counter()
        token_ids = [self._encode(group, i) for group in groups for i in range(len(group.completions))]
        fitting = [
            i
            for i, ids in enumerate(token_ids)
            if 0 < len(ids) <= self.settings.max_tokens and self._unknown.isdisjoint(ids)
        ]
        values = dict(zip(fitting, self._run([token_ids[i] for i in fitting]), strict=True))
        scores = [self._score(values.get(i), ids) for i, ids in enumerate(token_ids)]
        self.counts = {self.names[0]: Counter(score.outcome for score in scores)}
        self.slowest = {self.names[0]: time.perf_counter() - start}
        self._check_failures(scores, more)
        rest = iter(scores)
        return [replace(group, scores=tuple((next(rest),) for _ in group.completions)) for group in groups]

    def close(self) -> None:
        """Lets go of the model and its memory."""
        self.model = None

    def __enter__(self) -> RewardModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, group: Group, i: int) -> list[int]:
        completion = group.completions[i]
        match self.settings.text:
            case "plain":
                return list(self.tokenizer(group.prompt.text + completion.text)["input_ids"])
            case "chat":
                pass
            case _:
                raise unknown_choice("rewards.text", self.settings.text)
        chat = [*map(dict, group.prompt.messages), {"role": "assistant", "content": completion.text}]
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception as error:  # jinja's own errors: a template may refuse roles, or an order of them
            raise RewardError(
                f"The chat template of the reward model {self.settings.path} refuses the conversation of prompt "
                f"{group.prompt.id} ({type(error).__name__}: {error}). Use prompts of a form that it knows, or `text: plain`."
            ) from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def _run(self, token_ids: Sequence[list[int]]) -> list[float]:
        if self.model is None:
            raise RewardError(f"The reward model {self.settings.path} was closed before it was asked to score.")
        pad = self.model.config.get_text_config().pad_token_id
        # transformers finds a text's end by its padding token; without one it takes one text at a time.
        # One at a time too where rotary frequencies would be chosen by the longest text of a batch.
        alone = pad is None or length_dependent_rope(self.model.config) is not None
        budget = 1 if alone else self.settings.batch_tokens
        values = [0.0] * len(token_ids)
        for stack in stack_rows([len(ids) for ids in token_ids], budget):
            try:
                scores = self._forward([token_ids[i] for i in stack.rows], stack.width, pad or 0)
            except torch.OutOfMemoryError as error:
                raise RewardError(
                    f"The reward model {self.settings.path} ran out of memory on {self.device} with {len(stack.rows)} texts of "
                    f"{stack.width} tokens. Lower its batch_tokens ({self.settings.batch_tokens}), or give it another device."
                ) from error
            for i, value in zip(stack.rows, scores.tolist(), strict=True):
                values[i] = value
        return values

    def _forward(self, texts: Sequence[list[int]], width: int, pad: int) -> Tensor:
        """Scores [R]; padding is at the right end."""
        assert self.model is not None
        ids = torch.full((len(texts), width), pad, dtype=torch.int64)
        seen = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            seen[row, : len(text)] = 1
        logits = self.model(input_ids=ids.to(self.device), attention_mask=seen.to(self.device)).logits
        # Some models' own code returns [R] scores: one output without its dimension.
        scores = logits if logits.ndim == 1 else logits[:, self.settings.label or 0]
        return scores.float().cpu()

    def _score(self, value: float | None, ids: Sequence[int]) -> Score:
        if value is None:
            detail = f"{len(ids)} tokens, more than max_tokens={self.settings.max_tokens}" if ids else "no text"
            if unknown := self._unknown.intersection(ids):
                names = self.tokenizer.convert_ids_to_tokens(sorted(unknown))
                detail = f"tokens that the reward model does not know, though its tokenizer does: {', '.join(names)}"
            return Score(Outcome.UNPARSABLE, None, detail)
        if value != value or value in (float("inf"), float("-inf")):
            return Score(Outcome.UNPARSABLE, None, f"the model's score is {value}")
        return Score(Outcome.SCORED, value)

    def _check_failures(self, scores: Sequence[Score], more: bool) -> None:
        failed, tally, name = [score for score in scores if score.failed], self._failures, self.names[0]
        if not more:
            tally.clear()
        if tally.too_many(name, failed, len(scores)):
            raise RewardError(
                f"The reward model {self.settings.path} could not score {tally.kinds[name].total()} of {tally.samples[name]} "
                f"completions, more than scoring.max_failed_share={tally.max_failed_share:g} allows. For example: "
                f"{failed[0].detail}."
            )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RewardError(f"There is no device {name!r} for a reward model; use auto, cpu, or cuda:1.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RewardError(
            f"The reward model's device {name} does not exist: torch sees {torch.cuda.device_count()} GPUs. Use auto or cpu."
        )
    return device


def _load_tokenizer(settings: RewardModelSection) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.path, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load(settings, error, "tokenizer") from error
    if settings.text == "chat" and not tokenizer.chat_template:
        raise RewardError(
            f"The reward model {settings.path} has no chat template, so it is not known how it was shown conversations. Use "
            "`text: plain` if it takes bare text, or add the template to its tokenizer."
        )
    return tokenizer


def _load_model(settings: RewardModelSection) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    from rlpost.policy.loading import without_progress_bars

    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "trust_remote_code": settings.trust_remote_code}
    try:
        with without_progress_bars():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                settings.path, output_loading_info=True, **options
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _cannot_load(settings, error, "model") from error
    if report["missing_keys"]:  # transformers would fill them with random numbers, and only warn
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise RewardError(
            f"{settings.path} is no reward model: it lacks the weights {missing}, which would be made up at random. Name a "
            "model that was saved as a sequence classifier."
        )
    outputs = int(model.config.num_labels)
    if settings.label is None and outputs != 1:
        raise RewardError(
            f"The reward model {settings.path} has {outputs} outputs. Say with `label` (0 to {outputs - 1}) which is the "
            "reward."
        )
    if settings.label is not None and settings.label >= outputs:
        raise RewardError(
            f"The reward model {settings.path} has {outputs} outputs, so `label` can be at most {outputs - 1}, not "
            f"{settings.label}."
        )
    return model.eval().requires_grad_(False)


def _cannot_load(settings: RewardModelSection, error: Exception, what: str) -> RewardError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return RewardError(
        f"The {what} of the reward model {settings.path} cannot be loaded ({type(error).__name__}: {first}). Give a folder in "
        "Hugging Face layout, or a name that this machine can download. Nothing is trained without it: there is no fallback."
    )

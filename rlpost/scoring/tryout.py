"""Tries a reward function out on a few written samples, without a model: `rlpost rewards try`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlpost.errors import DataError, RewardError, printable
from rlpost.experience import Completion, Group, Message, Outcome, Prompt, Score
from rlpost.scoring.keywords import Form

if TYPE_CHECKING:
    from rich.table import Table

CallSize = Literal["sample", "group", "batch"]
_WANTED = 'A sample is {"prompt": text or messages, "completion": text, ...columns}, one JSON object a line'
_OWN_KEYS = ("prompt", "completion", "completions", "completion_ids")


@dataclass(frozen=True, slots=True)
class Row:
    """One sample's verdict."""

    line: int
    completion: str
    score: Score


def try_reward(
    spec: str,
    samples_path: Path,
    arguments: Mapping[str, Any] | None = None,
    deadline_s: float = 10.0,
    *,
    completions: Form = "auto",
    call: CallSize = "sample",
    timeout_score: float | None = None,
) -> list[Row]:
    """Scores every sample of a JSONL file in a scoring process, exactly as training would.

    A line is `{"prompt": text or messages, "completion": text, ...columns}`; `completions`, a list of texts, makes a
    row of each. A prompt that is a text is handed over as one, and its completions too, as from a data set with texts;
    `completions`, `call` and `timeout_score` are the reward's keys of these names. Every word counts as one token, with the
    number 0, where a line with one completion has no list `completion_ids`.

    Raises:
        RewardError: a line cannot be read, the function cannot be loaded, or it breaks its contract.
    """
    from rlpost.recipe.sections.reward import RewardSection, ScoringSection
    from rlpost.scoring.scorer import Scorer

    lines, groups = zip(*_read_samples(samples_path), strict=True)
    settings = RewardSection(
        function=spec,
        arguments=dict(arguments or {}),
        deadline_s=deadline_s,
        completions=completions,
        call=call,
        timeout_score=timeout_score,
    )
    columns = set.intersection(*(set(group.prompt.columns) for group in groups))
    with Scorer([settings], ScoringSection(workers=1, max_failed_share=1.0), samples_path.parent) as scorer:
        scorer.check(columns)
        scored = scorer.score(groups)
    return [
        Row(line, completion.text, scores[0])
        for line, group in zip(lines, scored, strict=True)
        for completion, scores in zip(group.completions, group.scores, strict=True)
    ]


def run_tryout(
    spec: str,
    samples: Path,
    deadline_s: float,
    arguments: dict[str, Any],
    *,
    completions: Form = "auto",
    call: CallSize = "sample",
    timeout_score: float | None = None,
) -> int:
    """Prints a table of verdicts, and what they have in common. Returns 0, or 1 if scoring failed on any sample."""
    from rich.console import Console

    rows = try_reward(
        spec, samples, arguments, deadline_s, completions=completions, call=call, timeout_score=timeout_score
    )
    console = Console()
    console.print(_table(spec, rows))
    values = [row.score.value for row in rows if row.score.value is not None]
    counts = Counter(row.score.outcome.value for row in rows)
    mean = f", mean {sum(values) / len(values):.4g}" if values else ""
    console.print(", ".join(f"{n} {outcome}" for outcome, n in counts.items()) + mean, highlight=False)
    for note in _notes(rows):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    return 1 if any(row.score.failed for row in rows) else 0


def _notes(rows: Sequence[Row]) -> list[str]:
    """What verdicts say about the reward rather than about the samples."""
    values = {row.score.value for row in rows if row.score.value is not None}
    if all(row.score.outcome is Outcome.NOT_APPLICABLE for row in rows):
        return [
            "Warning: the function returned None for every sample, so it has no say. Is a column missing that it looks for, or "
            "a `return`?"
        ]
    if len(values) == 1 and len({row.completion for row in rows if row.score.value is not None}) > 1:
        return [
            f"Warning: all samples score alike ({values.pop():.4g}), although they differ: nothing can be learned from such a "
            "reward. Give samples that deserve different scores, and look at what the function reads: a completion is a text "
            "where the prompt is one, and a list of messages where the prompt is a chat. One that compares completions "
            "with each other must see them in one call: `call: group` or `batch` (docs/rewards.md)."
        ]
    return []


def _table(spec: str, rows: Sequence[Row]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(spec))
    for name, justify in (("line", "right"), ("completion", "left"), ("outcome", "left"), ("reward", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("detail", overflow="fold")
    for row in rows:
        text = " ".join(printable(row.completion.encode("utf-8", "backslashreplace").decode()).split())
        value = "" if row.score.value is None else f"{row.score.value:.4g}"
        colour = "red" if row.score.failed else "green" if row.score.outcome is Outcome.SCORED else "yellow"
        outcome = f"[{colour}]{row.score.outcome.value}[/]"
        shown = text if len(text) <= 60 else "..." + text[-57:]  # answers stand at the end
        table.add_row(str(row.line), escape(shown), outcome, value, escape(printable(row.score.detail)))
    return table


def _read_samples(path: Path) -> list[tuple[int, Group]]:
    from rlpost.data.readers import numbered_objects

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "do not exist"
        raise RewardError(f"The samples {path} {what}. Name a file of samples, one JSON object a line.")
    try:
        samples = [(number, _read_sample(path, number, sample)) for number, sample in numbered_objects(path, _WANTED)]
    except DataError as error:
        raise RewardError(f"The samples cannot be read: {error}") from error
    if not samples:
        raise RewardError(f'The samples {path} are empty: write lines like {{"prompt": "1+1?", "completion": "2"}}.')
    return samples


def _read_sample(path: Path, number: int, sample: Mapping[str, Any]) -> Group:
    def refuse(why: str) -> RewardError:
        return RewardError(f"{path}, line {number}: {why}. {_WANTED}.")

    texts, ids = sample.get("completions", [sample.get("completion")]), sample.get("completion_ids")
    texts = [_text(one) for one in texts] if isinstance(texts, list) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise refuse("`completion` is missing or no text")
    if ids is not None and not (isinstance(ids, list) and all(isinstance(i, int) for i in ids) and len(texts) == 1):
        raise refuse("`completion_ids` is no list of integers, or stands beside several `completions`")
    messages = _messages(sample.get("prompt", ""), refuse)
    columns = {name: value for name, value in sample.items() if name not in _OWN_KEYS}
    is_text = not isinstance(sample.get("prompt"), list)
    prompt = Prompt(f"{path.name}/{number}", messages, messages[-1]["content"] or "", (), columns, is_text=is_text)
    return Group(prompt, tuple(_completion(text, ids) for text in texts))


def _text(completion: object) -> object:
    """The text of a completion that is written as TRL hands it over, a chat of one message; others as they are."""
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        return completion[0].get("content")
    return completion


def _completion(text: str, ids: Sequence[int] | None) -> Completion:
    tokens = tuple(ids) if ids is not None else (0,) * len(text.split())
    return Completion(tokens, (0.0,) * len(tokens), text, "stop")


def _messages(prompt: object, refuse: Callable[[str], RewardError]) -> tuple[Message, ...]:
    from rlpost.data.messages import as_messages, chat_fault

    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    if (fault := chat_fault(prompt)) is not None or not isinstance(prompt, list) or not prompt:
        raise refuse(
            f"`prompt` is neither text nor a list of messages with `role` and `content` (it {fault or 'is empty'})"
        )
    return as_messages(prompt)

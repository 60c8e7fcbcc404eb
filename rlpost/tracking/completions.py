"""`completions/step_<N>.jsonl`: what was sampled, how it was scored and why, one line per completion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlpost.errors import RlpostError
from rlpost.experience import Group
from rlpost.tracking.metrics import clean_number, write_atomically


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """The groups of one rollout, over all processes, with what became of them.

    `rewards[g][i]` and `advantages[g][i]` belong to completion i of group g; NaN: the reward is unknown. `advantages`
    may be empty (methods without one number per completion). `reward_names` are in the order of `Group.scores[i]`.
    """

    groups: Sequence[Group]
    rewards: Sequence[Sequence[float]]
    reward_names: Sequence[str]
    advantages: Sequence[Sequence[float]] = ()


@dataclass(frozen=True, slots=True)
class ScoreRecord:
    """One reward function's verdict, as written."""

    outcome: str
    value: float | None
    detail: str


@dataclass(frozen=True, slots=True)
class CompletionRecord:
    """One line of a completions file."""

    step: int
    prompt_id: str
    sample: int
    prompt: str
    completion: str
    reward: float | None
    advantage: float | None
    scores: dict[str, ScoreRecord]
    finish: str
    tokens: int
    versions: list[list[int]]  # [optimizer steps that had made the weights, tokens that these sampled]; []: not known


def records(step: int, rollout: ScoredRollout) -> list[CompletionRecord]:
    """One record per completion, group after group."""
    rows = []
    for g, group in enumerate(rollout.groups):
        for i, completion in enumerate(group.completions):
            scores = group.scores[i] if group.scores else ()
            rows.append(
                CompletionRecord(
                    step=step,
                    prompt_id=group.prompt.id,
                    sample=i,
                    prompt=group.prompt.text,
                    completion=completion.text,
                    reward=clean_number(rollout.rewards[g][i]),
                    advantage=clean_number(rollout.advantages[g][i]) if rollout.advantages else None,
                    scores={
                        name: ScoreRecord(str(score.outcome), clean_number(score.value), score.detail)
                        for name, score in zip(rollout.reward_names, scores, strict=bool(scores))
                    },
                    finish=completion.finish,
                    tokens=len(completion.token_ids),
                    versions=[list(stretch) for stretch in completion.versions],
                )
            )
    return rows


def write_completions(folder: Path, step: int, written: Sequence[CompletionRecord]) -> Path:
    """Writes `step_<step>.jsonl`, whole or not at all. `step`: the first optimizer step that the rollout feeds."""
    path = folder / f"step_{step:06d}.jsonl"
    lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in written]
    write_atomically(path, "".join(lines))
    return path


def read_completions(path: Path) -> list[CompletionRecord]:
    """The records of one completions file. Raises RlpostError when it is damaged."""
    try:
        # Not splitlines(): completions may hold U+2028 and its like, which JSON does not escape.
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [_record(row) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise RlpostError(f"{path} is not a completions file of rlpost ({error}). Remove it to go on.") from error


def completion_files(folder: Path) -> list[Path]:
    """The completions files of a run, oldest first."""
    return sorted(folder.glob("step_*.jsonl"), key=lambda path: int(path.stem.removeprefix("step_")))


def pick_sample(sampled: Sequence[CompletionRecord], step: int) -> CompletionRecord | None:
    """One completion to show: another place in the batch every time, good or bad, and the same after a resume."""
    return sampled[(step * 7919) % len(sampled)] if sampled else None


def _record(row: dict[str, Any]) -> CompletionRecord:
    scores = {name: ScoreRecord(**score) for name, score in row.pop("scores").items()}
    return CompletionRecord(**row, scores=scores)

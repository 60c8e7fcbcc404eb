"""The source `reasoning_gym`: procedurally generated tasks that come with their own verifiers."""

from __future__ import annotations

import json
from typing import Any

from rlpost.data.rows import Row, nearest
from rlpost.data.solutions import worked_solution
from rlpost.errors import DataError
from rlpost.experience import Demonstration
from rlpost.recipe.sections.data import ReasoningGymSource


def reasoning_gym_rows(source: ReasoningGymSource, where: str = "data.train") -> list[Row]:
    """`source.size` questions of one task. Columns: `entry` (JSON text, what the verifier needs), `task`, `answer`.

    `answer` is reasoning-gym's own solution, None for tasks that have many. Tasks with a solver in
    `rlpost.data.solutions` have demonstrations.
    """
    tasks = _create(source, where)
    rows = []
    for i in range(source.size):
        entry = tasks[i]
        text = json.dumps(entry)
        if i == 0:
            _check_verifier(source.task, entry, text, where)
        columns = {"entry": text, "task": source.task, "answer": entry["answer"]}
        solution = worked_solution(source.task, entry)
        demonstration = Demonstration(solution) if solution else None
        name = f"reasoning_gym:{source.task}:{source.seed}/{i}"
        rows.append(Row(name, entry["question"] + source.suffix, columns, demonstration))
    return rows


def _create(source: ReasoningGymSource, where: str) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        raise DataError(
            f"{where}.task: reasoning-gym has no task `{source.task}`.{nearest(source.task, DATASETS)} All names: "
            'python -c "from reasoning_gym.factory import DATASETS; print(*sorted(DATASETS))".'
        )
    try:
        tasks = reasoning_gym.create_dataset(source.task, size=source.size, seed=source.seed, **source.options)
        tasks[0]  # some settings are only found impossible when a question is made
        return tasks
    except (TypeError, ValueError, AssertionError) as error:  # how reasoning-gym refuses settings
        raise DataError(
            f"{where}.options: reasoning-gym's task `{source.task}` refuses {source.options}: {error}. Its settings "
            f"are the fields of {DATASETS[source.task][1].__name__}."
        ) from error


def _check_verifier(task: str, entry: dict[str, Any], text: str, where: str) -> None:
    """A few verifiers compare tuples, which JSON turns into lists: they would call a right answer wrong."""
    from reasoning_gym.factory import get_score_answer_fn

    if entry["answer"] is None:
        return
    verify = get_score_answer_fn(task)
    if verify(entry["answer"], json.loads(text)) != verify(entry["answer"], entry):
        raise DataError(
            f"{where}.task: the verifier of reasoning-gym's task `{task}` does not recognise its own answer after the "
            "entry went through JSON, so rewards would be wrong. Choose another task."
        )

"""The gate: after scoring and guidance, which prompts are learned from their samples and which from their solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlpost.experience import Group, Prompt
from rlpost.gradient.metrics import Mean, Metric, Total
from rlpost.learner.buffer import DemonstrationRow
from rlpost.methods.hpt import Route, route
from rlpost.recipe.sections.guidance import Gate
from rlpost.teaching.verdict import accuracies, right_of_known

Read = Callable[[Sequence[Prompt]], Sequence[tuple[int, ...] | None]]


@dataclass(frozen=True, slots=True)
class Gated:
    """Where this process's prompts go, by group."""

    routes: tuple[Route, ...]
    demonstrations: tuple[DemonstrationRow | None, ...]
    metrics: dict[str, Metric]  # to be merged over processes


def gate(
    groups: Sequence[Group], settings: Gate, *, accuracy_rewards: Sequence[bool], rollout: int, read: Read
) -> Gated:
    """HPT's decision (arXiv 2509.04419 eq. 10) or a relative's, for every scored group.

    `read` gives a prompt's demonstration as tokens (None: there is none, or it is too long): then the group stays with RL,
    and is counted. A demonstration is always learned under the bare question, also where the samples had a hint.
    """
    by_group = [accuracies(group, accuracy_rewards) for group in groups]
    wanted = [route(settings, values, rollout) for values in by_group]
    asked = [i for i, r in enumerate(wanted) if r.demonstration]
    ids = dict(zip(asked, read([groups[i].prompt for i in asked]), strict=True))
    routes = tuple(r.dropped if i in ids and ids[i] is None else r for i, r in enumerate(wanted))
    rows = tuple(_row(group, ids.get(i)) for i, group in enumerate(groups))
    solved = [right_of_known(values, settings.threshold) for values in by_group]
    size, demonstrated = float(len(groups)), [r for r in routes if r.demonstration]
    metrics: dict[str, Metric] = {
        "gate/sft_share": Mean(float(sum(not r.samples for r in demonstrated)), size),
        "gate/demonstration_share": Mean(float(len(demonstrated)), size),
        "gate/demonstration_tokens": Total(float(sum(len(row.token_ids) for row in rows if row is not None))),
        "gate/no_demonstration": Total(float(sum(value is None for value in ids.values()))),
        "gate/solve_rate": Mean(
            sum(right / known for right, known in solved if known), sum(bool(k) for _, k in solved)
        ),
    }
    return Gated(routes, rows, metrics)


def _row(group: Group, ids: tuple[int, ...] | None) -> DemonstrationRow | None:
    return None if ids is None else DemonstrationRow(group.prompt.bare.token_ids, ids)

"""What a reward function is called with: TRL's keywords, in TRL's two formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rlpost.experience import Completion, Group
from rlpost.recipe.sections.base import unknown_choice
from rlpost.scoring.contract import BUILTINS, EXTRAS, IN_WORKER, RewardFunction
from rlpost.scoring.formats import Text

Sample = tuple[Group, Completion]
Form = Literal["auto", "text", "messages"]

_NEVER_COLUMNS = ("prompt", "completion", "completion_ids")  # as in TRL: these have keywords of their own


def keywords(
    function: RewardFunction, samples: Sequence[Sample], arguments: Mapping[str, Any], form: Form = "auto"
) -> dict[str, Any]:
    """What TRL would pass for these samples, as far as the function takes it; lists have one entry a sample."""
    columns = {name for group, _ in samples for name in group.prompt.columns}
    made: dict[str, Any] = {}
    for name in (*BUILTINS, *EXTRAS, *sorted(columns)):
        if name in IN_WORKER or name in arguments or not function.wants(name):
            continue
        if name in columns and name not in BUILTINS:
            if name not in _NEVER_COLUMNS:
                made[name] = [group.prompt.columns.get(name) for group, _ in samples]
        else:
            made[name] = [_VALUES[name](group, completion, form) for group, completion in samples]
    return {**made, **arguments}


def _prompt(group: Group, completion: Completion, form: Form) -> Any:
    prompt = group.prompt
    return _formed([dict(message) for message in prompt.messages], form, is_text=prompt.is_text)


def _completion(group: Group, completion: Completion, form: Form) -> Any:
    return _formed([{"role": "assistant", "content": completion.text}], form, is_text=group.prompt.is_text)


def _formed(messages: list[dict[str, Any]], completions: Form, *, is_text: bool) -> Any:
    text = messages[-1]["content"]
    match completions:
        case "messages":
            return messages
        case "text":
            return text
        case "auto":
            return Text(text, messages) if is_text else messages
        case _:
            raise unknown_choice("rewards.completions", completions)


_VALUES: dict[str, Callable[[Group, Completion, Form], Any]] = {
    "prompts": _prompt,
    "completions": _completion,
    "completion_ids": lambda group, completion, form: list(completion.token_ids),
    "truncated": lambda group, completion, form: completion.truncated,
    "demonstration": lambda group, completion, form: group.prompt.demonstration and group.prompt.demonstration.text,
}

"""From prompts to groups, in one batched call of the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rlpost.errors import RolloutError
from rlpost.experience import Completion, Group, Prompt
from rlpost.rollout.engine import RolloutEngine, SamplingRequest, SamplingSettings
from rlpost.rollout.seeds import request_seed


def sample_groups(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    completions_per_prompt: int,
    settings: SamplingSettings,
    *,
    run_seed: int,
    step: int,
    level: int = 0,
    finished: Callable[[Group], None] | None = None,
) -> list[Group]:
    """G completions of every prompt, as one unscored group a prompt, in the order of the prompts.

    `finished` is told of a group whose completions are all there while others are still sampled, in another thread and an order
    of its own, where the engine has them one by one. It holds the same completions as the group that is returned.

    A prompt that stands twice in `prompts` gets different samples each time. Raises RolloutError when the engine gives
    back another number of completions than it was asked for.
    """
    size = completions_per_prompt
    seen: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        first = seen[prompt.id] * size
        seen[prompt.id] += 1
        requests += [
            SamplingRequest(prompt.token_ids, request_seed(run_seed, step, prompt.id, first + i, level))
            for i in range(size)
        ]
    if finished is None:
        completions = engine.sample(requests, settings) if requests else []
    else:
        completions = engine.sample(requests, settings, finished=_Gathered(prompts, size, finished)) if requests else []
    if len(completions) != len(requests):
        raise RolloutError(
            f"The rollout engine {engine.name!r} returned {len(completions)} completions for {len(requests)} requests "
            f"at step {step}: this is a defect of the engine, not of the recipe. Report it, and use "
            "`rollout.engine.type=transformers` until it is mended."
        )
    return [Group(prompt, tuple(completions[i * size : (i + 1) * size])) for i, prompt in enumerate(prompts)]


class _Gathered:
    """Puts completions that come one by one together to groups."""

    def __init__(self, prompts: Sequence[Prompt], size: int, finished: Callable[[Group], None]) -> None:
        self._prompts, self._size, self._finished = prompts, size, finished
        self._parts: list[dict[int, Completion]] = [{} for _ in prompts]

    def __call__(self, number: int, completion: Completion) -> None:
        place, sample = divmod(number, self._size)
        self._parts[place][sample] = completion
        if len(self._parts[place]) == self._size:
            whole = tuple(self._parts[place][i] for i in range(self._size))
            self._finished(Group(self._prompts[place], whole))

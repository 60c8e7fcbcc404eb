"""Responses of the initial model to the prompts of a preference data set, for `method.pairs.baseline: initial`.

They are sampled once, greedily, before training, and kept on disk like the reference's log-probs: a run that is taken up
again, and `rlpost eval`, read the same ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlpost.data.pairs import Pair, PairSets
from rlpost.rollout.engine import RolloutEngine, SamplingRequest, SamplingSettings
from rlpost.source.reference import load_tensors, model_identity, rotary_parts, save_tensors

if TYPE_CHECKING:
    from rlpost.data.prompts import PromptSets
    from rlpost.learner.process import Processes
    from rlpost.recipe.sections.root import Recipe

Tokens = tuple[int, ...]


def lacks_baselines(recipe: Recipe, sets: PairSets) -> bool:
    """Whether the method learns from the initial model's responses and a pair has none of its own."""
    pairs = recipe.method.pairs
    wanted = pairs is not None and recipe.data.has_pairs and pairs.from_initial
    return wanted and any(pair.baseline is None for pair in (*sets.train, *sets.held_out))


def with_baselines(
    recipe: Recipe,
    sets: PromptSets | PairSets,
    model_path: str,
    start_engine: Callable[[], RolloutEngine],
    processes: Processes,
) -> tuple[PromptSets | PairSets, str | None]:
    """The pairs with a response of the initial model each, and a line for the user; as they are, and None, where the method
    needs none or the data set brings them (`data.train.baseline`). `start_engine` starts a rollout engine with the initial
    model, which lives no longer than it samples. Collective.

    Raises RolloutError when the rollout engine cannot start.
    """
    if not isinstance(sets, PairSets) or not lacks_baselines(recipe, sets):
        return sets, None
    # Equal prompts have equal greedy responses: each is sampled once.
    prompts = sorted({pair.token_ids for pair in (*sets.train, *sets.held_out) if pair.baseline is None})
    path = baseline_path(recipe, model_path, prompts)
    baselines = processes.gather(read_responses(path, len(prompts)) if processes.is_main else None)[0]
    how = f"read from {path}"
    if baselines is None:
        baselines = _sample(recipe, prompts, start_engine, processes)
        problem = write_responses(path, baselines) if processes.is_main else None
        how = f"sampled, kept in {path}" if problem is None else f"sampled, not kept: {problem}"
    response = dict(zip(prompts, baselines, strict=True))

    def complete(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
        return tuple(replace(p, baseline=response[p.token_ids]) if p.baseline is None else p for p in pairs)

    note = f"Responses of the initial model to {len(prompts)} prompts (method.pairs.baseline=initial): {how}"
    return replace(sets, train=complete(sets.train), held_out=complete(sets.held_out)), note


def baseline_path(recipe: Recipe, model_path: str, prompts: Sequence[Tokens]) -> Path:
    """Where the responses belong: model, engine, limits and prompts are in the name."""
    from rlpost.data.packaged import cache_folder

    rollout = recipe.rollout
    engine = rollout.engine.model_dump(mode="json")
    parts = [
        model_identity(model_path),
        engine,
        rollout.max_completion_tokens,
        rollout.stop,
        prompts,
        *rotary_parts(recipe),
    ]
    key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
    return cache_folder() / "baseline" / f"{key}.safetensors"


def read_responses(path: Path, count: int) -> list[Tokens] | None:
    """What was kept under `path`; None when there is nothing, or nothing usable."""
    kept = load_tensors(path, "token_ids", "lengths")
    if kept is None:
        return None
    ids, lengths = kept["token_ids"].tolist(), kept["lengths"].tolist()
    if len(lengths) != count or sum(lengths) != len(ids) or min(lengths, default=1) < 1:
        return None
    ends = list(accumulate(lengths))
    return [tuple(ids[end - size : end]) for end, size in zip(ends, lengths, strict=True)]


def write_responses(path: Path, responses: Sequence[Tokens]) -> str | None:
    """Keeps the responses. Returns what went wrong, in words."""
    flat = [token for ids in responses for token in ids]
    return save_tensors(path, token_ids=torch.tensor(flat), lengths=torch.tensor([len(ids) for ids in responses]))


def _sample(
    recipe: Recipe,
    prompts: Sequence[Tokens],
    start_engine: Callable[[], RolloutEngine],
    processes: Processes,
) -> list[Tokens]:
    """Greedy responses in the order of the prompts, each process its share, with an engine that lives no longer."""
    own = prompts[processes.rank :: processes.world]
    engine = start_engine()
    rollout = recipe.rollout
    settings = SamplingSettings(rollout.max_completion_tokens, temperature=0.0, stop=rollout.stop)
    try:
        sampled = processes.together(lambda: engine.sample([SamplingRequest(ids, 0) for ids in own], settings))
    finally:
        engine.close()
    baselines: list[Tokens] = [()] * len(prompts)
    for rank, part in enumerate(processes.gather([completion.token_ids for completion in sampled])):
        baselines[rank :: processes.world] = part
    return baselines

"""Numbers at the edge, through the real loop on every preset: none that is not finite reaches a weight, a moment or a state."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from conftest import rows, weights

from rlpost.experience import Completion, Outcome, Score
from rlpost.recipe.load import load_recipe
from rlpost.recipe.sections.method import MethodSection
from rlpost.recipe.sections.presets import preset_names
from rlpost.rollout.transformers_engine import TransformersRolloutEngine
from rlpost.run.loop import train
from rlpost.scoring.contract import LARGEST_REWARD
from rlpost.scoring.scorer import Scorer

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]

SAMPLING = [name for name in preset_names() if MethodSection.model_validate({"preset": name}).pairs is None]
UNKNOWN = Score(Outcome.CRASHED, None, "made unknown")
EDGES = ("largest", "unknown group", "unknown", "some empty", "empty", "masked", "equal", "huge", "plain")
"""What is wrong with the rollout of each optimizer step; the last one is as it should be."""


def spoilt_score(edge, group, sample, score):
    """A score of the `group`-th group's `sample`-th completion."""
    match edge:
        case "largest":
            return Score(Outcome.SCORED, LARGEST_REWARD * (1.0, -1.0, 0.0, 1e-30)[(group + sample) % 4])
        case "huge":  # no scorer lets such a reward through, but a weight may make one
            return Score(Outcome.SCORED, (1e308, -1e308, 0.0, 1.0)[(group + sample) % 4])
        case "equal":
            return Score(Outcome.SCORED, LARGEST_REWARD)
        case "unknown":
            return UNKNOWN
        case "unknown group":
            return UNKNOWN if group == 0 or sample == 0 else score
        case _:
            return score


def spoilt_completion(edge, place, completion):
    if edge == "empty" or (edge == "some empty" and place % 3 == 0):
        return Completion((), (), "", "length")
    return replace(completion, finish="length" if edge == "masked" else "stop")


@pytest.fixture
def edges(monkeypatch):
    """The rollout of optimizer step i meets EDGES[i]."""
    now = [0]
    load, sample, score = TransformersRolloutEngine.load_weights, TransformersRolloutEngine.sample, Scorer.score

    def load_weights(self, tensors, version):
        now[0] = min(version, len(EDGES) - 1)
        load(self, tensors, version)

    def spoilt_sample(self, requests, settings, **options):
        done = sample(self, requests, settings, **options)
        return [spoilt_completion(EDGES[now[0]], i, one) for i, one in enumerate(done)]

    def spoilt_scores(self, groups, *arguments, **keywords):
        return [
            replace(
                group,
                scores=tuple(
                    tuple(spoilt_score(EDGES[now[0]], g, s, one) for one in scores)
                    for s, scores in enumerate(group.scores)
                ),
            )
            for g, group in enumerate(score(self, groups, *arguments, **keywords))
        ]

    monkeypatch.setattr(TransformersRolloutEngine, "load_weights", load_weights)
    monkeypatch.setattr(TransformersRolloutEngine, "sample", spoilt_sample)
    monkeypatch.setattr(Scorer, "score", spoilt_scores)


def not_finite(value, path=""):
    """The places of all numbers in a state that are not finite."""
    if isinstance(value, torch.Tensor):
        return [] if not value.is_floating_point() or bool(value.isfinite().all()) else [path]
    if isinstance(value, float):
        return [] if math.isfinite(value) else [path]
    inside = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    return [place for key, one in inside for place in not_finite(one, f"{path}/{key}")]


@pytest.mark.parametrize("preset", SAMPLING)
def test_no_number_that_is_not_finite_reaches_a_weight(preset, edges, tmp_path, write_recipe):
    changes = {
        "learner.rollouts": len(EDGES), "learner.skip_nonfinite": 99, "evaluation.prompts": 0, "checkpoint.every": 1,
        "checkpoint.keep": 99, "data.max_demonstration_tokens": 120, "data.max_prompt_tokens": 200,
        "scoring.max_failed_share": 1.0, "rollout.probe": None,
    }  # fmt: skip
    more = ["method.overlong.filter=true"] if preset not in ("sft",) else []
    more += ["method.dynamic_sampling.max_rounds=1"] if "dapo" in preset else []
    result = train(load_recipe(write_recipe(tmp_path, changes), [f"method.preset={preset}", *more]))
    found = rows(result.run_dir)
    assert len(found) == len(EDGES)
    for step, edge in enumerate(EDGES, start=1):
        checkpoint = result.run_dir / "checkpoints" / f"step_{step:06d}"
        assert not not_finite(weights(checkpoint)), edge
        for file in (checkpoint / "trainer").glob("*.pt"):
            state = torch.load(file, weights_only=False)
            found_there = not_finite(state.get("method") if file.name.startswith("rank_") else state)
            # What a controller has seen is NaN where there was nothing to see; it takes that for no observation.
            assert not [one for one in found_there if not one.startswith("/actor_critic/seen/")], (edge, file.name)
        assert not not_finite(json.loads((checkpoint / "trainer" / "state.json").read_text())), edge
    before, after = (weights(result.run_dir / "checkpoints" / f"step_{n:06d}") for n in (len(EDGES) - 1, len(EDGES)))
    assert found[-1]["optimizer/skipped"] == 0 and math.isfinite(found[-1]["optimizer/loss"])
    assert any(not before[name].equal(after[name]) for name in before)  # it still learns

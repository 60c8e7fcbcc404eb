"""The probe across a sync: each fault stops the run at the step that makes it, at a rate of 1e-6; a sound run never stops."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from conftest import rows

from rlpost.errors import RolloutError
from rlpost.evaluation.checkpoint import evaluate_checkpoint
from rlpost.recipe.load import load_recipe
from rlpost.recipe.sections.rollout import ProbeSection
from rlpost.rollout.probe import ProbeResult, check_jump, remember
from rlpost.rollout.transformers_engine import TransformersRolloutEngine
from rlpost.rollout.verify import LEVELS, check_sync, level, precision, slope
from rlpost.run.loop import train

ORIGINAL = TransformersRolloutEngine.load_weights


def said(share: float, *, noise: float = 0.0, moved: float = 0.005, n: int = 400):
    """(before, after) of an engine that shows `share` of the learner's change."""
    draw = random.Random(0)
    old = [draw.uniform(-3, 0) for _ in range(n)]
    change = [draw.gauss(0, moved) for _ in range(n)]
    learner = [a + d for a, d in zip(old, change, strict=True)]
    engine = [a + share * d + draw.gauss(0, noise) for a, d in zip(old, change, strict=True)]
    heard = [a + draw.gauss(0, noise) for a in old]
    return (old, heard), (learner, engine)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, -1.0])
def test_the_slope_is_the_share_that_arrived(share):
    found = slope(*said(share, noise=1e-5))
    assert found.value == pytest.approx(share, abs=1e-3)
    assert found.error < 1e-3
    assert found.moved == pytest.approx(0.005, rel=0.1)
    assert found.wrong == (share != 1.0)


def test_a_slope_says_nothing_where_the_learner_stood_still_or_rounding_is_as_large():
    assert not slope(*said(0.0, moved=1e-6, noise=1e-6)).wrong
    assert not slope(*said(0.0, moved=0.0)).wrong
    assert not slope(*said(0.0, n=8)).wrong
    assert not slope(*said(0.7, noise=0.05)).wrong, "within five standard errors of 1"
    assert slope(*said(0.95, noise=1e-5)).wrong
    assert not slope(*said(0.95, noise=1e-3)).wrong, "as much as rounding can take away"


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.0, "nothing of the learner's last change"), (0.515, "5[0-3] % of the learner's last change")],
)
def test_the_message_says_how_much_arrived(share, words):
    with pytest.raises(RolloutError, match=words):
        check_sync(*said(share), limit=1.0, exact=True, when="Step 3")
    check_sync(*said(share), limit=1.0, exact=False, when="Step 3")


def test_a_gap_that_is_too_large_or_no_number_is_refused_whatever_moved():
    before, (learner, engine) = said(1.0)
    off = [x - 0.01 for x in engine]
    with pytest.raises(RolloutError, match=r"Step 3: after the sync .*gap is 0\.01 nats.*did arrive"):
        check_sync((before[0], [x - 0.01 for x in before[1]]), (learner, off), limit=1e-3, exact=True, when="Step 3")
    with pytest.raises(RolloutError, match=r"Step 3: the sync did not bring.*gap is 0\.01 nats"):
        check_sync(before, (learner, off), limit=1e-3, exact=True, when="Step 3")
    with pytest.raises(RolloutError, match="gap is nan"):
        check_sync(before, (learner, [math.nan, *engine[1:]]), limit=1e-3, exact=False, when="Step 3")


def test_the_level_is_by_precision_unless_it_is_given():
    assert [level("auto", of) for of in LEVELS] == [1e-3, 0.05, 0.1, 0.5]
    assert level(0.3, "float32") == 0.3
    assert ProbeSection().max_mean_gap == "auto"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, "float32"),
        ({"model.lora": {}}, "float32"),
        ({"model.lora": {"quantize": "nf4"}}, "quantised"),
        ({"rollout.engine": {"type": "transformers", "dtype": "bfloat16"}}, "bfloat16"),
        ({"rollout.engine": {"dtype": "float32"}}, "float32"),
        ({"rollout.engine": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}}, "quantised"),
        ({"rollout.engine": {"dtype": "bfloat16", "quantization": "fp8"}}, "quantised"),
    ],
)
def test_the_precision_is_the_coarsest_of_the_two(write_recipe, tmp_path, overrides, expected):
    assert precision(load_recipe(write_recipe(tmp_path, overrides)).recipe) == expected


def test_a_gap_that_jumps_below_the_limit_is_named():
    earlier: list[ProbeResult] = []
    for i in range(40):
        result = ProbeResult(1e-5 * (1 + i % 3), 1e-4, 100)
        check_jump(result, earlier, step=i)
        remember(earlier, result)
    assert len(earlier) == 20
    with pytest.raises(
        RolloutError, match=r"Step 40: .* 0\.0003 nats, .*median over the last 20 probes was 2e-05.*prefix cache"
    ):
        check_jump(ProbeResult(3e-4, 1e-2, 100), earlier, step=40)
    check_jump(ProbeResult(3e-4, 1e-2, 100), earlier[:4], step=4)  # too few to compare with
    check_jump(ProbeResult(math.nan, math.nan, 0), earlier, step=40)
    check_jump(ProbeResult(1.9e-5, 1e-4, 100), [ProbeResult(1e-6, 1e-5, 100)] * 9, step=9)


def skipped(weights, old):
    return old.items()


def every_second(weights, old):
    return [(name, old[name] if i % 2 else tensor) for i, (name, tensor) in enumerate(weights)]


def one_left_as_it_was(weights, old):
    return [(name, old[name] if name.endswith("layers.1.mlp.down_proj.weight") else tensor) for name, tensor in weights]


def one_norm_scaled(weights, old):
    return [(name, tensor * (1.02 if name.endswith("model.norm.weight") else 1.0)) for name, tensor in weights]


def attention_off(weights, old):
    return [(n, tensor * (0.0 if n.endswith("layers.1.self_attn.o_proj.weight") else 1.0)) for n, tensor in weights]


FAULTS = [skipped, every_second, one_left_as_it_was, one_norm_scaled, attention_off]


@pytest.mark.thorough
@pytest.mark.parametrize("fault", FAULTS)
def test_a_sync_with_a_fault_stops_the_run_at_once(write_recipe, tmp_path, monkeypatch, one_thread, fault):
    """From the second optimizer step on; the loop's own probe is not needed for it."""
    calls: list[dict] = []

    def load(self, weights, version=0):
        now = {name: tensor.detach().clone() for name, tensor in weights}
        calls.append(now)
        ORIGINAL(self, now.items() if version < 2 else fault(list(now.items()), calls[-2]), version)

    monkeypatch.setattr(TransformersRolloutEngine, "load_weights", load)
    changes = {"learner.rollouts": 4, "learner.learning_rate": 1e-6, "evaluation.prompts": 0}
    with pytest.raises(RolloutError, match=r"Step 2: (the sync did not bring|after the sync)"):
        train(load_recipe(write_recipe(tmp_path, changes)))
    assert len(rows(tmp_path / "run", "train")) == 1


@pytest.mark.thorough
def test_a_lost_adapter_stops_the_run_at_once(write_recipe, tmp_path, monkeypatch, one_thread):
    """LoRA: from the second step on the engine gets the model without what the adapter adds."""
    plain: dict = {}

    def load(self, weights, version=0):
        now = {name: tensor.detach().clone() for name, tensor in weights}
        plain.update(now if version == 0 else {})  # an adapter begins as nothing
        ORIGINAL(self, (plain if version >= 2 else now).items(), version)

    monkeypatch.setattr(TransformersRolloutEngine, "load_weights", load)
    changes = {
        "model.lora": {"rank": 4},
        "learner.rollouts": 4,
        "learner.learning_rate": 1e-6,
        "evaluation.prompts": 0,
    }
    with pytest.raises(RolloutError, match="Step 2: the sync did not bring"):
        train(load_recipe(write_recipe(tmp_path, changes)))
    assert len(rows(tmp_path / "run", "train")) == 1


@pytest.mark.thorough
def test_stale_logprobs_stop_the_run_at_once(write_recipe, tmp_path, monkeypatch, one_thread):
    """As a prefix cache that was not forgotten gives them: what was scored before is answered as it was then."""
    asked, kept = TransformersRolloutEngine.logprobs, {}

    def logprobs(self, sequences):
        now = dict(zip(sequences, asked(self, sequences), strict=True))
        kept.update({s: row for s, row in now.items() if s not in kept})
        return [kept[s] for s in sequences]

    monkeypatch.setattr(TransformersRolloutEngine, "logprobs", logprobs)
    changes = {"learner.rollouts": 4, "learner.learning_rate": 1e-6, "evaluation.prompts": 0}
    with pytest.raises(RolloutError, match="Step 1: the sync did not bring.*nothing of the learner's last change"):
        train(load_recipe(write_recipe(tmp_path, changes)))


@pytest.mark.thorough
def test_a_sound_run_raises_no_alarm_and_learns_what_it_learns_without(write_recipe, tmp_path, one_thread):
    """In 50 steps; a temperature other than 1 and several steps a rollout are no fault either."""
    found = {}
    for name, probe in (("with", {"every": 1}), ("without", None)):
        changes = {
            "learner.rollouts": 25,
            "learner.minibatches": 2,
            "learner.learning_rate": 1e-6,
            "rollout.temperature": 0.8,
            "rollout.probe": probe,
            "evaluation.prompts": 0,
        }
        train(load_recipe(write_recipe(tmp_path / name, changes)))
        found[name] = rows(tmp_path / name / "run", "train")
    slopes = [row["sync/slope"] for row in found["with"] if "sync/slope" in row]
    assert len(slopes) >= 20, "a rollout without any signal leaves the learner where it was"
    assert all(0.99 < value < 1.01 for value in slopes)
    probed = [row for row in found["with"] if "sync/mean_abs_gap" in row]
    assert len(probed) == 25 and all(row["sync/mean_abs_gap"] < 1e-5 for row in probed)
    looked_at = ("sync/", "mismatch/", "tokens/probed")
    learned = [[{k: v for k, v in row.items() if not k.startswith(looked_at)} for row in run] for run in found.values()]
    assert learned[0] == learned[1]


@pytest.mark.engine
@pytest.mark.slow
def test_a_prefix_cache_that_is_kept_stops_the_run_at_its_first_use(write_recipe, children, tmp_path):
    """At 1e-6, with two prompts that come again in every rollout, each longer than a block of the cache. From step 8 on nothing
    is forgotten: what the samples of step 9 are computed from is one step old, and they are what gives it away."""
    pytest.importorskip("vllm")
    before = """
import vllm
forget, calls = vllm.LLM.reset_prefix_cache, []
def reset(self, *arguments, **keywords):
    calls.append(None)
    return forget(self, *arguments, **keywords) if len(calls) <= 16 else True
vllm.LLM.reset_prefix_cache = reset
"""
    changes = {
        "rollout.engine": {"type": "vllm", "dtype": "float32", "kv_cache_gib": 0.25, "max_sequences": 16},
        "rollout.max_completion_tokens": 24,
        "rollout.probe": {"every": 1},
        "data.train": {"type": "arithmetic", "size": 6},
        "data.system_prompt": "Answer with a number and nothing else, as shortly as you can, however hard it is.",
        "data.max_prompt_tokens": 128,
        "learner.rollouts": 14,
        "learner.learning_rate": 1e-6,
        "evaluation.prompts": 0,
        "checkpoint.every": 0,
    }
    recipe = write_recipe(tmp_path, changes)
    code, printed = children.run(recipe, timeout=600, before=before)
    assert code == 2 and re.search(r"RolloutError: Step 9: .*agree less than before.*prefix cache", printed), printed
    assert len(rows(tmp_path / "run", "train")) == 8


@pytest.mark.engine
@pytest.mark.slow
def test_two_hundred_clean_steps_with_vllm_raise_no_alarm(write_recipe, children, tmp_path):
    pytest.importorskip("vllm")
    changes = {
        "rollout.engine": {"type": "vllm", "dtype": "float32", "kv_cache_gib": 0.25, "max_sequences": 16},
        "rollout.max_completion_tokens": 24,
        "rollout.probe": {"every": 1},
        "learner.rollouts": 200,
        "learner.learning_rate": 1e-6,
        "evaluation.prompts": 0,
        "checkpoint.every": 0,
    }
    code, printed = children.run(write_recipe(tmp_path, changes), timeout=1500)
    assert code == 0, printed
    found = rows(tmp_path / "run", "train")
    slopes = [row["sync/slope"] for row in found if "sync/slope" in row]
    assert len(found) == 200 and len(slopes) > 150
    assert all(0.98 < value < 1.02 for value in slopes)
    assert all(row["sync/mean_abs_gap"] < 1e-5 and row["mismatch/mean_abs_gap"] < 1e-5 for row in found)


@pytest.mark.thorough
def test_the_probe_reads_every_precision(write_recipe, tmp_path, one_thread):
    """In bfloat16 the level alone speaks, after the last sync: rounding is as large as a step."""
    changes = {
        "learner.rollouts": 2,
        "rollout.engine": {"type": "transformers", "dtype": "bfloat16"},
        "evaluation.prompts": 0,
    }
    train(load_recipe(write_recipe(tmp_path, changes)))
    found = rows(tmp_path / "run", "train")
    assert ["sync/mean_abs_gap" in row for row in found] == [False, True]
    assert 0 < found[-1]["sync/mean_abs_gap"] < LEVELS["bfloat16"]
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.thorough
def test_an_evaluation_by_other_weights_than_the_checkpoints_is_refused(
    write_recipe, tmp_path, monkeypatch, one_thread
):
    recipe = load_recipe(write_recipe(tmp_path, {"learner.rollouts": 2}))
    checkpoint = train(recipe).checkpoint
    assert evaluate_checkpoint(recipe, checkpoint).groups

    def load(self, weights, version=0):
        ORIGINAL(self, one_norm_scaled(list(weights), {}), version)

    monkeypatch.setattr(TransformersRolloutEngine, "load_weights", load)
    with pytest.raises(RolloutError, match="Evaluation: after the sync learner and rollout engine disagree"):
        evaluate_checkpoint(recipe, checkpoint)

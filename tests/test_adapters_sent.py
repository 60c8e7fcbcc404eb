"""LoRA adapters that go to a worker by themselves: which requests they answer, what is removed, and what a lost one does."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import rows
from safetensors.torch import load_file
from test_rollout import direct
from test_rollout_remote import DEADLINE_S, SECTION, SETTINGS, requests, saved, start_engine  # noqa: F401

from rlpost.errors import RolloutError
from rlpost.policy.model import load_policy
from rlpost.policy.weights import adapter_weights, gather_nothing, named_weights
from rlpost.recipe.sections.model import LoraSection, ModelSection
from rlpost.rollout.place import Place
from rlpost.rollout.remote.adapters import Adapters
from rlpost.rollout.remote.client import Client, run

LORA = LoraSection(rank=4, alpha=16)


@pytest.fixture
def policy(tiny_model):
    return changed(load_policy(ModelSection(path=str(tiny_model), lora=LORA), str(tiny_model)))


def changed(policy, by: float = 0.02):
    """With adapters that do something."""
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_" in name:
                parameter.add_(by * torch.randn_like(parameter).sign())
    return policy


def test_what_is_sent_apart_is_what_is_merged(policy):
    apart = dict(policy.named_weights(form="apart"))
    alone = dict(policy.named_weights(form="adapters"))
    merged = dict(policy.named_weights())
    assert set(apart) - set(alone) == set(merged)
    assert set(alone) == {name for name in apart if ".lora_" in name}
    assert all(name.startswith("base_model.model.") and name.endswith(".weight") for name in alone)
    moved = 0
    for name, tensor in merged.items():
        a = alone.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        b = alone.get(f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight")
        update = 0 if a is None or b is None else LORA.alpha / LORA.rank * b @ a
        torch.testing.assert_close(apart[name] + update, tensor)
        moved += a is not None
    assert moved == len(alone) // 2 > 0
    asked = []
    list(adapter_weights(policy.model, lambda parameters: (asked.append(len(parameters)), gather_nothing([]))[1]))
    assert asked == [1] * len(alone), "gathered one at a time"


def test_a_folder_a_version_as_peft_writes_it(policy, tmp_path):
    found = Adapters(LORA, tmp_path)
    for version in (0, 3, 3):
        found.begin(str(version), Place())
        rest = dict(found.taken(policy.named_weights(form="apart")))
        found.write()
        found.forget_old()
        assert rest.keys() == dict(named_weights(policy.causal_lm)).keys()
    [folder] = tmp_path.iterdir()
    assert folder == found.path and folder.name == found.name and found.name.endswith("-2-step-3")
    assert load_file(folder / "adapter_model.safetensors").keys() == dict(adapter_weights(policy.model)).keys()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 16)
    assert set(config["target_modules"]) == set(policy.model.peft_config["default"].target_modules) or all(
        any(full.endswith(name) for full in policy.model.peft_config["default"].target_modules)
        for name in config["target_modules"]
    )


def test_half_an_adapter_or_fewer_than_before_is_refused(policy, tmp_path):
    found = Adapters(LORA, tmp_path)
    whole = list(policy.named_weights(form="adapters"))
    for version, sent in enumerate(([], whole[:1], whole, whole[:-2])):
        found.begin(str(version), Place())
        list(found.taken(sent))
        if sent is whole:
            found.write()
            continue
        with pytest.raises(RolloutError, match=r"did not come from the learner.*rollout\.sync\.lora=merged"):
            found.write()


def lora_policy(path: str):
    return changed(load_policy(ModelSection(path=path, lora=LORA), path))


def gap(policy, request, completion) -> float:
    """Between what the worker reports of its sample and the learner's own."""
    sequence = request.token_ids + completion.token_ids
    wanted = direct(policy.causal_lm, sequence)[-len(completion.token_ids) :]
    return max(abs(a - b) for a, b in zip(wanted, completion.sampler_logprobs, strict=True))


@pytest.mark.engine
def test_a_worker_samples_by_the_newest_adapter_alone(saved, tmp_path, one_thread, monkeypatch):  # noqa: F811
    """The base model comes once, then adapters; the one before is gone; a worker that is replaced is given both."""
    path = saved[0]
    policy, called, call = lora_policy(path), [], Client.call

    async def noted(self, where, body=None, **options):
        called.append(where)
        return await call(self, where, body, **options)

    monkeypatch.setattr(Client, "call", noted)
    section = SECTION.model_copy(update={"deadline_s": 10 * DEADLINE_S})
    engine = start_engine(saved, tmp_path, section, lora=LORA, adapter_rank=LORA.rank)
    try:
        engine.load_weights(policy.named_weights(form="apart"), 0)
        first, old = engine.sample(requests(), SETTINGS), engine._adapters.name
        assert max(gap(policy, r, c) for r, c in zip(requests(), first, strict=True)) < 2e-4
        changed(policy)
        called.clear()
        engine.load_weights(policy.named_weights(form="adapters"), 7)
        assert "/update_weights" not in called and called.count("/v1/load_lora_adapter") == 1
        second = engine.sample(requests(), SETTINGS)
        assert second != first
        assert max(gap(policy, r, c) for r, c in zip(requests(), second, strict=True)) < 2e-4
        assert {version for c in second for version, _ in c.versions} <= {7}
        whole = [r.token_ids + c.token_ids for r, c in zip(requests(), second, strict=True)]
        for sequence, scores in zip(whole, engine.logprobs(whole), strict=True):  # at once, which ended vLLM's engine
            assert max(abs(a - b) for a, b in zip(direct(policy.causal_lm, sequence), scores, strict=True)) < 2e-4
        assert models(engine) & {old, engine._adapters.name} == {engine._adapters.name}, "the old one is gone"
        assert [p.name for p in engine._files.folder.iterdir() if p.is_dir()] == [engine._adapters.name]
        engine.servers[0].process.end()
        assert engine.sample(requests(), SETTINGS) == second, "by a new process, with the base model and the adapter"
        assert engine.restarts == 1
    finally:
        engine.close()


def models(engine) -> set[str]:
    async def ask():
        async with Client(engine.servers[0].address, deadline_s=60) as client:
            return await client.call("/v1/models", method="GET")

    return {model["id"] for model in run(ask())["data"]}


FAULT = """
from rlpost.rollout.remote.engine import RemoteEngine
named, syncs, load = RemoteEngine._named, [], RemoteEngine.load_weights
def counted(self, weights, version=0):
    syncs.append(version)
    return load(self, weights, version)
def lost(self, body):
    return body if len(syncs) > 2 else named(self, body)
RemoteEngine.load_weights = counted
RemoteEngine._named = lost
"""


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True], ids=["sound", "lost"])
def test_a_run_that_sends_adapters(write_recipe, children, tmp_path, lost):
    """At a rate of 1e-6. From the second step on requests without the adapter's name are answered by the model without it."""
    pytest.importorskip("vllm")
    engine = {"type": "vllm", "where": "worker", "dtype": "float32", "kv_cache_gib": 0.25, "max_sequences": 16}
    changes = {
        "model.lora": {"rank": 4},
        "rollout.engine": engine,
        "rollout.sync": {"lora": "adapter"},
        "learner.rollouts": 4,
        "learner.learning_rate": 1e-6,
        "evaluation.prompts": 0,
    }
    code, printed = children.run(write_recipe(tmp_path, changes), timeout=600, before=FAULT if lost else "")
    found = rows(tmp_path / "run", "train")
    if lost:
        assert code == 2 and "Step 2: the sync did not bring" in printed, printed
        assert len(found) == 1
        return
    assert code == 0, printed
    slopes = [row["sync/slope"] for row in found if "sync/slope" in row]
    assert slopes and all(0.98 < value < 1.02 for value in slopes)

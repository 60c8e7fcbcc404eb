"""The plan: batch arithmetic, memory, order of the slots."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from rlpost.recipe.load import load_recipe
from rlpost.recipe.memory import GIB, ModelSize, estimate, find_model_size, guess_from_name
from rlpost.recipe.plan import make_plan, print_plan

SIZE = ModelSize(1_000_000, 2, 64, 128, 32, 1000, exact=True)


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def reward(completions, **columns):\n    return [0.0 for _ in completions]\n")
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nmodel: {path: nobody/tiny-7B-it}\ndata: {train: {type: arithmetic, size: 164}, max_prompt_tokens: 100}\n"
        "rollout: {prompts_per_step: 8, completions_per_prompt: 4, max_completion_tokens: 50}\n"
        "rewards: [{function: ./mine.py, weight: 2}]\nmethod: {preset: grpo}\n"
        "learner: {steps: 25, minibatches: 2, epochs: 3, micro_batch_tokens: 500}\n"
    )
    return lambda *overrides: load_recipe(path, overrides)


def test_batch_arithmetic(loaded):
    batch = make_plan(loaded(), processes=2).batch
    assert (batch.prompts_per_process, batch.completions_per_step, batch.tokens_sampled_per_step) == (4, 32, 1600)
    assert (batch.updates_per_rollout, batch.optimizer_steps) == (6, 150)
    # Two prompts per process and update, as tree rows: 2 x (100 + 4 x 50).
    assert (batch.tokens_per_process_and_update, batch.micro_batches_per_update) == (600, 2)
    assert (batch.training_prompts, batch.data_epochs) == (100, 2.0)
    assert make_plan(loaded("learner.layout=sorted"), processes=2).batch.tokens_per_process_and_update == 1200


def test_memory_adds_up(loaded):
    lines = {line.what: line.bytes for line in estimate(loaded().recipe, SIZE)}
    assert (lines["weights"], lines["gradients"], lines["AdamW state"]) == (4_000_000, 4_000_000, 8_000_000)
    assert lines["activations"] == 500 * 2 * 2 * (8 * 64 + 2 * 32 + 4 * 128)
    assert lines["rollout engine KV cache"] == GIB
    assert "reference model" not in lines


def test_zero_stages_share_what_deepspeed_shares(loaded):
    def share(stage: int) -> tuple[int, int, int]:
        lines = {line.what: line.bytes for line in estimate(loaded().recipe, SIZE, processes=4, zero_stage=stage)}
        return lines["weights"], lines["gradients"], lines["AdamW state"]

    assert share(0) == (4_000_000, 4_000_000, 8_000_000)
    assert share(1) == (4_000_000, 4_000_000, 2_000_000)
    assert share(2) == (4_000_000, 1_000_000, 2_000_000)
    assert share(3) == (1_000_000, 1_000_000, 2_000_000)


def test_lora_and_checkpointing_need_less_and_a_reference_more(loaded):
    def total(*overrides: str) -> int:
        return sum(line.bytes for line in estimate(loaded(*overrides).recipe, SIZE))

    assert total("model.lora={rank: 4}") < total()
    assert total("model.gradient_checkpointing=true") < total()
    assert total("method.kl.coefficient=0.1") == total() + 4_000_000
    assert total("method.kl.coefficient=0.1", "model.lora={rank: 4}") == total("model.lora={rank: 4}")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7e9),
        ("x/smol-135m", 135e6),
        ("a/b-0.5B", 0.5e9),
        ("Qwen3-30B-A3B", 30e9),
        ("gpt2", None),
    ],
)
def test_guess_from_name(name, parameters):
    size = guess_from_name(name)
    assert (size.parameters if size else None) == parameters
    if size:
        assert not size.exact
        assert 0.5 < 12 * size.layers * size.hidden**2 / size.parameters < 2


def test_size_of_a_local_model(tmp_path, loaded):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.save_pretrained(tmp_path / "m")
    size, source = find_model_size(loaded("model.path=./m").recipe.model)
    layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32 + 2 * 16
    assert size == ModelSize(2 * layer + 16 + 2 * 100 * 16, 2, 16, 32, 8, 100, exact=True)
    assert "config.json" in source


def test_a_model_that_is_elsewhere(loaded):
    plan = make_plan(loaded())
    assert "not on this machine; guessed from its name" in plan.memory_source and plan.memory
    nameless = make_plan(loaded("model.path=nobody/model"))
    assert nameless.memory == () and "not on this machine" in nameless.memory_source


def test_order_of_slots(loaded):
    order = make_plan(loaded("method.preset=dapo", "learner.minibatches=1", "learner.epochs=1")).order
    assert order[0] == "sample completions" and order[1] == "score: 2 x ./mine.py"
    assert any("sampled anew" in step for step in order)
    assert "clip never acts" in order[-1]


def test_printing(loaded, capsys):
    plan = make_plan(loaded("learner.steps=3", "evaluation.k=[9]"))
    print_plan(plan)
    text = capsys.readouterr().out
    for part in ("learner.steps", "command line", "preset", "GiB", "problem: evaluation.k=9"):
        assert part in text
    print_plan(plan, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == asdict(plan.batch) and len(found["problems"]) == 1
    assert {"key": "learner.steps", "value": 3, "origin": "command line"} in found["values"]

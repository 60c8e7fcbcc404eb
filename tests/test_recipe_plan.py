"""The plan: batch arithmetic, memory, order of the slots."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from live_bytes import LiveBytes
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.policy.model import load_policy
from rlpost.policy.rows import RowGroup, build_rows
from rlpost.recipe.load import load_recipe
from rlpost.recipe.plan.describe import make_plan, print_plan
from rlpost.recipe.plan.memory import GIB, ModelSize, estimate, find_model_size, guess_from_name
from rlpost.recipe.sections.model import ModelSection
from rlpost.run import rehearse

SIZE = ModelSize(1_000_000, 2, 64, 128, 32, 1000, exact=True)


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nmodel: {path: nobody/tiny-7B-it}\ndata: {train: {type: arithmetic, size: 164}, max_prompt_tokens: 100}\n"
        "rollout: {prompts_per_step: 8, completions_per_prompt: 4, max_completion_tokens: 50}\n"
        "rewards: [{function: number, weight: 2}]\nmethod: {preset: grpo}\n"
        "learner: {rollouts: 25, minibatches: 2, epochs: 3, micro_batch_tokens: 500}\n"
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


def test_tokens_of_hints_rounds_and_solutions(loaded):
    def batch(*overrides):
        return make_plan(loaded(*overrides), processes=2).batch

    hint = "method.guidance={type: hint, ratios: [0.25, 0.5]}"
    assert (batch(hint).samplings, batch(hint).tokens_sampled_per_step) == (3, 3 * 1600)
    assert batch("method.preset=dapo").tokens_sampled_per_step == (1 + 3) * 1600
    long = "data.max_demonstration_tokens=300"
    # Two prompts per process and update: samples 100 + 4 x 50, solution 100 + 300; one of them, or both.
    short = "data.max_demonstration_tokens=50"
    assert batch("method.preset=hpt", short).tokens_per_process_and_update == 2 * 300
    # By default a solution may fill a micro-batch (500) behind the longest prompt, whatever the limit of sampling.
    for limit in ("rollout.max_completion_tokens=16", "rollout.max_completion_tokens=50"):
        assert batch("method.preset=sft", limit).tokens_per_process_and_update == 2 * 500
    assert batch("method.preset=hpt", long).tokens_per_process_and_update == 2 * 400
    assert batch("method.gate={type: luffy}", long).tokens_per_process_and_update == 2 * (300 + 400)
    plain = batch("method.preset=sft", long)
    assert (plain.tokens_per_process_and_update, plain.tokens_sampled_per_step) == (2 * 400, 0)


def test_plain_sft_samples_nothing_and_needs_no_reward(loaded, capsys):
    plan = make_plan(loaded("method.preset=sft", "rewards=[]", "evaluation.prompts=0"))
    assert plan.problems == () and not any("engine" in line.what for line in plan.memory)
    print_plan(plan)
    said = capsys.readouterr().out
    assert "8 worked solutions a step, not sampled" in said and "SFT on every prompt's demonstration" in said
    assert any("engine" in line.what for line in make_plan(loaded("method.preset=sft")).memory)


def test_one_threshold_for_all(loaded):
    shared = loaded("method.preset=hpt", "method.guidance={type: hint}", "scoring.threshold=0.5").recipe
    method = shared.method
    assert method.gate.threshold == method.guidance.threshold == shared.evaluation.threshold == 0.5
    own = loaded("method.preset=hpt", "method.gate.threshold=0.9", "scoring.threshold=0.5").recipe
    assert own.method.gate.threshold == 0.9 and own.evaluation.threshold == 0.5
    assert type(own).model_validate(own.model_dump()) == own
    low = "method.guidance={type: hint, wrong_at_most: 0.6}"
    (problem,) = make_plan(loaded(low, "scoring.threshold=0.5")).problems
    assert "wrong_at_most=0.6" in problem and "scoring.threshold" in problem


def test_memory_adds_up(loaded):
    lines = {line.what: line.bytes for line in estimate(loaded().recipe, SIZE)}
    assert (lines["weights"], lines["gradients"], lines["AdamW state"]) == (4_000_000, 4_000_000, 8_000_000)
    assert lines["activations"] == 500 * 2 * 2 * (16 * 64 + 4 * 128)  # float32 weights under autocast
    assert lines["rollout engine KV cache"] == GIB
    assert "reference model" not in lines


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("dtype", "autocast"), [("float32", "none"), ("float32", "bfloat16"), ("bfloat16", "none")])
def test_activations_are_what_a_pass_keeps(loaded, tmp_path, kind, dtype, autocast):
    shape = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **shape, intermediate_size=192, vocab_size=61, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    policy = load_policy(ModelSection(path=str(tmp_path), dtype=dtype, autocast=autocast), str(tmp_path))
    branches = tuple((i, 40 * i, tuple(range(5, 45))) for i in range(5))
    (rows,) = build_rows([RowGroup((3, 4), branches)], layout="tree", micro_batch_tokens=1000, pad_id=0)
    tokens = rows.input_ids.numel()
    with LiveBytes() as memory, policy.precision():
        states = policy._states(rows)
    assert states.requires_grad
    settings = (f"model.dtype={dtype}", f"model.autocast={autocast}", f"learner.micro_batch_tokens={tokens}")
    size = replace(SIZE, layers=4, hidden=64, intermediate=192, kv_width=32)
    lines = {line.what: line.bytes for line in estimate(loaded(*settings).recipe, size)}
    assert lines["activations"] == pytest.approx(memory.live, rel=0.1)


def test_critics_and_reward_models_are_counted(loaded, classifier):
    def lines(*overrides: str, **options) -> dict[str, int]:
        found = estimate(loaded(*overrides).recipe, SIZE, **options)
        return {line.what: line.bytes for line in found}

    before = lines()
    on_trunk = lines("method.preset=ppo")
    assert set(on_trunk) - set(before) == {"critic with gradients and AdamW state", "reference model"}
    head = 64 * 16 + 16
    assert on_trunk["critic with gradients and AdamW state"] == 16 * head
    own = lines("method={preset: ppo, critic: {model: separate}}")
    assert own["critic with gradients and AdamW state"] == 16 * 1_000_000 + 16 * head
    assert own["critic's activations"] == own["activations"]
    shared = lines("method={preset: ppo, critic: {model: separate}}", processes=4, zero_stage=3)
    assert shared["critic with gradients and AdamW state"] == (16 * 1_000_000 + 16 * head) // 4
    other = lines("method={preset: ppo, critic: {model: separate, path: nobody/critic-2B}}")
    assert other["critic with gradients and AdamW state"] > 16 * 2e9
    judged = lines("rewards=[{path: nobody/judge-8B}, {path: nobody/judge, name: unknown}]")
    assert judged["reward model reward_model"] == 2 * 8_000_000_000 and judged["reward model unknown"] == 0
    from transformers import AutoModelForSequenceClassification

    exact = AutoModelForSequenceClassification.from_pretrained(classifier).num_parameters()
    found = lines(f"rewards=[{{path: {classifier}, dtype: float32}}]").items() - before.items()
    assert found == {("reward model reward_model", 4 * exact)}


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


SHAPE = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_size_of_a_local_model(tmp_path, loaded):
    from transformers import LlamaConfig

    config = LlamaConfig(**SHAPE)
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
    assert order[0] == "sample completions" and order[1] == "score: 2 x number"
    assert any("sampled anew" in step for step in order)
    assert "clip never acts" in order[-1]


def test_printing(loaded, capsys):
    plan = make_plan(loaded("learner.rollouts=3", "evaluation.k=[9]"))
    print_plan(plan)
    text = capsys.readouterr().out
    for part in ("learner.rollouts", "command line", "preset", "GiB", "problem: evaluation.k=9"):
        assert part in text
    print_plan(plan, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == asdict(plan.batch) and len(found["problems"]) == 1
    assert {"key": "learner.rollouts", "value": 3, "origin": "command line"} in found["values"]


PAIRS = (
    "name: r\nmodel: {path: ./m}\ndata: {train: {type: preference, path: pairs.jsonl}, held_out: 1, max_prompt_tokens: 32}\n"
    "rollout: {prompts_per_step: 2, max_completion_tokens: 16}\nmethod: {preset: rpo}\n"
    "learner: {rollouts: 2, micro_batch_tokens: 80}\n"
)


@pytest.mark.parametrize(("window", "layout"), [(None, "tree"), (48, "tree"), (47, "sorted")])
def test_a_model_that_cannot_take_trees_is_planned_for(tmp_path, monkeypatch, window, layout):
    """Mistral's window: trees where it holds the longest sequence (32 + 16 tokens), else rows, in which a pair is longer."""
    from transformers import MistralConfig

    monkeypatch.chdir(tmp_path)
    MistralConfig(**SHAPE, sliding_window=window).save_pretrained(tmp_path / "m")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 8)
    (tmp_path / "p.yaml").write_text(PAIRS)
    monkeypatch.setattr(rehearse, "rehearse", lambda *_: rehearse.Rehearsal())  # the folder has a configuration alone
    plan = make_plan(load_recipe(tmp_path / "p.yaml"))
    assert plan.layout.startswith(layout)
    per_pair = plan.batch.tokens_per_process_and_update // 2
    problems = [problem for problem in plan.problems if "micro_batch_tokens" in problem]
    if layout == "tree":
        assert problems == [] and plan.layout == "tree" and per_pair == 32 + 2 * 16
    else:
        assert per_pair == 2 * (32 + 16) and "sliding_window=47, where a sequence may have 48 tokens" in plan.layout
        (problem,) = problems
        assert "the longest pair has 96 positions" in problem and "sliding_window=47" in problem


PLACES = {
    "": ["2 learner processes, vLLM inside each", "staleness=1, so that both sides work at once"],
    "rollout.engine.type=transformers": ["sampling with transformers"],
    "rollout.engine.where=worker rollout.engine.devices=[2,3,4,5] rollout.engine.tensor_parallel=2": [
        "a vLLM worker beside each, on cards [2, 3, 4, 5] of each node, 2 cards (tensor_parallel 2",
        "staleness=0: one side",
    ],
    "rollout.engine.where=server rollout.engine.urls=[http://10.0.0.2:8000] rollout.staleness=2 rollout.in_flight=true": [
        "1 vLLM server for all of them",
        "2 rollouts old at the most, 12 optimizer steps; new weights reach",
        "how many cards",
    ],
}


@pytest.mark.parametrize("overrides", PLACES)
def test_the_plan_says_who_samples_where(loaded, overrides, capsys):
    plan = make_plan(loaded(*overrides.split()), processes=2)
    assert all(any(words in line for line in plan.places) for words in PLACES[overrides]), plan.places
    print_plan(plan)
    assert "who samples: 2 learner processes" in capsys.readouterr().out


def test_a_recipe_that_samples_nothing_names_no_place(loaded):
    assert make_plan(loaded("method.preset=sft", "evaluation.prompts=0")).places == ()

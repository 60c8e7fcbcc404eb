"""Cross-field rules: each names both fields and a fix."""

from __future__ import annotations

import json

import pytest

from rlpost.errors import RecipeError
from rlpost.recipe.load import load_recipe
from rlpost.recipe.rules.check import Setting, advise, check, known_size, refuse_unsound, training_prompts
from rlpost.recipe.rules.paths import looks_local

REWARD = "def reward(completions, **columns):\n    return [0.0 for _ in completions]\n"


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {path: ./model}\ndata: {train: {type: arithmetic, size: 200}}\n"
        "rewards: [{function: number}]\nmethod: {preset: grpo}\n"
    )
    return tmp_path


def problems(base, *overrides: str, processes: int = 1) -> list[str]:
    return check(load_recipe(base / "r.yaml", overrides).recipe, Setting(processes, base))


def test_a_sound_recipe_has_no_problems(base):
    assert problems(base) == []
    refuse_unsound(load_recipe(base / "r.yaml"))


CASES = [
    (
        ["rollout.completions_per_prompt=1"],
        ["rollout.completions_per_prompt=1", "method.advantage.center", "at least 2"],
    ),
    (["learner.minibatches=3"], ["rollout.prompts_per_step=8", "learner.minibatches=3", "6 or 9"]),
    (["rollout.top_k=1"], ["rollout.top_k=1", "the same"]),
    (
        ["method.preset=sft", "rollout.temperature=0.7", "data.train={type: reasoning_gym, task: chain_sum}"],
        ["rollout.temperature=0.7", "method.preset=sft", "samples nothing"],
    ),
    (["evaluation.k=[1,4]"], ["evaluation.k=4", "evaluation.samples=1"]),
    (["learner.micro_batch_tokens=700"], ["learner.micro_batch_tokens=700", "max_prompt_tokens", "at least 768"]),
    (["data.held_out=0"], ["evaluation.prompts=64", "data.held_out=0"]),
    (["rewards.0.accuracy=false"], ["evaluation.prompts=64", "accuracy=true"]),
    (["learner.warmup_steps=100"], ["learner.warmup_steps=100", "100 optimizer steps"]),
    (["learner.stop_after=101"], ["learner.stop_after=101", "learner.rollouts=100"]),
    (["rollout.engine.tensor_parallel=2"], ["rollout.engine.tensor_parallel=2", "rollout.engine.where=colocated"]),
    (["rollout.engine.replicas=2"], ["replicas=2", "where=worker"]),
    (["rollout.staleness=1"], ["rollout.staleness=1", "where=worker"]),
    (["rollout.in_flight=true"], ["rollout.in_flight=true", "rollout.staleness to 1"]),
    (["method.masks=[{type: stale}]"], ["stale", "rollout.staleness=0"]),
    (["rollout.staleness=2", "rollout.engine.type=transformers"], ["rollout.staleness=2", "rollout.engine.type=vllm"]),
    (["rollout.engine.where=server"], ["where=server", "rollout.engine.urls", "rlpost serve"]),
    (["rollout.engine.urls=[http://a:1]"], ["rollout.engine.urls", "where=server"]),
    (["rollout.engine={where: server, urls: [http://a:1, http://a:1]}"], ["same server twice"]),
    (["rollout.engine={where: server, urls: ['10.0.0.2:8000']}"], ["'10.0.0.2:8000'", "http://10.0.0.2:8000"]),
    (["rollout.engine={where: worker, sleep: true}"], ["rollout.engine.sleep", "gives memory back"]),
    (["rollout.engine={where: worker, devices: [1, 2, 3], tensor_parallel: 2}"], ["3 GPUs", "= 2"]),
    (["rollout.engine={where: worker, cores: [4096]}"], ["core 4096"]),
    (["rollout.engine.cores=[0]"], ["rollout.engine.cores", "where=worker"]),
    (
        ["rollout.sync.rounding=stochastic", "rollout.engine.dtype=float32"],
        ["rollout.sync.rounding=stochastic", "rollout.engine.dtype=float32", "weights whole"],
    ),
    (["rollout.sync.rounding=stochastic", "rollout.engine={type: transformers}"], ["rollout.engine.dtype=float32"]),
    (["rollout.sync.lora=adapter", "rollout.engine={where: worker}"], ["rollout.sync.lora=adapter", "set model.lora"]),
    (["rollout.sync.transfer=nccl"], ["rollout.sync.transfer=nccl", "rollout.engine.where=server"]),
    (
        ["rollout.sync.transfer=nccl", "rollout.engine={where: worker}"],
        ["rollout.engine.where=server", "transfer=files"],
    ),
    (
        [
            "rollout.sync={transfer: nccl, lora: adapter}",
            "model.lora={}",
            "rollout.engine={where: server, urls: [http://a:1]}",
        ],
        ["rollout.sync.transfer=nccl", "rollout.sync.lora=adapter"],
    ),
    (["rollout.sync.lora=adapter", "model.lora={}"], ["rollout.sync.lora=adapter", "rollout.engine.where=worker"]),
    (
        ["rollout.sync.lora=adapter", "model.lora={rank: 600}", "rollout.engine={where: worker}"],
        ["model.lora.rank=600", "512"],
    ),
    (
        ["rollout.sync.lora=adapter", "model.lora={targets: [q_proj, lm_head]}", "rollout.engine={where: worker}"],
        ["model.lora.targets=['lm_head']", "lora=merged"],
    ),
    (
        [
            "rollout.sync.lora=adapter",
            "model.lora={}",
            "rollout.engine={where: worker}",
            "rollout.staleness=2",
            "rollout.in_flight=true",
        ],
        ["rollout.sync.lora=adapter", "rollout.in_flight=true"],
    ),
    (
        [
            "rollout.sync={lora: adapter, rounding: stochastic}",
            "model.lora={}",
            "rollout.engine={where: worker, dtype: bfloat16}",
        ],
        ["rollout.sync.lora=adapter", "rollout.sync.rounding=stochastic"],
    ),
    (["rollout.sync.rounding=stochastic", "rollout.engine.dtype=float16"], ["rollout.engine.dtype=float16"]),
    (
        ["rollout.sync.rounding=stochastic", "rollout.engine={where: server, urls: [http://a:1]}"],
        ["rollout.engine.dtype=auto", "servers' machine"],
    ),
    (
        ["rollout.sync.rounding=stochastic", "rollout.engine.dtype=bfloat16", "model.dtype=bfloat16"],
        ["rollout.sync.rounding=stochastic", "model.dtype=bfloat16", "bfloat16 already"],
    ),
    (
        ["rollout.sync.rounding=stochastic", "rollout.engine.dtype=bfloat16", "model.dtype=bfloat16", "model.lora={}"],
        ["model.dtype=bfloat16", "merged with the adapters"],
    ),
    (["rollout.engine.speculative={}"], ["rollout.engine.speculative", "CUDA", "wrong by whole nats"]),
    (["rollout.engine.quantization=fp8"], ["rollout.engine.quantization=fp8", "CUDA"]),
    (
        ["rollout.engine={where: server, urls: [http://a:1], speculative: {tokens: 3}}", "rollout.top_k=20"],
        ["rollout.engine.speculative", "rollout.top_k=20", "tokens kept"],
    ),
    (
        [
            "rollout.engine={where: server, urls: [http://a:1], quantization: fp8, dtype: bfloat16}",
            "rollout.sync.rounding=stochastic",
        ],
        ["rollout.sync.rounding=stochastic", "rollout.engine.quantization=fp8", "to the nearest"],
    ),
    (["rewards=[{function: ./mine.py},{function: ./mine.py}]"], ["2 of them are named mine", "rewards.N.name"]),
    (["rewards=[]", "evaluation.prompts=0"], ["rewards is empty", "method.preset=grpo"]),
    (["rewards.0.function=./no.py"], ["rewards.0.function", "no.py"]),
    (["rewards.0.function=./mine.py:other"], ["rewards.0.function", "other"]),
    (["resume=runs/r/checkpoints/step_9"], ["resume=", "has no checkpoints"]),
    (["resume=auto", "overwrite=true"], ["resume=auto", "overwrite=true"]),
    (["data.train.size=70"], ["data.train has 6 prompts", "data.held_out=64", "rollout.prompts_per_step=8"]),
    (["data.train={type: dataset, path: no.jsonl}"], ["data.train.path=no.jsonl", "no such file"]),
    (["data.eval={type: dataset, path: 'no*.parquet'}"], ["data.eval.path=no*.parquet"]),
    (["model.chat_template=no.jinja"], ["model.chat_template=no.jinja"]),
    (["model.path=./nowhere"], ["model.path=./nowhere", "no such folder"]),
    (["model.path=package:smol"], ["model.path=package:smol", "package:smollm2-135m"]),
    (["model.path=."], ["no config.json"]),
    (["rewards=[{path: ./nowhere}]", "evaluation.prompts=0"], ["rewards.0.path=./nowhere", "no such folder"]),
    (["rewards=[{path: .}]", "evaluation.prompts=0"], ["rewards.0.path=.", "no config.json"]),
    (
        ["rewards=[{function: ./mine.py},{path: ./model, name: mine}]"],
        ["2 of them are named mine", "rewards.N.name"],
    ),
    (
        ["method={preset: ppo, critic: {model: separate, path: ./nowhere}}"],
        ["method.critic.path=./nowhere", "no such folder"],
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), CASES, ids=[c[0][0] for c in CASES])
def test_each_rule(base, overrides, expected):
    found = problems(base, *overrides)
    assert len(found) == 1, found
    for part in expected:
        assert part in found[0]


def test_processes_divide_the_prompts(base):
    assert "3 processes" in problems(base, processes=3)[0]
    assert problems(base, "learner.minibatches=4", processes=2) == []
    assert "in each of the 4 processes" in problems(base, "learner.minibatches=4", processes=4)[0]
    # What is proposed must itself pass.
    assert problems(base, "learner.minibatches=4", "rollout.prompts_per_step=16", processes=4) == []


def test_world_size_comes_from_the_launcher(base, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match="WORLD_SIZE"):
        refuse_unsound(load_recipe(base / "r.yaml"))


def test_group_of_one_is_fine_without_a_group_baseline(base):
    reinforce = ["method.preset=reinforce_pp", "rollout.completions_per_prompt=1"]
    assert problems(base, *reinforce) == []


def test_flash_attention_needs_cuda_and_half_precision(base):
    import torch

    found = " ".join(problems(base, "model.attention=flash_attention_2", "model.autocast=none"))
    assert "model.autocast=none" in found
    if not torch.cuda.is_available():
        assert "CUDA" in found


def test_several_problems_are_raised_together(base):
    loaded = load_recipe(base / "r.yaml", ["learner.minibatches=3", "evaluation.k=[4]"])
    with pytest.raises(RecipeError, match="2 problems") as caught:
        refuse_unsound(loaded)
    assert "learner.minibatches" in str(caught.value) and "evaluation.k" in str(caught.value)


def test_existing_checkpoints_are_named(base):
    for step in (2, 10):
        (base / "runs" / "r" / "checkpoints" / f"step_{step}").mkdir(parents=True)
    assert "step_2, step_10" in problems(base, "resume=runs/r/checkpoints/step_3")[0]
    assert problems(base, "resume=runs/r/checkpoints/step_10") == []


def test_advice_is_no_problem(base):
    loaded = load_recipe(base / "r.yaml", ["model.dtype=bfloat16", "overwrite=true"])
    (base / "runs" / "r").mkdir(parents=True)
    (base / "runs" / "r" / "metrics.jsonl").write_text("")
    notes = advise(loaded.recipe, Setting())
    assert len(notes) == 2 and "model.dtype" in notes[0] and "deleted" in notes[1]
    refuse_unsound(loaded)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("{preset: grpo, kl: {coefficient: 0.1, estimator: k1}}", "k1 with the penalty in the loss"),
        ("{preset: grpo, kl: {coefficient: 0.1, estimator: k3, where: reward}}", "k3 with the penalty in the reward"),
        ("{preset: safe, kl: {estimator: k1}}", "k1 with the penalty in the loss"),
        ("{preset: safe, controller: {term: reward}}", "k3 with the penalty in the reward"),
        ("{preset: safe_released}", None),  # k1, but without any gradient
        ("{preset: safe}", None),
        ("{preset: ppo}", None),
        ("{preset: reinforce_pp}", None),
        ("{preset: grpo}", None),
    ],
)
def test_estimators_that_do_not_fit_their_place_get_advice(base, method, said):
    notes = advise(load_recipe(base / "r.yaml", [f"method={method}"]).recipe, Setting())
    assert [said in note for note in notes] == [True] if said else notes == []


def test_deepspeed_has_one_clip_for_policy_and_critic(base):
    recipe = load_recipe(base / "r.yaml", ["method.preset=ppo"]).recipe
    (note,) = advise(recipe, Setting(zero_stage=2))
    assert "method.critic.max_grad_norm=0.5" in note and "learner.max_grad_norm=1." in note
    assert advise(recipe, Setting()) == []
    same = load_recipe(base / "r.yaml", ["method={preset: ppo, critic: {max_grad_norm: 1.0}}"]).recipe
    assert advise(same, Setting(zero_stage=2)) == []


def test_sizes_of_sources(base):
    (base / "d.jsonl").write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(100)) + "\n")
    path = "data.train={type: dataset, path: d.jsonl, limit: 90}"
    recipe = load_recipe(base / "r.yaml", [path, "data.held_out=10"]).recipe
    assert known_size(recipe.data.train) == 90
    assert training_prompts(recipe) == 80
    hub = load_recipe(base / "r.yaml", ["data.train={type: dataset, path: openai/gsm8k}"]).recipe
    assert training_prompts(hub) is None


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("Qwen/Qwen3-4B", False),
        ("gpt2", False),
        ("./m", True),
        ("/m", True),
        ("a/b/c", True),
        ("~/m", True),
        ("m/", True),
    ],
)
def test_paths_that_can_only_be_local(path, local):
    assert looks_local(path) is local


def test_a_hang_must_not_count_as_right(base):
    [problem] = problems(base, "rewards.0.timeout_score=1")
    assert "rewards.0.timeout_score=1 is not below scoring.threshold=1" in problem
    assert problems(base, "rewards.0.timeout_score=0") == [] == problems(base, "rewards.0.timeout_score=0.5")
    assert problems(base, "rewards.0.timeout_score=0.5", "scoring.threshold=0.5") != []


def test_what_no_engine_samples_as_it_is_told_is_refused(base):
    for override in (
        "rollout.temperature=0.005",
        "rollout.temperature=0",
        "evaluation.temperature=0.001",
        "rollout.stop=['']",
    ):
        with pytest.raises(RecipeError, match=override.partition("=")[0]):
            load_recipe(base / "r.yaml", [override])


def test_a_temperature_that_is_not_used_is_said(base):
    loaded = load_recipe(base / "r.yaml", ["evaluation.temperature=0.7"])
    assert any("evaluation.samples=1" in note for note in advise(loaded.recipe, Setting(1, base)))


@pytest.mark.parametrize(
    ("stage", "overrides", "said"),
    [
        (0, [], ["learner.offload.type=streamed", "does not use DeepSpeed", "launch/zero3.yaml"]),
        (2, [], ["learner.offload.type=streamed", "ZeRO-2", "launch/cpu-zero3.yaml"]),
        (3, ["model.lora={rank: 4}"], ["learner.offload.type=streamed", "model.lora"]),
    ],
)
def test_an_offload_with_nothing_to_take_over_is_refused(stage, overrides, said, base):
    recipe = load_recipe(base / "r.yaml", ["learner.offload={type: streamed}", *overrides]).recipe
    [problem] = [found for found in check(recipe, Setting(1, base, stage)) if "learner.offload" in found]
    assert all(part in problem for part in said), problem
    assert not any(
        "offload" in found for found in check(recipe, Setting(1, base, stage, learns=False))
    )  # eval and serve


def test_an_offload_beside_deepspeeds_own_is_refused(base, monkeypatch):
    recipe = load_recipe(base / "r.yaml", ["learner.offload={type: interleaved}"]).recipe
    assert check(recipe, Setting(1, base, 3)) == []
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    [problem] = check(recipe, Setting(1, base, 3))
    assert "offload_optimizer_device to none" in problem


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"zero_optimization": {"stage": 3, "zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
        ({"sparse_gradients": True}, "sparse_gradients"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast"),
        ({"torch_autocast": {"enabled": False}, "bf16": {"bf16_master_weights_and_grads": True}}, None),
    ],
)
def test_settings_of_deepspeed_that_an_offload_cannot_honour_are_refused(base, monkeypatch, config, named):
    (base / "deepspeed.json").write_text(json.dumps(config))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(base / "deepspeed.json"))
    recipe = load_recipe(base / "r.yaml", ["learner.offload={type: streamed}"]).recipe
    problems = check(recipe, Setting(1, base, 3))
    assert len(problems) == (named is not None)
    assert all(named in problem and "deepspeed_config_file" in problem for problem in problems)


def test_an_offload_without_a_gpu_is_said_to_gain_nothing(base, monkeypatch):
    import torch

    recipe = load_recipe(base / "r.yaml", ["learner.offload={type: streamed, arithmetic: own}"]).recipe
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert any("nothing is gained" in note for note in advise(recipe, Setting(1, base, 3)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not any("nothing is gained" in note for note in advise(recipe, Setting(1, base, 3)))


def test_an_offload_that_parks_nothing_is_refused_or_said(base):
    with pytest.raises(RecipeError, match="park=false parks nothing"):
        load_recipe(base / "r.yaml", ["learner.offload={type: parked, park: false}"])
    for staleness, count in (("0", 0), ("1", 1)):
        overrides = ["learner.offload={type: parked}", f"rollout.staleness={staleness}"]
        recipe = load_recipe(base / "r.yaml", overrides).recipe
        assert sum("parks nothing here" in note for note in advise(recipe, Setting(1, base, 3))) == count


def test_more_pieces_for_the_gpu_than_there_are_are_refused(base):
    with pytest.raises(RecipeError, match="gpu_of=3 of every=2"):
        load_recipe(base / "r.yaml", ["learner.offload={type: interleaved, gpu_of: 3}"])


def test_weights_from_gpu_to_gpu_need_gpus(base, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = ("rollout.sync.transfer=nccl", "rollout.engine={where: server, urls: [http://a:1]}")
    [problem] = problems(base, *asked)
    assert "rollout.sync.transfer=nccl needs a CUDA GPU" in problem and "rollout.sync.transfer=files" in problem

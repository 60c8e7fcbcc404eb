"""Every family's weights under one name: what the learner holds, what the sampler gets, what a checkpoint says.

Each family, as a tiny random model: sample, learn a step, sync, sample again; save, load with transformers.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import save_tiny, tiny_config

from rlpost.errors import RecipeError, RolloutError
from rlpost.policy.adapters import check_targets
from rlpost.policy.family import TREE_MODEL_TYPES, plain_kernel
from rlpost.policy.model import load_policy
from rlpost.policy.names import WeightNames
from rlpost.policy.weights import held_tensors, named_weights, weight_names
from rlpost.recipe.sections.model import LoraSection, ModelSection
from rlpost.rollout.engine import SamplingRequest, SamplingSettings
from rlpost.rollout.transformers_engine import TransformersRolloutEngine

pytestmark = pytest.mark.thorough

MIXTURES = (
    "afmoe cohere2_moe deepseek_v2 deepseek_v3 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite gpt_oss "
    "granitemoeshared hunyuan_v1_moe llama4_text minimax_m2 solar_open"
)
DENSE = "apertus arcee bloom cohere2 cwm ernie4_5 exaone4 falcon gpt2 hunyuan_v1_dense nemotron opt"
FAMILIES = sorted({*TREE_MODEL_TYPES, *MIXTURES.split(), *DENSE.split()})
OTHERS = (
    "axk1 bamba biogpt bitnet codegen diffllama doge falcon_h1 falcon_mamba gemma3n_text gpt_bigcode gpt_neo "
    "gpt_neox_japanese gptj granite_swa granitemoe_swa granitemoehybrid hrm_text hy_v3 hyperclovax jais2 jamba jetmoe "
    "kimi_linear laguna lfm2 lfm2_moe longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax ministral3 mpt "
    "nanochat nemotron_h olmo_hybrid persimmon phimoe qwen3_next vaultgemma xglm zaya"
)
IDS = torch.tensor([[5, 9, 40, 77, 3, 250, 11, 8, 90, 33, 200, 6]])
SETTINGS = SamplingSettings(max_completion_tokens=8, temperature=1.0)
REQUESTS = [SamplingRequest((5, 9, 40, 77, 3), seed=7), SamplingRequest((250, 11, 8), seed=8)]


class Letters:
    """As much of a tokenizer as the engine asks for."""

    eos_token_id = 1

    def decode(self, tokens, **_options):
        return " ".join(map(str, tokens))


def policy_of(folder, lora=None):
    return load_policy(ModelSection(path=str(folder), autocast="none", lora=lora), str(folder))


def loaded(folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=plain_kernel(AutoConfig.from_pretrained(folder)),
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


def logps(model, ids=IDS):
    scores = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return scores.gather(-1, ids[:, 1:, None])[0, :, 0]


def learn(policy):
    """One step, large enough that old weights are told from new ones; the log-probs before and after."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(1 + policy.has_adapter):  # an adapter's first step changes only B
        before = logps(policy.causal_lm)
        (-before.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = logps(policy.causal_lm)
    assert (after - before.detach()).abs().max() > 1e-2
    return after


@torch.no_grad()
def sampling_gap(engine, policy):
    """The largest difference between a sampled token's log-prob in the sampler and in the learner."""
    gaps = []
    for request, done in zip(REQUESTS, engine.sample(REQUESTS, SETTINGS), strict=True):
        scores = logps(policy.causal_lm, torch.tensor([[*request.token_ids, *done.token_ids]]))
        found = torch.tensor(done.sampler_logprobs)
        gaps.append((scores[-len(found) :] - found).abs().max())
    return float(max(gaps))


@torch.no_grad()
def scoring_gap(engine, policy):
    return float((torch.tensor(engine.logprobs([tuple(IDS[0].tolist())])[0]) - logps(policy.causal_lm)).abs().max())


def on_disk(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.fixture(autouse=True)
def fixed(one_thread):
    torch.manual_seed(0)


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_learner_and_checkpoint_hold_the_same_weights(family, tmp_path):
    check(family, tmp_path, sampling_gap)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS.split())
def test_weights_of_other_families_travel_too(family, tmp_path):
    check(family, tmp_path, scoring_gap)


def check(family, folder, gap):
    save_tiny(family, folder / "model")
    policy = policy_of(folder / "model")
    engine = TransformersRolloutEngine(loaded(folder / "model"), Letters(), max_model_len=64)
    after = learn(policy)
    engine.load_weights(policy.named_weights())
    assert gap(engine, policy) < 2e-5
    assert {name for name, _ in policy.named_weights()} == on_disk(folder / "model"), "as the checkpoint names them"
    policy.save(folder / "saved")
    with torch.no_grad():
        assert torch.allclose(logps(loaded(folder / "saved")), after, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen3_moe", ("q_proj", "v_proj")),  # attention only
        ("qwen3_moe", ("gate_proj", "up_proj", "down_proj")),  # experts only
        ("deepseek_v3", "all-linear"),  # experts, shared experts and a dense layer
        ("mixtral", ("w1", "w2", "w3")),
        ("gpt_oss", "all-linear"),  # without the experts, which peft does not know
        ("gpt_neox", "all-linear"),
        ("apertus", "all-linear"),
    ],
)
def test_adapters_reach_the_sampler_and_merged_checkpoints(family, targets, tmp_path):
    save_tiny(family, tmp_path / "model")
    policy = policy_of(tmp_path / "model", LoraSection(rank=4, targets=targets))
    engine = TransformersRolloutEngine(loaded(tmp_path / "model"), Letters(), max_model_len=64)
    after = learn(policy)
    engine.load_weights(policy.named_weights())
    assert sampling_gap(engine, policy) < 2e-5
    assert {name for name, _ in policy.named_weights()} == on_disk(tmp_path / "model")
    policy.save(tmp_path / "saved", merged=True)
    with torch.no_grad():
        assert torch.allclose(logps(loaded(tmp_path / "saved" / "merged")), after, rtol=0, atol=2e-5)
    again = policy_of(tmp_path / "model", LoraSection(rank=4, targets=targets))
    load_saved_adapter(again, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(logps(again.causal_lm), after), "the adapter itself, as a resume takes it up"


def load_saved_adapter(policy, folder):
    from rlpost.run.build import load_adapter

    load_adapter(policy, folder, torch.device("cpu"))


@pytest.mark.parametrize(
    ("family", "targets", "words"),
    [
        (
            "mixtral",
            ("gate_proj",),
            "Linear layers of this model: k_proj, o_proj, q_proj, v_proj.*experts.*gate_up_proj",
        ),
        ("gpt_oss", ("experts",), "GptOssExperts.*k_proj, o_proj, q_proj, v_proj"),
        ("qwen3_moe", ("gate_proj",), "gate_proj without also targeting up_proj"),
        ("phimoe", ("router",), r"model\.layers\.0\.mlp\.router, a PhimoeTopKRouter"),
        ("gemma", ("embed_tokens",), r"model\.embed_tokens, whose tensor is also lm_head\.weight"),
        ("llama", ("lm_head",), "output layer"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_anything_is_loaded(family, targets, words):
    with pytest.raises(RecipeError, match=words):
        check_targets(tiny_config(family), LoraSection(targets=targets))


def test_a_recipe_with_such_targets_is_refused_by_its_rules(tmp_path):
    from rlpost.recipe.rules.check import Setting
    from rlpost.recipe.rules.model import adapter_problems

    save_tiny("qwen3_moe", tmp_path)

    def problems(targets, stage):
        recipe = SimpleNamespace(model=ModelSection(path=str(tmp_path), lora=LoraSection(targets=targets)))
        return list(adapter_problems(recipe, Setting(processes=2, zero_stage=stage)))

    assert problems(("q_proj",), 3) == [] == problems("all-linear", 2)
    [said] = problems(("gate_proj",), 0)
    assert "without also targeting up_proj" in said
    [said] = problems("all-linear", 3)
    assert "model.layers.0.mlp.experts." in said and "ZeRO-3" in said


def test_experts_without_adapters_are_told(tmp_path):
    save_tiny("gpt_oss", tmp_path)
    assert any("no adapter on the experts" in note for note in policy_of(tmp_path, LoraSection(rank=2)).notes)


# --- the mapping itself ----------------------------------------------------------------------------------------


def names_of(family) -> tuple[WeightNames, list[str]]:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    names = weight_names(model)
    return names, [name for bundle in names.bundles for name in bundle.checkpoint]


def test_experts_are_one_bundle_a_tensor_and_all_else_is_alone():
    names, _ = names_of("mixtral")
    fused = [bundle for bundle in names.bundles if len(bundle.checkpoint) > 1]
    assert [bundle.module for bundle in fused] == [
        (f"model.layers.{i}.mlp.experts.{leaf}",) for i in range(2) for leaf in ("down_proj", "gate_up_proj")
    ]
    assert len(fused[1].checkpoint) == 8  # gate and up of four experts
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in fused[1].checkpoint


def test_what_is_missing_is_said_by_the_modules_names():
    names, every = names_of("qwen3_moe")
    assert names.missing(every) == []
    one_short = [name for name in every if name != "model.layers.1.mlp.experts.2.up_proj.weight"]
    assert names.missing(one_short) == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert names.missing([name for name in every if "q_proj" not in name]) == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    ]


def test_the_way_back_is_exact_in_any_order(tmp_path):
    save_tiny("qwen3_moe", tmp_path)
    model = loaded(tmp_path)
    sent = {name: tensor.clone() for name, tensor in named_weights(model)}
    back = dict(weight_names(model).to_module(reversed(sent.items())))
    held = held_tensors(model)
    assert back.keys() == held.keys()
    assert all(torch.equal(back[name], part.tensor) for name, part in held.items())


def test_an_engine_names_the_experts_that_did_not_arrive(tmp_path):
    save_tiny("qwen3_moe", tmp_path)
    engine = TransformersRolloutEngine(loaded(tmp_path), Letters(), max_model_len=64)
    sent = [pair for pair in named_weights(loaded(tmp_path)) if "layers.1.mlp.experts.2.up" not in pair[0]]
    with pytest.raises(
        RolloutError, match=r"1 of the model's weights did not reach.*layers\.1\.mlp\.experts\.gate_up_proj"
    ):
        engine.load_weights(sent)


def test_fused_experts_are_gathered_a_layer_at_a_time(tmp_path):
    from contextlib import contextmanager

    save_tiny("qwen3_moe", tmp_path)
    model, open_now, most = loaded(tmp_path), [], []

    @contextmanager
    def gather(parameters):
        open_now.extend(parameters)
        most.append(len(open_now))
        yield
        open_now.clear()

    for name, _ in named_weights(model, gather):
        assert open_now, name
    assert max(most) == 1, "ZeRO-3 makes one parameter whole at a time"


def test_weights_kept_in_float32_beside_bfloat16_stay_as_they_are(tmp_path):
    save_tiny("deepseek_v3", tmp_path)
    section = ModelSection(path=str(tmp_path), dtype="bfloat16", autocast="none", attention="sdpa")
    policy = load_policy(section, str(tmp_path))
    own = {name: part.tensor.dtype for name, part in held_tensors(policy.causal_lm).items()}
    assert own["model.layers.1.mlp.gate.e_score_correction_bias"] == torch.float32
    sent = {name: tensor.dtype for name, tensor in policy.named_weights()}
    assert sent["model.layers.1.mlp.gate.e_score_correction_bias"] == torch.float32
    assert sent["model.layers.1.mlp.experts.0.up_proj.weight"] == torch.bfloat16

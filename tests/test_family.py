"""Sampler and learner mean the same model, whatever its family; what cannot be is refused by name before it is loaded."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlpost.errors import RecipeError
from rlpost.policy.family import (
    TREE_MODEL_TYPES,
    choose_attention,
    choose_layout,
    length_dependent_rope,
    sampler_attention,
    why_untrainable,
)
from rlpost.policy.loading import load_config
from rlpost.policy.model import load_policy
from rlpost.policy.rotary import chosen_length
from rlpost.policy.rows import RowCompletion, RowGroup, build_rows
from rlpost.recipe.load import load_recipe
from rlpost.recipe.rules.check import Setting, check
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.rollout import TransformersEngine
from rlpost.rollout.decoding import CachedDecoding, WholeDecoding
from rlpost.rollout.engine import SamplingRequest, SamplingSettings
from rlpost.rollout.factory import make_engine

pytestmark = pytest.mark.usefixtures("one_thread")

LONGEST = 60  # tokens of a prompt with its completion
COMMON = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
TEMPERATURE = 3.0  # at 1 a random model whose layers are tied repeats one token
ENDS = tuple("abcdefghijklmnopqrstuvwxyz")  # so that completions end at different places
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 24,
}
PHI = {"original_max_position_embeddings": 24, "sliding_window": None}
MAMBA = {"state_size": 16, "num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 16}
# name: (model type, what differs from COMMON); None leaves a setting out
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama, dropout": ("llama", {"attention_dropout": 0.5}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, **PHI}),
    "phi3, longrope, short": (
        "phi3",
        {
            "rope_parameters": LONGROPE | {"original_max_position_embeddings": 400},
            **PHI,
            "original_max_position_embeddings": 400,
        },
    ),
    "mistral, narrow window": ("mistral", {"sliding_window": 12}),
    "gemma2, capped": ("gemma2", {"attn_logit_softcapping": 1.0, "sliding_window": 12, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 12}),
    "qwen3 experts": ("qwen3_moe", {**EXPERTS, "head_dim": 16}),
    "mixtral, noise": ("mixtral", {**EXPERTS, "router_jitter_noise": 0.4}),
    "phimoe, noise": ("phimoe", {**EXPERTS, "input_jitter_noise": 0.3, "router_jitter_noise": 0.2}),
    "gpt-oss": ("gpt_oss", {**EXPERTS, "head_dim": 16, "sliding_window": 12}),
    "smollm3, no positions": ("smollm3", {"no_rope_layers": [1, 0]}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.3}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.3, "num_key_value_heads": None}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.3, "num_key_value_heads": None}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "gptj": ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "num_key_value_heads": None}),
    "mpt": ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "num_key_value_heads": None}),
    "opt-350m": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False, "layerdrop": 0.5}),
    "biogpt": ("biogpt", {"hidden_dropout_prob": 0.5, "layerdrop": 0.5}),
    "llama4": (
        "llama4_text",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 0],
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "mamba2": ("mamba2", {**MAMBA, "num_attention_heads": None, "num_key_value_heads": None}),
    "recurrent gemma": (
        "recurrent_gemma",
        {"lru_width": 64, "attention_window_size": 12, "block_types": ["recurrent", "attention"], "head_dim": 16},
    ),
    "granite hybrid": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
        },
    ),
    "qwen3-next": (
        "qwen3_next",
        {
            **EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "shared_expert_intermediate_size": 48,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
}
HYBRIDS = ("lfm2", "mamba2", "recurrent gemma", "granite hybrid", "qwen3-next")


def make_config(kind: str, **options):
    return AutoConfig.for_model(
        kind, **{k: v for k, v in {**COMMON, **options}.items() if v is not None or k not in options}
    )


def save(folder, kind: str, **options) -> str:
    """A tiny random model of a family, with the byte tokenizer of the other tests."""
    save_tiny_model(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config(kind, **options), dtype=torch.float32)
    model.save_pretrained(folder)
    return str(folder)


def section(path: str, **options) -> ModelSection:
    return ModelSection(path=path, dtype="float32", autocast="none", **options)


def start(path: str, **options):
    engine = TransformersEngine(dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(path)
    return make_engine(engine, section(path, **options), path, tokenizer, max_model_len=LONGEST, seed=0, device="cpu")


def sampled(engine) -> tuple[list[RowGroup], torch.Tensor]:
    """Completions that end at different places, of prompts of different lengths, and the sampler's log-probs of them."""
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(2, 258, (n,), generator=generator).tolist()) for n in (5, 17, 9)]
    requests = [SamplingRequest(prompt, seed=7 * i + j) for i, prompt in enumerate(prompts) for j in range(3)]
    found = engine.sample(requests, SamplingSettings(max_completion_tokens=24, temperature=TEMPERATURE, stop=ENDS))
    assert len({len(completion.token_ids) for completion in found}) > 1
    groups, start, logprobs = [], 0, []
    for i, prompt in enumerate(prompts):
        completions = []
        for j in range(3):
            completion = found[3 * i + j]
            completions.append(RowCompletion(3 * i + j, start, completion.token_ids))
            start += len(completion.token_ids)
            logprobs += completion.sampler_logprobs
        groups.append(RowGroup(prompt, tuple(completions)))
    return groups, torch.tensor(logprobs)


@torch.no_grad()
def learned(policy, groups, count: int, layout, budget: int) -> torch.Tensor:
    logp = torch.zeros(count)
    for rows in build_rows(groups, layout=layout, micro_batch_tokens=budget, pad_id=0):
        logp[rows.token_index] = policy(rows).logp
    return logp


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
def test_sampler_and_learner_mean_the_same_model(tmp_path, name):
    """In every layout that the model may have, in large micro-batches and in small ones."""
    kind, options = FAMILIES[name]
    path = save(tmp_path, kind, **options)
    policy = load_policy(section(path), path, temperature=TEMPERATURE, longest=LONGEST)
    engine = start(path)
    groups, theirs = sampled(engine)
    layout, _ = choose_layout(policy.config, "tree", policy.config._attn_implementation, LONGEST)
    for rows in {layout, "sorted"}:
        for budget in (10_000, 50):
            ours = learned(policy, groups, len(theirs), rows, budget)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5, msg=lambda m, r=rows, b=budget: f"{r} {b}: {m}")
    assert engine._decoding is (WholeDecoding if name in HYBRIDS else CachedDecoding)


UNTRAINABLE = {
    "t5": "encoder-decoder",
    "bert": "masked language model",
    "llava": "several models (text_config, vision_config)",
    "gemma3": "text-only checkpoint",
    "llama4": "text-only checkpoint",
    "whisper": "encoder-decoder",
    "rwkv": "divides its own weights",
    "reformer": "hashes positions at random",
    "xlnet": "sees the whole text",
    "deepseek_v32": "indexed_attention",
    "vit": "no causal language model of that type",
}


@pytest.mark.parametrize("kind", UNTRAINABLE)
def test_what_cannot_be_trained_is_refused_by_name(kind):
    reason = why_untrainable(AutoConfig.for_model(kind))
    assert reason is not None and UNTRAINABLE[kind] in reason
    assert (
        f"model type {AutoConfig.for_model(kind).model_type} cannot be trained" in reason
        and "Use a decoder-only" in reason
    )


def test_what_can_be_trained_is_not_refused():
    for kind in (*TREE_MODEL_TYPES, *(kind for kind, _ in FAMILIES.values())):
        assert why_untrainable(AutoConfig.for_model(kind)) is None, kind


def test_the_plan_refuses_before_anything_is_loaded(tmp_path, write_recipe):
    model = tmp_path / "bart"
    model.mkdir()
    AutoConfig.for_model("bart").save_pretrained(model)
    recipe = load_recipe(write_recipe(tmp_path, {"model.path": str(model)})).recipe
    (problem,) = (found for found in check(recipe, Setting(1, tmp_path)) if "bart" in found)
    assert problem.startswith(f"model.path={model}: model type bart cannot be trained: it is an encoder-decoder")
    with pytest.raises(RecipeError, match=r"method\.critic\.path: model type bart cannot be trained"):
        load_config(section(str(model)), str(model), key="method.critic.path")


def test_auto_takes_a_kernel_that_computes_the_models_own_attention():
    def choose(kind, wanted="auto", device="cpu", **options):
        return choose_attention(wanted, make_config(kind, **options), device=device, layout="tree", longest=LONGEST)

    oss = {**EXPERTS, "head_dim": 16}
    assert choose("gpt_oss", **oss) == ("eager", "model.attention: eager instead of sdpa, which gpt_oss does not have")
    assert choose("gpt_oss", device="cuda", **oss)[0] == "eager"
    assert choose("gpt_oss", "flex_attention", **oss)[0] == "flex_attention"
    with pytest.raises(
        RecipeError, match=r"model\.attention=sdpa: model type gpt_oss .*\(it has eager, flex_attention, flash"
    ):
        choose("gpt_oss", "sdpa", **oss)
    with pytest.raises(RecipeError, match=r"model\.attention=flex_attention: model type gpt2 has no such attention"):
        choose("gpt2", "flex_attention")
    with pytest.raises(RecipeError, match=r"model\.attention=eager: .* counts ALiBi twice in falcon"):
        choose("falcon", "eager", alibi=True)
    gemma = make_config("gemma2", attn_logit_softcapping=30.0)
    assert [sampler_attention(wanted, gemma) for wanted in ("auto", "sdpa", "flex_attention", "flash_attention_2")] == [
        "eager"
    ] * 4
    llama = make_config("llama")
    assert [sampler_attention(wanted, llama) for wanted in ("auto", "flex_attention", "eager")] == [
        "sdpa",
        "sdpa",
        "eager",
    ]


def test_frequencies_are_chosen_by_the_longest_sequence_of_the_run():
    config = make_config("phi3", rope_parameters=LONGROPE)
    assert length_dependent_rope(config) == "longrope" and length_dependent_rope(make_config("llama")) is None
    assert (chosen_length(config, 60), chosen_length(config, None), chosen_length(config, 10_000)) == (60, 512, 512)
    assert chosen_length(make_config("llama"), 60) is None


def test_long_and_short_frequencies_differ_and_checkpoints_keep_the_models_own_settings(tmp_path):
    path = save(tmp_path / "model", "phi3", rope_parameters=LONGROPE, **PHI)
    groups = [RowGroup((5, 6, 7), (RowCompletion(0, 0, tuple(range(20, 32))),))]
    long, short = (load_policy(section(path), path, longest=longest) for longest in (60, 20))
    assert any("rotary frequencies of type longrope are those of sequences of 60 tokens" in note for note in long.notes)
    of_long, of_short = (learned(policy, groups, 12, "sorted", 100) for policy in (long, short))
    assert (of_long - of_short).abs().max() > 0.1
    ids = torch.tensor([[5, 6, 7, *range(20, 32)]])  # of less than 24 tokens: transformers takes the short ones
    logits = AutoModelForCausalLM.from_pretrained(path)(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
    torch.testing.assert_close(of_short, logits.gather(-1, ids[0, 3:, None])[:, 0].detach(), rtol=0, atol=5e-5)
    long.save(tmp_path / "saved")
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "model", tmp_path / "saved")
    )
    assert before["rope_parameters"] == after["rope_parameters"]


def test_a_model_that_sees_what_comes_later_is_found_when_it_is_loaded(tmp_path, monkeypatch):
    """Without its name being known."""
    path = save(tmp_path, "bert-generation", is_decoder=False, hidden_dropout_prob=0.0, num_key_value_heads=None)
    monkeypatch.setattr("rlpost.policy.loading.refuse_untrainable", lambda *_: None)
    with pytest.raises(RecipeError, match="bert-generation is no causal language model"):
        load_policy(section(path), path)


def test_rows_that_change_log_probs_are_found_when_a_model_is_loaded(tmp_path, monkeypatch):
    """Alibi counts columns, so that branches of a tree would be further away than they are."""
    path = save(tmp_path, "bloom", n_layer=2, n_head=4, num_key_value_heads=None)
    monkeypatch.setattr("rlpost.policy.model.choose_layout", lambda *_: ("tree", None))
    with pytest.raises(
        RecipeError, match="model type bloom (gives other log-probs in rows of layout tree|cannot be called)"
    ):
        load_policy(section(path), path)


def test_whatever_a_models_code_raises_is_said_in_words(tmp_path):
    path = save(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "nope"}))
    with pytest.raises(RecipeError, match=r"model\.path: cannot load a causal language model .*nope"):
        load_policy(section(path), path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": 300}))
    with pytest.raises(RecipeError, match=r"model\.path: its config\.json says pad_token_id=300, but vocab_size=258"):
        load_policy(section(path), path)

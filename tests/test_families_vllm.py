"""vLLM takes a family's saved checkpoint and its weights at a sync; the learner keeps its model."""

from __future__ import annotations

import pytest
import torch
from families import save_tiny, tiny_config
from test_families import IDS, learn, policy_of

from rlpost.errors import RolloutError
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.rollout.vllm_engine import VllmRolloutEngine
from rlpost.rollout.vllm_reload import is_borrowed

# Sizes that vLLM's CPU kernels take.
SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192}
OTHERS = (
    "apertus cohere cohere2 gemma gemma2 gemma3_text glm glm4 granite granitemoe helium llama mistral mixtral olmo olmo2 "
    "olmo3 olmoe phi phi3 qwen2 qwen2_moe qwen3 seed_oss smollm3 stablelm starcoder2"
)


@pytest.fixture(autouse=True)
def fixed(one_thread):
    pytest.importorskip("vllm")
    torch.manual_seed(0)


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def started(folder):
    section = VllmEngine(dtype="float32", kv_cache_gib=0.1, max_sequences=8)
    return VllmRolloutEngine(str(folder), section, max_model_len=64, seed=0, device="cpu")


def gap(engine, wanted):
    return float((torch.tensor(engine.logprobs([tuple(IDS[0].tolist())])[0]) - wanted).abs().max())


def check(family, folder, tokenizer, most):
    """A checkpoint of the learner's is sampled from as it is; then what it learns since."""
    save_tiny(family, folder / "model", **SIZES)
    policy = policy_of(folder / "model")
    first = learn(policy)
    policy.save(folder / "saved", tokenizer)
    engine = started(folder / "saved")
    try:
        assert gap(engine, first) < most
        second = learn(policy)  # the learner's model still runs although vLLM may have built one of its class
        engine.load_weights(policy.named_weights())
        assert gap(engine, second) < most
    finally:
        engine.close()


@pytest.mark.engine
def test_experts_are_packed_anew_at_a_sync(tmp_path, tokenizer):
    check("qwen3_moe", tmp_path, tokenizer, 5e-5)


@pytest.mark.engine
def test_a_family_that_vllm_runs_on_transformers_classes(tmp_path, tokenizer):
    check("gpt_neox", tmp_path, tokenizer, 5e-5)


@pytest.mark.engine
def test_which_families_vllm_borrows_from_transformers():
    config = tiny_config("gpt_neox", architectures=["GPTNeoXForCausalLM"])
    assert is_borrowed(config) and not is_borrowed(tiny_config("llama", architectures=["LlamaForCausalLM"]))


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS.split())
def test_other_families(family, tmp_path, tokenizer):
    check(family, tmp_path, tokenizer, 1e-2 if family == "apertus" else 5e-5)  # vLLM's xIELU rounds more


@pytest.mark.slow
def test_experts_that_vllm_cannot_replace_are_named(tmp_path, tokenizer):
    """Its GPT-OSS writes past the loaders of a reload: old experts would stay, next to a new rest."""
    save_tiny("gpt_oss", tmp_path / "model", **SIZES)
    policy = policy_of(tmp_path / "model")
    policy.save(tmp_path / "saved", tokenizer)
    engine = started(tmp_path / "saved")
    try:
        with pytest.raises(
            RolloutError, match=r"did not replace the weights of .*experts.*rollout\.engine\.type=transformers"
        ):
            engine.load_weights(policy.named_weights())
    finally:
        engine.close()

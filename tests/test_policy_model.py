"""Loading, adapters, weight sync names, saving, and refusals of the policy."""

from __future__ import annotations

import copy

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.errors import RecipeError, TrainingError
from rlpost.gradient.types import StatisticsRequest
from rlpost.policy.accumulation import AccumulatingEmbedding
from rlpost.policy.head import LogitRule, ScoringLinear
from rlpost.policy.linear import RecastLinear
from rlpost.policy.loading import prepare
from rlpost.policy.model import load_policy
from rlpost.policy.rows import RowGroup, build_rows
from rlpost.policy.verify import verify_head
from rlpost.recipe.sections.model import LoraSection, ModelSection

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
GROUPS = [
    RowGroup((3, 4, 5), ((0, 0, (6, 7, 8, 9)), (1, 4, (10, 11)), (2, 6, (12,)))),
    RowGroup((13,), ((3, 7, (14, 15)),)),
]


def save_model(folder, kind="llama", **extra):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, "pad_token_id": 0, **extra})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def section(**options):
    return ModelSection(**{"path": "unused", "autocast": "none", **options})


def scores(policy, groups=GROUPS, statistics=None):
    (rows,) = build_rows(groups, layout="tree", micro_batch_tokens=1000, pad_id=0)
    return rows, policy(rows, statistics=statistics)


def perturb_adapter(policy):
    """Adapters start as a zero update; give them one."""
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)


def test_output_is_per_completion_token(path):
    rows, out = scores(load_policy(section(), path), statistics=StatisticsRequest(k=5))
    assert out.logp.shape == out.entropy.shape == (rows.useful_tokens,) == (9,)
    assert out.logp.dtype == torch.float32 and out.logp.requires_grad
    assert out.statistics.hidden.shape == (9, 32) and not out.statistics.hidden.requires_grad
    assert out.statistics.top_ids.shape == (9, 5)
    top = out.statistics.top_logits.log_softmax(-1)
    assert (top >= -1e3).all()
    _, plain = scores(load_policy(section(), path), statistics=StatisticsRequest())
    assert plain.statistics.top_ids is None
    torch.testing.assert_close(plain.statistics.sum_p2, out.statistics.sum_p2)
    _, without = scores(load_policy(section(), path), statistics=StatisticsRequest(k=5, powers=False))
    assert without.statistics.sum_p2 is None and without.statistics.sum_p3 is None
    assert torch.equal(without.statistics.top_ids, out.statistics.top_ids)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_policy_is_the_same_function_as_the_sampler(tmp_path, checkpointing):
    """Nothing acts in training alone, also where activations are computed again, and a checkpoint keeps its settings."""
    path = save_model(tmp_path, attention_dropout=0.5)
    policy = load_policy(section(gradient_checkpointing=checkpointing), path)
    assert not any(
        module.training for module in policy.causal_lm.modules() if not hasattr(module, "gradient_checkpointing")
    )
    assert any(module.training for module in policy.causal_lm.modules()) == checkpointing
    assert any("attention_dropout=0.5 not applied" in note for note in policy.notes)
    assert torch.equal(scores(policy)[1].logp, scores(load_policy(section(), path))[1].logp)
    assert policy.config.attention_dropout == 0.5


def test_autocast_and_storage_precision(path):
    policy = load_policy(section(autocast="bfloat16", dtype="bfloat16"), path)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    _, out = scores(policy)
    assert out.logp.dtype == torch.float32
    exact = scores(load_policy(section(), path))[1].logp
    assert 1e-5 < (out.logp - exact).abs().max() < 0.1
    mixed = load_policy(section(autocast="bfloat16"), path)
    scores(mixed)[1].logp.sum().backward()
    assert {p.grad.dtype for p in mixed.parameters()} == {torch.float32}


@pytest.mark.parametrize("adapter", [None, LoraSection(rank=4)])
def test_layers_that_hold_less_in_a_pass(path, adapter):
    policy = load_policy(section(autocast="bfloat16", lora=adapter), path)
    layers = [m for name, m in policy.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
    assert {type(m) for m in layers} == {RecastLinear, ScoringLinear}
    assert [type(m) for m in policy.modules() if isinstance(m, nn.Embedding)] == [AccumulatingEmbedding]


@pytest.mark.parametrize(
    ("dtype", "autocast", "width"), [("float32", "none", 4), ("float32", "bfloat16", 2), ("bfloat16", "none", 2)]
)
def test_all_layers_share_one_mask(path, dtype, autocast, width):
    """Attention would make a mask of its own of a boolean one, in every layer, and keep it for the backward pass."""
    policy = load_policy(section(dtype=dtype, autocast=autocast), path)
    groups = [RowGroup((3, 4), tuple((i, 40 * i, tuple(range(5, 45))) for i in range(5)))]
    (rows,) = build_rows(groups, layout="tree", micro_batch_tokens=1000, pad_id=0)
    positions = rows.input_ids.numel()
    square = positions**2 * width
    with LiveBytes() as memory:
        out = policy(rows)
        assert sum(size == square for size in memory.known.values()) == 1
    assert out.logp.requires_grad and policy.config.num_hidden_layers > 1


def test_gradient_checkpointing_changes_nothing(path):
    grads = []
    for checkpointing in (False, True):
        policy = load_policy(section(gradient_checkpointing=checkpointing), path)
        assert policy.causal_lm.is_gradient_checkpointing == checkpointing
        scores(policy)[1].logp.sum().backward()
        grads.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_adapter_alone_and_the_reference_is_the_base(path, checkpointing):
    lora = section(lora=LoraSection(rank=4, alpha=8.0), gradient_checkpointing=checkpointing)
    policy = load_policy(lora, path)
    base = scores(load_policy(section(), path))[1].logp
    assert torch.equal(scores(policy)[1].logp, base)
    perturb_adapter(policy)
    out = scores(policy)[1].logp
    assert (out - base).abs().max() > 1e-2
    with policy.disable_adapter(), torch.no_grad():
        assert torch.equal(scores(policy)[1].logp, base)
    out.sum().backward()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all((p.grad is not None) == (name in trained) for name, p in policy.named_parameters())


def test_lora_weights_equal_merge_and_unload(path, tmp_path):
    policy = load_policy(section(lora=LoraSection(rank=4)), path)
    perturb_adapter(policy)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    got = {name: tensor.clone() for name, tensor in policy.named_weights()}
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())
    policy.save(tmp_path, merged=True)
    logp = scores(policy)[1].logp
    want = copy.deepcopy(policy.model).merge_and_unload().state_dict()
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[name], want[name], atol=1e-6) for name in got)
    torch.testing.assert_close(scores(load_policy(section(), str(tmp_path / "merged")))[1].logp, logp)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_named_weights_of_a_tied_model_leave_the_output_layer_out(tmp_path):
    policy = load_policy(section(), save_model(tmp_path, tie_word_embeddings=True))
    names = [name for name, _ in policy.named_weights()]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert len(names) == len(set(names))
    assert policy.causal_lm.lm_head.weight is policy.causal_lm.model.embed_tokens.weight
    scores(policy)[1].logp.sum().backward()
    untied = load_policy(section(), save_model(tmp_path / "untied"))
    assert "lm_head.weight" in [name for name, _ in untied.named_weights()]


def test_named_weights_gather_what_they_read(path):
    from contextlib import contextmanager

    opened = []

    @contextmanager
    def gather(parameters):
        opened.append(len(parameters))
        yield

    policy = load_policy(section(lora=LoraSection(rank=4, targets=("q_proj",))), path)
    for name, _ in policy.named_weights(gather):
        assert opened.pop() == (3 if "q_proj" in name else 1)


def test_mixtures_of_experts_use_the_names_of_their_checkpoint(tmp_path):
    from safetensors.torch import load_file

    folder = save_model(
        tmp_path,
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        head_dim=8,
        decoder_sparse_step=1,
    )
    stored = load_file(tmp_path / "model.safetensors")
    got = {name: tensor.clone() for name, tensor in load_policy(section(), folder).named_weights()}
    assert got.keys() == stored.keys()
    assert all(torch.equal(got[name], stored[name]) for name in got)


def test_save_and_load(path, tmp_path):
    policy = load_policy(section(), path)
    with torch.no_grad():
        policy.causal_lm.model.norm.weight.mul_(1.5)
    policy.save(tmp_path)
    assert torch.equal(scores(load_policy(section(), str(tmp_path)))[1].logp, scores(policy)[1].logp)


def test_a_copy_scores_with_its_own_weights(path):
    policy = load_policy(section(), path)
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        twin.causal_lm.lm_head.weight.mul_(2)
    assert not torch.allclose(scores(twin)[1].logp, scores(policy)[1].logp)


def test_generation_still_works(path):
    policy = load_policy(section(), path)
    out = policy.causal_lm.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] >= 4


def test_wrong_paths_name_the_setting(tmp_path):
    with pytest.raises(RecipeError, match=r"model\.path: there is no folder"):
        load_policy(section(), str(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match=r"model\.path: cannot load"):
        load_policy(section(), str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RecipeError, match=r"model\.path: cannot load"):
        load_policy(section(), str(tmp_path))


def test_impossible_adapters_are_refused(path):
    with pytest.raises(RecipeError, match=r"model\.lora\.dropout"):
        load_policy(section(lora=LoraSection(dropout=0.1)), path)
    with pytest.raises(RecipeError, match=r"model\.lora\.targets"):
        load_policy(section(lora=LoraSection(targets=("no_such_module",))), path)
    with pytest.raises(RecipeError, match="output layer"):
        load_policy(section(lora=LoraSection(targets=("lm_head",))), path)
    with pytest.raises(TrainingError, match="no LoRA adapter"):
        load_policy(section(), path).disable_adapter()


def test_capped_attention_scores_need_eager_attention(tmp_path):
    folder = save_model(tmp_path, "gemma2", head_dim=8, attn_logit_softcapping=0.5, layer_types=["full_attention"] * 2)
    policy = load_policy(section(), folder)
    assert policy.config._attn_implementation == "eager"
    assert any("eager instead of sdpa" in note for note in policy.notes)


def test_flash_attention_in_float32_is_refused(path):
    with pytest.raises(RecipeError, match=r"model\.attention"):
        load_policy(section(attention="flash_attention_2"), path)


def test_unknown_changes_to_the_scores_are_found():
    torch.manual_seed(0)
    config = AutoConfig.for_model("granite", **SIZES, logits_scaling=4.0)
    model = prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    from contextlib import nullcontext

    verify_head(model, LogitRule(0.7, 0.25), nullcontext())
    with pytest.raises(RecipeError, match="granite changes its scores"):
        verify_head(model, LogitRule(0.7), nullcontext())


def test_models_without_a_plain_output_layer_are_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(RecipeError, match="output layer of model type llama"):
        prepare(model)
    model.lm_head = model.lm_head[0]
    assert type(prepare(model).lm_head) is ScoringLinear

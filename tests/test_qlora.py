"""QLoRA: 4-bit base weights under trained adapters; what the engine and a merged checkpoint get; refusals."""

from __future__ import annotations

import importlib.util
import json

import bitsandbytes.functional as bitsandbytes_functional
import pytest
import torch
from conftest import rows, save_tiny_model, weights
from test_policy_model import perturb_adapter, save_model, scores, section
from transformers import AutoModelForCausalLM

import rlpost.policy.quantized as quantized_module
from rlpost.errors import RecipeError
from rlpost.policy.head import ScoringLinear
from rlpost.policy.model import load_policy
from rlpost.policy.quantized import is_quantized
from rlpost.recipe.load import load_recipe
from rlpost.recipe.plan.memory import ModelSize, estimate
from rlpost.recipe.rules.check import Setting, advise, check, refuse_unsound
from rlpost.recipe.sections.model import LoraSection
from rlpost.run.loop import train
from rlpost.source.reference import cache_path

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.thorough]
NF4 = "model.lora={rank: 4, quantize: nf4}"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Qwen2, whose q, k and v have biases; wide enough for blocks of 64."""
    return save_model(tmp_path_factory.mktemp("model"), "qwen2", hidden_size=64, intermediate_size=128)


def quantized(path, **options):
    return load_policy(section(lora=LoraSection(rank=4, quantize="nf4"), **options), path)


def test_linear_layers_are_packed_and_the_rest_is_not(path):
    policy = quantized(path)
    packed = {name for name, p in policy.named_parameters() if is_quantized(p)}
    assert len(packed) == 2 * 7 and all(name.endswith("proj.base_layer.weight") for name in packed)
    lm = policy.causal_lm
    assert type(lm.get_output_embeddings()) is ScoringLinear
    assert lm.lm_head.weight.dtype == lm.model.embed_tokens.weight.dtype == torch.float32
    assert (
        sum(p.numel() for n, p in policy.named_parameters() if n in packed)
        == 2 * (64 * (64 + 32) * 2 + 3 * 64 * 128) / 2
    )
    (note,) = [note for note in policy.notes if "4 bits" in note]
    assert note.startswith("model.lora.quantize: 0.1 M of 0.1 M")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_are_trained_in_float32_and_the_reference_is_the_base(path, dtype, checkpointing):
    policy = quantized(path, dtype=dtype, gradient_checkpointing=checkpointing)
    base = scores(policy)[1].logp
    exact = scores(load_policy(section(dtype=dtype), path))[1].logp
    assert 1e-3 < (base - exact).abs().max() < 1.0  # 4 bits are seen, and little is lost
    perturb_adapter(policy)
    out = scores(policy)[1].logp
    assert (out - base).abs().max() > 1e-2
    with policy.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(scores(policy)[1].logp, base, rtol=0, atol=1e-6 if dtype == "float32" else 0.05)
    out.sum().backward()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for name, p in policy.named_parameters():
        assert (p.grad is not None) == (name in trained)
        assert name not in trained or (p.dtype == torch.float32 and p.grad.norm() > 0)


def test_the_engine_gets_full_weights_that_score_as_the_policy_does(path):
    policy = quantized(path)
    perturb_adapter(policy)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    got = {name: tensor.clone() for name, tensor in policy.named_weights()}
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in plain.state_dict().items()}
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}
    same = load_policy(section(), path)
    same.causal_lm.load_state_dict(got)
    torch.testing.assert_close(scores(same)[1].logp, scores(policy)[1].logp, rtol=1e-4, atol=1e-4)


def test_layers_without_an_adapter_are_unpacked_too(path):
    lora = LoraSection(rank=4, quantize="nf4", targets=("q_proj",))
    got = {name: t.clone() for name, t in load_policy(section(lora=lora), path).named_weights()}
    want = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())
    for name, tensor in got.items():
        error, largest = (tensor - want[name]).abs().max(), want[name].abs().max()
        assert 0 < error < 0.2 * largest if "proj.weight" in name else error == 0


@pytest.mark.parametrize("right", [True, False])
def test_layers_that_this_cpu_would_unpack_wrongly_are_refused(right, monkeypatch, tmp_path):
    """bitsandbytes 0.50 does so on CPUs with AVX-512, where rows are no multiple of 64 long."""
    narrow = save_model(tmp_path, "qwen2", hidden_size=64, intermediate_size=96)
    monkeypatch.setattr(quantized_module, "_reads_rows", lambda width, block: right)
    if right:
        assert quantized(narrow).notes
        return
    with pytest.raises(RecipeError, match=r"model.lora.quantize: .*down_proj.* has 96 inputs, no multiple of 64"):
        quantized(narrow)


def test_what_is_unpacked_wrongly_is_found_out():
    width, block = 96, 64
    blocks = (
        torch.linspace(-1, 1, block * width).view(-1, block) * torch.tensor([1.0, 100.0]).repeat(width // 2)[:, None]
    )
    packed = bitsandbytes_functional.quantize_4bit(blocks.view(block, width), blocksize=block, quant_type="nf4")
    gap = (bitsandbytes_functional.dequantize_4bit(*packed).view_as(blocks) - blocks).abs()
    near = bool((gap < 0.2 * blocks.abs().amax(-1, keepdim=True)).all())  # half of nf4's widest gap is 0.15
    assert quantized_module._reads_rows(width, block) == near and quantized_module._reads_rows(128, block)


def test_merged_is_a_plain_checkpoint_and_the_adapter_comes_back(path, tmp_path):
    from peft import load_peft_weights, set_peft_model_state_dict

    policy = quantized(path)
    perturb_adapter(policy)
    logp = scores(policy)[1].logp
    policy.save(tmp_path, merged=True)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = load_policy(section(), str(tmp_path / "merged"))
    assert not any(is_quantized(p) for p in merged.parameters())
    torch.testing.assert_close(scores(merged)[1].logp, logp, rtol=1e-4, atol=1e-4)
    assert torch.equal(scores(policy)[1].logp, logp)  # saving left it as it was
    again = quantized(path)
    assert all("lora_" in name for name in weights(tmp_path))
    set_peft_model_state_dict(again.model, load_peft_weights(str(tmp_path), device="cpu"))
    assert torch.equal(scores(again)[1].logp, logp)


def test_tied_output_layers_stay_tied_and_whole(tmp_path):
    save_tiny_model(tmp_path, intermediate=128)
    policy = quantized(str(tmp_path))
    assert policy.causal_lm.lm_head.weight is policy.causal_lm.model.embed_tokens.weight
    names = [name for name, _ in policy.named_weights()]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


@pytest.fixture
def without_bitsandbytes(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )


def test_a_missing_package_is_named_before_the_model_is_loaded(write_recipe, tmp_path, path, without_bitsandbytes):
    loaded = load_recipe(write_recipe(tmp_path), [NF4])
    (problem,) = check(loaded.recipe, Setting(1, tmp_path))
    assert "model.lora.quantize=nf4" in problem and "rlpost[qlora]" in problem
    with pytest.raises(RecipeError, match=r"rlpost\[qlora\]"):
        quantized(path)
    load_policy(section(lora=LoraSection()), path)


def test_zero_3_is_refused_by_name_and_zero_2_is_not(write_recipe, tmp_path, monkeypatch):
    loaded = load_recipe(write_recipe(tmp_path), [NF4])
    for stage in (0, 1, 2):
        assert check(loaded.recipe, Setting(1, tmp_path, stage)) == []
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(RecipeError, match=r"model\.lora\.quantize=nf4 with DeepSpeed ZeRO-3.*ZeRO-2"):
        refuse_unsound(loaded)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    refuse_unsound(loaded)
    assert any("model.dtype=bfloat16" in note for note in advise(loaded.recipe, Setting()))


def test_the_estimate_knows_4_bits(write_recipe, tmp_path):
    file = write_recipe(tmp_path)
    size = ModelSize(7_000_000_000, 32, 4096, 11008, 4096, 32_000, exact=True)

    def lines(*overrides):
        found = estimate(load_recipe(file, ["model.dtype=bfloat16", *overrides]).recipe, size)
        return {line.what: line.bytes for line in found}

    plain, packed = lines("model.lora={rank: 4}"), lines(NF4)
    assert plain["weights"] == 14_000_000_000 and "weights in 4 bits" not in plain
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert packed["weights"] == 2 * (7_000_000_000 - linear)
    assert 0.515 < packed["weights in 4 bits"] / linear < 0.517
    assert packed["rollout engine weights"] == plain["rollout engine weights"]


def test_cached_reference_log_probs_of_4_bits_are_others(write_recipe, tmp_path, path):
    file = write_recipe(tmp_path)
    keys = {cache_path(load_recipe(file, over).recipe, path, []) for over in (["model.lora={rank: 4}"], [NF4])}
    assert len(keys) == 2


@pytest.mark.engine
def test_a_run_resumes_exactly_and_zero_2_does_the_same(write_recipe, children, tmp_path):
    """The probe of every rollout compares engine and policy, so a weight that is not unpacked would end the run."""
    save_tiny_model(tmp_path / "model", intermediate=128)
    lora = {"model.path": str(tmp_path / "model"), "model.lora": {"rank": 4, "quantize": "nf4"}}
    changes = {**lora, "learner.rollouts": 2, "checkpoint": {"every": 1, "keep": 5}}
    whole = write_recipe(tmp_path / "whole", changes)
    train(load_recipe(whole))
    final = weights(tmp_path / "whole" / "run" / "checkpoints" / "step_000002")
    assert all("lora_" in name for name in final) and any(t.abs().max() > 0 for n, t in final.items() if "lora_B" in n)

    half = write_recipe(tmp_path / "half", changes)
    first = tmp_path / "whole" / "run" / "checkpoints" / "step_000001"
    train(load_recipe(half, [f"resume={first}"]))
    resumed = weights(tmp_path / "half" / "run" / "checkpoints" / "step_000002")
    assert all(torch.equal(resumed[name], final[name]) for name in final)

    zero = write_recipe(tmp_path / "zero", changes)
    code, printed = children.run(zero, launch="cpu-zero2.yaml")
    assert code == 0, printed
    norms = [[r["optimizer/grad_norm"] for r in rows(tmp_path / f / "run", "train")] for f in ("whole", "zero")]
    assert len(norms[0]) == 2 and norms[1] == pytest.approx(norms[0], rel=1e-4)

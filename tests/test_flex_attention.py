"""FlexAttention: what `model.attention: auto` chooses, and that trees give the same numbers as with sdpa."""

from __future__ import annotations

import pytest
import torch
from test_policy_layouts import make_groups, make_policy
from test_policy_model import save_model, section
from transformers import AutoConfig

from rlpost.policy.attention import allow_many_shapes, plain_attention
from rlpost.policy.family import choose_attention
from rlpost.policy.loading import load_config
from rlpost.policy.model import load_policy
from rlpost.policy.rows import build_rows
from rlpost.policy.verify import verify_policy
from rlpost.recipe.load import load_recipe
from rlpost.recipe.plan.describe import make_plan
from rlpost.recipe.rules.check import Setting, check

LLAMA = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}


def choose(kind="llama", wanted="auto", device="cuda", layout="tree", **options):
    return choose_attention(wanted, AutoConfig.for_model(kind, **{**LLAMA, **options}), device=device, layout=layout)


def test_auto_takes_flex_attention_for_trees_on_a_gpu_alone():
    assert choose() == (
        "flex_attention",
        "model.attention: flex_attention, because rows are trees and the device is a GPU",
    )
    assert choose(device="cuda:1")[0] == "flex_attention"
    assert choose(device="cpu") == ("sdpa", None)
    for layout in ("sorted", "padded"):
        assert choose(layout=layout) == ("sdpa", "model.attention: sdpa, because rows are no trees")


def test_auto_takes_sdpa_for_models_that_do_not_take_flex_attention():
    kind, note = choose("gpt2")  # refused as trees, so its rows are sorted
    assert kind == "sdpa" and "no trees" in note
    kind, note = choose(hidden_size=32)
    assert kind == "sdpa" and "heads of 8 numbers" in note


def test_auto_keeps_capped_scores():
    full = {"layer_types": ["full_attention"], "attn_logit_softcapping": 30.0, "head_dim": 16}
    assert choose("gemma2", **full)[0] == "flex_attention"  # which can cap them
    kind, note = choose("gemma2", device="cpu", **full)
    assert kind == "eager" and "instead of sdpa" in note


@pytest.mark.parametrize("wanted", ["sdpa", "eager", "flex_attention", "flash_attention_2"])
def test_what_the_recipe_says_is_taken(wanted):
    assert choose(wanted=wanted) == (wanted, None)


@pytest.mark.thorough
def test_the_choice_reaches_the_model_and_the_notes(tmp_path, monkeypatch):
    raised = []  # the compiler's limit; importing the compiler takes its time, so not here
    monkeypatch.setattr("rlpost.policy.loading.allow_many_shapes", lambda: raised.append(True))
    path = save_model(tmp_path, hidden_size=64)
    config, notes = load_config(section(), path, device="cuda")
    assert config._attn_implementation == "flex_attention" and any("flex_attention" in note for note in notes)
    with plain_attention(config):
        assert config._attn_implementation == "eager"
    assert config._attn_implementation == "flex_attention"
    policy = load_policy(section(), path)
    assert policy.config._attn_implementation == "sdpa" and policy.notes == () and not raised
    # Loaded on the host for a GPU, as under ZeRO-3: nothing is compiled for the host.
    seen = []
    monkeypatch.setattr(
        "rlpost.policy.model.verify_policy",
        lambda policy, layout: (seen.append(policy.config._attn_implementation), verify_policy(policy, layout)),
    )
    away = load_policy(section(), path, runs_on=torch.device("cuda"))
    assert seen == ["eager"]
    assert away.config._attn_implementation == "flex_attention" and away.device.type == "cpu" and raised
    assert (
        load_policy(section(), path, layout="sorted", runs_on=torch.device("cuda")).config._attn_implementation
        == "sdpa"
    )


def test_without_a_gpu_flex_attention_is_refused_and_the_plan_says_what_auto_means(write_recipe, tmp_path, monkeypatch):
    file = write_recipe(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (problem,) = check(load_recipe(file, ["model.attention=flex_attention"]).recipe, Setting(1, tmp_path))
    assert "model.attention=flex_attention needs a CUDA GPU" in problem and "auto" in problem
    assert make_plan(load_recipe(file)).attention.startswith("sdpa (model.attention=auto")
    assert make_plan(load_recipe(file, ["learner.layout=sorted"])).attention == "sdpa"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert make_plan(load_recipe(file)).attention == "flex_attention"


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """Torch's own uncompiled FlexAttention, with the gate open that keeps gradients from the CPU.

    It computes all scores and their backward pass with plain tensor operations, so that the mask, the model's use of it and
    the gradient are tested here; the compiled kernel is tested on a GPU.
    """
    import torch.nn.attention.flex_attention as flex
    from transformers.integrations import flex_attention as used

    options = flex._apply_kernel_options

    def with_normalizer(*args, **kwargs):
        return {**options(*args, **kwargs), "OUTPUT_LOGSUMEXP": True}

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_apply_kernel_options", with_normalizer)
    monkeypatch.setattr(
        used,
        "compile_friendly_flex_attention",
        lambda q, k, v, training=False, **kw: flex.flex_attention(q, k, v, **kw),
    )


@pytest.mark.engine  # half a minute
def test_trees_and_causal_rows_agree_with_sdpa_on_the_cpu(flex_on_cpu):
    allow_many_shapes()
    assert torch._dynamo.config.recompile_limit >= 64
    groups, total = make_groups(4, [(6, [5, 9, 1]), (3, [150, 7]), (2, [4])])  # more than a block of 128
    weights = torch.randn(2, total)
    compare("cpu", groups, total, weights)


def numbers(policy, groups, total, weights, layout):
    """(log-probs, entropies, gradient) on the CPU."""
    policy.zero_grad()
    logp, entropy = torch.zeros(total), torch.zeros(total)
    for rows in build_rows(groups, layout=layout, micro_batch_tokens=400, pad_id=0):
        out = policy(rows)
        at = rows.token_index
        scale = weights[:, at].to(out.logp.device)
        (scale[0] * out.logp + scale[1] * out.entropy).sum().backward()
        logp[at], entropy[at] = out.logp.detach().cpu(), out.entropy.detach().cpu()
    return logp, entropy, torch.cat([p.grad.flatten().cpu() for p in policy.parameters()])


def compare(device, groups, total, weights):
    """Log-probs, entropies and gradients, in tree rows and in plain ones."""
    sdpa, flex = (make_policy("llama", attention=a, head_dim=16).to(device) for a in ("sdpa", "flex_attention"))
    for layout in ("tree", "sorted"):
        want, got = (numbers(policy, groups, total, weights, layout) for policy in (sdpa, flex))
        torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
        assert (got[2] - want[2]).norm() <= 1e-4 * want[2].norm()


@pytest.mark.gpu
def test_the_compiled_kernel_agrees_with_sdpa_for_many_shapes():
    allow_many_shapes()
    for seed in range(12):
        shape = [(3 + 7 * seed, [5, 9 + 31 * seed, 1]), (3, [150, 7]), (2, [4])][: 1 + seed % 3]
        groups, total = make_groups(seed, shape)
        compare("cuda", groups, total, torch.randn(2, total))

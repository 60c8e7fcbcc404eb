"""Tree, sorted and padded rows give the same log-probs, entropies and gradients; unsuitable models are refused by name."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.policy.family import check_tree_support, choose_layout
from rlpost.policy.head import LogitRule
from rlpost.policy.loading import logit_rule, prepare
from rlpost.policy.model import Policy
from rlpost.policy.rows import RowGroup, build_rows

VOCABULARY = 61
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
}
SPECIAL = {
    "gemma3_text": {"layer_types": ["full_attention"] * 2},
    "qwen2_tied": {"tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 3.0},
    "mistral": {"sliding_window": None},
}
PROPERTY_MODELS = ("llama", "qwen2", "qwen3", "gemma", "gemma3_text", "qwen2_tied")


def make_policy(kind, *, attention="sdpa", temperature=1.0, chunk=16, **extra):
    torch.manual_seed(0)
    options = {**TINY, **SPECIAL.get(kind, {}), **extra, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind.removesuffix("_tied"), **options)
    model = prepare(AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32))
    return Policy(model, rule=logit_rule(config, temperature), head_chunk_tokens=chunk)


@pytest.fixture(scope="module")
def policies():
    return {kind: make_policy(kind, temperature=0.8) for kind in PROPERTY_MODELS}


def make_groups(seed, shape):
    rng = random.Random(seed)
    groups, sequence, start = [], 0, 0
    for prompt, lengths in shape:
        completions = []
        for n in lengths:
            completions.append((sequence, start, tuple(rng.randrange(VOCABULARY) for _ in range(n))))
            sequence, start = sequence + 1, start + n
        groups.append(RowGroup(tuple(rng.randrange(VOCABULARY) for _ in range(prompt)), tuple(completions)))
    return groups, start


def run(policy, groups, total, weights, *, layout, budget, row_cap=4096, skip=()):
    """(logp, entropy, gradient) of a weighted sum over all tokens of all micro-batches."""
    policy.zero_grad()
    logp, entropy = torch.zeros(total), torch.zeros(total)
    kept = [group for i, group in enumerate(groups) if i not in skip]
    for rows in build_rows(kept, layout=layout, micro_batch_tokens=budget, pad_id=0, row_cap=row_cap):
        out = policy(rows)
        at = rows.token_index
        (weights[0][at] * out.logp + weights[1][at] * out.entropy).sum().backward()
        logp[at], entropy[at] = out.logp.detach(), out.entropy.detach()
    return logp, entropy, torch.cat([p.grad.flatten() for p in policy.parameters()])


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=2e-5)
    assert (got[2] - want[2]).norm() <= 1e-6 * want[2].norm()


SHAPES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 14), min_size=1, max_size=5)), min_size=1, max_size=4
)


@pytest.mark.parametrize("kind", PROPERTY_MODELS)
@given(shape=SHAPES, seed=st.integers(0, 1000), budget=st.integers(20, 200))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_gradients_agree_between_layouts(policies, kind, shape, seed, budget):
    groups, total = make_groups(seed, shape)
    torch.manual_seed(seed)
    weights = torch.randn(2, total)
    want = run(policies[kind], groups, total, weights, layout="padded", budget=10_000)
    for layout in ("tree", "sorted", "padded"):
        assert_same(run(policies[kind], groups, total, weights, layout=layout, budget=budget), want)


def test_split_groups_and_single_token_completions(policies):
    groups, total = make_groups(1, [(7, [1, 1, 20, 9, 1, 13]), (3, [1]), (5, [30])])
    weights = torch.randn(2, total)
    want = run(policies["llama"], groups, total, weights, layout="padded", budget=10_000)
    assert_same(run(policies["llama"], groups, total, weights, layout="tree", budget=100, row_cap=25), want)


def test_a_dead_group_may_be_left_out(policies):
    """Its coefficients are 0, so the gradient of all else is the same with and without its rows."""
    groups, total = make_groups(2, [(4, [5, 6]), (6, [7, 8, 9]), (3, [4])])
    weights = torch.randn(2, total)
    weights[:, 11:35] = 0
    want = run(policies["llama"], groups, total, weights, layout="padded", budget=10_000)
    got = run(policies["llama"], groups, total, weights, layout="tree", budget=100, skip=(1,))
    assert (got[2] - want[2]).norm() <= 1e-6 * want[2].norm()


@pytest.mark.parametrize("kind", ["cohere", "granite", "mistral", "phi3", "olmo2", "smollm3", "stablelm", "qwen3_moe"])
def test_other_families_agree(kind):
    policy = make_policy(kind)
    groups, total = make_groups(3, [(6, [5, 9, 1]), (2, [11])])
    weights = torch.randn(2, total)
    want = run(policy, groups, total, weights, layout="padded", budget=10_000)
    assert check_tree_support(policy.config) is None
    got = run(policy, groups, total, weights, layout="tree", budget=10_000)
    assert (got[2] - want[2]).norm() <= 2e-6 * want[2].norm()


SLIDING = {
    "mistral": {},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
}


@pytest.mark.parametrize("kind", SLIDING)
def test_a_window_that_holds_every_sequence_takes_trees(kind):
    """The window counts within a branch, so it may be narrower than the row: here 15 of 21 positions."""
    policy = make_policy(kind, attention="eager", sliding_window=15, **SLIDING[kind])
    groups, total = make_groups(6, [(6, [5, 9, 1]), (2, [11])])
    weights = torch.randn(2, total)
    want = run(policy, groups, total, weights, layout="padded", budget=10_000)
    got = run(policy, groups, total, weights, layout="tree", budget=10_000)
    assert (got[2] - want[2]).norm() <= 2e-6 * want[2].norm()
    assert choose_layout(policy.config, "tree", longest=15) == ("tree", None)
    layout, note = choose_layout(policy.config, "tree", longest=16)
    assert layout == "sorted" and "sliding_window=15" in note
    assert choose_layout(policy.config, "tree")[0] == "sorted"


def test_eager_attention_takes_trees():
    groups, total = make_groups(4, [(6, [5, 9, 1])])
    weights = torch.randn(2, total)
    results = [
        run(make_policy("llama", attention=a), groups, total, weights, layout="tree", budget=200)
        for a in ("sdpa", "eager")
    ]
    assert_same(results[1], results[0])


def test_log_probs_are_of_the_distribution_sampled_from(policies):
    groups, total = make_groups(5, [(6, [5, 9, 1])])
    logp, entropy, _ = run(policies["llama"], groups, total, torch.ones(2, total), layout="tree", budget=200)
    for _sequence, start, ids in groups[0].completions:
        tokens = torch.tensor([*groups[0].prompt_ids, *ids])
        logits = policies["llama"].causal_lm(input_ids=tokens[None]).logits[0, len(groups[0].prompt_ids) - 1 : -1]
        logq = (logits / 0.8).log_softmax(-1)
        want = logq.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(logp[start : start + len(ids)], want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            entropy[start : start + len(ids)], -(logq.exp() * logq).sum(-1), rtol=1e-4, atol=1e-4
        )


REFUSED = [
    ("gpt2", {}, "not known"),
    ("bloom", {}, "not known"),
    ("mamba", {}, "not known"),
    ("mistral", {"sliding_window": 16}, "sliding_window=16"),
    ("gemma2", {"num_hidden_layers": 2}, "sliding_attention"),
    ("gemma3_text", {"num_hidden_layers": 2}, "sliding_attention"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_attention"),
]


@pytest.mark.parametrize(("kind", "options", "reason"), REFUSED, ids=str)
def test_models_that_are_not_plain_full_attention_are_refused_by_name(kind, options, reason):
    config = AutoConfig.for_model(kind, **options)
    assert reason in check_tree_support(config)
    layout, note = choose_layout(config, "tree")
    assert layout == "sorted" and kind in note and reason in note
    assert choose_layout(config, "padded") == ("padded", None)


def test_plain_models_keep_the_tree():
    config = AutoConfig.for_model("qwen2", sliding_window=4096, use_sliding_window=False)
    assert choose_layout(config, "tree") == ("tree", None)
    layout, note = choose_layout(config, "tree", "flash_attention_2")
    assert layout == "sorted" and "flash_attention_2" in note


def test_logit_rules_of_known_families():
    assert logit_rule(AutoConfig.for_model("gemma2"), 0.7) == LogitRule(0.7, 1.0, 30.0)
    assert logit_rule(AutoConfig.for_model("granite", logits_scaling=8.0), 1.0) == LogitRule(1.0, 0.125, None)
    assert logit_rule(AutoConfig.for_model("cohere", logit_scale=0.0625), 1.0) == LogitRule(1.0, 0.0625, None)

"""The critic: heads on hidden states, where they read, what gradient reaches the trunk, the same in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from rlpost.errors import RecipeError
from rlpost.gradient.gae import aggregate_values, value_coefficients, value_surrogate
from rlpost.policy.accumulation import AccumulatingEmbedding
from rlpost.policy.critic import ValueHead, make_critic, read_places, scale_gradient, states_at
from rlpost.policy.linear import RecastLinear
from rlpost.policy.model import load_policy
from rlpost.policy.rows import RowGroup, build_rows
from rlpost.recipe.sections.critic import CriticSection, describe_critic
from rlpost.recipe.sections.model import ModelSection

GROUPS = [
    RowGroup((5, 6, 7), ((0, 0, (8, 9, 10)), (1, 3, (11,)), (2, 4, (12, 13)))),
    RowGroup((20, 21), ((3, 6, (22, 23, 24, 25)),)),
]
pytestmark = pytest.mark.usefixtures("one_thread")


def critic(**slots) -> CriticSection:
    return CriticSection.model_validate(slots)


@pytest.fixture
def model(tiny_model) -> ModelSection:
    return ModelSection(path=tiny_model, dtype="float32", autocast="none")


def values_of(section: CriticSection, model: ModelSection, layout: str) -> tuple[dict, dict]:
    """(value by token or completion, gradient by parameter of policy and critic) of the two groups."""
    policy = load_policy(model, model.path)
    made = make_critic(section, model, model.path, policy.config.hidden_size, seed=3)
    found, target = {}, 1.0
    for rows in build_rows(GROUPS, layout=layout, micro_batch_tokens=24, pad_id=0):
        hidden = policy.causal_lm.base_model(
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            attention_mask=mask(rows),
            use_cache=False,
        ).last_hidden_state
        values = made(rows, states_at(hidden, rows))
        places = read_places(section, rows.sequence)
        keys = rows.token_index if places is None else rows.sequence[places]
        found |= dict(zip(keys.tolist(), values.detach(), strict=True))
        old = aggregate_values(section, values).detach()
        loss = value_coefficients(section, values, old, torch.full_like(old, target))
        value_surrogate(loss, torch.ones_like(old), values).backward()
    gradients = {f"policy.{k}": p.grad for k, p in policy.named_parameters() if p.grad is not None}
    return found, gradients | {f"critic.{k}": p.grad for k, p in made.named_parameters() if p.grad is not None}


def mask(rows):
    from rlpost.policy.attention import attention_mask

    return attention_mask(rows, "sdpa")


@pytest.mark.parametrize("level", ["token", "sequence", "answer"])
@pytest.mark.parametrize("kind", ["trunk", "separate"])
def test_values_and_gradients_do_not_depend_on_the_layout(model, level, kind):
    section = critic(heads=2, aggregate="soft_min", level=level, model=kind)
    section = section.model_copy(update={"trunk_gradient": 1.0 if kind == "trunk" else 0.0})
    expected, wanted = values_of(section, model, "padded")
    assert sorted(expected) == (list(range(10)) if level == "token" else [0, 1, 2, 3])
    for layout in ("sorted", "tree"):
        found, gradients = values_of(section, model, layout)
        assert sorted(found) == sorted(expected) and sorted(gradients) == sorted(wanted)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)


def test_sequence_values_are_read_at_the_prompts_end(model):
    """Completions of one prompt share their value: it cannot depend on the answer."""
    found, _ = values_of(critic(level="sequence"), model, "tree")
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])
    by_token, _ = values_of(critic(level="token"), model, "tree")
    torch.testing.assert_close(by_token[0], found[0])  # the first token's state is the prompt's end
    torch.testing.assert_close(by_token[6], found[3])


def test_values_of_whole_answers_are_read_before_their_last_token(model):
    """As released: the value of a completion is that of its last token's state, so it depends on the answer."""
    found, _ = values_of(critic(level="answer"), model, "tree")
    by_token, _ = values_of(critic(level="token"), model, "tree")
    for completion, last in {0: 2, 1: 3, 2: 5, 3: 9}.items():
        torch.testing.assert_close(found[completion], by_token[last])
    assert not torch.equal(found[0], found[2])


def test_how_much_gradient_reaches_the_trunk(model):
    _, none = values_of(critic(), model, "tree")
    _, all_ = values_of(critic(trunk_gradient=1.0), model, "tree")
    _, tenth = values_of(critic(trunk_gradient=0.1), model, "tree")
    trunk = [name for name in all_ if name.startswith("policy.")]
    assert trunk and not any(name.startswith("policy.") for name in none)
    for name in trunk:
        torch.testing.assert_close(tenth[name], 0.1 * all_[name], rtol=1e-4, atol=1e-6)
    for name in (n for n in all_ if n.startswith("critic.")):
        assert torch.equal(none[name], all_[name]) and all_[name].abs().sum() > 0
    x = torch.randn(5, requires_grad=True)
    assert torch.equal(scale_gradient(x, 0.3), x)


def test_a_separate_critic_leaves_the_policy_alone(model):
    _, gradients = values_of(critic(model="separate", hidden_share=0.0), model, "tree")
    assert not any(name.startswith("policy.") for name in gradients)
    assert any(name.startswith("critic.trunk.") for name in gradients)
    assert {n for n in gradients if n.startswith("critic.head.heads")} == {
        "critic.head.heads.0.0.weight",
        "critic.head.heads.0.0.bias",
    }


def test_a_separate_critics_layers_hold_less_in_a_pass_as_the_policys_do(model):
    made = make_critic(critic(model="separate"), model, model.path, 64)
    kinds = {type(m) for m in made.trunk.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    assert kinds == {RecastLinear, AccumulatingEmbedding} and not made.trunk.training


def test_heads_differ_are_repeatable_and_keep_their_precision():
    section = critic(heads=2, aggregate="min")
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    first, again, other = (ValueHead(64, section, seed=s) for s in (1, 1, 2))
    values = first(hidden)
    assert values.shape == (7, 2) and torch.equal(values, again(hidden)) and not torch.equal(values, other(hidden))
    assert not torch.equal(values[:, 0], values[:, 1])
    assert values.abs().max() < 20 and sum(p.numel() for p in first.heads.parameters()) == 2 * (64 * 16 + 16 + 16 + 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first(hidden), values)  # not rounded to three digits
    assert first.to(torch.bfloat16)(hidden).dtype == torch.float32  # as under DeepSpeed's bf16
    assert again.double()(hidden.double()).dtype == torch.float64
    restored = ValueHead(64, section, seed=9)
    restored.load_state_dict(other.state_dict())
    assert torch.equal(restored(hidden), other(hidden))
    torch.random.set_rng_state(state)


def test_new_heads_do_not_touch_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ValueHead(64, critic(), seed=1)
    found = torch.rand(3)
    assert torch.equal(found, expected)


def test_a_critic_learns(model):
    """Heads on frozen states fit their targets, also with the clip moving along."""
    section = critic(heads=2, aggregate="soft_min", loss={"clip": 0.2, "type": "huber", "combine": "mean"})
    head = ValueHead(64, section, seed=0)
    hidden, target = torch.randn(32, 64), torch.linspace(-1, 1, 32)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    errors = []
    for _ in range(40):
        old = aggregate_values(section, head(hidden)).detach()
        errors.append(float((old - target).square().mean()))
        for _ in range(4):
            values = head(hidden)
            loss = value_surrogate(value_coefficients(section, values, old, target), torch.full((32,), 1 / 32), values)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert errors[-1] < 0.05 * errors[0]


def test_a_separate_critic_must_be_whole(model, tmp_path):
    with pytest.raises(RecipeError, match=r"model\.path|critic\.path"):
        make_critic(critic(model="separate"), model, str(tmp_path / "nowhere"), 64)
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model.path, broken)
    state = load_file(broken / "model.safetensors")
    state.pop("model.layers.1.mlp.down_proj.weight")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="made up at random"):
        make_critic(critic(model="separate"), model, str(broken), 64)


def test_a_critic_of_another_tokenizer_is_refused_before_anything_is_loaded(tiny_model, write_recipe, tmp_path):
    from rlpost.recipe.load import load_recipe
    from rlpost.run.checks import check_critic

    larger = tmp_path / "larger"  # of which only the configuration is there
    larger.mkdir()
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    method = {"preset": "ppo", "critic": {"model": "separate", "path": tiny_model}}
    file = write_recipe(tmp_path, {"method": method, "model.path": str(larger)})
    recipe = load_recipe(file).recipe
    check_critic(recipe, 258)
    with pytest.raises(RecipeError, match=r"method\.critic\.path=.* knows 258 tokens, but the tokenizer .* has 259"):
        check_critic(recipe, 259)
    # A token that the policy does not know either is never written: Gemma 3's text models have one.
    check_critic(load_recipe(file, [f"model.path={tiny_model}"]).recipe, 259)


def test_rows_suit_the_critics_model_too(model):
    from rlpost.run.build import layout_for

    policy = load_policy(model, model.path)
    assert layout_for(policy, "tree", 256) == ("tree", None)
    policy.critic = make_critic(critic(model="separate"), model, model.path, 64)
    assert layout_for(policy, "tree", 256) == ("tree", None)
    policy.critic.trunk.config.layer_types = ["sliding_attention", "full_attention"]
    layout, note = layout_for(policy, "tree", 256)
    assert layout == "sorted" and "sliding_attention" in note and "critic" in note
    assert layout_for(policy, "sorted", 256) == ("sorted", None)


def test_sections_refuse_what_means_nothing():
    for slots, word in (
        ({"aggregate": "min"}, "heads 2"),
        ({"path": "x"}, "separate"),
        ({"model": "separate", "trunk_gradient": 1.0}, "shares nothing"),
        ({"heads": 3}, "heads"),
    ):
        with pytest.raises(ValidationError, match=word):
            critic(**slots)
    assert all(field.description for field in CriticSection.model_fields.values())
    lines = describe_critic(critic(heads=2, aggregate="soft_min", level="sequence", whiten_reward="full"))
    assert "whitened" in lines[0] and "soft_min" in lines[1] and "prompt's end" in lines[1]

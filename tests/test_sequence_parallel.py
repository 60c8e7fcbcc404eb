"""Rows shared by processes: what is refused, how rows are cut, whose turn it is. Runs: test_processes.py."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from rlpost.errors import RecipeError
from rlpost.policy.attention import tree_mask
from rlpost.policy.rows import RowGroup, build_rows, spare_rows
from rlpost.policy.sequence_parallel import padded, refuse_unshareable, take_turns
from rlpost.recipe.load import load_recipe
from rlpost.recipe.rules.check import Setting, check


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.sequence_parallel=3", "does not divide the 4 process"),
        ("model.attention=eager", "cannot share heads"),
        ("method={preset: ppo, critic: {model: separate}}", "whose rows are not shared"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(override, said, write_recipe, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, {"learner.sequence_parallel": 2}), [override]).recipe
    found = [problem for problem in check(recipe, Setting(4)) if "learner.sequence_parallel" in problem]
    assert len(found) == 1 and said in found[0], found


def test_a_sound_recipe_is_not_refused(write_recipe, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, {"learner.sequence_parallel": 2})).recipe
    for setting in (Setting(4), Setting(4, zero_stage=2), Setting(4, zero_stage=3)):
        assert not [problem for problem in check(recipe, setting) if "sequence_parallel" in problem]


@pytest.mark.parametrize(
    ("config", "size", "said"),
    [
        (LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=6), 4, "6 attention heads"),
        (LlamaConfig(hidden_size=96, num_attention_heads=12, num_key_value_heads=3), 2, "3 of keys and values"),
        (MistralConfig(sliding_window=16), 2, "sliding_window=16"),
    ],
)
def test_models_that_cannot_share_rows_are_refused_by_name(config, size, said):
    with pytest.raises(RecipeError, match=rf"learner.sequence_parallel={size} .*{config.model_type}.*{said}"):
        refuse_unshareable(config, size)
    refuse_unshareable(config, 1)


def test_models_with_fewer_key_heads_than_processes_can(monkeypatch):
    refuse_unshareable(LlamaConfig(num_attention_heads=8, num_key_value_heads=2), 4)


def test_rows_are_padded_to_equal_slices_that_see_nothing():
    groups = [RowGroup(prompt_ids=(5, 6, 7), completions=((0, 0, (8, 9)), (1, 2, (10, 11))))]
    (rows,) = build_rows(groups, layout="tree", micro_batch_tokens=64, pad_id=0)
    wide = padded(rows, 4)
    assert rows.input_ids.shape == (1, 7) and wide.input_ids.shape == (1, 8)
    assert torch.equal(wide.input_ids[:, :7], rows.input_ids) and torch.equal(
        wide.position_ids[:, :7], rows.position_ids
    )
    mask = tree_mask(wide)[0]
    assert torch.equal(mask[:7, :7], tree_mask(rows)[0])
    assert mask[7].sum() == 1 and mask[:, 7].sum() == 1, "padding sees itself alone"
    assert padded(wide, 4) is wide


def test_neighbours_take_turns():
    class Place:
        size, rank = 2, 1

    spare, a = spare_rows(), spare_rows(3)
    assert take_turns([a], 2, None, spare) == [a, spare]
    turns = take_turns([a], 2, Place, spare)
    assert [turn is a for turn in turns] == [False, True, False, False]

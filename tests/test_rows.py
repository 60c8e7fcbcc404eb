"""Rows: every completion token is scored exactly once, from the right place, within the budget."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.errors import DataError
from rlpost.policy.attention import attention_mask, tree_mask
from rlpost.policy.packing import balanced_split, stack_rows
from rlpost.policy.rows import RowGroup, build_rows, padding_share

LAYOUTS = ("tree", "sorted", "padded")


def make_groups(prompts, completions):
    """Groups from lengths, with token ids that are unique over the whole rollout."""
    groups, sequence, start, token = [], 0, 0, 1
    for prompt, lengths in zip(prompts, completions):
        ids = tuple(range(token, token + prompt))
        token += prompt
        rows = []
        for n in lengths:
            rows.append((sequence, start, tuple(range(token, token + n))))
            sequence, start, token = sequence + 1, start + n, token + n
        groups.append(RowGroup(ids, tuple(rows)))
    return groups


LENGTHS = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(1, 30), min_size=1, max_size=5)), min_size=1, max_size=5
)


@given(LENGTHS, st.sampled_from(LAYOUTS), st.integers(8, 120), st.integers(8, 120))
@settings(max_examples=60, deadline=None)
def test_each_token_is_seen_with_its_own_past(lengths, layout, budget, row_cap):
    groups = make_groups([p for p, _ in lengths], [c for _, c in lengths])
    expected = {}  # token_index -> (sequence, target, all tokens before it)
    for group in groups:
        for sequence, start, ids in group.completions:
            for i, token in enumerate(ids):
                expected[start + i] = (sequence, token, (*group.prompt_ids, *ids[:i]))
    batches = build_rows(groups, layout=layout, micro_batch_tokens=budget, pad_id=0, row_cap=row_cap)
    seen = {}
    for rows in batches:
        mask = tree_mask(rows)
        assert rows.useful_tokens == rows.target.numel()
        assert rows.real_tokens == int((rows.branch >= 0).sum()) == int((rows.input_ids > 0).sum())
        assert torch.equal(rows.sequence, rows.sequence.sort().values)
        for n in range(rows.useful_tokens):
            r, c = int(rows.predict_row[n]), int(rows.predict_col[n])
            visible = mask[r, c].nonzero().squeeze(-1)
            assert torch.equal(rows.position_ids[r, visible], torch.arange(len(visible)))
            past = tuple(rows.input_ids[r, visible].tolist())
            assert int(rows.token_index[n]) not in seen
            seen[int(rows.token_index[n])] = (int(rows.sequence[n]), int(rows.target[n]), past)
        if rows.input_ids.shape[0] > 1 or layout == "tree" and rows.branch.max() > 1:
            assert rows.input_ids.numel() <= budget
    assert seen == expected


@given(LENGTHS, st.sampled_from(LAYOUTS), st.integers(8, 120))
@settings(max_examples=30, deadline=None)
def test_completions_stay_whole_and_rows_are_deterministic(lengths, layout, budget):
    groups = make_groups([p for p, _ in lengths], [c for _, c in lengths])
    batches = build_rows(groups, layout=layout, micro_batch_tokens=budget, pad_id=0)
    sequences = [s for rows in batches for s in rows.sequence.unique().tolist()]
    assert sorted(sequences) == list(range(sum(len(c) for _, c in lengths)))
    again = build_rows(groups, layout=layout, micro_batch_tokens=budget, pad_id=0)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))


def test_a_group_over_the_cap_is_split_into_even_trees_that_repeat_the_prompt():
    batches = build_rows(
        make_groups([10], [[30, 10, 20, 25, 15, 20]]), layout="tree", micro_batch_tokens=1000, pad_id=0, row_cap=70
    )
    lengths = [int((branch >= 0).sum()) for rows in batches for branch in rows.branch]
    assert sorted(lengths) == [70, 70]
    prompts = [row[branch == 0].tolist() for rows in batches for row, branch in zip(rows.input_ids, rows.branch)]
    assert all(prompt == list(range(1, 11)) for prompt in prompts)


def test_a_completion_over_the_budget_keeps_its_own_row():
    batches = build_rows(make_groups([5], [[200, 3, 4]]), layout="tree", micro_batch_tokens=64, pad_id=0)
    assert sorted(rows.input_ids.shape[1] for rows in batches) == [12, 205]


def test_single_branches_are_causal_and_trees_are_not():
    groups = make_groups([5, 6], [[3], [4]])
    (rows,) = build_rows(groups, layout="tree", micro_batch_tokens=100, pad_id=0)
    assert rows.causal
    assert attention_mask(rows, "sdpa") is None
    # transformers takes a jump in positions for the start of another packed sequence
    assert torch.equal(rows.position_ids, torch.arange(rows.input_ids.shape[1]).expand_as(rows.position_ids))
    (rows,) = build_rows(make_groups([5], [[3, 4]]), layout="tree", micro_batch_tokens=100, pad_id=0)
    assert not rows.causal


def test_masks_of_all_implementations_agree():
    (rows,) = build_rows(make_groups([4, 3], [[3, 1, 5], [2, 2]]), layout="tree", micro_batch_tokens=200, pad_id=0)
    assert rows.input_ids.shape[0] == 2
    boolean = tree_mask(rows)[:, None]
    assert boolean.any(-1).all()  # also padding attends to something
    for dtype in (torch.float32, torch.bfloat16):
        additive = attention_mask(rows, "sdpa", dtype)
        assert additive.dtype == dtype and torch.equal(additive == 0, boolean)
        assert (additive[~boolean] == -torch.inf).all()
    additive = attention_mask(rows, "eager", torch.bfloat16)
    assert additive.dtype == torch.float32 and torch.equal(additive == 0, boolean) and additive.isfinite().all()
    blocks = attention_mask(rows, "flex_attention")
    r, q, k = torch.meshgrid(*(torch.arange(n) for n in tree_mask(rows).shape), indexing="ij")
    assert torch.equal(blocks.mask_mod(r, torch.zeros_like(r), q, k), boolean[:, 0])
    with pytest.raises(ValueError, match="flash_attention_2"):
        attention_mask(rows, "flash_attention_2")


def test_packing_of_a_lognormal_rollout_wastes_little():
    random.seed(0)
    lengths = [[min(384, int(random.lognormvariate(4.6, 0.7)) + 1) for _ in range(8)] for _ in range(32)]
    groups = make_groups([100] * 32, lengths)
    built = {layout: build_rows(groups, layout=layout, micro_batch_tokens=4096, pad_id=0) for layout in LAYOUTS}
    share = {layout: padding_share(batches) for layout, batches in built.items()}
    positions = {layout: sum(rows.input_ids.numel() for rows in batches) for layout, batches in built.items()}
    assert share["sorted"] < 0.07
    assert share["tree"] < 0.10
    assert share["padded"] > 0.4
    assert positions["tree"] < positions["sorted"] < positions["padded"]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(10, 120))
@settings(max_examples=60, deadline=None)
def test_stacks_are_the_best_cut_of_the_sorted_rows(lengths, budget):
    stacks = stack_rows(lengths, budget)
    assert sorted(i for s in stacks for i in s.rows) == list(range(len(lengths)))
    assert all(s.width == max(lengths[i] for i in s.rows) for s in stacks)
    assert all(len(s.rows) * s.width <= budget or len(s.rows) == 1 for s in stacks)
    ordered = sorted(lengths, reverse=True)
    best = math.inf
    for cuts in range(2 ** (len(lengths) - 1)):  # brute force over all ways to cut
        runs, run = [], [ordered[0]]
        for i, n in enumerate(ordered[1:]):
            if cuts >> i & 1:
                runs.append(run)
                run = []
            run.append(n)
        runs.append(run)
        if all(len(run) * run[0] <= budget or len(run) == 1 for run in runs):
            best = min(best, sum(len(run) * run[0] + budget / 8 for run in runs))
    assert sum(len(s.rows) * s.width + budget / 8 for s in stacks) == pytest.approx(best)


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(-5, 120))
@settings(max_examples=60, deadline=None)
def test_balanced_split_keeps_the_capacity(lengths, capacity):
    parts = balanced_split(lengths, capacity)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in part) <= capacity or len(part) == 1 for part in parts)


def test_balanced_split_is_even():
    parts = balanced_split([10] * 8, 50)
    assert [len(part) for part in parts] == [4, 4]


def test_empty_inputs():
    assert build_rows([], layout="tree", micro_batch_tokens=10, pad_id=0) == []
    assert build_rows([RowGroup((1,), ((0, 0, ()),))], layout="sorted", micro_batch_tokens=10, pad_id=0) == []
    assert padding_share([]) == 0
    with pytest.raises(DataError, match="prompt has no tokens"):
        build_rows([RowGroup((), ((0, 0, (1,)),))], layout="tree", micro_batch_tokens=10, pad_id=0)

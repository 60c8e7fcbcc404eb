"""The prompt sampler: epochs, global order, resume."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.data.sampler import PromptSampler
from rlpost.errors import CheckpointError

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32)
batches = st.lists(st.integers(0, 60), max_size=12)


@given(n=sizes, seed=seeds, shuffle=st.booleans(), batches=batches)
def test_every_epoch_holds_every_prompt_once(n, seed, shuffle, batches):
    sampler = PromptSampler(n, seed, shuffle)
    taken = [index for k in batches for index in sampler.next(k)]
    assert len(taken) == sum(batches)
    for start in range(0, len(taken) - n + 1, n):
        assert sorted(taken[start : start + n]) == list(range(n))
    assert sampler.epochs == pytest.approx(len(taken) / n)


@given(n=sizes, seed=seeds, shuffle=st.booleans(), first=batches, second=batches)
def test_the_sequence_does_not_depend_on_batch_sizes(n, seed, shuffle, first, second):
    one, other = PromptSampler(n, seed, shuffle), PromptSampler(n, seed, shuffle)
    a = [index for k in first for index in one.next(k)]
    b = [index for k in second for index in other.next(k)]
    shared = min(len(a), len(b))
    assert a[:shared] == b[:shared]


@given(n=sizes, seed=seeds, shuffle=st.booleans(), before=batches, after=batches)
def test_resume_continues_the_sequence(n, seed, shuffle, before, after):
    sampler = PromptSampler(n, seed, shuffle, "print")
    for k in before:
        sampler.next(k)
    state = json.loads(json.dumps(sampler.state_dict()))  # as it comes back from a checkpoint
    resumed = PromptSampler(n, seed, shuffle, "print")
    resumed.next(7)
    resumed.load_state_dict(state)
    assert [resumed.next(k) for k in after] == [sampler.next(k) for k in after]
    assert resumed.state_dict() == sampler.state_dict()


def test_epochs_and_seeds_differ():
    sampler = PromptSampler(100, 0)
    first, second = sampler.next(100), sampler.next(100)
    assert first != second
    assert PromptSampler(100, 1).next(100) != first
    assert first != list(range(100))


def test_without_shuffling_the_order_is_the_data_sets():
    assert PromptSampler(3, 0, shuffle=False).next(7) == [0, 1, 2, 0, 1, 2, 0]


def test_the_order_is_the_same_on_every_machine():
    """Pinned: a change would make old checkpoints resume differently."""
    assert PromptSampler(8, 17).next(10) == [1, 5, 4, 7, 0, 3, 6, 2, 5, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 11}, "number of training prompts was 10 .* is 11 now"),
        ({"seed": 1}, "seed was 0"),
        ({"shuffle": False}, r"data\.shuffle"),
        ({"fingerprint": "b"}, "content of the training prompts"),
    ],
)
def test_a_changed_run_cannot_be_resumed(change, message):
    arguments = {"n": 10, "seed": 0, "shuffle": True, "fingerprint": "a"}
    state = PromptSampler(**arguments).state_dict()
    sampler = PromptSampler(**arguments | change)
    before = sampler.state_dict()
    with pytest.raises(CheckpointError, match=message):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == before


def test_damaged_state_and_bad_arguments():
    sampler = PromptSampler(3, 0)
    with pytest.raises(CheckpointError, match="damaged"):
        sampler.load_state_dict(sampler.state_dict() | {"position": 3})
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptSampler(0, 0)
    with pytest.raises(ValueError, match="cannot take -1"):
        sampler.next(-1)

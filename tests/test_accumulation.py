"""Gradients of embedding and head added in place: autograd's sums, without copies as large as the vocabulary's matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn

from rlpost.learner.learner import DataParallelLearner
from rlpost.learner.process import Processes
from rlpost.policy.accumulation import AccumulatingEmbedding, accumulate_in_place, accumulating_embedding
from rlpost.policy.head import HeadRequest, LogitRule, ScoringLinear
from rlpost.policy.model import load_policy
from rlpost.recipe.sections.learner import LearnerSection
from rlpost.recipe.sections.model import LoraSection, ModelSection

WORDS, WIDTH, TOKENS = 300, 8, 12


class Tied(nn.Module):
    """The smallest language model: look up, mix, score with the same matrix."""

    def __init__(self, *, in_place, tied=True, padding=None, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = ScoringLinear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.to(dtype)
        accumulating_embedding(self)
        assert type(self.embedding) is AccumulatingEmbedding
        if in_place:
            accumulate_in_place(self.parameters())

    def forward(self, ids, target, chunk=5):
        states = torch.tanh(self.mix(self.embedding(ids))).flatten(0, -2)
        logp, entropy, *_ = self.head(states, HeadRequest(target, LogitRule(), chunk))
        return (logp * torch.linspace(-1, 1, len(logp))).sum() + 0.1 * entropy.sum()


def passes(count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (torch.randint(0, 20, (2, TOKENS // 2), generator=generator),) + (
            torch.randint(0, WORDS, (TOKENS,), generator=generator),
        )


def gradients(model, *, autocast=False):
    for ids, target in passes():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, target)
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_sums_over_micro_batches_are_autograds(tied, padding, autocast):
    options = {"tied": tied, "padding": padding}
    want = gradients(Tied(in_place=False, **options), autocast=autocast)
    found = gradients(Tied(in_place=True, **options), autocast=autocast)
    assert found.keys() == want.keys() and len(want) == (3 if tied else 4)
    for name, gradient in want.items():  # the order of additions differs
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    if padding is not None and not tied:
        assert not found["embedding.weight"][padding].any() and found["embedding.weight"].any()


def test_bfloat16_weights_keep_the_heads_sum_in_float32():
    """Shares of the head's gradient are in float32, `.grad` is not: they are added up before they are rounded."""
    want = gradients(Tied(in_place=False, tied=False, dtype=torch.bfloat16))
    found = gradients(Tied(in_place=True, tied=False, dtype=torch.bfloat16))
    assert torch.equal(found["head.weight"], want["head.weight"])
    torch.testing.assert_close(found["embedding.weight"], want["embedding.weight"], rtol=2e-2, atol=1e-2)


def test_no_copy_of_the_matrix_from_the_second_micro_batch_on():
    matrix = 4 * WORDS * WIDTH
    peaks = {}
    for in_place in (True, False):
        model = Tied(in_place=in_place)
        (first, second) = passes(2)
        model(*first, chunk=1).backward()
        grad = model.embedding.weight.grad
        assert grad is not None
        loss = model(*second, chunk=1)
        with LiveBytes() as memory:
            loss.backward()
        assert model.embedding.weight.grad is grad
        peaks[in_place] = memory.peak
    assert peaks[False] > 2 * matrix, "the head's part is there when the embedding's comes"
    assert peaks[True] < peaks[False] - matrix, "only what is as large as a product of one part of the vocabulary"


def test_nothing_is_added_in_place_unless_a_learner_says_so():
    model = Tied(in_place=False)
    ids, target = next(passes())
    model(ids, target).backward()
    before = model.embedding.weight.grad.clone()
    torch.autograd.grad(model(ids, target), model.embedding.weight)
    assert torch.equal(model.embedding.weight.grad, before)
    assert not hasattr(copy.deepcopy(Tied(in_place=True)).embedding.weight, "_accumulates_in_place")


@pytest.mark.parametrize("lora", [None, LoraSection(rank=4)])
def test_the_data_parallel_learner_marks_what_it_trains(tiny_model, lora):
    policy = load_policy(ModelSection(path=tiny_model, autocast="none", lora=lora), tiny_model)
    DataParallelLearner(policy, LearnerSection(), Processes())
    for parameter in policy.parameters():
        assert getattr(parameter, "_accumulates_in_place", False) == parameter.requires_grad
    assert type(policy.causal_lm.get_input_embeddings()) is AccumulatingEmbedding


def test_embeddings_of_other_kinds_stay():
    class Scaled(nn.Embedding):
        pass

    kinds = nn.ModuleList([Scaled(3, 2), nn.Embedding(3, 2, sparse=True), nn.Embedding(3, 2, max_norm=1.0)])
    before = [type(m) for m in kinds]
    accumulating_embedding(kinds)
    assert [type(m) for m in kinds] == before

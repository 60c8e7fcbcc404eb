"""DPO and RPO: gradients equal autograd of the printed losses, the method page's numbers, whole pairs only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from rlpost.gradient.loss import coefficient_loss
from rlpost.gradient.metrics import values
from rlpost.gradient.types import Counts, TokenView
from rlpost.methods.dpo import pair_coefficients, preference_loss, preference_slope, read_pairs
from rlpost.recipe.sections.preference import PairsSection

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Three pairs; the order of the two sides differs, and lengths too.
LENGTHS, PROMPT, SIDE = (3, 5, 2, 6, 1, 4), (0, 0, 1, 1, 2, 2), (1, -1, -1, 1, 1, -1)
CHOSEN, REJECTED = [0, 3, 4], [1, 2, 5]
SFT = (
    {"type": "none"},
    {"type": "sum", "eta": 0.3},
    {"type": "sequence_mean", "weight": 0.2},
    {"type": "token_mean", "weight": 0.7},
)
LOSSES = (
    {"loss": "sigmoid"},
    {"loss": "sigmoid", "label_smoothing": 0.1},
    {"loss": "sigmoid", "length_normalised": True},
    {"loss": "sigmoid", "length_normalised": True, "label_smoothing": 0.2},
    {"loss": "hinge"},
    {"loss": "hinge", "length_normalised": True},
    {"loss": "ipo"},
    {"loss": "ipo", "length_normalised": False},
)


def section(**slots) -> PairsSection:
    return PairsSection.model_validate(slots)


class Pairs:
    """A head W [7, 4] on fixed hidden states; `baseline` adds a response of the initial model to every pair."""

    def __init__(self, seed: int = 0, *, baseline: bool = False) -> None:
        g = torch.Generator().manual_seed(seed)
        lengths = LENGTHS + ((2, 3, 5) if baseline else ())
        self.prompt = torch.tensor(PROMPT + ((0, 1, 2) if baseline else ()))
        side = torch.tensor(SIDE + ((0, 0, 0) if baseline else ()), dtype=torch.float64)
        n = sum(lengths)
        self.lengths = torch.tensor(lengths)
        self.sequence = torch.repeat_interleave(torch.arange(len(lengths)), self.lengths)
        self.demonstration = torch.arange(len(lengths)) >= len(LENGTHS)
        self.advantage = side[self.sequence]
        self.hidden = torch.randn(n, 4, generator=g, dtype=torch.float64)
        self.head = torch.randn(7, 4, generator=g, dtype=torch.float64).requires_grad_()
        self.token = torch.randint(7, (n,), generator=g)
        self.ref_logp = self.logp().detach() + torch.randn(n, generator=g, dtype=torch.float64)

    def logp(self) -> torch.Tensor:
        return torch.log_softmax(self.hidden @ self.head.T, -1).gather(1, self.token[:, None]).squeeze(1)

    def sums(self, per_token: torch.Tensor) -> torch.Tensor:
        return torch.stack([per_token[self.sequence == i].sum() for i in range(len(self.lengths))])

    def view(self) -> TokenView:
        logp = self.logp().detach()
        return TokenView(
            logp=logp,
            entropy=torch.ones_like(logp),
            old_logp=logp,
            sampler_logp=torch.full_like(logp, torch.nan),
            advantage=self.advantage,
            sequence=self.sequence,
            prompt=self.prompt,
            truncated=torch.zeros(len(self.lengths), dtype=torch.bool),
            demonstration=self.demonstration,
            ref_logp=self.ref_logp,
        )

    def counts(self) -> Counts:
        base = [6, 7, 8] if bool(self.demonstration.any()) else CHOSEN
        tokens = int(self.lengths[base].sum())
        return Counts(int(self.lengths.sum()), 6, 3, demonstrations=3, demonstration_tokens=tokens)

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, self.head)[0]


def printed(case: Pairs, s: PairsSection) -> torch.Tensor:
    """The loss as the papers print it, from summed log-probs."""
    logp, ref = case.sums(case.logp()), case.sums(case.ref_logp)
    n = case.lengths.double()
    ratio = (logp - ref) / n if s.normalised else logp - ref
    h = ratio[CHOSEN] - ratio[REJECTED]
    if s.loss == "sigmoid":
        e = s.label_smoothing
        loss = -(1 - e) * logsigmoid(s.beta * h) - e * logsigmoid(-s.beta * h)
    elif s.loss == "hinge":
        loss = torch.relu(1 - s.beta * h)
    else:
        loss = (h - 1 / (2 * s.beta)) ** 2
    base = [6, 7, 8] if s.baseline == "initial" else CHOSEN
    if s.sft.type == "sum":
        loss = loss - s.sft.eta * s.beta * logp[base]
    elif s.sft.type == "sequence_mean":
        loss = loss - s.sft.weight * logp[base] / n[base]
    elif s.sft.type == "token_mean":
        loss = loss - s.sft.weight * logp[base].sum() / n[base].sum()
    return loss.mean()


@pytest.mark.parametrize("baseline", ["chosen", "initial"])
@pytest.mark.parametrize("sft", SFT, ids=lambda s: s["type"])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradient_is_autograd_of_the_printed_loss(loss, sft, baseline):
    if baseline == "initial" and sft["type"] == "none":
        pytest.skip("means nothing, and is refused")
    s = section(**loss, sft=sft, beta=0.7, baseline=baseline)
    for seed in range(3):
        case = Pairs(seed, baseline=baseline == "initial")
        coefficients = pair_coefficients(s, case.view(), case.counts())
        logp = case.logp()
        ours = case.gradient(coefficient_loss(coefficients, logp, torch.zeros_like(logp)))
        theirs = printed(case, s)
        torch.testing.assert_close(ours, case.gradient(theirs), **EXACT)
        assert values(coefficients.metrics)["pairs/loss"] == pytest.approx(float(theirs), rel=1e-12)


def test_a_hinge_that_is_satisfied_pulls_no_more():
    case, s = Pairs(1), section(loss="hinge", beta=1.0)
    case.ref_logp[case.sequence == CHOSEN[0]] -= 20
    case.ref_logp[case.sequence == CHOSEN[1]] += 20
    coefficient = pair_coefficients(s, case.view(), case.counts()).coefficient
    for i, idle in ((CHOSEN[0], True), (REJECTED[0], True), (CHOSEN[1], False), (REJECTED[1], False)):
        assert bool((coefficient[case.sequence == i] == 0).all()) == idle


@pytest.mark.parametrize(
    "sft",
    [{"type": "sum", "eta": 0}, {"type": "sequence_mean", "weight": 0}, {"type": "token_mean", "weight": 0}, "none"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rpo_without_weight_is_dpo_bit_for_bit(sft, dtype):
    view = Pairs(2).view()
    view = replace(view, logp=view.logp.to(dtype), ref_logp=view.ref_logp.to(dtype), advantage=view.advantage.to(dtype))
    counts = Pairs(2).counts()
    dpo, rpo = (pair_coefficients(section(beta=0.3, sft=s), view, counts) for s in ("none", sft))
    assert torch.equal(dpo.coefficient, rpo.coefficient) and dpo.coefficient.dtype == dtype
    assert torch.equal(dpo.weight, rpo.weight)
    assert dpo.metrics == rpo.metrics


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_margin_is_what_the_loss_acts_on(loss):
    """beta h; the difference of the implicit rewards, which are sums, only where h is not per token."""
    case, s = Pairs(4), section(**loss, beta=0.7)
    found = values(pair_coefficients(s, case.view(), case.counts()).metrics)
    ratio = case.sums(case.logp().detach() - case.ref_logp)
    rewards = 0.7 * (ratio[CHOSEN] - ratio[REJECTED]).mean()
    per_token = ratio / case.lengths
    assert found["pairs/chosen_reward"] - found["pairs/rejected_reward"] == pytest.approx(float(rewards), rel=1e-9)
    want = 0.7 * (per_token[CHOSEN] - per_token[REJECTED]).mean() if s.normalised else rewards
    assert found["pairs/margin"] == pytest.approx(float(want), rel=1e-9)


VECTORS = [  # the method page: lw -50, ll -60, rw -52, rl -58
    ({"beta": 0.01, "sft": {"type": "sum", "eta": 0.005}}, 0.04, 0.673347, 0.0025, 0.675847),
    ({"beta": 0.05, "sft": {"type": "sum", "eta": 0.005}}, 0.20, 0.598139, 0.0125, 0.610639),
    ({"beta": 0.5, "sft": {"type": "sequence_mean", "weight": 0.2}}, 2.0, 0.126928, 0.4, 0.526928),
]


@pytest.mark.parametrize(("slots", "z", "dpo", "sft", "total"), VECTORS)
def test_vectors_of_the_method_page(slots, z, dpo, sft, total):
    lengths, side = (25, 30), (1.0, -1.0)
    sequence = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    logp, ref = (torch.tensor(s, dtype=torch.float64)[sequence] for s in ((-50 / 25, -60 / 30), (-52 / 25, -58 / 30)))
    flags = torch.zeros(2, dtype=torch.bool)
    view = TokenView(
        logp=logp, entropy=logp, old_logp=logp, sampler_logp=torch.full_like(logp, torch.nan),
        advantage=torch.tensor(side)[sequence], sequence=sequence, prompt=torch.tensor([0, 0]), truncated=flags,
        demonstration=flags, ref_logp=ref,
    )  # fmt: skip
    found = values(pair_coefficients(section(**slots), view, Counts(55, 2, 1, demonstration_tokens=25)).metrics)
    assert found["pairs/margin"] == pytest.approx(z, abs=1e-9)
    assert found["pairs/preference_loss"] == pytest.approx(dpo, abs=5e-7)
    assert found["pairs/sft_loss"] == pytest.approx(sft, abs=1e-9)
    assert found["pairs/loss"] == pytest.approx(total, abs=5e-7)
    assert found["pairs/chosen_logp"] == pytest.approx(-50)
    assert found["pairs/rejected_logp"] == pytest.approx(-60)
    assert found["pairs/chosen_logp_per_token"] == pytest.approx(-2)


@settings(max_examples=50, deadline=None)
@given(st.floats(-30, 30), st.floats(0.01, 2), st.sampled_from(LOSSES))
def test_slope_is_minus_the_derivative(h, beta, loss):
    s = section(**loss, beta=beta)
    x = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(preference_loss(s, x).sum(), x)
    assert torch.allclose(preference_slope(s, x.detach()), -derivative, rtol=1e-9, atol=1e-12)


def test_pairs_may_be_spread_over_views_but_a_pair_may_not_be_split():
    case, s = Pairs(3), section(sft="token_mean")
    whole = pair_coefficients(s, case.view(), case.counts())
    for first, last in ((0, 2), (2, 6)):
        view = cut(case.view(), first, last)
        part = pair_coefficients(s, view, case.counts())
        at = (case.sequence >= first) & (case.sequence < last)
        assert torch.equal(part.coefficient, whole.coefficient[at])
        assert torch.equal(part.weight, whole.weight[at])
    with pytest.raises(ValueError, match="split"):
        pair_coefficients(s, cut(case.view(), 0, 3), case.counts())


def test_two_chosen_responses_are_no_pair():
    view = Pairs(0).view()
    with pytest.raises(ValueError, match="chosen"):
        read_pairs(section(), replace(view, advantage=view.advantage.abs()))


def test_a_reference_is_needed():
    with pytest.raises(ValueError, match="ref_logp"):
        pair_coefficients(section(), replace(Pairs(0).view(), ref_logp=None), Pairs(0).counts())


def test_ties_count_half():
    case = Pairs(0)
    view = replace(case.view(), ref_logp=case.view().logp)
    assert values(pair_coefficients(section(), view, case.counts()).metrics)["pairs/accuracy"] == 0.5


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"baseline": "initial"}, "baseline"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"beta": 0}, "beta"),
        ({"sft": "mean"}, "sft"),
    ],
)
def test_senseless_slots_are_refused(slots, words):
    with pytest.raises(ValueError, match=words):
        section(**slots)


def cut(view: TokenView, first: int, last: int) -> TokenView:
    """The completions first..last - 1 as a view of their own."""
    at = (view.sequence >= first) & (view.sequence < last)
    prompt = torch.unique(view.prompt[first:last], return_inverse=True)[1]
    per_token = {
        name: getattr(view, name)[at]
        for name in ("logp", "entropy", "old_logp", "sampler_logp", "advantage", "ref_logp")
    }
    return replace(
        view,
        **per_token,
        sequence=view.sequence[at] - first,
        prompt=prompt,
        truncated=view.truncated[first:last],
        demonstration=view.demonstration[first:last],
    )

"""PPO's maths: GAE, token rewards, whitening, value losses against autograd on their printed form."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.gradient.gae import (
    aggregate_values,
    first_tokens,
    generalised_advantage,
    head_shares,
    soft_min,
    value_coefficients,
    value_surrogate,
)
from rlpost.gradient.types import Counts
from rlpost.methods.ppo import (
    Moments,
    RewardWhitening,
    ValueStatistics,
    counted,
    estimate,
    explained_variance,
    token_rewards,
    total_moments,
    value_metrics,
    value_weights,
    whiten,
    whiten_advantage,
)
from rlpost.recipe.sections.critic import CriticSection

NAN = float("nan")


def critic(**slots) -> CriticSection:
    return CriticSection.model_validate(slots)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequences(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def literal_gae(reward, value, gamma, lam, final=0.0):
    """The recursion as it is printed, for one completion."""
    following = [*value[1:], final][: len(value)]
    delta = [r + gamma * n - v for r, n, v in zip(reward, following, value, strict=True)]
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, len(delta))) for t in range(len(delta))]


def test_gae_by_hand():
    # d = (0 + 0.9*2 - 1, 0 + 0.9*3 - 2, 10 + 0 - 3) = (0.8, 0.7, 7); A_2 = 7, A_1 = 0.7 + 0.45*7, A_0 = 0.8 + 0.45*A_1
    reward, value = torch.tensor([0.0, 0, 10]).double(), torch.tensor([1.0, 2, 3]).double()
    found = generalised_advantage(reward, value, torch.zeros(3, dtype=torch.int64), 1, gamma=0.9, lam=0.5)
    torch.testing.assert_close(found, torch.tensor([0.8 + 0.45 * 3.85, 3.85, 7.0]).double())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    st.sampled_from([0.9, 1.0]),
)
def test_gae_of_any_lengths(lengths, lam, gamma):
    n, sequence = sum(lengths), sequences(lengths)
    reward, value, final = normal(n, seed=1), normal(n, seed=2), normal(len(lengths), seed=3)
    for ends in (None, final):
        found = generalised_advantage(reward, value, sequence, len(lengths), gamma=gamma, lam=lam, final_value=ends)
        for s in range(len(lengths)):
            own = sequence == s
            end = 0.0 if ends is None else float(ends[s])
            expected = literal_gae(reward[own].tolist(), value[own].tolist(), gamma, lam, end)
            torch.testing.assert_close(found[own], torch.tensor(expected, dtype=torch.float64))


def test_gae_limits():
    sequence, reward, value = sequences([4, 1, 3]), normal(8, seed=1), normal(8, seed=2)
    whole = generalised_advantage(reward, value, sequence, 3, lam=1.0)  # lambda 1: the sum of what is still to come - V
    for s in range(3):
        own = sequence == s
        torch.testing.assert_close(whole[own], reward[own].flip(0).cumsum(0).flip(0) - value[own])
    one_step = generalised_advantage(reward, value, sequence, 3, lam=0.0)
    assert torch.equal(one_step[7], reward[7] - value[7])
    assert torch.equal(one_step[0], reward[0] + value[1] - value[0])


def test_a_completion_does_not_see_its_neighbours():
    """The same numbers bit for bit, alone and among others."""
    lengths = [3, 6, 2]
    sequence, reward, value = sequences(lengths), normal(11, seed=1), normal(11, seed=2)
    together = generalised_advantage(reward, value, sequence, 3)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = generalised_advantage(reward[part], value[part], torch.zeros(length, dtype=torch.int64), 1)
        assert torch.equal(together[part], alone)
        start += length


def test_first_tokens():
    assert first_tokens(torch.tensor([0, 0, 2, 5, 5])).tolist() == [0, 2, 3]
    assert first_tokens(torch.empty(0, dtype=torch.int64)).numel() == 0


def test_token_rewards_by_hand():
    reward, sequence = torch.tensor([3.0, NAN, 5.0]), torch.tensor([0, 0, 2, 2, 2])
    kl = torch.tensor([1.0, 2, 3, 4, 5])
    assert token_rewards(reward, sequence).tolist() == [0, 3, 0, 0, 5]
    torch.testing.assert_close(token_rewards(reward, sequence, kl, 0.1), torch.tensor([-0.1, 2.8, -0.3, -0.4, 4.5]))


def test_sequence_values_are_a_baseline_at_the_prompts_end():
    """One value a completion: A = reward - sum of KL - V at all of its tokens, and the same target everywhere."""
    sequence = sequences([2, 3])
    value = torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25]).double()
    found = estimate(
        critic(level="sequence"),
        torch.tensor([1.0, 2.0]).double(),
        value,
        sequence,
        kl=torch.ones(5).double(),
        kl_coefficient=0.1,
    )
    torch.testing.assert_close(found.target, torch.tensor([0.8, 0.8, 1.7, 1.7, 1.7]).double())
    torch.testing.assert_close(found.advantage, found.target - value)
    assert counted(critic(level="sequence"), found, sequence).tolist() == [True, False, True, False, False]


def test_unknown_rewards_teach_nothing():
    sequence, value = sequences([2, 3]), normal(5)
    for level in ("token", "sequence"):
        section = critic(level=level)
        found = estimate(section, torch.tensor([NAN, 1.0]).double(), value, sequence)
        assert found.known.tolist() == [False, False, True, True, True]
        assert not found.advantage[:2].any() and found.advantage[2:].all()
        where = counted(section, found, sequence)
        whitened = whiten_advantage(section, found, Moments.of(found.advantage[where]))
        assert not whitened[:2].any() and not whitened.isnan().any()
        known = found.known if level == "token" else found.known[first_tokens(sequence)]
        weights = value_weights(section, Counts(5, 2, 1), known)
        assert (weights == 0).tolist() == (~known).tolist()


def test_targets_have_a_lambda_of_their_own():
    section = critic(lam=0.5, value_lam=1.0)
    sequence, value, reward = sequences([4]), normal(4), torch.tensor([2.0]).double()
    found = estimate(section, reward, value, sequence)
    torch.testing.assert_close(found.target, torch.full((4,), 2.0).double())  # lambda 1: the return itself
    torch.testing.assert_close(
        found.advantage, generalised_advantage(token_rewards(reward, sequence), value, sequence, 1, lam=0.5)
    )


def test_moments_add_up():
    values = normal(50) * 3 + 7
    values[::7] = NAN
    parts = [Moments.of(part) for part in values.split([1, 0, 20, 29])]
    total, whole = total_moments(parts), Moments.of(values)
    known = values[~values.isnan()]
    for found in (total, whole):
        assert found.count == len(known)
        assert found.mean == pytest.approx(float(known.mean()), rel=1e-12)
        assert found.variance == pytest.approx(float(known.var()), rel=1e-12)
    white = whiten(known, whole)
    assert abs(float(white.mean())) < 1e-12 and float(white.std()) == pytest.approx(1.0, rel=1e-6)
    assert whiten(torch.full((3,), 2.0), Moments.of(torch.full((3,), 2.0))).tolist() == [0, 0, 0]
    assert Moments.from_dict(json.loads(json.dumps(total.to_dict()))) == total


def test_reward_whitening_resumes_and_keeps_unknown_rewards_unknown():
    rollouts = [normal(8, seed=s) + s for s in range(4)]
    rollouts[1][3] = NAN
    whole = RewardWhitening(critic(whiten_reward="full"))
    wanted = [whole(r) for r in rollouts]
    first, second = RewardWhitening(critic(whiten_reward="full")), RewardWhitening(critic(whiten_reward="full"))
    found = [first(r) for r in rollouts[:2]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second(r) for r in rollouts[2:]]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.nan_to_num(nan=9.0), b.nan_to_num(nan=9.0))
    assert wanted[1].isnan().tolist() == [i == 3 for i in range(8)]
    seen = torch.cat(rollouts)[: 4 * 8]
    seen = seen[~seen.isnan()]
    torch.testing.assert_close(wanted[3], (rollouts[3] - seen.mean()) / seen.std(), rtol=1e-6, atol=1e-8)
    scale = RewardWhitening(critic(whiten_reward="scale"))
    torch.testing.assert_close(scale(rollouts[0]), rollouts[0] / rollouts[0].std(), rtol=1e-6, atol=1e-8)
    none = RewardWhitening(critic())
    assert none(rollouts[0]) is rollouts[0] and none.state_dict()["count"] == 0


# --- the value loss ---------------------------------------------------------------------------------------------------


def printed_loss(section: CriticSection, values, old, target):
    """The value loss per value as the papers print it, for autograd."""
    loss = section.loss

    def distance(v):
        if loss.type == "squared":
            return (v - target) ** 2 / 2
        return torch.nn.functional.huber_loss(v, target.expand_as(v), reduction="none", delta=loss.delta)

    if section.train == "heads":
        target = target[:, None]
        value = values
    else:
        value = aggregate_values(section, values)
    plain = distance(value)
    if loss.clip is None:
        return plain if section.train == "aggregate" else plain.mean(-1)
    clipped = distance(old + (value - old).clamp(-loss.clip, loss.clip))
    both = torch.maximum(plain, clipped) if loss.combine == "max" else (plain + clipped) / 2
    return both if section.train == "aggregate" else both.mean(-1)


@pytest.mark.parametrize("train", ["aggregate", "heads"])
@pytest.mark.parametrize("aggregate", ["mean", "min", "soft_min"])
@pytest.mark.parametrize("kind", ["squared", "huber"])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("combine", ["max", "mean"])
def test_value_gradient_equals_autograd(train, aggregate, kind, clip, combine):
    loss = {"type": kind, "clip": clip, "combine": combine}
    section = critic(heads=2, aggregate=aggregate, train=train, loss=loss)
    values = normal(40, 2, seed=1).requires_grad_()
    old = values.detach() + 0.3 * normal(40, 2, seed=2)
    old = old if train == "heads" else aggregate_values(section, old)
    target, weight = normal(40, seed=3), normal(40, seed=4).abs()
    printed = printed_loss(section, values, old, target)
    (expected,) = torch.autograd.grad((weight * printed).sum(), values)
    found = value_coefficients(section, values, old, target)
    torch.testing.assert_close(found.loss, printed.detach())
    surrogate = value_surrogate(found, weight, values)
    torch.testing.assert_close(torch.autograd.grad(surrogate, values)[0], expected)
    assert expected.abs().sum() > 0 and (clip is None) == (not found.clipped.any())


def test_value_clip_by_hand():
    """Old 0, value 1, clip 0.2: towards a target of 0.1 the clip holds nothing (l(V) is larger); towards 2 it does."""
    section = critic(loss={"clip": 0.2})
    values, old = torch.tensor([[1.0], [1.0]]), torch.zeros(2)
    found = value_coefficients(section, values, old, torch.tensor([0.1, 2.0]))
    assert found.clipped.tolist() == [False, True]
    torch.testing.assert_close(found.gradient, torch.tensor([[0.9], [0.0]]))
    torch.testing.assert_close(found.loss, torch.tensor([0.9**2 / 2, 1.8**2 / 2]))


def test_a_head_that_drifts_high_stops_learning_only_with_the_published_loss():
    """safe.md section 2: at a gap of 2 the higher head gets 0.001 of the gradient; with `train: heads` its own error."""
    values, target = torch.tensor([[0.0, 2.0]]).double(), torch.tensor([0.5]).double()
    slots = {"heads": 2, "aggregate": "soft_min", "loss": {"clip": None}}
    published = value_coefficients(critic(**slots), values, torch.zeros(1).double(), target).gradient[0]
    assert abs(float(published[1] / published[0])) < 0.0014
    sound = value_coefficients(critic(**slots, train="heads"), values, torch.zeros(1, 2).double(), target).gradient[0]
    torch.testing.assert_close(sound, torch.tensor([-0.25, 0.75]).double())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=2), min_size=1, max_size=4),
    st.sampled_from([0.01, 0.3, 1.0, 50.0]),
)
def test_soft_min_lies_between_min_and_mean(rows, alpha):
    values = torch.tensor(rows, dtype=torch.float64)
    found = soft_min(values, alpha)
    assert (found >= values.amin(-1) - 1e-9).all() and (found <= values.mean(-1) + 1e-9).all()
    assert (found <= values.amin(-1) + alpha * torch.log(torch.tensor(2.0)) + 1e-9).all()
    shares = head_shares(critic(heads=2, aggregate="soft_min", alpha=alpha), values)
    torch.testing.assert_close(shares.sum(-1), torch.ones(len(rows), dtype=torch.float64))


def test_soft_min_fixed_points():
    """safe.md: softmin(0.2, 0.8; 0.3) = 0.36987; pessimism against the mean by gap; its limits."""
    assert float(soft_min(torch.tensor([0.2, 0.8]).double(), 0.3)) == pytest.approx(0.36987, abs=5e-6)
    for gap, pessimism in ((0.1, -0.004), (0.3, -0.036), (0.6, -0.130), (1.0, -0.303), (2.0, -0.792)):
        pair = torch.tensor([0.0, gap]).double()
        assert float(soft_min(pair, 0.3) - pair.mean()) == pytest.approx(pessimism, abs=1e-3)
    pair = torch.tensor([0.2, 0.8]).double()
    assert float(soft_min(pair, 1e-4)) == pytest.approx(0.2, abs=1e-4)
    assert float(soft_min(pair, 1e4)) == pytest.approx(0.5, abs=1e-4)
    weights = head_shares(critic(heads=2, aggregate="soft_min"), torch.tensor([[0.2, 0.8]]))
    torch.testing.assert_close(weights, torch.tensor([[0.88, 0.12]]), atol=1e-2, rtol=0)


def test_weights_and_statistics_over_processes():
    section, sequence = critic(), sequences([2, 3])
    weights = value_weights(section, Counts(5, 2, 1), torch.ones(5, dtype=torch.bool))
    assert float(weights.sum()) == pytest.approx(section.loss.weight)
    reward, value = torch.tensor([1.0, 3.0]).double(), normal(5)
    found = estimate(section, reward, value, sequence)
    whole = ValueStatistics.of(section, found, value, sequence).metrics()
    error = found.target - value
    assert whole["critic/explained_variance"] == pytest.approx(1 - float(error.var() / found.target.var()))
    assert whole["critic/rmse"] == pytest.approx(float(error.square().mean().sqrt()))
    parts = [
        ValueStatistics.of(section, estimate(section, r, v, torch.zeros_like(v).long()), v, torch.zeros_like(v).long())
        for r, v in ((reward[:1], value[:2]), (reward[1:], value[2:]))
    ]
    assert (parts[0] + parts[1]).metrics() == pytest.approx(whole)
    assert explained_variance(Moments(), Moments()) is None
    assert ValueStatistics().metrics() == {}


def test_value_metrics():
    section = critic(heads=2, aggregate="min")
    values, known = torch.tensor([[0.0, 1.0], [5.0, 2.0], [0.0, 100.0]]), torch.tensor([True, True, False])
    found = value_coefficients(section, values, torch.zeros(3), torch.zeros(3))
    metrics = {name: metric.value() for name, metric in value_metrics(section, found, values, known).items()}
    assert metrics["critic/head_gap"] == 2.0 and metrics["critic/head_gap_max"] == 3.0
    assert metrics["critic/value_mean"] == 1.0 and metrics["critic/pessimism"] == 1.0

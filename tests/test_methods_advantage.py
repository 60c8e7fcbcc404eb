"""Advantages: published formulas, unknown rewards, several rewards, shaping, dynamic sampling."""

from __future__ import annotations

import pytest
import torch
from method_cases import method

from rlpost.gradient.kl import sequence_kl
from rlpost.gradient.shaping import groups_to_refill, overlong_penalty
from rlpost.methods import compute_advantages, dead_groups

NAN = float("nan")


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def advantages(section, rewards, prompt=None, **more):
    prompt = torch.zeros(rewards.shape[0], dtype=torch.int64) if prompt is None else torch.tensor(prompt)
    return compute_advantages(section, rewards, prompt, **more)


def test_ghpo_vectors() -> None:
    """Accuracy weight 1, format weight 0.5, eight samples: arXiv 2507.10628's normalisation (unbiased std, eps 1e-4)."""
    one_solved = torch.tensor([[1.0, 0.5]] + [[0.0, 0.5]] * 7)
    result = advantages(method(), one_solved).advantage
    assert result[0].item() == pytest.approx(2.47417, abs=5e-6)
    assert torch.allclose(result[1:], torch.full((7,), -0.35345, dtype=torch.float64), atol=5e-6)
    format_only = torch.tensor([[0.0, 0.5]] * 4 + [[0.0, 0.0]] * 4)
    result = advantages(method(), format_only).advantage
    assert result.abs().tolist() == pytest.approx([0.93506] * 8, abs=5e-6)
    hopeless = advantages(method(), torch.tensor([[0.0, 0.5]] * 8))
    assert (hopeless.advantage == 0).all() and hopeless.zero_variance.tolist() == [True]


def test_equal_rewards_are_exactly_zero() -> None:
    for value in (0.1, 0.7, 1e9 / 3):
        for center in ("group", "leave_one_out"):
            section = method(advantage={"center": center})
            assert (advantages(section, column(*[value] * 7)).advantage == 0).all()


def test_leave_one_out() -> None:
    rewards = column(1.0, 0.0, 0.5, 3.0, 1.0)
    result = advantages(method(preset="rloo"), rewards, [0, 0, 0, 1, 1]).advantage
    assert result.tolist() == pytest.approx([1 - 0.25, 0 - 0.75, 0.5 - 0.5, 2.0, -2.0])


def test_reinforce_pp_whitens_the_batch() -> None:
    rewards = column(1.0, 0.0, 0.0, 1.0, 1.0, 0.5)
    section = method(preset="reinforce_pp", kl={"coefficient": 0.0, "where": "loss"})
    result = advantages(section, rewards, [0, 0, 0, 1, 1, 1]).advantage
    r = rewards[:, 0]
    assert torch.allclose(result, (r - r.mean()) / (r.std() + 1e-4), atol=1e-14)


def test_group_centre_with_batch_scale() -> None:
    section = method(advantage={"center": "group", "scale": "batch_std"})
    result = advantages(section, column(1.0, 0.0, 2.0, 4.0), [0, 0, 1, 1]).advantage
    centred = torch.tensor([0.5, -0.5, -1.0, 1.0], dtype=torch.float64)
    assert torch.allclose(result, centred / (centred.std() + 1e-4))


def test_kl_in_the_reward() -> None:
    logp, ref = (
        torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64),
        torch.tensor([-1.5, -1.0, -3.0], dtype=torch.float64),
    )
    kl = sequence_kl("k1", logp, ref, torch.tensor([0, 0, 1]), 2)
    assert kl.tolist() == pytest.approx([0.5 - 1.0, 0.0])
    section = method(preset="reinforce_pp", kl={"coefficient": 0.5})
    with_kl = advantages(section, column(1.0, 0.0), sequence_kl=kl).advantage
    shaped = torch.tensor([1.25, 0.0], dtype=torch.float64)
    assert torch.allclose(with_kl, (shaped - shaped.mean()) / (shaped.std() + 1e-4))
    with pytest.raises(ValueError, match="sequence_kl"):
        advantages(section, column(1.0, 0.0))


def test_unknown_rewards_enter_no_mean_and_get_zero() -> None:
    rewards = column(1.0, 0.0, NAN, 1.0)
    result = advantages(method(), rewards)
    known = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    expected = (known - known.mean()) / (known.std() + 1e-4)
    assert result.advantage[2] == 0
    assert torch.allclose(result.advantage[[0, 1, 3]], expected)
    assert result.metrics["advantage/unknown_share"].value() == 0.25
    lonely = advantages(method(), column(1.0, NAN, NAN))
    assert (lonely.advantage == 0).all() and lonely.zero_variance.all()
    assert (advantages(method(preset="rloo"), column(1.0, NAN)).advantage == 0).all()


def test_several_rewards() -> None:
    weights = [1.0, 0.5]
    raw = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, NAN], [1.0, 1.0]], dtype=torch.float64)
    weighted = raw * torch.tensor(weights, dtype=torch.float64)
    summed = advantages(method(), weighted).advantage
    total = torch.tensor([1.0, 0.5, 0.0, 1.5], dtype=torch.float64)
    assert torch.allclose(summed, (total - total.mean()) / (total.std() + 1e-4))

    section = method(advantage={"combine": "normalise_then_sum"})
    separate = advantages(section, weighted, weights=weights).advantage
    a, b = raw[:, 0], raw[[0, 1, 3], 1]
    expected = (a - a.mean()) / (a.std() + 1e-4)
    expected[[0, 1, 3]] += 0.5 * (b - b.mean()) / (b.std() + 1e-4)
    assert torch.allclose(separate, expected)


def test_soft_overlong_punishment() -> None:
    """arXiv 2503.14476 eq. 13 with L_max 20480 and L_cache 4096."""
    section = method(preset="dapo").overlong
    lengths = torch.tensor([1, 16384, 17408, 18432, 20480])
    assert overlong_penalty(section, lengths, 20480).tolist() == pytest.approx([0, 0, 0.25, 0.5, 1.0])
    result = advantages(
        method(preset="dapo"), column(1.0, 1.0), lengths=torch.tensor([10, 100]), max_completion_tokens=100
    )
    assert result.advantage[0] > 0 > result.advantage[1] and not result.zero_variance.any()
    with pytest.raises(ValueError, match="lengths"):
        advantages(method(preset="dapo"), column(1.0, 1.0))


def test_groups_to_refill() -> None:
    rewards, prompt = column(1.0, 1.0, 0.0, 1.0, NAN, 1.0, 0.0, 0.0), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    dapo, grpo = method(preset="dapo"), method()
    assert groups_to_refill(dapo, rewards, prompt, 4).tolist() == [True, False, True, True]
    assert not groups_to_refill(grpo, rewards, prompt, 4).any()


def test_refill_judges_rewards_as_they_are_normalised() -> None:
    """Equal sums of unequal rewards teach nothing when summed first, and something when each is normalised by itself."""
    rewards, prompt = (
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, NAN], [1.0, NAN]]).double(),
        torch.tensor([0, 0, 1, 1]),
    )
    for combine, flat in (("sum_then_normalise", [True, True]), ("normalise_then_sum", [False, True])):
        section = method(preset="dapo", advantage={"combine": combine}, overlong={"penalty": 0.0})
        assert groups_to_refill(section, rewards, prompt, 2).tolist() == flat
        result = compute_advantages(section, rewards, prompt, weights=(2.0, 1.0))
        assert result.zero_variance.tolist() == flat


def test_dead_groups() -> None:
    advantage, prompt = torch.tensor([0.0, 0.0, 0.5, -0.5]), torch.tensor([0, 0, 1, 1])
    assert dead_groups(method(), advantage, prompt).tolist() == [True, False]
    assert not dead_groups(method(kl={"coefficient": 0.1}), advantage, prompt).any()
    assert not dead_groups(method(entropy={"coefficient": 0.1}), advantage, prompt).any()
    in_reward = method(preset="reinforce_pp")
    assert dead_groups(in_reward, advantage, prompt).tolist() == [True, False]


def test_batch_of_nothing() -> None:
    result = advantages(method(), torch.zeros(0, 1))
    assert result.advantage.numel() == 0 and result.zero_variance.numel() == 0

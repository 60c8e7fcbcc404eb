"""Numbers that say what they are: coefficients that do not cancel, no NaN, metrics that are of what their name says."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from method_cases import CONTEXT, LIMIT, Case, method
from threads import together

from rlpost.experience import Completion, Demonstration, Group, Outcome, Prompt, Score
from rlpost.gradient.masks import token_uniform
from rlpost.gradient.metrics import merge, values
from rlpost.gradient.step import StepContext
from rlpost.learner.actor_critic import ActorCritic, weigh_tokens
from rlpost.learner.buffer import token_keys
from rlpost.methods import compute_advantages, compute_coefficients
from rlpost.methods.capo import make_tracker
from rlpost.methods.hpt import Route, gated_advantages
from rlpost.methods.ppo import Moments, whiten
from rlpost.recipe.sections.method import AdvantageSection
from rlpost.recipe.sections.presets import preset_names
from rlpost.recipe.sections.reward import RewardSection
from rlpost.source.weigh import logged_metrics, open_buffer, weigh
from rlpost.teaching.gate import gate

NAN = math.nan
SAMPLING = [name for name in preset_names() if method(preset=name).pairs is None and method(preset=name).samples]


def advantages(section, rewards, prompt, **more) -> torch.Tensor:
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return compute_advantages(section, rewards, torch.tensor(prompt), **more).advantage


# ---- coefficients stay outside


REWARDS, PROMPT = [[1.0, 0.5], [0.0, 0.0], [1.0, 0.0], [0.0, 0.5], [1.0, 0.5], [1.0, 0.0]], [0, 0, 0, 1, 1, 1]
LENGTHS = torch.tensor([10, 90, 100, 85, 20, 95])
KL = torch.tensor([0.3, 2.0, -0.5, 0.1, 1.0, 0.4])


def shaped(combine: str, *, beta: float = 0.0, penalty: float = 0.0) -> torch.Tensor:
    kl = {"coefficient": beta, "where": "reward"} if beta else {}
    section = method(advantage={"combine": combine, "eps": 0.0}, kl=kl, overlong={"penalty": penalty})
    more = {"weights": [1.0, 0.5], "lengths": LENGTHS, "max_completion_tokens": 100, "sequence_kl": KL}
    return advantages(section, REWARDS, PROMPT, **more)


def standardised(x) -> torch.Tensor:
    """Within the two groups of three, unbiased; 0 where all are equal."""
    rows = torch.as_tensor(x).double().view(2, 3)
    centred = rows - rows.mean(1, keepdim=True)
    return (centred / rows.std(1, keepdim=True).clamp(min=1e-30)).flatten()


def test_coefficients_of_what_is_added_to_rewards_do_not_cancel() -> None:
    plain = shaped("normalise_then_sum")
    into = torch.tensor([0, 0.5, 1.0, 0.25, 0, 0.75])
    for beta, penalty in itertools.product((0.0, 0.001, 1.0), repeat=2):
        expected = plain - beta * standardised(KL) - penalty * standardised(into)
        assert torch.allclose(shaped("normalise_then_sum", beta=beta, penalty=penalty), expected, atol=1e-12)


@pytest.mark.parametrize("term", ["beta", "penalty"])
@pytest.mark.parametrize("combine", ["sum_then_normalise", "normalise_then_sum", "gdpo"])
def test_a_larger_coefficient_has_a_larger_effect(combine: str, term: str) -> None:
    off, *rest = (shaped(combine, **{term: value}) for value in (0.0, 0.001, 0.01, 1.0))
    effects = [float((found - off).abs().max()) for found in rest]
    assert 0 < effects[0] < 0.1 * effects[2] and effects[0] < effects[1] < effects[2]


def test_without_a_scale_it_does_not_matter_when_rewards_are_added() -> None:
    slots = {"kl": {"coefficient": 0.3, "where": "reward"}, "overlong": {"penalty": 0.7}}
    more = {"weights": [1.0, 0.5], "lengths": LENGTHS, "max_completion_tokens": 100, "sequence_kl": KL}
    first, last = (
        advantages(method(advantage={"scale": "none", "combine": combine}, **slots), REWARDS, PROMPT, **more)
        for combine in ("sum_then_normalise", "normalise_then_sum")
    )
    assert torch.allclose(first, last, atol=1e-14)


def test_gdpo_as_its_paper_prints_it() -> None:
    """arXiv 2601.05242: each reward normalised in its group, the weighted sum normalised over the batch. Its released TRL
    trainer: unbiased standard deviations, 1e-4 added to each."""
    raw = torch.tensor(REWARDS).double() / torch.tensor([1.0, 0.5])

    def in_groups(x):
        rows = x.view(2, 3)
        return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-4)).flatten()

    total = in_groups(raw[:, 0]) + 0.5 * in_groups(raw[:, 1])
    expected = (total - total.mean()) / (total.std() + 1e-4)
    section = method(advantage={"combine": "gdpo"})
    assert torch.allclose(advantages(section, REWARDS, PROMPT, weights=[1.0, 0.5]), expected, atol=1e-12)


def test_gdpo_leaves_groups_without_signal_at_exactly_zero() -> None:
    rewards = [[0.1, 0.7]] * 7 + [[1.0, 0.3], [0.1, 0.2], [0.7, 0.9]]
    result = compute_advantages(
        method(advantage={"combine": "gdpo"}), torch.tensor(rewards).double(), torch.tensor([0] * 7 + [1] * 3)
    )
    assert (result.advantage[:7] == 0).all() and (result.advantage[7:] != 0).all()
    assert result.advantage.std().item() == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(ValueError, match=r"gdpo.*center"):
        method(preset="ppo", advantage={"combine": "gdpo"})


# ---- no NaN, whatever the input


BATCHES = {
    "equal": [0.1] * 6,
    "equal in a group": [1, 1, 1, 0, 1, 0],
    "zeros": [0.0] * 6,
    "one known": [NAN, NAN, 0.3, NAN, NAN, NAN],
    "none known": [NAN] * 6,
    "huge": [1e308, -1e308, 0, 1, 1e308, 1e308],
    "huge and equal": [1e308] * 6,
    "infinite": [math.inf, -math.inf, 0, 1, 0.5, math.inf],
    "tiny": [1e-308, 0, 0, 5e-324, 0, 0],
    "nearly equal": [0.1, 0.1 + 1e-17, 0.1 + 2e-17, 1 / 3, 1 / 3, 0.1 + 0.2],
}


REFUSED = {
    ("group_std", "batch"),
    ("batch_std", "leave_one_out"),
}  # (scale, center) that mean nothing, beside center `none`


@pytest.mark.parametrize("combine", ["sum_then_normalise", "normalise_then_sum", "gdpo"])
@pytest.mark.parametrize("scale", get_args(AdvantageSection.model_fields["scale"].annotation))
@pytest.mark.parametrize("center", get_args(AdvantageSection.model_fields["center"].annotation))
def test_advantages_are_finite_for_every_choice(center: str, scale: str, combine: str) -> None:
    made = 0
    for eps, unbiased, (name, rewards) in itertools.product((0.0, 1e-4), (True, False), BATCHES.items()):
        try:
            section = method(
                advantage={"center": center, "scale": scale, "combine": combine, "eps": eps, "unbiased": unbiased}
            )
        except ValueError:
            continue  # means nothing, and is refused
        for prompt in ([0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5]):
            found = advantages(section, [[r] for r in rewards], prompt)
            assert found.isfinite().all(), (eps, unbiased, name, found)
            assert (found[~torch.tensor(rewards, dtype=torch.float64).isfinite()] == 0).all()
            if center != "none" and name in ("equal", "zeros", "none known", "huge and equal"):
                assert (found == 0).all(), (name, found)
            if center in ("group", "leave_one_out") and name == "equal in a group" and prompt[1] == 0:
                assert (found[:3] == 0).all() and found[3:].abs().min() > 0
            made += 1
    assert made in (0, 4 * 2 * len(BATCHES))
    assert made or center == "none" or (scale, center) in REFUSED, (
        f"scale {scale} with center {center} is refused whatever else is said: if `_rules` of the method means that, add the "
        "pair to REFUSED here"
    )


def test_rewards_of_any_size_have_the_same_normalised_advantage() -> None:
    for size in (1e-3, 1.0, 1e150, 1e308):
        found = advantages(method(advantage={"eps": 0.0}), [[size], [0.0], [0.0]], [0, 0, 0])
        assert found.tolist() == pytest.approx([2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5], rel=1e-12)


def test_without_a_centre_equal_rewards_are_not_blown_up() -> None:
    section = method(advantage={"center": "none", "scale": "batch_std"})
    assert advantages(section, [[1.0]] * 4, [0, 0, 1, 1]).tolist() == [1.0] * 4


EDGES = {
    "as it is": {},
    "impossible tokens": {"logp": -math.inf, "old_logp": -math.inf, "sampler_logp": -math.inf, "ref_logp": -math.inf},
    "impossible now": {"logp": -math.inf},
    "impossible before": {"old_logp": -math.inf, "ref_logp": -math.inf, "sampler_logp": -math.inf},
    "certain": {"logp": 0.0, "old_logp": 0.0, "sampler_logp": 0.0, "ref_logp": 0.0, "entropy": 0.0},
    "sampler silent": {"sampler_logp": math.nan},
    "no advantage": {"advantage": 0.0},
    "far": {"logp": -1e4, "old_logp": -1.0},
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("preset", SAMPLING)
def test_no_coefficient_or_weight_is_nan(preset: str, edge: str) -> None:
    gates = (
        [None] if method(preset=preset).gate is None else [{}, {"type": "luffy", "shaping": 1e-300}, {"type": "srft"}]
    )
    for masked, taught, gating in itertools.product((False, True), (False, True), gates):
        more = {} if gating is None else {"gate": gating}
        if masked:
            more["overlong"] = {"filter": True}
        section, case = method(preset=preset, **more), Case(1)
        tracker = make_tracker(section, case.head.shape[0], case.head.shape[1])
        context = StepContext(learning_rate=0.02, optimizer_step=3, seed=11, curvature=tracker)
        view = case.view()
        view = replace(view, **{name: torch.full_like(getattr(view, name), x) for name, x in EDGES[edge].items()})
        if masked:
            view = replace(view, truncated=torch.ones_like(view.truncated))
        if taught:
            view = replace(view, demonstration=torch.ones_like(view.demonstration))
        found = compute_coefficients(section, view, case.counts(), context=context)
        for name in ("coefficient", "entropy_coefficient", "weight"):
            assert getattr(found, name).isfinite().all(), (name, masked, taught, gating)
        numbers = {key: x for key, x in values(found.metrics).items() if not key.startswith("gate/loss_")}
        assert not any(math.isnan(x) for x in numbers.values()), numbers  # (a loss of log 0 is infinite by its nature)


def test_whitening_of_nothing_one_and_equals() -> None:
    for numbers in ([], [NAN], [2.0], [2.0] * 5, [1e-300, 0.0]):
        x = torch.tensor(numbers, dtype=torch.float64)
        found = whiten(x, Moments.of(x))
        assert found[~x.isnan()].isfinite().all()


def test_the_entropy_gate_of_the_smallest_entropy() -> None:
    from rlpost.methods.safe import relative_gate

    assert relative_gate(0.0, 5e-324, 0.1, (0.5, 5.0)) == 5.0 and relative_gate(
        0.0, 1.0, 0.1, (0.5, 50.0)
    ) == pytest.approx(11)


# ---- metrics are of what they say


def scored(name: str, rewards: list[float], *, length: int = 3) -> Group:
    """A group; NaN: scoring failed. The tokens differ from sample to sample."""
    prompt = Prompt(name, (), name, (1, 2), {}, Demonstration("s"))
    made = tuple(Completion((5 + i,) * length, (-1.0,) * length, "", "stop") for i in range(len(rewards)))
    scores = tuple((Score(Outcome.CRASHED) if math.isnan(r) else Score(Outcome.SCORED, r),) for r in rewards)
    return Group(prompt, made, scores)


def rollout(groups: list[Group], section, world: int = 1):
    """The buffers of the groups shared out among `world` processes."""
    share = len(groups) // world

    def one(processes):
        own = groups[processes.rank * share : (processes.rank + 1) * share]
        gated = None
        if section.gate is not None:
            reads = [(7, 7, 7)]
            gated = gate(own, section.gate, accuracy_rewards=(True,), rollout=0, read=lambda ps: reads * len(ps))
        buffer = open_buffer(own, step=0, minibatches=1, gated=gated)
        if section.critic is not None or section.kl_place == "reward":
            buffer.old_logp = torch.full((buffer.tokens,), -1.0)
            buffer.ref_logp = torch.full((buffer.tokens,), -1.5)
        weigh(
            buffer,
            method=section,
            rewards=[RewardSection(function="x")],
            names=["x"],
            minibatches=1,
            max_completion_tokens=8,
            processes=processes,
        )
        if section.critic is not None:
            buffer.old_values = torch.linspace(0, 1, buffer.tokens)[:, None].expand(-1, section.critic.heads)
            raw = torch.tensor([g.reward(i, (1.0,)) for g in own for i in range(len(g.completions))]).double()
            weigh_tokens(buffer, ActorCritic.of(section), raw, 0.0, processes)
        return buffer

    return together(world, one)


GROUPS = [
    scored("a", [1, 0, 1, 0]),
    scored("b", [0, 0, 0, 0], length=5),
    scored("c", [1, 1, 1, 1]),
    scored("d", [1, NAN, 0, 0], length=2),
]


@pytest.mark.parametrize("preset", SAMPLING)
def test_metrics_of_a_rollout_are_the_same_on_two_processes(preset: str) -> None:
    section = method(preset=preset)
    (one,), (left, right) = rollout(GROUPS, section), rollout(GROUPS, section, 2)
    assert left.metrics == right.metrics and set(left.metrics) == set(one.metrics)
    for key in one.metrics:
        if not key.startswith("critic/") and (key != "advantage/mean_abs" or section.critic is None):
            assert left.metrics[key] == pytest.approx(one.metrics[key], rel=1e-12), key
    assert all(not math.isnan(value) for value in one.metrics.values())


@pytest.mark.parametrize("preset", SAMPLING)
def test_zero_variance_is_reported_where_it_means_that_nothing_is_learned(preset: str) -> None:
    section = method(preset=preset)
    (buffer,) = rollout(GROUPS, section)
    compared = section.critic is None and section.advantage.center in ("group", "leave_one_out")
    assert ("reward/zero_variance_share" in buffer.metrics) == compared
    if not compared:
        return
    if section.gate is not None:  # b goes to its solution; of the others c is flat
        assert buffer.metrics["reward/zero_variance_share"] == pytest.approx(1 / 3)
    else:
        assert buffer.metrics["reward/zero_variance_share"] == 0.5
    flat = [dead for dead, route in zip(buffer.dead, buffer.routes or (Route(),) * 4, strict=True) if route.samples]
    if not section.entropy.coefficient:
        assert buffer.metrics["reward/zero_variance_share"] == pytest.approx(sum(flat) / len(flat))


@pytest.mark.parametrize("preset", ["reinforce_pp", "rein_capo", "ppo", "safe"])
def test_one_completion_a_prompt_is_no_group_of_equal_rewards(preset: str) -> None:
    section = method(preset=preset)
    (buffer,) = rollout([scored(str(i), [i % 2]) for i in range(4)], section)
    assert "reward/zero_variance_share" not in buffer.metrics
    assert (buffer.token_advantage if section.critic else buffer.advantage).abs().sum() > 0


@pytest.mark.parametrize("preset", SAMPLING)
def test_mean_abs_is_of_the_advantages_that_are_learned_from(preset: str) -> None:
    section = method(preset=preset)
    (buffer,) = rollout(GROUPS, section)
    if section.critic is not None:
        expected = buffer.token_advantage[buffer.known].abs().mean()
    else:
        routes = buffer.routes or (Route(),) * len(GROUPS)
        known = [not math.isnan(g.reward(i, (1.0,))) for g in GROUPS for i in range(4)]
        used = [route.samples for route in routes for _ in range(4)]
        sampled = buffer.advantage[torch.tensor(buffer.sampled)]
        expected = sampled[torch.tensor(known) & torch.tensor(used)].abs().mean()
    assert buffer.metrics["advantage/mean_abs"] == pytest.approx(float(expected), rel=1e-6)
    assert buffer.metrics["advantage/unknown_share"] == 1 / 16
    assert buffer.metrics["reward/mean"] == pytest.approx(7 / 15)


def test_pairs_report_no_advantages_and_refuse_what_would_not_act() -> None:
    section = method(preset="dpo")
    (buffer,) = rollout(GROUPS, section)
    assert "advantage/mean_abs" not in buffer.metrics and buffer.metrics["reward/zero_variance_share"] == 0.5
    for overlong in ({"penalty": 1.0}, {"filter": True}):
        with pytest.raises(ValueError, match=r"pairs and overlong\."):
            method(preset="dpo", overlong=overlong)


def test_demonstrations_that_join_a_group_are_in_no_metric_of_samples() -> None:
    section = method(gate={"type": "luffy", "rl_weight": 2.0}, overlong={"penalty": 1.0})
    prompt, rewards = torch.tensor([0, 0, 1, 1]), torch.tensor([[1.0], [0.0], [1.0], [NAN]])
    found = gated_advantages(
        section,
        rewards,
        prompt,
        [Route(True, True, 2.0, 0.0)] * 2,
        weights=[1.0],
        right=torch.tensor([1.0, 0.0, 1.0, NAN]),
        lengths=torch.full((4,), 100),
        max_completion_tokens=100,
    )
    numbers = values(found.metrics)
    assert numbers["reward/shaping"] == -1.0, "every sample is at the limit"
    assert numbers["advantage/unknown_share"] == 0.25
    assert numbers["advantage/mean_abs"] == pytest.approx(float(found.samples[:3].abs().mean()))


def test_what_a_method_does_not_have_has_no_metric() -> None:
    case = Case(3)

    def keys(**slots):
        return compute_coefficients(method(**slots), case.view(), case.counts(), context=CONTEXT).metrics.keys()

    clip, ratio = (
        {"policy/clip_fraction", "policy/clip_low", "policy/clip_high"},
        {"policy/ratio_mean", "policy/ratio_max"},
    )
    assert clip | ratio <= keys() and clip | ratio <= keys(preset="cispo")
    assert not (clip | ratio) & keys(preset="rloo")
    assert ratio <= keys(clip={"type": "none"}) and not clip & keys(clip={"type": "none"})


def test_two_masks_of_a_type_have_metrics_of_their_own() -> None:
    masks = [{"type": "random", "rate": 0.3}, {"type": "random", "rate": 0.6}]
    found = compute_coefficients(method(masks=masks), Case(2).view(), Case(2).counts(), context=CONTEXT)
    first, second = (found.metrics[f"mask/random{more}/rejected_share"].value() for more in ("", "_2"))
    both = found.metrics["mask/rejected_share"].value()
    assert both == pytest.approx(float((~found.keep).double().mean()))
    assert max(first, second) < both < first + second, "they draw apart from each other"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_random_masks_draw_by_the_token_and_not_by_the_process(world: int) -> None:
    groups = [scored(str(i), [1, 0, 1], length=4) for i in range(4)]

    def draws(part: list[Group]) -> list[float]:
        return token_uniform(token_keys(part, ()), seed=3, step=5).tolist()

    share = len(groups) // world
    apart = [draws(groups[rank * share : (rank + 1) * share]) for rank in range(world)]
    assert sum(apart, []) == draws(groups)
    assert len(set(draws(groups))) == 4 * 3 * 4, "every token draws for itself"


def test_the_same_prompt_twice_in_a_rollout_draws_twice() -> None:
    first, second = scored("a", [1, 0]), scored("a", [0, 1])
    other = replace(second, completions=tuple(replace(c, token_ids=(9, *c.token_ids)) for c in second.completions))
    keys = token_keys([first, other], ()).tolist()
    assert len(set(keys)) == len(keys)


def test_what_rewards_log_is_a_mean_over_processes() -> None:
    logged = [{"tokens": 3.0}, {"tokens": 5.0, "rare": 1.0}]
    found = together(2, lambda processes: logged_metrics(logged[processes.rank], processes))
    assert found == [{"scores/tokens": 4.0, "scores/rare": 1.0}] * 2


def test_an_off_policy_demonstration_comes_on_top_of_its_group() -> None:
    """docs/methods/hpt.md: a demonstration weighs 1 / P by default, as much as the G samples that stay beside it; as one
    more completion with `reduction: as_samples`."""
    from rlpost.gradient.reduction import token_weights
    from rlpost.methods.imitation import demonstration_weights

    case = Case(0)
    view = replace(case.view(), demonstration=torch.tensor([False, False, True, False, False, False]))
    counts = replace(case.counts(), sequences=4, prompts=2, demonstrations=1, demonstration_tokens=2)
    taught = view.demonstration[view.sequence]
    for reduction, expected in (("sequence", 1 / 2), ("as_samples", 1 / 4)):
        section = method(gate={"type": "solve_rate", "below": "off_policy", "reduction": reduction})
        weight = token_weights(section.reduction, view, counts, torch.ones_like(taught))
        found = demonstration_weights(section.gate, view, counts, weight)
        assert float(found[taught].sum()) == pytest.approx(expected)
        group = (view.prompt == 0)[view.sequence] & ~taught
        assert float(weight[group].sum()) == pytest.approx(1 / 2), "its two samples, 1 / P"


@pytest.mark.parametrize("preset", ["grpo", "capo", "hpt", "ppo"])
def test_metrics_of_a_step_do_not_depend_on_micro_batches(preset: str) -> None:
    from method_cases import cut

    section, case = method(preset=preset), Case(5)
    tracker = make_tracker(section, case.head.shape[0], case.head.shape[1])
    context = StepContext(learning_rate=0.02, optimizer_step=3, seed=11, curvature=tracker)
    view, counts = case.view(), case.counts()
    whole = values(compute_coefficients(section, view, counts, context=context).metrics)
    parts = [cut(view, counts, keep)[:2] for keep in ([5], [0, 3], [4, 2, 1])]
    split = values(merge(compute_coefficients(section, small, c, context=context).metrics for small, c in parts))
    assert set(split) == set(whole) and LIMIT
    for key, number in whole.items():
        assert split[key] == pytest.approx(number, rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize(
    ("value", "outcome"), [(1e20, "scored"), (-1e20, "scored"), (1e21, "unparsable"), (-1e308, "unparsable")]
)
def test_a_number_too_large_to_learn_from_is_no_reward(value: float, outcome: str) -> None:
    from rlpost.scoring.outcome import _verdict

    assert _verdict(value)[0] == outcome
    if outcome == "unparsable":
        assert "larger than 1e+20" in _verdict(value)[2]

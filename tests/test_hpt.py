"""HPT: where prompts go, that the gradient is SFT's for some and the base method's for the others, and how both are weighed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_cases import CONTEXT, LENGTHS, LIMIT, Case, cut, method
from pydantic import ValidationError

from rlpost.experience import Completion, Demonstration, Group, Outcome, Prompt, Score
from rlpost.gradient.loss import coefficient_loss
from rlpost.gradient.metrics import values
from rlpost.gradient.types import Counts
from rlpost.learner.buffer import RolloutBuffer, micro_batches
from rlpost.methods import compute_advantages, compute_coefficients
from rlpost.methods.hpt import Route, gated_advantages, needs_samples, route
from rlpost.methods.imitation import off_policy_slope
from rlpost.policy.model import PolicyOutput
from rlpost.recipe.sections.guidance import LuffyGate, SftFirstGate, SoftGate, SolveRateGate, SrftGate
from rlpost.source.weigh import open_buffer, weigh
from rlpost.teaching.gate import gate

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
DEMONSTRATIONS = (2, 4)  # of Case's completions: one a prompt, taken for its worked solution
COUNTS = Counts(
    tokens=3 + 5 + 6 + 4,
    sequences=4,
    prompts=2,
    prompt_tokens=torch.tensor([8.0, 10.0], dtype=torch.float64),
    max_completion_tokens=LIMIT,
    demonstrations=2,
    demonstration_tokens=2 + 1,
)


def mixed_view(case: Case, coefficient: float = 1.0):
    """Case's batch, in which completions 2 and 4 are demonstrations."""
    flags = torch.zeros(len(LENGTHS), dtype=torch.bool)
    flags[list(DEMONSTRATIONS)] = True
    of_token = flags[case.sequence]
    advantage = torch.where(of_token, torch.full_like(case.old_logp, coefficient), case.advantage[case.sequence])
    unknown = torch.full_like(case.sampler_logp, torch.nan)
    return case.view(
        demonstration=flags, advantage=advantage, sampler_logp=torch.where(of_token, unknown, case.sampler_logp)
    )


def coefficients(case, section, view=None, counts=COUNTS):
    return compute_coefficients(section, view or mixed_view(case), counts, context=CONTEXT)


def gradient(case, section, view=None, counts=COUNTS):
    logp, entropy = case.score()
    return case.gradient(coefficient_loss(coefficients(case, section, view, counts), logp, entropy))


def surrogate(case: Case, section, i: int):
    """[n] clipped PPO terms of completion i, with truncated importance weights."""
    logp, _ = case.score()
    at = case.sequence == i
    r, a = torch.exp(logp[at] - case.old_logp[at]), case.advantage[i]
    w = torch.exp(case.old_logp - case.sampler_logp)[at].nan_to_num(nan=1.0).clamp(max=2.0)
    return w * (torch.minimum(r * a, r.clamp(0.8, 1.2) * a) if section.clip.type == "ppo" else r * a)


def nll(case: Case, i: int):
    return -case.score()[0][case.sequence == i]


def expected(case: Case, section, *, rl, sft):
    """-sum over samples of rl(i) * surrogate + sum over demonstrations of sft(i) * nll, with factors a token."""
    samples = [i for i in range(len(LENGTHS)) if i not in DEMONSTRATIONS]
    total = -sum((rl(i) * surrogate(case, section, i)).sum() for i in samples)
    return case.gradient(total + sum((sft(i) * nll(case, i)).sum() for i in DEMONSTRATIONS))


@pytest.mark.parametrize("seed", [0, 1])
def test_default_gives_every_prompt_the_same_weight(seed) -> None:
    case, section = Case(seed), method(preset="hpt")
    wanted = expected(case, section, rl=lambda i: 1 / (LENGTHS[i] * 4), sft=lambda i: 1 / (LENGTHS[i] * 2))
    torch.testing.assert_close(gradient(case, section), wanted, **TOLERANCE)


def test_the_papers_text() -> None:
    """Eq. 7-13: RL is summed over tokens and divided by n; SFT is a mean over the demonstration; both means over prompts."""
    case, section = Case(2), method(preset="hpt_paper")
    n, prompts = 2, 2
    wanted = expected(case, section, rl=lambda i: 1 / n / prompts, sft=lambda i: 1 / LENGTHS[i] / prompts)
    torch.testing.assert_close(gradient(case, section), wanted, **TOLERANCE)
    assert section.advantage.scale == "group_std" and section.clip.type == "ppo"


def test_the_released_code() -> None:
    """A constant denominator without clip, SFT pooled over tokens with weight 1, entropy on all rows."""
    case, section = Case(3, mismatch=0.0), method(preset="hpt_released", gate={"rl_weight": 1.0})
    logp, entropy = case.score()
    samples = [i for i in range(len(LENGTHS)) if i not in DEMONSTRATIONS]
    loss = -sum(
        (torch.exp(logp - case.old_logp) * case.advantage[i])[case.sequence == i].sum() / 8192 / 4 for i in samples
    )
    pooled = torch.cat([nll(case, i) for i in DEMONSTRATIONS]).mean()
    # The bonus has the denominators of the loss of its row: 8192 and 4 samples, or the 3 tokens of all demonstrations.
    taught = mixed_view(case).demonstration[case.sequence]
    bonus = entropy[~taught].sum() / 8192 / 4 + entropy[taught].sum() / 3
    wanted = case.gradient(loss + pooled - 0.001 * bonus)
    torch.testing.assert_close(gradient(case, section), wanted, **TOLERANCE)
    assert section.gate.rl_weight == 1.0 and method(preset="hpt_released").gate.rl_weight == 64.0
    assert (coefficients(case, section).entropy_coefficient == 0.001).all()
    quiet = method(preset="hpt", entropy={"coefficient": 0.001})
    demonstration = mixed_view(case).demonstration[case.sequence]
    assert (coefficients(case, quiet).entropy_coefficient[demonstration] == 0).all()


@pytest.mark.parametrize(
    ("slots", "factor"),
    [
        ({"balance": "prompts", "reduction": "token"}, lambda i: 2 / 2 / 3),
        ({"balance": "parts", "reduction": "sequence"}, lambda i: 1 / (LENGTHS[i] * 2)),
        ({"balance": "parts", "reduction": "token"}, lambda i: 1 / 3),
        ({"reduction": "as_samples"}, lambda i: 1 / (LENGTHS[i] * 4)),
    ],
)
def test_reductions_of_demonstrations(slots, factor) -> None:
    case, section = Case(4), method(preset="hpt", gate=slots)
    wanted = expected(case, section, rl=lambda i: 1 / (LENGTHS[i] * 4), sft=factor)
    torch.testing.assert_close(gradient(case, section), wanted, **TOLERANCE)


def test_two_shares_of_prompts_keep_the_relative_weight() -> None:
    """With D of P prompts at SFT, demonstrations weigh D / P in all: the mean over prompts of the paper's loss."""
    case = Case(5)
    for demonstrations, prompts in ((2, 2), (2, 8), (2, 100)):
        counts = replace(COUNTS, demonstrations=demonstrations, prompts=prompts)
        for reduction in ("sequence", "token"):
            found = coefficients(case, method(preset="hpt", gate={"reduction": reduction}), counts=counts)
            weight = found.weight[mixed_view(case).demonstration[case.sequence]].sum()
            assert weight.item() == pytest.approx(demonstrations / prompts)


@pytest.mark.parametrize("gates", ["hpt", "hpt_paper", "hpt_released", "luffy", "srft", "soft"])
def test_invariance_to_micro_batches_with_both_kinds_of_row(gates) -> None:
    slots = {"preset": gates} if gates.startswith("hpt") else {"gate": {"type": gates}}
    case, section = Case(6), method(**slots, masks=[{"type": "probability", "below": 0.1}])
    view = mixed_view(case)
    whole = coefficients(case, section, view)
    for split in ([[0, 1, 2, 3, 4, 5]], [[5], [0, 3], [4, 2, 1]], [[5, 4, 3, 2, 1, 0]], [[2], [4], [0, 1, 3, 5]]):
        for keep in split:
            small, counts, places = cut(view, COUNTS, keep)
            part = compute_coefficients(section, small, counts, context=CONTEXT)
            for name in ("coefficient", "weight", "entropy_coefficient"):
                torch.testing.assert_close(getattr(part, name), getattr(whole, name)[places], **TOLERANCE)
    parts = [cut(view, COUNTS, keep)[:2] for keep in ([0, 2], [1, 3, 4], [5])]
    metrics = [compute_coefficients(section, v, c, context=CONTEXT).metrics for v, c in parts]
    for name in ("gate/loss_samples", "gate/loss_demonstrations"):
        total = sum(m[name].value() for m in metrics)
        assert total == pytest.approx(whole.metrics[name].value(), rel=1e-12)


def test_masks_clip_correction_and_kl_act_on_samples_only() -> None:
    case = Case(7, drift=2.0)
    section = method(preset="hpt", masks=[{"type": "random", "rate": 1.0}], kl={"coefficient": 0.5})
    found = coefficients(case, section)
    demonstration = mixed_view(case).demonstration[case.sequence]
    assert (found.coefficient[demonstration] == 1).all()
    assert (found.coefficient[~demonstration] == 0).all() and not found.keep[~demonstration].any()


def test_all_sft_is_plain_sft_bit_for_bit() -> None:
    case, section = Case(8), method(preset="hpt", gate={"gamma": 1.0})
    view, counts, _ = cut(mixed_view(case), COUNTS, list(DEMONSTRATIONS))
    found = compute_coefficients(section, view, counts, context=CONTEXT)
    plain = torch.tensor([1 / (n * 2) for n in (2, 1) for _ in range(n)], dtype=torch.float64)
    assert torch.equal(found.coefficient, torch.ones_like(found.coefficient)) and torch.equal(found.weight, plain)


def test_no_sft_is_the_base_method_bit_for_bit() -> None:
    case = Case(9)
    base, gated = method(advantage={"scale": "none"}), method(preset="hpt", gate={"gamma": -1.0})
    view = case.view()
    one = compute_coefficients(base, view, case.counts(), context=CONTEXT)
    two = compute_coefficients(gated, view, case.counts(), context=CONTEXT)
    for name in ("coefficient", "weight", "entropy_coefficient", "keep"):
        assert torch.equal(getattr(one, name), getattr(two, name))


def test_vectors_of_the_method_page() -> None:
    """methods/hpt.md 2.1: three of eight right, none, all; and gate 2."""
    section = method(preset="hpt")

    def at(right: int, gamma: float = 0.0):
        return route(SolveRateGate(gamma=gamma), [1.0] * right + [0.0] * (8 - right), 0)

    rewards = torch.tensor([[1.0]] * 3 + [[0.0]] * 5)
    group = torch.zeros(8, dtype=torch.int64)
    found = gated_advantages(section, rewards, group, [at(3)], weights=[1.0], right=rewards[:, 0])
    assert found.samples.tolist() == [0.625] * 3 + [-0.375] * 5
    assert at(3) == Route(samples=True, demonstration=False)
    assert at(0) == Route(samples=False, demonstration=True, sft_weight=1.0)
    solved = gated_advantages(section, torch.ones(8, 1), group, [at(8)], weights=[1.0], right=torch.ones(8))
    assert at(8).samples and (solved.samples == 0).all()
    assert not at(2, 2 / 8).samples and at(3, 2 / 8).samples and not at(1, 1 / 8).samples


def test_unknown_answers_are_left_out_of_the_share() -> None:
    gated, half = SolveRateGate(), SolveRateGate(gamma=0.5)
    assert route(gated, [0.0, None, 0.0], 0).demonstration
    assert not route(gated, [None, None], 0).demonstration, "nothing is known: it is not unsolved"
    assert route(SolveRateGate(gamma=1.0), [None, None], 0).demonstration
    assert route(half, [1.0, 0.0, None, None], 0).demonstration and not route(half, [1.0, None, None], 0).demonstration
    assert not route(SolveRateGate(gamma=-1e-12), [0.0, 0.0], 0).demonstration


def test_other_gates() -> None:
    soft = [route(SoftGate(), [1.0] * k + [0.0] * (8 - k), 0) for k in (0, 1, 2, 3, 4, 8)]
    assert [r.rl_weight for r in soft] == [0, 0.125, 0.25, 0.5, 1, 1]
    assert [r.sft_weight for r in soft] == [1, 0.5, 0.25, 0.125, 0, 0]
    assert [(r.samples, r.demonstration) for r in soft][:5:4] == [(False, True), (True, False)]
    first = SftFirstGate(rollouts=2)
    assert [route(first, [], i).demonstration for i in range(4)] == [True, True, False, False]
    assert [needs_samples(first, i) for i in range(4)] == [False, False, True, True]
    assert needs_samples(None, 0) and needs_samples(SoftGate(), 0)
    assert not method(preset="sft").samples and method(preset="hpt").samples and method(gate=first.model_dump()).samples
    plain = method(preset="sft").gate
    assert route(plain, [], 10**6) == Route(False, True, 1.0, 1.0) and not needs_samples(plain, 10**6)
    for joint in (LuffyGate(), SrftGate()):
        assert route(joint, [0.0, 1.0], 0) == Route(True, True, 1.0, joint.sft_weight)
    assert route(SolveRateGate(below="both", sft_weight=0.1), [0.0] * 4, 0) == Route(True, True, 1.0, 0.1)


def test_luffys_shaping_against_autograd() -> None:
    logp = torch.tensor([-0.1, -1.0, -5.0], dtype=torch.float64, requires_grad=True)
    p = logp.exp()
    for shaping, f in ((0.1, p / (p + 0.1)), (None, p)):
        (slope,) = torch.autograd.grad(f.sum(), logp, retain_graph=True)
        torch.testing.assert_close(off_policy_slope(logp.detach(), shaping), slope, **TOLERANCE)


@pytest.mark.parametrize(
    ("slots", "sft"),
    [
        ({"type": "luffy"}, 0.0),
        ({"type": "solve_rate", "below": "both", "sft_weight": 0.1, "reduction": "as_samples"}, 0.1),
    ],
)
def test_luffys_gradient(slots, sft) -> None:
    case, section = Case(10), method(gate=slots)
    view = mixed_view(case, coefficient=1.7)
    logp, _ = case.score()
    total = 0.0
    for i, n in enumerate(LENGTHS):
        at = case.sequence == i
        if i in DEMONSTRATIONS:
            p = logp[at].exp()
            terms = p / (p + 0.1) * 1.7 + sft * logp[at]
        else:
            terms = surrogate(case, section, i)
        total = total - terms.sum() / (n * 4)
    torch.testing.assert_close(gradient(case, section, view), case.gradient(total), **TOLERANCE)


def test_srfts_gradient() -> None:
    section = method(
        gate={"type": "srft"}, ratio={"level": "none"}, clip={"type": "none"}, correction={"action": "none"}
    )
    case = Case(11)
    case.advantage = torch.tensor([1.0, -1.0, 0.6, -1.0, 0.9, 1.0], dtype=torch.float64)
    logp, entropy = case.score()
    total = 0.0
    for i, n in enumerate(LENGTHS):
        at = case.sequence == i
        h = entropy[at].detach().mean()
        if i in DEMONSTRATIONS:
            terms = logp[at].exp() * case.advantage[i] + 0.5 * torch.exp(-h) * logp[at]
        else:
            terms = (0.1 * torch.exp(h) if case.advantage[i] > 0 else -1.0) * logp[at]
        total = total - terms.sum() / (n * 4)
    view = replace(mixed_view(case), advantage=case.advantage[case.sequence])
    torch.testing.assert_close(gradient(case, section, view), case.gradient(total), **TOLERANCE)


def test_a_demonstration_that_joins_its_group_enters_its_statistics() -> None:
    section = method(gate={"type": "luffy"})
    rewards, prompt = torch.tensor([[0.0]] * 4 + [[1.0], [0.0]]), torch.tensor([0, 0, 0, 0, 1, 1])
    both = [Route(True, True), Route(True, False)]
    found = gated_advantages(section, rewards, prompt, both, weights=[1.0], right=rewards[:, 0])
    joint = compute_advantages(
        section, torch.tensor([[0.0]] * 4 + [[1.0]]), torch.zeros(5, dtype=torch.int64)
    ).advantage
    assert torch.equal(found.samples[:4], joint[:4]) and found.demonstrations[0] == joint[4]
    assert found.samples[4] > 0 > found.samples[5] and found.demonstrations[1] == 0
    signed = gated_advantages(method(gate={"type": "srft"}), rewards, prompt, both, weights=[1.0], right=rewards[:, 0])
    assert signed.samples.tolist() == [-1, -1, -1, -1, 1, -1] and signed.demonstrations[0] == joint[4]


class Alone:
    """One process."""

    rank, world = 0, 1

    def gather(self, value):
        return [value]


def group_of(name: str, right: int, n: int = 4, *, solution: str | None = "s", hint: bool = False) -> Group:
    bare = Prompt(name, (), name, (1, 2), {}, None if solution is None else Demonstration(solution))
    shown = replace(bare, token_ids=(1, 2, 9), hint="h", origin=bare) if hint else bare
    made = tuple(Completion((3,) * (2 + i), (-1.0,) * (2 + i), "", "stop") for i in range(n))
    return Group(shown, made, tuple((Score(Outcome.SCORED, float(i < right)),) for i in range(n)))


def fill(groups, section, *, read=None, minibatches=1) -> tuple[RolloutBuffer, dict[str, float]]:
    from rlpost.recipe.sections.reward import RewardSection

    def tokens(prompts):
        return [None if p.demonstration is None else (7, 7, 7) for p in prompts]

    gated = gate(groups, section.gate, accuracy_rewards=(True,), rollout=0, read=read or tokens)
    buffer = open_buffer(groups, step=0, minibatches=minibatches, gated=gated)
    weigh(
        buffer,
        method=section,
        rewards=[RewardSection(function="x")],
        names=["x"],
        minibatches=minibatches,
        max_completion_tokens=8,
        processes=Alone(),
    )
    return buffer, values(gated.metrics)


def test_the_buffer_of_a_mixed_rollout() -> None:
    groups = [
        group_of("solved", 4),
        group_of("some", 2),
        group_of("never", 0, hint=True),
        group_of("bare", 0, solution=None),
    ]
    buffer, metrics = fill(groups, method(preset="hpt"))
    assert buffer.dead == (True, False, True, True)
    assert buffer.sampled == [True] * 12 + [False] + [True] * 4
    assert buffer.advantage[12] == 1.0 and buffer.advantage[4:8].tolist() == [0.5, 0.5, -0.5, -0.5]
    rows = buffer.row_groups()
    assert [row.prompt_ids for row in rows] == [(1, 2), (1, 2)], "a solution is learned under the bare question"
    assert [c[2] for c in rows[1].completions] == [(7, 7, 7)] and rows[1].completions[0][0] == 12
    samples = 4 * sum(range(2, 6))
    assert rows[1].completions[0][1] == 3 * sum(range(2, 6)), "behind the samples of its group"
    counts = buffer.counts[0]
    assert (counts.tokens, counts.sequences, counts.prompts) == (samples, 16, 4)
    assert (counts.demonstrations, counts.demonstration_tokens) == (1, 3)
    assert metrics["gate/sft_share"] == 0.25 and metrics["gate/no_demonstration"] == 1
    assert metrics["gate/demonstration_tokens"] == 3 and metrics["gate/solve_rate"] == pytest.approx(1.5 / 4)
    arrays = buffer.arrays(torch.device("cpu"))
    assert arrays.demonstration.tolist() == [not s for s in buffer.sampled]
    assert arrays.sampler_logp.isnan().sum() == 3 and arrays.prompt.tolist() == [0] * 4 + [1] * 4 + [2] * 5 + [3] * 4


def advantages(groups, section) -> tuple[list[float], list[float | None]]:
    """What a buffer says of a rollout: the advantages of all samples, and of every group's demonstration (None: none)."""
    buffer, _ = fill(groups, section)
    sampled = torch.tensor(buffer.sampled)
    taught = iter(buffer.advantage[~sampled].tolist())
    rows = [None if buffer.demonstration(i) is None else next(taught) for i in range(len(groups))]
    return buffer.advantage[sampled].tolist(), rows


def test_alpha_and_beta_of_soft_switching_reach_the_buffer() -> None:
    """0, 1, 3 and 4 of 4 right; centred rewards (without std) times alpha, demonstrations with beta."""
    groups = [group_of(str(right), right) for right in (0, 1, 3, 4)]
    soft = {"type": "soft", "rl_weight": 2.0, "sft_weight": 3.0}
    samples, taught = advantages(groups, method(advantage={"scale": "none"}, gate=soft))
    assert samples[:4] == [0.0] * 4
    assert samples[4:8] == pytest.approx([2 * 0.125 * a for a in (0.75, -0.25, -0.25, -0.25)])
    assert samples[8:12] == pytest.approx([2 * 0.5 * a for a in (0.25, 0.25, 0.25, -0.75)])
    assert taught == [3.0, 1.5, 0.375, None]


def test_sft_weight_and_rl_weight_reach_the_buffer() -> None:
    groups = [group_of("never", 0), group_of("some", 2)]
    samples, taught = advantages(groups, method(preset="hpt", gate={"sft_weight": 0.3, "rl_weight": 5.0}))
    assert taught == [pytest.approx(0.3), None] and samples[4:] == [2.5, 2.5, -2.5, -2.5]
    samples, taught = advantages(groups, method(preset="hpt_released"))
    assert taught == [1.0, None] and samples[4:] == [32.0, 32.0, -32.0, -32.0], "64 x the centred reward"
    joined = {"type": "luffy", "rl_weight": 4.0}
    samples, taught = advantages([group_of("some", 2)], method(advantage={"scale": "none"}, gate=joined))
    assert samples == pytest.approx([4 * a for a in (0.4, 0.4, -0.6, -0.6)]) and taught == [pytest.approx(0.4)]


@pytest.mark.parametrize(
    ("right", "lengths", "sampled"), [(8, [8], [True] * 8), (3, [8], [True] * 8), (0, [1], [True] * 8 + [False])]
)
def test_vectors_of_the_method_page_through_a_buffer(right, lengths, sampled) -> None:
    """methods/hpt.md 2.1: 8 of 8 and 3 of 8 right give 8 RL rows, 0 of 8 gives 1 SFT row."""
    buffer, _ = fill([group_of("a", right, 8)], method(preset="hpt_released"))
    assert [len(row.completions) for row in buffer.row_groups()] == lengths and buffer.sampled == sampled
    samples = buffer.advantage[:8]
    if right == 3:
        assert (samples / 64).tolist() == [0.625] * 3 + [-0.375] * 5
        return
    assert (samples == 0).all()
    arrays, rows = buffer.arrays(torch.device("cpu")), buffer.row_groups()
    (batch,) = micro_batches(rows, layout="tree", micro_batch_tokens=512, pad_id=0)
    score = torch.linspace(-3.0, -1.0, batch.useful_tokens)
    view, _ = arrays.view(batch, PolicyOutput(score, -score))
    found = compute_coefficients(method(preset="hpt_released"), view, buffer.counts[0], context=CONTEXT)
    assert (found.entropy_coefficient == 0.001).all()
    if right == 8:
        assert (found.coefficient == 0).all(), "only the entropy bonus acts"
        quiet, _ = fill([group_of("a", right, 8)], method(preset="hpt"))
        assert quiet.dead == (True,) and quiet.row_groups() == [], "without one the group costs nothing"
    else:
        assert found.coefficient.tolist() == [1.0] * 3 and found.weight.tolist() == pytest.approx([1 / 3] * 3)


def test_a_demonstration_shares_the_tree_of_its_group() -> None:
    buffer, _ = fill([group_of("a", 1), group_of("b", 1, hint=True)], method(gate={"type": "luffy"}))
    rows = buffer.row_groups()
    assert [len(row.completions) for row in rows] == [5, 4, 1], (
        "with a hint, samples and solution have different prompts"
    )
    assert [row.prompt_ids for row in rows] == [(1, 2), (1, 2, 9), (1, 2)]


def test_minibatches_keep_their_demonstrations() -> None:
    buffer, _ = fill(
        [group_of("a", 1), group_of("b", 0), group_of("c", 0), group_of("d", 1)], method(preset="hpt"), minibatches=2
    )
    assert [c.demonstrations for c in buffer.counts] == [1, 1]
    assert [[len(r.completions) for r in buffer.row_groups(m)] for m in (0, 1)] == [[4, 1], [1, 4]]


def test_long_demonstrations_leave_their_prompt_to_rl() -> None:
    buffer, metrics = fill([group_of("a", 0), group_of("b", 1)], method(preset="hpt"), read=lambda ps: [None] * len(ps))
    assert metrics["gate/no_demonstration"] == 1 and metrics["gate/sft_share"] == 0
    assert buffer.dead == (True, False) and buffer.sampled == [True] * 8


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ({"gate": {"type": "solve_rate"}, "dynamic_sampling": {"enabled": True}}, "dynamic_sampling"),
        ({"gate": {"type": "solve_rate", "gamma": 1.5}}, "gamma"),
        ({"gate": {"type": "soft", "rl": []}}, "rl"),
        ({"gate": {"type": "sft_first"}}, "rollouts"),
        ({"gate": {"type": "sft_first", "rollouts": 5}, "guidance": {"type": "hint"}}, "cold_start"),
        ({"gate": {"type": "hard"}}, "solve_rate"),
        ({"preset": "sft", "guidance": {"type": "hint"}}, "guidance"),
        ({"preset": "ppo", "gate": {"type": "solve_rate"}}, "gate"),
    ],
)
def test_impossible_gates_are_refused(slots, said) -> None:
    with pytest.raises(ValidationError, match=said):
        method(**slots)

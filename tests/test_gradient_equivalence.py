"""The gradient of the one loss is autograd's gradient of each method's loss as its paper prints it, to 1e-12."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_cases import CONTEXT, LENGTHS, LIMIT, Case, cut, method

from rlpost.gradient.loss import coefficient_loss
from rlpost.gradient.step import StepContext
from rlpost.methods import compute_coefficients
from rlpost.methods.capo import make_tracker
from rlpost.recipe.sections.base import members
from rlpost.recipe.sections.masks import Mask
from rlpost.recipe.sections.presets import preset_names

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def ours(case: Case, section, view=None, context=CONTEXT, counts=None) -> torch.Tensor:
    logp, entropy = case.score()
    coefficients = compute_coefficients(section, view or case.view(), counts or case.counts(), context=context)
    return case.gradient(coefficient_loss(coefficients, logp, entropy))


def clipped(r, a, low=0.2, high=0.2):
    return torch.minimum(r * a, torch.clamp(r, 1 - low, 1 + high) * a)


def tis(case: Case, i: int) -> torch.Tensor:
    """Truncated importance weights of completion i; 1 where the sampler is silent."""
    at = case.sequence == i
    weight = torch.exp(case.old_logp - case.sampler_logp)[at].nan_to_num(nan=1.0)
    return weight.clamp(max=2.0)


def lengths_of(case: Case, i: int, keep: torch.Tensor | None, denominator: str) -> tuple[torch.Tensor, int]:
    """(which tokens of completion i are kept [n_i], the divisor of its token mean)."""
    kept = torch.ones(LENGTHS[i], dtype=torch.bool) if keep is None else keep[case.sequence == i]
    return kept, max(1, int(kept.sum())) if denominator == "accepted" else LENGTHS[i]


def per_completion(case: Case):
    logp, _ = case.score()
    for i in range(len(LENGTHS)):
        at = case.sequence == i
        yield i, logp[at], case.old_logp[at], case.advantage[i], tis(case, i)


def grpo(case, low=0.2, high=0.2, reduce="sequence", keep=None, denominator="all"):
    """`keep` [N] bool: tokens that pass the masks."""
    total = 0.0
    for i, logp, old, a, w in per_completion(case):
        kept, size = lengths_of(case, i, keep, denominator)
        terms = torch.where(kept, w * clipped(torch.exp(logp - old), a, low, high), 0.0)
        if reduce == "sequence":
            total = total + terms.sum() / size / len(LENGTHS)
        elif reduce == "token":
            total = total + terms.sum() / sum(LENGTHS)
        else:
            total = total + terms.sum() / LIMIT / len(LENGTHS)
    return -total


def gspo(case):
    total = 0.0
    for _, logp, old, a, w in per_completion(case):
        s = torch.exp((logp - old).mean())
        # The correction's weight differs by token, so the completion's term is spread evenly over them (GSPO-token).
        s_token = s.detach() * torch.exp(logp - logp.detach())
        total = total + (w * clipped(s_token, a, 3e-4, 4e-4)).mean() / len(LENGTHS)
    return -total


def cispo(case, low=0.0, high=5.0):
    total = 0.0
    for _, logp, old, a, w in per_completion(case):
        weight = torch.clamp(torch.exp(logp - old), low, high).detach()
        total = total + (w * weight * a * logp).sum() / sum(LENGTHS)
    return -total


def reinforce(case, reduce, keep=None, denominator="all"):
    total = 0.0
    for i, logp, _, a, w in per_completion(case):
        kept, size = lengths_of(case, i, keep, denominator)
        terms = torch.where(kept, w * a * logp, 0.0)
        total = total + (terms.sum() if reduce == "sum" else terms.sum() / size) / len(LENGTHS)
    return -total


def untruncated(case: Case) -> torch.Tensor:
    """[N] bool: what DAPO's overlong filtering keeps."""
    return ~case.view().truncated[case.sequence]


PUBLISHED = {
    "grpo": grpo,
    "dr_grpo": lambda c: grpo(c, reduce="constant"),
    "dapo": lambda c: grpo(c, high=0.28, reduce="token", keep=untruncated(c)),
    "gspo": gspo,
    "cispo": cispo,
    "rloo": lambda c: reinforce(c, "sum"),
    "reinforce_pp": lambda c: grpo(c, reduce="token"),
}


# Presets whose published losses are compared in files of their own: critics, gates, guidance and preference pairs.
ELSEWHERE = ("capo", "dr_capo", "rein_capo", "ppo", "safe", "ghpo", "hpt", "sft", "dpo", "rpo")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_its_published_loss(name: str) -> None:
    variant = any(name.startswith(f"{other}_") for other in (*PUBLISHED, *ELSEWHERE))
    assert name in PUBLISHED or name in ELSEWHERE or variant, f"write the loss of {name} as published into PUBLISHED"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_preset_equals_published_surrogate(preset: str, seed: int) -> None:
    case = Case(seed)
    torch.testing.assert_close(ours(case, method(preset=preset)), case.gradient(PUBLISHED[preset](case)), **TOLERANCE)


@pytest.mark.parametrize("preset", ["grpo", "gspo", "dapo"])
def test_cases_have_clipped_and_unclipped_tokens(preset: str) -> None:
    section, case = method(preset=preset), Case(0)
    metrics = compute_coefficients(section, case.view(), case.counts(), context=CONTEXT).metrics
    assert 0 < metrics["policy/clip_fraction"].value() < 1
    assert metrics["policy/clip_low"].value() > 0 and metrics["policy/clip_high"].value() > 0


CAPO_BASES = {
    "capo": lambda c, keep, denominator: grpo(c, keep=keep, denominator=denominator),
    "dr_capo": lambda c, keep, _: grpo(c, reduce="constant", keep=keep),
    "rein_capo": lambda c, keep, denominator: reinforce(c, "mean", keep, denominator),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("preset", "denominator"),
    [("capo", "all"), ("capo", "accepted"), ("dr_capo", "all"), ("rein_capo", "all"), ("rein_capo", "accepted")],
)
def test_capo_equals_its_base_over_the_accepted_tokens(preset: str, denominator: str, seed: int) -> None:
    """The mask is -tau_H < m_H < tau_H and m_F < tau_F of the tracker's own predictions, which test_capo.py checks."""
    case = Case(seed)
    section = method(
        preset=preset,
        masks=[{"type": "curvature", "thresholds": {"type": "fixed", "max_kl": 0.02, "max_objective": 0.1}}],
        reduction={"denominator": denominator} if denominator == "accepted" else {},
    )
    context = context_of(section, case)
    predicted = context.curvature.predict(case.view(), context)
    keep = (predicted.kl < 0.02) & (predicted.objective > -0.1) & (predicted.objective < 0.1)
    assert 0 < keep.sum() < keep.numel()
    published = CAPO_BASES[preset](case, keep, denominator)
    torch.testing.assert_close(ours(case, section, context=context), case.gradient(published), **TOLERANCE)


@pytest.mark.parametrize("low", [None, 0.3])
def test_cispo_with_limits_that_bind(low: float | None) -> None:
    case = Case(16, drift=2.5)
    ratio = torch.exp(case.score()[0].detach() - case.old_logp)
    assert (ratio > 5).any() and (ratio < 0.7).any()
    section = method(preset="cispo", clip={} if low is None else {"low": low})
    expected = cispo(case, 0.0 if low is None else 1 - low)
    torch.testing.assert_close(ours(case, section), case.gradient(expected), **TOLERANCE)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_truncation_of_the_sampler_correction_that_binds(preset: str) -> None:
    case = Case(17, mismatch=1.5)
    raw = torch.exp(case.old_logp - case.sampler_logp).nan_to_num(nan=1.0)
    assert (raw > 2).any() and (raw < 2).any()
    torch.testing.assert_close(ours(case, method(preset=preset)), case.gradient(PUBLISHED[preset](case)), **TOLERANCE)


REDUCED = {"dr_grpo": "constant", "dapo": "token", "cispo": "token", "rloo": "sum", "reinforce_pp": "token"}


@pytest.mark.parametrize("preset", [*PUBLISHED, *CAPO_BASES])
def test_kl_and_entropy_on_every_preset(preset: str) -> None:
    """Both are reduced as the preset reduces its terms, over the tokens that pass its masks."""
    case, beta, bonus = Case(18), 0.37, 0.02
    slots = {"kl": {"coefficient": beta, "estimator": "k3", "where": "loss"}, "entropy": {"coefficient": bonus}}
    if preset in CAPO_BASES:
        thresholds = {"type": "fixed", "max_kl": 0.02, "max_objective": 0.1}
        slots["masks"] = [{"type": "curvature", "thresholds": thresholds}]
    section = method(preset=preset, **slots)
    context = context_of(section, case)
    keep = compute_coefficients(section, case.view(), case.counts(), context=context).keep
    base = PUBLISHED[preset](case) if preset in PUBLISHED else CAPO_BASES[preset](case, keep, "all")
    logp, entropy = case.score()
    d = logp - case.ref_logp
    terms = torch.where(keep, beta * (torch.exp(-d) + d - 1) - bonus * entropy, 0.0)
    reduce = "constant" if preset == "dr_capo" else REDUCED.get(preset, "sequence")
    sizes = {"token": sum(LENGTHS), "constant": LIMIT * len(LENGTHS), "sum": len(LENGTHS)}
    divisor = torch.tensor([float(sizes.get(reduce, n * len(LENGTHS))) for n in LENGTHS]).double()[case.sequence]
    extra = (terms / divisor).sum()
    torch.testing.assert_close(ours(case, section, context=context), case.gradient(base + extra), **TOLERANCE)


def test_gspo_is_the_sequence_form_without_correction() -> None:
    """GSPO eq. 5 itself: the gradient runs through the geometric-mean ratio."""
    case, total = Case(1, drift=3e-4), 0.0
    for _, logp, old, a, _ in per_completion(case):
        total = total + clipped(torch.exp((logp - old).mean()), a, 3e-4, 4e-4) / len(LENGTHS)
    section = method(preset="gspo", correction={"action": "none"})
    torch.testing.assert_close(ours(case, section), case.gradient(-total), **TOLERANCE)


def test_dual_clip() -> None:
    case, total = Case(3, drift=2.0), 0.0
    for _, logp, old, a, w in per_completion(case):
        r = torch.exp(logp - old)
        inner = clipped(r, a)
        terms = torch.maximum(inner, 3.0 * a) if a < 0 else inner
        total = total + (w * terms).mean() / len(LENGTHS)
    section = method(clip={"dual": 3.0})
    torch.testing.assert_close(ours(case, section), case.gradient(-total), **TOLERANCE)
    assert not torch.allclose(ours(case, section), ours(case, method()))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("reduce", ["token", "sequence"])
def test_kl_in_the_loss(estimator: str, reduce: str) -> None:
    case, beta, total = Case(4), 0.37, 0.0
    for i, logp, _, _, _ in per_completion(case):
        d = logp - case.ref_logp[case.sequence == i]
        kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) + d - 1}[estimator]
        total = total + (kl.mean() / len(LENGTHS) if reduce == "sequence" else kl.sum() / sum(LENGTHS))
    section = method(kl={"coefficient": beta, "estimator": estimator}, reduction={"type": reduce})
    torch.testing.assert_close(
        ours(case, section), case.gradient(grpo(case, reduce=reduce) + beta * total), **TOLERANCE
    )


def test_entropy_bonus() -> None:
    case = Case(5)
    _, entropy = case.score()
    expected = grpo(case, reduce="token") - 0.02 * entropy.mean()
    section = method(reduction={"type": "token"}, entropy={"coefficient": 0.02})
    torch.testing.assert_close(ours(case, section), case.gradient(expected), **TOLERANCE)


def test_prompt_reduction() -> None:
    case, total = Case(6), 0.0
    sizes = [sum(LENGTHS[:3]), sum(LENGTHS[3:])]
    for i, logp, old, a, w in per_completion(case):
        total = total + (w * clipped(torch.exp(logp - old), a)).sum() / sizes[i // 3] / 2
    torch.testing.assert_close(ours(case, method(reduction={"type": "prompt"})), case.gradient(-total), **TOLERANCE)


def test_sequence_correction_and_masking_correction() -> None:
    case = Case(7, mismatch=0.5)
    for level, action in [("sequence", "truncate"), ("token", "mask"), ("sequence", "mask")]:
        total = 0.0
        for i, logp, old, a, _ in per_completion(case):
            gap = (case.old_logp - case.sampler_logp)[case.sequence == i].nan_to_num(nan=0.0)
            w = torch.exp(gap if level == "token" else gap.sum().expand_as(gap))
            w = w.clamp(max=1.5) if action == "truncate" else torch.where((w > 1.5) | (w < 0.5), 0.0, w)
            total = total + (w * clipped(torch.exp(logp - old), a)).mean() / len(LENGTHS)
        section = method(correction={"level": level, "action": action, "max": 1.5, "min": 0.5 * (action == "mask")})
        torch.testing.assert_close(ours(case, section), case.gradient(-total), **TOLERANCE)


@pytest.mark.parametrize("denominator", ["all", "accepted"])
def test_masks_are_constants(denominator: str) -> None:
    case, total = Case(8), 0.0
    keep = case.score()[0].detach().exp() >= 0.15
    assert 0 < keep.sum() < keep.numel()
    for i, logp, old, a, w in per_completion(case):
        accepted = keep[case.sequence == i]
        terms = (w * clipped(torch.exp(logp - old), a))[accepted].sum()
        size = accepted.sum().clamp(min=1) if denominator == "accepted" else accepted.numel()
        total = total + terms / size / len(LENGTHS)
    section = method(
        masks=[{"type": "probability", "below": 0.15}], reduction={"type": "sequence", "denominator": denominator}
    )
    torch.testing.assert_close(ours(case, section), case.gradient(-total), **TOLERANCE)


def test_overlong_filter_leaves_out_truncated_completions() -> None:
    case, total = Case(9), 0.0
    for i, logp, old, a, w in per_completion(case):
        if not case.view().truncated[i]:
            total = total + (w * clipped(torch.exp(logp - old), a)).mean() / len(LENGTHS)
    torch.testing.assert_close(ours(case, method(overlong={"filter": True})), case.gradient(-total), **TOLERANCE)


def test_off_policy_mask_rejects_whole_negative_completions() -> None:
    case = Case(10, drift=1.0)
    section = method(masks=[{"type": "off_policy", "max_gap": 0.2}])
    keep = compute_coefficients(section, case.view(), case.counts(), context=CONTEXT).keep
    behaviour = torch.where(case.sampler_logp.isnan(), case.old_logp, case.sampler_logp)
    gap = behaviour - case.score()[0].detach()
    for i in range(len(LENGTHS)):
        at = case.sequence == i
        assert (~keep[at]).all() == bool(gap[at].mean() > 0.2 and case.advantage[i] < 0)
    assert (~keep).any() and keep.any()


def test_stale_mask_rejects_tokens_whose_weights_are_too_old() -> None:
    case = Case(10)
    context = replace(CONTEXT, optimizer_step=4)
    keep = compute_coefficients(
        method(masks=[{"type": "stale", "max_age": 2}]), case.view(), case.counts(), context=context
    ).keep
    # Tokens of versions 0 and 1 are 4 and 3 steps old; of those without a version nothing is known.
    assert torch.equal(keep, ~((case.version == 0) | (case.version == 1)))
    assert not keep.all() and keep.any()


def test_demonstrations_are_plain_likelihood() -> None:
    case = Case(11)
    demonstration = torch.tensor([False, True, False, False, False, False])
    advantage = torch.where(case.sequence == 1, torch.ones_like(case.old_logp), case.advantage[case.sequence])
    view = case.view(demonstration=demonstration, advantage=advantage)
    total = 0.0
    for i, logp, old, a, w in per_completion(case):
        terms = logp if i == 1 else w * clipped(torch.exp(logp - old), a)
        d = logp - case.ref_logp[case.sequence == i]
        kl = 0.0 if i == 1 else 0.1 * (torch.exp(-d) + d - 1)
        total = total + (terms - kl).mean() / len(LENGTHS)
    masks = [{"type": "probability", "below": 1.0}]
    assert (ours(case, method(masks=masks), view) != 0).any()  # the demonstration passes every mask
    section = method(kl={"coefficient": 0.1})
    torch.testing.assert_close(ours(case, section, view), case.gradient(-total), **TOLERANCE)


# New presets and masks are tested here without being listed. Only a mask whose default settings reject no token of the random
# case, or every token, must be given other settings in this table.
MASKS = {
    "random": {"rate": 0.3},
    "probability": {"below": 0.1},
    "off_policy": {"max_gap": 0.05, "negative_only": False},
    "stale": {"max_age": 1},
}
MASK_TYPES = [mask.model_fields["type"].default for mask in members(Mask)]
ALL = [name for name in preset_names() if method(preset=name).pairs is None]
ALL += ["prompt", "controls", *(f"mask {kind}" for kind in MASK_TYPES if kind != "curvature")]


def section_of(name: str):
    fixed = {"type": "fixed", "max_kl": 0.02, "max_objective": 0.1}
    if name == "prompt":
        return method(reduction={"type": "prompt"}, kl={"coefficient": 0.1}, entropy={"coefficient": 0.01})
    if name == "controls":
        match = {"type": "curvature", "thresholds": fixed}
        return method(masks=[{"type": "random", "match": match}, {"type": "probability", "match": match}])
    if name.startswith("mask "):
        kind = name.removeprefix("mask ")
        return method(masks=[{"type": kind, **MASKS.get(kind, {})}])
    slots = {"masks": [{"type": "curvature", "thresholds": fixed}]} if "capo" in name else {}
    return method(preset=name, **slots)


def context_of(section, case: Case) -> StepContext:
    tracker = make_tracker(section, case.head.shape[0], case.head.shape[1])
    return StepContext(learning_rate=0.02, optimizer_step=3, seed=11, curvature=tracker)


@pytest.mark.parametrize("name", ALL)
def test_invariance_to_micro_batches_and_order(name: str) -> None:
    case, section = Case(12), section_of(name)
    context, view, counts = context_of(section, case), case.view(), case.counts()
    whole = compute_coefficients(section, view, counts, context=context)
    assert not section.masks or 0 < whole.keep.sum() < whole.keep.numel(), (
        f"{name} must reject some: give it settings in MASKS"
    )
    for split in ([[0, 1, 2, 3, 4, 5]], [[5], [0, 3], [4, 2, 1]], [[5, 4, 3, 2, 1, 0]]):
        for keep in split:
            small, small_counts, places = cut(view, counts, keep)
            part = compute_coefficients(section, small, small_counts, context=context)
            assert torch.equal(part.keep, whole.keep[places])
            torch.testing.assert_close(part.coefficient, whole.coefficient[places], **TOLERANCE)
            torch.testing.assert_close(part.weight, whole.weight[places], **TOLERANCE)
            torch.testing.assert_close(part.entropy_coefficient, whole.entropy_coefficient[places], **TOLERANCE)


@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo", "dr_grpo"])
@pytest.mark.parametrize("denominator", ["all", "accepted"])
def test_fully_masked_batch_is_zero_and_finite(preset: str, denominator: str) -> None:
    slots = {"reduction": {"type": "sequence", "denominator": denominator}} if preset in ("grpo", "gspo") else {}
    section = method(
        preset=preset,
        masks=[{"type": "random", "rate": 1.0}],
        kl={"coefficient": 1.0},
        entropy={"coefficient": 1.0},
        **slots,
    )
    case = Case(13)
    logp, entropy = case.score()
    coefficients = compute_coefficients(section, case.view(), case.counts(), context=CONTEXT)
    loss = coefficient_loss(coefficients, logp, entropy)
    assert loss.item() == 0
    assert (case.gradient(loss) == 0).all()


def test_everything_is_detached() -> None:
    case = Case(14)
    logp, entropy = case.score()
    view = case.view(logp=logp, entropy=entropy)
    result = compute_coefficients(method(kl={"coefficient": 0.1}), view, case.counts(), context=CONTEXT)
    assert not (
        result.coefficient.requires_grad or result.weight.requires_grad or result.entropy_coefficient.requires_grad
    )


def test_weights_sum_to_one() -> None:
    case = Case(15)
    for reduction in ("token", "sequence", "prompt"):
        weights = compute_coefficients(
            method(reduction={"type": reduction}), case.view(), case.counts(), context=CONTEXT
        ).weight
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)


def test_random_mask_rate_and_key() -> None:
    from rlpost.gradient.masks import token_uniform

    index = torch.arange(200_000)
    x = token_uniform(index, 7, 3)
    assert abs(float((x < 0.08).double().mean()) - 0.08) < 2e-3
    assert abs(float(x.mean()) - 0.5) < 3e-3
    for other in (token_uniform(index, 8, 3), token_uniform(index, 7, 4), token_uniform(index + 1, 7, 3)):
        correlation = torch.corrcoef(torch.stack([x, other]))[0, 1]
        assert abs(float(correlation)) < 0.01

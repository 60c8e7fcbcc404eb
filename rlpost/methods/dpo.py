"""DPO (arXiv 2305.18290) and its family, and RPO (arXiv 2405.16436): two numbers a pair, broadcast to its tokens.

With h = sum_chosen (log pi - log pi_ref) - sum_rejected (log pi - log pi_ref) and a loss f(h), the gradient of f is
f'(h) times the gradient of chosen's log-probs minus that of rejected's: the coefficient is -f'(h) on every chosen token and
f'(h) on every rejected one. RPO's SFT term adds a constant on the tokens of the baseline response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlpost.gradient.correction import sampler_correction
from rlpost.gradient.metrics import Metric, mean_of
from rlpost.gradient.segments import count_by, sum_by
from rlpost.gradient.types import Coefficients, Counts, TokenView
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.method import CorrectionSection
from rlpost.recipe.sections.preference import NoSft, PairsSection, SequenceMeanSft, SumSft, TokenMeanSft


def preference_loss(settings: PairsSection, difference: Tensor) -> Tensor:
    """[P] f(h) of the differences h [P] of log-ratios (nats; per token where `settings.normalised`).

    sigmoid: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e the label smoothing (DPO eq. 7; cDPO); hinge:
    max(0, 1 - beta h); ipo: (h - 1 / (2 beta))^2 (arXiv 2310.12036 eq. 17).
    """
    scaled = settings.beta * difference
    match settings.loss:
        case "hinge":
            return torch.relu(1 - scaled)
        case "ipo":
            return (difference - 1 / (2 * settings.beta)) ** 2
        case "sigmoid":
            e = settings.label_smoothing
            return -(1 - e) * logsigmoid(scaled) - e * logsigmoid(-scaled)
        case _:
            raise unknown_choice("pairs.loss", settings.loss)


def preference_slope(settings: PairsSection, difference: Tensor) -> Tensor:
    """[P] -f'(h): how strongly a pair pulls its responses apart."""
    scaled = settings.beta * difference
    match settings.loss:
        case "hinge":
            return settings.beta * (scaled < 1).to(difference.dtype)
        case "ipo":
            return -2 * (difference - 1 / (2 * settings.beta))
        case "sigmoid":
            e = settings.label_smoothing
            return settings.beta * ((1 - e) * torch.sigmoid(-scaled) - e * torch.sigmoid(scaled))
        case _:
            raise unknown_choice("pairs.loss", settings.loss)


def best_and_worst(
    rewards: Sequence[float], token_ids: Sequence[tuple[int, ...]], min_gap: float = 0.0
) -> tuple[int, int] | None:
    """Which completion of a group is chosen and which rejected: those of the highest and the lowest known reward.

    Of equal rewards the first counts. None where the gap is not above `min_gap`, where fewer than two rewards are known
    (not NaN), or where the two have the same tokens: then there is nothing to prefer.
    """
    known = [i for i, reward in enumerate(rewards) if not math.isnan(reward)]
    if len(known) < 2:
        return None
    best, worst = max(known, key=lambda i: rewards[i]), min(known, key=lambda i: rewards[i])
    if rewards[best] - rewards[worst] <= min_gap or token_ids[best] == token_ids[worst]:
        return None
    return best, worst


@dataclass(frozen=True, slots=True)
class PairIndex:
    """Which completions of a view (0 <= . < S) make its P pairs."""

    chosen: Tensor  # [P] int64
    rejected: Tensor  # [P] int64
    baseline: Tensor  # [P] int64: whose likelihood the SFT term holds up


def read_pairs(settings: PairsSection, view: TokenView) -> PairIndex:
    """The view's pairs. A preference is an advantage: above 0 on chosen, below 0 on rejected tokens; a response of the
    initial model is a demonstration.

    Raises ValueError when a pair is not whole: h needs all tokens of both sides at once, so a pair must never be split over
    micro-batches (`rlpost.learner.pair_rows` keeps it together).
    """
    side = sum_by(view.advantage, view.sequence, view.prompt.numel())
    groups = int(view.prompt.max()) + 1 if view.prompt.numel() else 0
    chosen = _one_each(view.prompt, (side > 0) & ~view.demonstration, groups, "chosen")
    rejected = _one_each(view.prompt, (side < 0) & ~view.demonstration, groups, "rejected")
    if isinstance(settings.sft, NoSft):
        return PairIndex(chosen, rejected, chosen)
    match settings.baseline:
        case "chosen":
            return PairIndex(chosen, rejected, chosen)
        case "initial":
            return PairIndex(chosen, rejected, _one_each(view.prompt, view.demonstration, groups, "baseline"))
        case _:
            raise unknown_choice("pairs.baseline", settings.baseline)


def _one_each(prompt: Tensor, where: Tensor, groups: int, what: str) -> Tensor:
    responses = where.nonzero().squeeze(1)
    if responses.numel() != groups or not torch.equal(
        prompt[responses].sort().values, torch.arange(groups, device=prompt.device)
    ):
        raise ValueError(
            f"a view of {groups} pairs holds {responses.numel()} {what} responses: a pair was split over micro-batches, or has "
            "more than two sides"
        )
    return responses[prompt[responses].argsort()]


def pair_coefficients(
    settings: PairsSection, view: TokenView, counts: Counts, correction: CorrectionSection | None = None
) -> Coefficients:
    """Coefficients of a view of whole pairs; the loss of an optimizer step is the mean over its `counts.prompts` pairs.

    `counts.demonstration_tokens` is the number of baseline tokens in the whole step (`sft: token_mean`). The SFT term adds
    to a baseline token: eta * beta (sum, RPO eq. 4.6), weight / length (sequence_mean), or weight * pairs / tokens
    (token_mean). With a coefficient of 0 the result is DPO's, bit for bit. Raises ValueError without `view.ref_logp`, or
    for a split pair. `correction` only names the gap to the sampler that pairs made on the spot report.
    """
    if view.ref_logp is None:
        raise ValueError("pairs need TokenView.ref_logp, the log-probs under the reference policy")
    with torch.no_grad():
        pairs, size = read_pairs(settings, view), view.prompt.numel()
        length = count_by(view.sequence, size).clamp(min=1).double()
        logp, ref = (sum_by(values.double(), view.sequence, size) for values in (view.logp, view.ref_logp))
        scale = 1 / length if settings.normalised else torch.ones_like(length)
        ratio = (logp - ref) * scale
        difference = ratio[pairs.chosen] - ratio[pairs.rejected]
        slope = preference_slope(settings, difference)
        own = torch.zeros_like(length)
        own[pairs.chosen] = slope * scale[pairs.chosen]
        own[pairs.rejected] = -slope * scale[pairs.rejected]
        pull = _sft_pull(settings, length[pairs.baseline], counts)
        if pull is not None:
            own[pairs.baseline] += pull
        sft = torch.zeros_like(slope) if pull is None else -pull * logp[pairs.baseline]
        metrics = pair_metrics(settings, pairs, logp, ref, length, difference, sft)
        metrics["policy/entropy"] = mean_of(view.entropy, ~view.demonstration[view.sequence])
        if correction is not None and not bool(view.sampler_logp.isnan().all()):
            metrics |= sampler_correction(correction, view)[1]
        return Coefficients(
            coefficient=own[view.sequence].to(view.logp.dtype),
            entropy_coefficient=torch.zeros_like(view.logp),
            weight=torch.full_like(view.logp, 1.0 / max(counts.prompts, 1)),
            keep=torch.ones_like(view.sequence, dtype=torch.bool),
            metrics=metrics,
        )


def _sft_pull(settings: PairsSection, length: Tensor, counts: Counts) -> Tensor | None:
    """[P] what the SFT term adds to the coefficient of each token of the baseline responses; None for nothing."""
    sft = settings.sft
    match sft:
        case NoSft():
            return None
        case SumSft():
            return torch.full_like(length, sft.eta * settings.beta) if sft.eta else None
        case SequenceMeanSft():
            return sft.weight / length if sft.weight else None
        case TokenMeanSft():
            if not sft.weight:
                return None
            if counts.demonstration_tokens <= 0:
                raise ValueError("sft `token_mean` needs Counts.demonstration_tokens: the step's baseline tokens")
            return torch.full_like(length, sft.weight * counts.prompts / counts.demonstration_tokens)
        case _:
            raise unknown_choice("pairs.sft", sft)


def pair_metrics(
    settings: PairsSection,
    pairs: PairIndex,
    logp: Tensor,
    ref: Tensor,
    length: Tensor,
    difference: Tensor,
    sft: Tensor,
) -> dict[str, Metric]:
    """Means over pairs. `logp`, `ref` and `length` are [S], `difference` and `sft` [P]; rewards are beta * log(pi / pi_ref).

    `pairs/chosen_log_ratio_per_token` is the over-optimisation curve with the differences between batches taken out: below 0
    the policy finds the chosen responses less likely than the reference does.
    """
    w, l = pairs.chosen, pairs.rejected  # noqa: E741 - the papers' names
    loss, log_ratio = preference_loss(settings, difference), logp - ref
    won = (difference > 0).double() + 0.5 * (difference == 0).double()  # ties, as before the first step, count half
    return {
        "pairs/loss": mean_of(loss + sft),
        "pairs/preference_loss": mean_of(loss),
        "pairs/sft_loss": mean_of(sft),
        "pairs/accuracy": mean_of(won),
        "pairs/margin": mean_of(settings.beta * difference),
        "pairs/chosen_reward": mean_of(settings.beta * log_ratio[w]),
        "pairs/rejected_reward": mean_of(settings.beta * log_ratio[l]),
        "pairs/chosen_logp": mean_of(logp[w]),
        "pairs/rejected_logp": mean_of(logp[l]),
        "pairs/chosen_logp_per_token": mean_of(logp[w] / length[w]),
        "pairs/rejected_logp_per_token": mean_of(logp[l] / length[l]),
        "pairs/chosen_log_ratio_per_token": mean_of(log_ratio[w] / length[w]),
        "pairs/rejected_log_ratio_per_token": mean_of(log_ratio[l] / length[l]),
        "pairs/chosen_length": mean_of(length[w]),
        "pairs/rejected_length": mean_of(length[l]),
    }

"""The run's doctor: reads recent metrics and says, in one line each, what is wrong and what to do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import fmean, median

from rlpost.recipe.sections.method import MethodSection
from rlpost.tracking.metrics import MetricRow, number

WINDOW = 5
"""Advice on a tendency looks at the mean of this many last optimizer steps, and is silent before there are as many."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One line of advice. `id` is stable, so that it is given once per run; and once more whenever `level` rises."""

    id: str
    text: str
    level: int = 0


@dataclass(frozen=True, slots=True)
class Setup:
    """What advice must know of a run besides its metrics, so that it names what the run has and can do."""

    reward_ceiling: float = 1.0
    """The highest total reward there is: the sum of the positive weights for rewards within [0, 1], infinite where there is
    no highest."""
    method: MethodSection = field(default_factory=MethodSection)

    @property
    def pairs(self) -> bool:
        """Whether what is learned from are pairs: then masks, clip, entropy bonus and KL penalty are none of the method's."""
        return self.method.pairs is not None

    @property
    def guided(self) -> bool:
        return self.method.guidance is not None


def advise(
    rows: Sequence[MetricRow], *, reward_ceiling: float = 1.0, method: MethodSection | None = None
) -> list[Advice]:
    """What the metrics of the training rows so far (oldest first; the first row of the run first) call for.

    `reward_ceiling` as in `Setup`; `method` is the run's, GRPO where it is not given. Pure: the caller remembers what it has
    already said.
    """
    rows = [row for row in rows if row.get("kind", "train") == "train"]
    return _advise(rows, _setup(reward_ceiling, method)) if rows else []


def _setup(reward_ceiling: float, method: MethodSection | None) -> Setup:
    return Setup(reward_ceiling) if method is None else Setup(reward_ceiling, method)


def _advise(rows: Sequence[MetricRow], about: Setup) -> list[Advice]:
    given = [advice for rule in _RULES for advice in rule(rows, about)]
    ceiling = _reward_ceiling(rows, about)
    # At the ceiling all rewards of a group are equal: one cause, one line.
    return ceiling + [one for one in given if not (ceiling and one.id == "zero-variance")]


def _recent(rows: Sequence[MetricRow], key: str) -> float | None:
    """The mean of the last WINDOW rows; None before there are as many, or when one has no such number."""
    if (
        len(rows) < WINDOW or number(rows[-1], key) is None
    ):  # of a resumed run every row is looked at anew: this is quick
        return None
    values = [value for row in rows[-WINDOW:] if (value := number(row, key)) is not None]
    return fmean(values) if len(values) == WINDOW else None


def _truncated(rows: Sequence[MetricRow], about: Setup) -> Iterator[Advice]:
    share = _recent(rows, "completions/truncated_share")
    if share is not None and share > 0.9:
        yield Advice(
            "all-truncated",
            f"{share:.0%} of completions are cut at the token limit: raise rollout.max_completion_tokens, ask for "
            "short answers in the prompt, or check that the chat template and rollout.stop let the model end.",
        )


def _zero_variance(rows: Sequence[MetricRow], about: Setup) -> Iterator[Advice]:
    # The metric is there where a group is its completions' baseline, over groups that are learned from by their samples.
    share = _recent(rows, "reward/zero_variance_share")
    if number(rows[-1], "critic/value_mean") is not None:
        return  # a run from before this metric was left out with a critic
    if share is not None and share > 0.8:
        mean = _recent(rows, "reward/mean")
        level = "" if mean is None else f" (mean reward {mean:.2f})"
        hints = "" if about.guided or about.pairs else ", or use method.guidance (GHPO)"
        yield Advice(
            "zero-variance",
            f"{share:.0%} of groups have equal rewards{level} and teach nothing: raise rollout.completions_per_prompt, "
            f"choose prompts of another difficulty, or give partial credit{hints}.",
        )


def _entropy(rows: Sequence[MetricRow], about: Setup) -> Iterator[Advice]:
    recent, start = _recent(rows, "policy/entropy"), number(rows[0], "policy/entropy")
    if recent is not None and start is not None and recent < 0.2 * start and recent < 0.3:
        clipped = about.method.clip.type == "ppo"
        cures = "raise method.clip.high (clip-higher), " if clipped else ""
        cures += "lower learner.learning_rate, or add method.entropy"
        cures += "" if about.method.curvature is not None else " or CAPO's mask"
        if about.pairs:
            cures = "lower learner.learning_rate, raise method.pairs.beta, or stop earlier"
        yield Advice(
            "entropy-collapse",
            f"Entropy fell from {start:.2f} to {recent:.3f} nats, so the policy's samples hardly differ any more: {cures}.",
        )


def _clip(rows: Sequence[MetricRow], about: Setup) -> Iterator[Advice]:
    share = None if about.pairs else _recent(rows, "policy/clip_fraction")
    # GSPO's limits, a thousandth of others', are meant to act on far more completions (arXiv 2507.18071, fig. 2).
    if share is not None and share > (0.3 if about.method.ratio.level == "token" else 0.6):
        limited = "are clipped, so most of each update is thrown away"
        if about.method.clip.type == "cispo":
            limited = "have their weight cut, so the policy is far from the one that sampled"
        yield Advice(
            "clip-saturated",
            f"{share:.0%} of tokens {limited}: lower learner.learning_rate, learner.epochs or learner.minibatches, or widen "
            "method.clip.",
        )


def _failed_scores(rows: Sequence[MetricRow], about: Setup) -> Iterator[Advice]:
    share = number(rows[-1], "scores/failed_share")
    if share is not None and share > 0.05:
        kinds = {
            key.split("/", 1)[1]: value
            for key in rows[-1]
            if key.startswith("scores/") and key.endswith(("/timed_out", "/crashed", "/unparsable"))
            if (value := number(rows[-1], key))
        }
        counts = ", ".join(f"{name}: {value:.0f}" for name, value in sorted(kinds.items()))
        yield Advice(
            "scores-failed",
            f"{share:.0%} of scores failed{f' ({counts})' if counts else ''} and are left out of the baseline: the "
            "reasons stand under `scores` in completions/; raise the reward's deadline_s if they timed out.",
            level=sum(share > limit for limit in (0.2, 0.5)),
        )


def _missing_reward(rows: Sequence[MetricRow], about: Setup) -> Iterator[Advice]:
    if "reward/mean" in rows[-1] and number(rows[-1], "reward/mean") is None:
        yield Advice(
            "reward-nan",
            "The mean reward is not a number: no completion of this step has a known reward. See `scores` in "
            "completions/ for why; a reward function must return a finite number, or None for not applicable.",
        )


def _mismatch(rows: Sequence[MetricRow], about: Setup) -> Iterator[Advice]:
    gap = _recent(rows, "mismatch/mean_abs_gap")
    if gap is not None and gap > 0.1:
        masked = about.pairs or any(mask.type == "off_policy" for mask in about.method.masks)
        cure = "Sample" if masked else "Add a mask {type: off_policy}, or sample"
        yield Advice(
            "sampler-gap",
            f"Sampler and learner log-probs differ by {gap:.2f} nats a token: the data is off-policy. {cure} in higher "
            "precision (rollout.engine.dtype).",
        )


def _chosen_falls(rows: Sequence[MetricRow], about: Setup) -> Iterator[Advice]:
    """Preference training's over-optimisation: pairs are told apart better while both responses become less likely. The
    log-ratio to the reference starts at 0 and, unlike the log-prob, does not depend on which pairs a batch holds. The
    accuracy starts at 0.5 by definition: before the first update policy and reference are one, and every pair is a tie. (The
    first batch's own figure is not used: in bfloat16 it is rounding that breaks the ties.)"""
    fall, accuracy = _recent(rows, "pairs/chosen_log_ratio_per_token"), _recent(rows, "pairs/accuracy")
    if fall is not None and accuracy is not None and fall < -0.01 and accuracy > 0.55:
        yield Advice(
            "chosen-falls",
            f"Accuracy rose from 0.50 to {accuracy:.2f} while chosen responses became less likely ({fall:.3f} nats a "
            "token against the reference), the sign of over-optimisation: use RPO's SFT term or raise its coefficient "
            "(method.pairs.sft.eta, or .weight), raise method.pairs.beta, or stop earlier.",
        )


def _curvature(rows: Sequence[MetricRow], about: Setup) -> Iterator[Advice]:
    """A calibrated curvature mask that is off without anyone having said so."""
    left, limits = number(rows[-1], "mask/curvature/steps_to_observe"), number(rows[-1], "mask/curvature/limits")
    if left == 0 and limits == 0:
        yield Advice(
            "curvature-no-limit",
            "The curvature mask was calibrated and found no limit, so it rejects nothing: all predicted changes were about 0. "
            "Give method.masks' thresholds as numbers (type: fixed), or leave the mask out.",
        )
    before = number(rows[-2 * WINDOW], "mask/curvature/steps_to_observe") if len(rows) >= 2 * WINDOW else None
    if left and left == before:
        yield Advice(
            "curvature-unseen",
            f"The curvature mask still waits for {left:.0f} steps with something to observe and rejects nothing so far: for "
            f"{2 * WINDOW} steps no token had a non-zero advantage (or the learning rate was 0). Choose prompts of another "
            "difficulty, or give method.masks' thresholds as numbers (type: fixed).",
        )


def _gradient(rows: Sequence[MetricRow], about: Setup) -> Iterator[Advice]:
    key = "optimizer/grad_norm"
    if key in rows[-1] and number(rows[-1], key) is None:
        yield Advice(
            "grad-nonfinite",
            "The gradient is not finite and the step was skipped: lower learner.learning_rate, or keep model.dtype and "
            "model.autocast in float32/bfloat16 (not float16).",
        )
        return
    last = number(rows[-1], key)
    # A step without signal has norm 0; only steps that had some say what is usual. (NaN is not between these, nor is inf.)
    before = [v for row in rows[:-1] if isinstance(v := row.get(key), int | float) and 0 < v < inf]
    if last is None or len(before) < WINDOW:
        return
    # With a gate, steps of RL and of SFT take turns, and the one's norm is no measure of the other's.
    usual, what = (median(before), "the usual") if about.method.gate is None else (max(before), "the largest so far,")
    if last > 10 * usual:
        held = about.pairs or about.method.kl_place is not None or not about.method.samples
        more = "raise method.pairs.beta" if about.pairs else "add method.kl to hold the policy near its start"
        cures = "lower learner.learning_rate" + (
            " or set learner.max_grad_norm" if held and not about.pairs else f", set learner.max_grad_norm, or {more}"
        )
        yield Advice(
            "grad-exploding",
            f"The gradient norm is {last:.3g}, over ten times {what} {usual:.3g}: {cures}.",
        )


def _reward_ceiling(rows: Sequence[MetricRow], about: Setup) -> list[Advice]:
    ceiling, mean = about.reward_ceiling, _recent(rows, "reward/mean")
    if mean is None or ceiling <= 0:
        return []
    same = _recent(rows, "reward/zero_variance_share")
    # Methods that compare no group tell by the mean alone.
    if (mean < 0.95 * ceiling or same < 0.5) if same is not None else mean < 0.99 * ceiling:
        return []
    hinted = _recent(rows, "guidance/hinted_share") or 0.0
    highest = max((value for row in rows if (value := number(row, "reward/max")) is not None), default=ceiling)
    if hinted > 0.05 or highest > ceiling * (1 + 1e-9):  # solved with hints; or rewards are not within [0, 1]
        return []
    solved = "" if same is None else f" and {same:.0%} of groups are solved throughout"
    return [
        Advice(
            "reward-ceiling",
            f"The mean reward is {mean:.2f} of {ceiling:g}{solved}: little is left to learn here. Stop, or take harder "
            "prompts.",
        )
    ]


def _waiting(rows: Sequence[MetricRow], about: Setup) -> Iterator[Advice]:
    """With sampling beside the learner (`rollout.staleness`): which side waits, and by how much its other should grow."""
    step, wait = _recent(rows, "time/step"), _recent(rows, "time/wait")
    if step is None or wait is None or step <= 0:
        return
    busy = sum(_recent(rows, f"time/beside_{phase}") or 0.0 for phase in ("rollout", "score", "guide"))
    learning = max(step - wait, 1e-9)
    if wait > 0.25 * step:
        more = ""
        if busy > learning:
            more = f" Where speed grows with their number, both are busy with {busy / learning:.1f} times those it has now."
        yield Advice(
            "learner-waits",
            f"The learner waited {wait / step:.0%} of the last {WINDOW} steps for samples: give sampling more cores or cards "
            f"(rollout.engine.cores, devices, or one more server).{more}",
        )
    elif 0 < busy < 0.5 * step:
        yield Advice(
            "sampling-waits",
            f"Sampling was busy for {busy / step:.0%} of the last {WINDOW} steps and waited for the learner otherwise: give "
            "the learner some of its cores or cards, or rollout.staleness=0 and all of them.",
        )


_RULES: tuple[Callable[[Sequence[MetricRow], Setup], Iterator[Advice]], ...] = (
    _missing_reward,
    _failed_scores,
    _truncated,
    _zero_variance,
    _entropy,
    _clip,
    _mismatch,
    _chosen_falls,
    _curvature,
    _gradient,
    _waiting,
)


class Doctor:
    """Remembers recent rows and what has been said, so that every advice comes once, and again when it is much worse."""

    def __init__(self, *, reward_ceiling: float = 1.0, method: MethodSection | None = None) -> None:
        self._about = _setup(reward_ceiling, method)
        self._first: MetricRow | None = None
        self._recent: deque[MetricRow] = deque(maxlen=10 * WINDOW)
        self._said: dict[str, int] = {}  # the highest level by id

    def observe(self, row: MetricRow) -> list[Advice]:
        """Takes the next row and returns the advice that is new."""
        if row.get("kind", "train") != "train":
            return []
        self._first = self._first or row
        self._recent.append(row)
        rows = list(self._recent)
        if rows[0] is not self._first:
            rows.insert(0, self._first)
        advice = _advise(rows, self._about)
        new = [one for one in advice if one.level > self._said.get(one.id, -1)]
        self._said.update({one.id: one.level for one in new})
        return new

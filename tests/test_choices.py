"""Every choice that a recipe offers has code: one without is an error, and never runs as another choice.

mypy finds a `match` that leaves a choice out (`unknown_choice` takes `Never`); here a planted unknown choice must raise at run
time in every dispatcher, and no module but the recipe's rules may compare a choice with `==`, whose `else` takes in all others.
"""

from __future__ import annotations

import ast
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from method_cases import CONTEXT, Case, method

import rlpost
from rlpost.data.hints import cut_hint
from rlpost.gradient.advantage import normalise
from rlpost.gradient.correction import sampler_correction
from rlpost.gradient.curvature import shift_curvature, taylor_forms
from rlpost.gradient.gae import aggregate_values, head_shares, value_coefficients, value_loss
from rlpost.gradient.kl import kl_coefficient, kl_estimate
from rlpost.gradient.ratio import importance_ratio, limit_ratio
from rlpost.gradient.reduction import token_weights
from rlpost.learner.optimizer import learning_rate
from rlpost.methods.capo import CurvatureTracker, make_tracker
from rlpost.methods.controllers import (
    Decision,
    Observation,
    control,
    initial_state,
    loss_coefficient,
    reward_coefficient,
)
from rlpost.methods.dpo import _sft_pull, preference_loss, preference_slope, read_pairs
from rlpost.methods.hpt import route
from rlpost.methods.imitation import demonstration_coefficient, demonstration_weights, joins_group
from rlpost.methods.masking import accepted_tokens
from rlpost.methods.ppo import RewardWhitening
from rlpost.methods.signal import group_is_baseline
from rlpost.offload.arithmetic import make_arithmetic
from rlpost.policy.critic import make_critic, read_places
from rlpost.policy.precision import autocast_of, sampler_dtype
from rlpost.policy.rows import build_rows
from rlpost.recipe.rules.rollout import placement_problems
from rlpost.recipe.sections.base import Section, members
from rlpost.recipe.sections.critic import CriticSection, ValueLossSection, penalty_place
from rlpost.recipe.sections.guidance import HintGuidance, LuffyGate, SolveRateGate, describe_gate
from rlpost.recipe.sections.learner import LearnerSection
from rlpost.recipe.sections.masks import CurvatureMask
from rlpost.recipe.sections.method import AdvantageSection, MethodSection, describe_order
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.preference import PairsSection, SumSft
from rlpost.recipe.sections.rollout import SyncSection, VllmEngine
from rlpost.recipe.sections.root import Recipe
from rlpost.rollout.factory import make_engine
from rlpost.rollout.none import NoEngine
from rlpost.rollout.rounding import with_rounding
from rlpost.scoring.scorer import _split

NEW = "a_new_choice"
SOURCE = Path(rlpost.__file__).parent


class New(Section):
    """A member of every union, for which there is no code."""

    type: Literal["a_new_choice"] = "a_new_choice"
    threshold: float = 1.0


def planted(section: Any, field: str, value: Any = NEW) -> Any:
    """The section with a value that its type does not allow yet."""
    return section.model_copy(update={field: value})


CASE = Case(0)
VIEW, COUNTS = CASE.view(), CASE.counts()
ONE, KEEP = torch.ones(2, dtype=torch.float64), torch.ones_like(VIEW.sequence, dtype=torch.bool)
PROMPT = torch.tensor([0, 0])
M, CRITIC, PAIRS, GATE = method(), CriticSection(heads=2), PairsSection(), SolveRateGate()
HUBER, TWO = ValueLossSection(), torch.ones(3, 2, dtype=torch.float64)
TRACKED = method(preset="capo")
TRACKER = make_tracker(TRACKED, CASE.head.shape[0], CASE.head.shape[1])
CURVED = replace(CONTEXT, curvature=TRACKER)
SAFE = method(preset="safe").controller
PAIR_VIEW = replace(
    VIEW, advantage=torch.tensor([1.0, 1, 1, -1, -1, -1, -1, -1, 1, 1, 0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 0]).double()
)

DISPATCHERS: dict[str, Callable[[], Any]] = {
    "advantage.center": lambda: normalise(planted(M.advantage, "center"), ONE, PROMPT, 1),
    "advantage.center (metrics)": lambda: group_is_baseline(planted(M, "advantage", planted(M.advantage, "center"))),
    "advantage.scale": lambda: normalise(planted(M.advantage, "scale"), torch.tensor([1.0, 0.0]), PROMPT, 1),
    "advantage.combine": lambda: planted(M.advantage, "combine").each_alone,
    "advantage.combine (whitening)": lambda: planted(M.advantage, "combine").whitened,
    "ratio.level": lambda: importance_ratio(planted(M.ratio, "level"), VIEW),
    "clip": lambda: limit_ratio(New(), torch.ones(3), torch.ones(3)),
    "clip (plan)": lambda: describe_order(planted(M, "clip", New())),
    "correction.level": lambda: sampler_correction(planted(M.correction, "level"), VIEW),
    "correction.action": lambda: sampler_correction(planted(M.correction, "action"), VIEW),
    "kl.estimator": lambda: kl_estimate(NEW, VIEW.logp, VIEW.old_logp),
    "kl.estimator (gradient)": lambda: kl_coefficient(NEW, VIEW.logp, VIEW.old_logp),
    "reduction.type": lambda: token_weights(planted(M.reduction, "type"), VIEW, COUNTS, KEEP),
    "reduction.denominator": lambda: token_weights(planted(M.reduction, "denominator"), VIEW, COUNTS, KEEP),
    "masks": lambda: accepted_tokens(planted(M, "masks", (New(),)), VIEW, CONTEXT),
    "masks.step": lambda: planted(CurvatureMask(), "step").by_adam,
    "masks.kl": lambda: taylor_forms(ONE, ONE, ONE, NEW),
    "masks.form": lambda: shift_curvature(TWO, TWO, TWO > 0, torch.ones(3), "sampled", NEW),
    "masks.thresholds": lambda: CurvatureTracker(planted(CurvatureMask(), "thresholds", New()), 3, 2),
    "gate": lambda: route(New(), [1.0], 0),
    "gate (joins)": lambda: joins_group(New()),
    "gate (coefficient)": lambda: demonstration_coefficient(New(), VIEW),
    "gate (plan)": lambda: describe_gate(New(), guided=False),
    "gate.below": lambda: demonstration_coefficient(planted(GATE, "below"), VIEW),
    "gate.below (joins)": lambda: planted(GATE, "below").joins,
    "gate.reduction": lambda: demonstration_weights(planted(GATE, "reduction"), VIEW, COUNTS, VIEW.logp),
    "gate.balance": lambda: demonstration_weights(planted(GATE, "balance"), VIEW, COUNTS, VIEW.logp),
    "guidance.unit": lambda: cut_hint("one two", 0.5, NEW),
    "guidance.place": lambda: planted(HintGuidance(), "place").continues,
    "guidance.judge": lambda: planted(HintGuidance(), "judge").judges_turn,
    "critic.aggregate": lambda: aggregate_values(planted(CRITIC, "aggregate"), TWO),
    "critic.aggregate (gradient)": lambda: head_shares(planted(CRITIC, "aggregate"), TWO),
    "critic.train": lambda: value_coefficients(planted(CRITIC, "train"), TWO, ONE, ONE),
    "critic.level": lambda: planted(CRITIC, "level").per_token,
    "critic.level (places)": lambda: read_places(planted(CRITIC, "level"), VIEW.sequence),
    "critic.model": lambda: make_critic(planted(CRITIC, "model"), ModelSection(path="x"), "x", 4),
    "critic.whiten_reward": lambda: RewardWhitening(planted(CRITIC, "whiten_reward"))(ONE),
    "critic.loss.type": lambda: value_loss(planted(HUBER, "type"), ONE, ONE, ONE),
    "critic.loss.combine": lambda: value_loss(planted(HUBER, "combine"), ONE, ONE, ONE),
    "controller": lambda: initial_state(New()),
    "controller (step)": lambda: control(New(), initial_state(SAFE), Observation(0.1, 1.0, 0.5)),
    "controller.term": lambda: penalty_place(NEW),
    "controller.term (loss)": lambda: loss_coefficient(NEW, Decision(1.0, 1.0, 1.0)),
    "controller.term (reward)": lambda: reward_coefficient(NEW, Decision(1.0, 1.0, 1.0)),
    "pairs.loss": lambda: preference_loss(planted(PAIRS, "loss"), ONE),
    "pairs.loss (gradient)": lambda: preference_slope(planted(PAIRS, "loss"), ONE),
    "pairs.baseline": lambda: planted(PAIRS, "baseline").from_initial,
    "pairs.baseline (view)": lambda: read_pairs(
        planted(PairsSection(sft=SumSft()), "baseline"), replace(PAIR_VIEW, prompt=torch.tensor([0, 0, 1, 2, 1, 2]))
    ),
    "pairs.reference": lambda: planted(PAIRS, "reference").cached,
    "pairs.sft": lambda: _sft_pull(planted(PAIRS, "sft", New()), ONE, COUNTS),
    "pairs.sft (plan)": lambda: describe_order(planted(method(preset="dpo"), "pairs", planted(PAIRS, "sft", New()))),
    "learner.schedule": lambda: learning_rate(planted(LearnerSection(rollouts=3), "schedule"), 1),
    "learner.offload.arithmetic": lambda: make_arithmetic(NEW),
    "learner.layout": lambda: build_rows([], layout=NEW, micro_batch_tokens=8, pad_id=0) or _rows(NEW),
    "rollout.engine": lambda: make_engine(
        New(), ModelSection(path="x"), "x", None, max_model_len=8, seed=0, device="cpu"
    ),
    "rollout.engine.where": lambda: make_engine(
        planted(VllmEngine(), "where"), ModelSection(path="x"), "x", None, max_model_len=8, seed=0, device="cpu"
    ),
    "rollout.engine.where (rules)": lambda: list(placement_problems(planted(VllmEngine(), "where"))),
    "rollout.sync.rounding": lambda: with_rounding(NoEngine(), planted(SyncSection(), "rounding"), 0),
    "rollout.engine.dtype": lambda: sampler_dtype(planted(VllmEngine(), "dtype")),
    "model.autocast": lambda: autocast_of(planted(ModelSection(path="x"), "autocast")),
    "rewards.call": lambda: list(_split([], NEW)),
}


def _rows(layout: Any) -> Any:
    from rlpost.policy.rows import RowGroup

    return build_rows(
        [RowGroup(prompt_ids=(1,), completions=((0, 0, (2,)),))], layout=layout, micro_batch_tokens=8, pad_id=0
    )


@pytest.mark.parametrize("slot", DISPATCHERS)
def test_a_choice_without_code_raises_and_names_its_key(slot: str) -> None:
    with pytest.raises((NotImplementedError, ValueError)) as caught:
        DISPATCHERS[slot]()
    if not slot.startswith("pairs.baseline (view)"):
        assert isinstance(caught.value, NotImplementedError), caught.value
        assert NEW in str(caught.value) and slot.split(" ")[0].split(".")[-1] in str(caught.value)


# ---- no `==` on a choice outside the recipe


def sections(section: type[Section] = Recipe, seen: set[type[Section]] | None = None) -> set[type[Section]]:
    """All sections of a recipe."""
    seen = set() if seen is None else seen
    if section in seen:
        return seen
    seen.add(section)
    for field in section.model_fields.values():
        for kind in _inside(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Section):
                sections(kind, seen)
    return seen


def _inside(annotation: Any) -> Iterator[Any]:
    for kind in members(annotation):
        if get_origin(kind) in (tuple, list, dict):
            for part in get_args(kind):
                yield from _inside(part)
        else:
            yield kind


@cache
def choices(least: int = 1) -> dict[str, set[str]]:
    """Field -> the words that it may hold, of all sections where there are at least so many."""
    found: dict[str, set[str]] = {}
    for section in sections():
        for name, field in section.model_fields.items():
            for kind in _inside(field.annotation):
                if get_origin(kind) is Literal and len(get_args(kind)) >= least:
                    found.setdefault(name, set()).update(w for w in typing.get_args(kind) if isinstance(w, str))
    return {name: words for name, words in found.items() if len(words) > 1}


ALLOWED = {  # questions about one value where every other one is meant to be the other case
    ("assemble.py", "resume"): "a path beside two words",
    ("data/prompts.py", "too_long"): "refuse before drop",
    ("data/pairs.py", "too_long"): "refuse before the match that knows all three",
    ("data/pairs.py", "identical"): "refuse before drop",
    ("data/pairs.py", "missing"): "refuse before drop",
    ("data/demonstrations.py", "long_demonstrations"): "refuse before drop",
    ("data/dataset.py", "system"): "whether something is dropped",
    ("policy/model.py", "attention"): "a kernel's own limit",
    ("policy/loading.py", "attention"): "a kernel's own limit",
    ("policy/loading.py", "dtype"): "a kernel's own limit",
    ("policy/loading.py", "autocast"): "a kernel's own limit",
    ("learner/factory.py", "attention"): "a kernel's own limit",
    ("rollout/factory.py", "attention"): "which kernels take the engine's masks",
    ("rollout/factory.py", "dtype"): "which of vLLM's types the other engine has",
    ("precision.py", "autocast"): "what is said of a decision",
    ("precision.py", "dtype"): "what is said of a decision",
    ("gradient/advantage.py", "scale"): "before the match that knows all three",
    ("rollout/vllm_options.py", "kv_cache_dtype"): "vLLM's default",
    ("rollout/vllm_options.py", "quantization"): "vLLM's default",
    ("data/hints.py", "unit"): "what must be prepared for one of them; all are told apart in `_unit_ends`",
    ("scoring/reward_model.py", "text"): "what must be there for one of them; both are told apart in `_encode`",
    ("scoring/scorer.py", "completions"): "whether a chat guards itself; all are told apart in `keywords.py`",
    ("methods/estimator.py", "level"): "whether there is a ratio to report",
    ("tracking/advice.py", "type"): "what advice says of one choice",
    ("tracking/advice.py", "level"): "what advice says of one choice",
}


def comparisons() -> Iterator[tuple[str, str, str, int]]:
    """(file, field, word, line) of every `x.field == "word"` and `!=` and `in` outside the recipe's own package."""
    words = choices()
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if name.startswith("recipe/"):  # rules and descriptions; its dispatchers are planted above
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute)):
                continue
            constants = [c.value for part in node.comparators for c in ast.walk(part) if isinstance(c, ast.Constant)]
            found = words.get(node.left.attr, set()).intersection(c for c in constants if isinstance(c, str))
            for word in found:
                yield name, node.left.attr, word, node.lineno


def test_choices_are_matched_and_not_compared() -> None:
    wrong = [
        f"rlpost/{file}:{line}: .{field} == {word!r}"
        for file, field, word, line in comparisons()
        if not any(file.endswith(place) and field == known for place, known in ALLOWED)
    ]
    assert not wrong, (
        "use `match` with a last `case _: raise unknown_choice(...)`, or a property of the section that does (an `else` would "
        "take in every choice that is added later); a mere question may be entered in ALLOWED:\n" + "\n".join(wrong)
    )


def test_every_union_is_planted() -> None:
    """A union of sections that is new must have its dispatcher among those above."""
    unions: dict[str, set[str]] = {}
    for section in sections(MethodSection):
        for name, field in section.model_fields.items():
            kinds = [kind for kind in _inside(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
            if len(kinds) > 1:
                unions[name] = {kind.__name__ for kind in kinds}
    planted_ones = {slot.split(" ")[0].split(".")[-1] for slot in DISPATCHERS}
    assert set(unions) <= planted_ones, f"plant an unknown choice in the dispatcher of {set(unions) - planted_ones}"
    cases = {
        pattern.cls.id
        for path in SOURCE.rglob("*.py")
        for pattern in ast.walk(ast.parse(path.read_text()))
        if isinstance(pattern, ast.MatchClass) and isinstance(pattern.cls, ast.Name)
    }
    for name, kinds in unions.items():
        assert kinds <= cases, f"no `case` for {kinds - cases} of `{name}`"
    assert AdvantageSection in sections() and LuffyGate in sections()


# How choices are carried out that no `match` tells apart; a field that is new belongs into a `match`, or here with its reason.
ELSEWHERE = {
    "attention": "names of transformers' kernels, handed on",
    "call": "an `if` chain that raises at its end (`scoring/scorer.py: _split`)",
    "condition": "a table that raises KeyError (`guide.py`)",
    "dtype": "names of torch's types, handed on (and `precision.py` for `auto`)",
    "empty": "drop or refuse",
    "identical": "drop or refuse",
    "kv_cache_dtype": "vLLM's own words, handed on (`vllm_options.py`)",
    "long_demonstrations": "drop or refuse",
    "missing": "drop or refuse",
    "mismatch": "drop or refuse",
    "mode": "W&B's own words, handed on",
    "operations": "a set of signs",
    "quantization": "none, or vLLM's own word, handed on (`vllm_options.py`)",
    "quantize": "none, or bitsandbytes' own word",
    "rules": "a set of words",
    "system": "keep or drop",
    "too_long": "drop or refuse, and for pairs a match",
    "unit": "an `if` chain that raises at its end (`data/hints.py: _unit_ends`)",
}
ALIASES = {"wanted": "layout"}


@cache
def matched() -> dict[str, set[str]]:
    """Name of what is matched (the last part of `a.b.c`) -> the words that its cases name, of the whole package."""
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Match) and isinstance(node.subject, ast.Attribute | ast.Name):
                name = node.subject.attr if isinstance(node.subject, ast.Attribute) else node.subject.id
                words = {
                    part.value.value
                    for case in node.cases
                    for part in ast.walk(case.pattern)
                    if isinstance(part, ast.MatchValue) and isinstance(part.value, ast.Constant)
                }
                found.setdefault(ALIASES.get(name, name), set()).update(words)
    return found


@pytest.mark.parametrize("field", sorted(choices(least=2)))
def test_every_word_that_a_recipe_may_say_has_a_case(field: str) -> None:
    if field in ELSEWHERE:
        return
    missing = choices(least=2)[field] - matched().get(field, set())
    assert not missing, (
        f"no `case` for {sorted(missing)} of `{field}`: add one, or the field to ELSEWHERE with its reason"
    )

"""What may change when a run is taken up again: a decision for every key of the recipe, and the comparison of two recipes."""

from __future__ import annotations

from types import NoneType
from typing import get_origin

import pytest
from conftest import REPOSITORY

from rlpost.recipe.changes import _BY_KEY, DECISIONS, LATER, MAPPINGS, NONE, ROLLOUT, RUN, changes, effect_of
from rlpost.recipe.load import load_recipe
from rlpost.recipe.schema import _walk
from rlpost.recipe.sections.base import Section, members
from rlpost.recipe.sections.root import Recipe


def keys_to_decide() -> set[str]:
    """Every key with a value of its own. Sections that are always there have none; of several types, `type` is the key."""
    found = set()
    for path, section in _walk("", Recipe):
        for name, field in section.model_fields.items():
            types = list(members(field.annotation))
            sections = [t for t in types if isinstance(t, type) and issubclass(t, Section)]
            if sections and NoneType not in types:
                continue
            found.add(f"{path}.{name}".lstrip(".").replace("[]", ".*").replace(".match.", "."))
    return found


def test_every_key_has_exactly_one_decision():
    keys = keys_to_decide()
    assert sorted(keys - _BY_KEY.keys()) == [], (
        "decide in rlpost/recipe/changes.py what a change of these means to a resumed run"
    )
    assert sorted(_BY_KEY.keys() - keys) == [], "these keys are no more"
    named = [f"{s}.{n}" for s, effects in DECISIONS.items() for names in effects.values() for n in names.split()]
    assert len(named) == len(set(named)) == len(_BY_KEY)


def test_mappings_of_the_users_own_are_compared_whole():
    mappings = {n for _, s in _walk("", Recipe) for n, f in s.model_fields.items() if get_origin(f.annotation) is dict}
    assert mappings == MAPPINGS


@pytest.mark.parametrize(
    ("key", "effect"),
    [
        ("rollout.temperature", ROLLOUT),
        ("rollout.top_p", ROLLOUT),
        ("rewards.3.weight", ROLLOUT),
        ("rewards.0.deadline_s", NONE),
        ("method.advantage.scale", ROLLOUT),
        ("method.clip.high", LATER),
        ("method.masks.1.match.thresholds.target", LATER),
        ("learner.learning_rate", LATER),
        ("model.path", RUN),
        ("model.lora.alpha", RUN),
        ("seed", RUN),
        ("tracking.wandb.mode", NONE),
    ],
)
def test_decisions(key, effect):
    assert effect_of(key) is effect


RECIPE = str(REPOSITORY / "recipes" / "quickstart.yaml")


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ([], ["resume=auto", "overwrite=false"], []),
        ([], ["rollout.temperature=0.3"], [("rollout.temperature", 1.0, 0.3, ROLLOUT)]),
        ([], ["learner.betas=[0.9,0.95]"], [("learner.betas", [0.9, 0.999], [0.9, 0.95], LATER)]),
        ([], ["rewards.0.weight=2"], [("rewards.0.weight", 1.0, 2.0, ROLLOUT)]),
        (["rollout.probe=null"], [], [("rollout.probe", None, {"every": 1, "max_mean_gap": "auto"}, NONE)]),
        (["method.controller={type: adaptive_kl, term: coefficient}"], ["learner.rollouts=7"], None),
    ],
)
def test_what_differs_is_found(before, now, expected):
    old, new = (load_recipe(RECIPE, overrides).recipe.model_dump(mode="json") for overrides in (before, now))
    found = [(c.key, c.before, c.now, c.effect) for c in changes(old, new)]
    if expected is None:
        by_key = {key: effect for key, _, _, effect in found}
        assert by_key["method.controller"] is ROLLOUT, "a controller can be left behind"
        [added] = [c for c in changes(new, old) if c.key == "method.controller"]
        assert added.effect is RUN, "but not be taken up where it was never written"
        return
    assert found == expected


def test_a_choice_of_another_type_is_one_change_and_a_curvature_masks_memory_is_kept():
    plain, clipped, capo, sgd = (
        load_recipe(RECIPE, overrides).recipe.model_dump(mode="json")
        for overrides in (
            [],
            ["method.clip={type: cispo}"],
            ["method.masks=[{type: curvature}]"],
            ["method.masks=[{type: curvature, step: sgd}]"],
        )
    )
    [change] = changes(plain, clipped)
    assert (change.key, change.before["type"], change.now["type"], change.effect) == (
        "method.clip",
        "ppo",
        "cispo",
        LATER,
    )
    assert {c.effect for c in changes(plain, capo)} == {LATER, RUN}
    assert {c.effect for c in changes(capo, plain)} == {LATER}
    assert {c.effect for c in changes(capo, sgd)} == {LATER, RUN}


def test_keys_of_another_version_are_left_out():
    tree = load_recipe(RECIPE).recipe.model_dump(mode="json")
    older = {**tree, "learner": {k: v for k, v in tree["learner"].items() if k != "betas"}, "gone": 1}
    assert changes(older, tree) == []

"""The `method` section: presets, overrides, refusals, and what a method asks of the learner."""

from __future__ import annotations

import subprocess
import sys

import pytest
from method_cases import method
from pydantic import ValidationError

from rlpost.errors import RecipeError
from rlpost.methods import needs_reference, needs_statistics
from rlpost.recipe.sections.method import MethodSection, describe_order
from rlpost.recipe.sections.presets import fill_preset, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_a_round_trip(name) -> None:
    section = method(preset=name)
    assert MethodSection.model_validate(section.model_dump()) == section
    assert MethodSection.model_validate_json(section.model_dump_json()) == section
    assert describe_order(section)[-1].startswith("reduction")


def test_default_is_grpo() -> None:
    assert MethodSection() == method(preset="grpo")
    assert method().reduction.type == "sequence"


def test_overrides_merge_into_the_preset() -> None:
    section = method(preset="dapo", clip={"low": 0.3})
    assert (section.clip.type, section.clip.low, section.clip.high) == ("ppo", 0.3, 0.28)
    assert section.reduction.type == "token"


def test_another_type_replaces_the_presets_choice() -> None:
    section = method(preset="dapo", clip={"type": "cispo", "high": 3.0})
    assert section.clip.low is None
    assert method(preset="rloo", reduction={"type": "token"}).reduction.constant is None


def test_lists_replace() -> None:
    section = method(preset="capo", masks=[{"type": "random", "rate": 0.1}])
    assert [mask.type for mask in section.masks] == ["random"]


def test_origins() -> None:
    merged, origins = fill_preset({"preset": "dapo", "clip": {"low": 0.3}, "masks": [{"type": "off_policy"}]})
    assert merged["clip"] == {"type": "ppo", "low": 0.3, "high": 0.28}
    assert origins["clip.low"] == origins["masks"] == origins["preset"] == "recipe"
    assert origins["clip.high"] == origins["dynamic_sampling.enabled"] == "preset"


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean `dr_grpo`"):
        fill_preset({"preset": "drgrpo"})


@pytest.mark.parametrize(
    ("slots", "names"),
    [
        ({"critic": {}}, ["critic", "advantage.center"]),
        ({"preset": "ppo", "kl": {"coefficient": 0.1}}, ["controller", "kl.coefficient"]),
        ({"controller": {"type": "safe", "term": "reward"}}, ["controller.term", "critic"]),
        ({"preset": "ppo", "gate": {"type": "solve_rate"}}, ["critic", "gate"]),
        (
            {"preset": "safe", "critic": {"warmup_rollouts": 2, "trunk_gradient": 1.0}},
            ["warmup_rollouts", "trunk_gradient"],
        ),
        ({"ratio": {"level": "none"}}, ["clip.type", "ratio.level"]),
        ({"ratio": {"level": "sequence"}, "clip": {"dual": 3.0}}, ["clip.dual", "ratio.level"]),
        ({"kl": {"where": "reward"}}, ["kl.where", "kl.coefficient"]),
        ({"advantage": {"center": "leave_one_out", "scale": "batch_std"}}, ["advantage.center", "advantage.scale"]),
        ({"advantage": {"center": "batch"}}, ["group_std", "batch"]),
        ({"reduction": {"type": "token", "constant": 5}}, ["reduction.constant", "reduction.type"]),
        ({"reduction": {"type": "token", "denominator": "accepted"}}, ["reduction.denominator", "sequence"]),
        ({"correction": {"min": 3.0}}, ["correction.min", "correction.max"]),
        ({"masks": [{"type": "random"}]}, ["rate", "match"]),
        ({"masks": [{"type": "curvature"}, {"type": "curvature", "top_k": 5}]}, ["curvature"]),
        ({"masks": [{"type": "curvature", "step": "sgd", "form": "exact"}]}, ["exact", "adam"]),
        ({"clip": {"dual": 0.5}}, ["dual"]),
        ({"clip": {"hihg": 0.5}}, ["hihg"]),
    ],
)
def test_impossible_combinations_are_refused_by_name(slots: dict, names: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        method(**slots)
    for name in names:
        assert name in str(caught.value)


def test_requests() -> None:
    assert not needs_reference(method()) and needs_reference(method(preset="reinforce_pp"))
    assert needs_statistics(method()) is None
    assert needs_statistics(method(preset="capo")).k == 50
    assert needs_statistics(method(masks=[{"type": "curvature", "step": "sgd"}])).k is None
    control = {"type": "random", "match": {"type": "curvature", "top_k": 8}}
    assert needs_statistics(method(masks=[control])).k == 8


def test_a_recipe_is_read_without_torch() -> None:
    code = "import sys, rlpost.recipe.sections.method, rlpost.recipe.sections.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

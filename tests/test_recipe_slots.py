"""`rlpost plan` shows every setting of every slot in force, and presets are listed in one place only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from method_cases import method

from rlpost.recipe.load import leaves, load_recipe
from rlpost.recipe.plan.describe import make_plan, print_plan
from rlpost.recipe.plan.slots import slot_sections, slots_in_force
from rlpost.recipe.sections.base import Section
from rlpost.recipe.sections.describe import describe_settings
from rlpost.recipe.sections.masks import Mask
from rlpost.recipe.sections.method import MethodSection, describe_order
from rlpost.recipe.sections.presets import preset_names

ROOT = Path(__file__).parents[1]
DATA = "data: {train: {type: arithmetic, size: 64, low: 0, high: 20}, held_out: 8, max_demonstration_tokens: 120}\n"


def recipe(folder: Path, preset: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"name: x\nmodel: {{path: org/model-135M}}\n{DATA}rewards: [{{function: number}}]\n"
        f"method: {{preset: {preset}}}\nlearner: {{rollouts: 2}}\nevaluation: {{prompts: 0}}\n"
    )
    return path


@pytest.mark.parametrize("preset", preset_names())
def test_every_setting_of_a_slot_in_force_is_printed_with_its_origin(preset, tmp_path, capsys) -> None:
    loaded = load_recipe(recipe(tmp_path, preset), ("method.correction.action=mask", "method.correction.min=0.25"))
    plan = make_plan(loaded)
    print_plan(plan)
    printed = " ".join(capsys.readouterr().out.split())
    sections = slot_sections(loaded.recipe.method)
    assert sections, "a method without a slot does nothing"
    for key, section in sections.items():
        line = next(line for line in plan.settings if line.startswith(f"{key}: "))
        assert " ".join(line.split()) in printed
        for path in leaves(section, f"{key}."):
            name, origin = path.rsplit(".", 1)[1], loaded.origins.get(path, "default")
            found = re.search(rf"\b{name} [^,()]*(\[[^]]*\])?( \([a-z ]+\))?", line)
            assert found, (path, line)
            assert origin == "default" or f"({origin})" in line, (path, line)
    if "correction" in slots_in_force(loaded.recipe.method):
        most = loaded.recipe.method.correction.max
        assert "min 0.25 (command line)" in printed and f"outside [0.25, {most:g}]" in printed


def test_a_mask_is_printed_with_its_limits() -> None:
    section = method(masks=[{"type": "off_policy", "max_gap": 0.125}, {"type": "random", "rate": 0.0625}])
    order = "\n".join(describe_order(section))
    assert "mask: off_policy, max_gap 0.125, negative_only true" in order and "rate 0.0625" in order


def test_a_slot_that_is_new_is_in_force_until_someone_says_when_it_is_not() -> None:
    class New(Section):
        strength: float = 0.5

    class Grown(MethodSection):
        new: New | None = None

    assert "new" not in slots_in_force(Grown()) and "new" in slots_in_force(Grown(new=New()))
    assert describe_settings(New()) == "strength 0.5"


def test_what_does_not_act_is_not_shown() -> None:
    assert slots_in_force(method(preset="dpo")) == ("pairs",)
    assert slots_in_force(method(preset="sft")) == ("gate",)
    assert slots_in_force(method(preset="sft", gate={"reduction": "as_samples"})) == ("reduction", "gate")
    plain = slots_in_force(method())
    assert not {"kl", "entropy", "overlong", "dynamic_sampling", "masks", "preset"} & set(plain)
    assert {"overlong", "dynamic_sampling"} <= set(slots_in_force(method(preset="dapo")))


def named(text: str, name: str) -> bool:
    return re.search(rf"(?<![a-z_]){name}(?![a-z_])", text) is not None


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_named_where_presets_are_listed(name) -> None:
    """The list is `recipe.sections.presets`; what is written for readers must follow it (docs/recipe.md: `make docs`)."""
    described = MethodSection.model_fields["preset"].description
    assert named(described, name), (
        f"name `{name}` in the docstring of MethodSection.preset (rlpost/recipe/sections/method.py)"
    )
    pages = [path for path in sorted((ROOT / "docs" / "methods").glob("*.md")) if named(path.read_text(), name)]
    assert pages, f"say what `{name}` is in a page of docs/methods/"
    readme = (ROOT / "README.md").read_text()
    variant = any(name.startswith(f"{other}_") and named(readme, other) for other in preset_names())
    assert named(readme, name) or variant, (
        f"give `{name}` a row in README.md's table of methods, or name it as a variant"
    )


def test_every_mask_stands_in_the_table_of_masks() -> None:
    page = (ROOT / "docs" / "methods" / "grpo.md").read_text()
    table = page[page.index("## Masks") :]
    for section in get_args(get_args(Mask)[0]):
        name = section.model_fields["type"].default
        assert f"`{name}`" in table, f"give `{name}` a row in the table of masks in docs/methods/grpo.md"

"""What is generated from the sections is up to date, and the recipes of the house are sound."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlpost.recipe.load import load_recipe
from rlpost.recipe.root import Recipe
from rlpost.recipe.rules import Setting, check
from rlpost.recipe.schema import json_schema, reference, sections_of

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_json_schema_is_up_to_date():
    assert (ROOT / "recipes" / "schema.json").read_text() == json_schema(), "run: rlpost schema > recipes/schema.json"


def test_reference_is_up_to_date():
    assert (ROOT / "docs" / "recipe.md").read_text() == reference(), "run: rlpost recipe-docs > docs/recipe.md"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_are_sound(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = load_recipe(path)
    assert check(loaded.recipe, Setting(1, path.parent)) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_fit_the_json_schema(path):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(json_schema()))


def all_sections(section=Recipe, seen=None):
    seen = seen if seen is not None else set()
    if section not in seen:
        seen.add(section)
        for field in section.model_fields.values():
            for inner in sections_of(field.annotation):
                all_sections(inner, seen)
    return seen


def test_every_key_is_explained():
    silent = [
        f"{section.__name__}.{name}"
        for section in all_sections()
        for name, field in section.model_fields.items()
        if not field.description and name != "type"
    ]
    assert silent == []


def test_every_section_can_be_reached():
    names = {section.__name__ for section in all_sections()}
    assert {"LoraSection", "VllmEngine", "CurvatureMask", "ProbeSection", "WandbSection", "CispoClip"} <= names


def test_recipes_import_no_heavy_package():
    code = (
        "import sys, rlpost.recipe.load, rlpost.recipe.rules\n"
        "print([m for m in ('torch', 'transformers', 'vllm', 'datasets', 'trl') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(out) == []

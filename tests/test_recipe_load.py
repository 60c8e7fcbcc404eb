"""Reading a recipe: every mistake that a user can make in the file or on the command line is named in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlpost.errors import RecipeError
from rlpost.recipe.load import load_recipe, parse_values, recipe_files, save_resolved

MINIMAL = """\
name: tiny
model: {path: some/model}
data:
  train: {type: arithmetic, size: 200}
rewards:
  - function: number
method: {preset: grpo}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_minimal_recipe_has_defaults_and_origins(recipe):
    loaded = load_recipe(recipe, ["learner.rollouts=7"])
    assert loaded.recipe.learner.rollouts == 7
    assert loaded.recipe.run_dir == Path("runs/tiny")
    assert loaded.recipe.optimizer_steps == 7
    origins = loaded.origins
    assert origins["learner.rollouts"] == "command line"
    assert origins["data.train.size"] == "recipe"
    assert origins["rewards.0.function"] == "recipe"
    assert origins["rewards.0.weight"] == "default"
    assert origins["method.clip.low"] == "preset"
    assert origins["method.overlong.filter"] == "default"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("learner.learning_rate=1e-6", 1e-6),
        ("learner.max_grad_norm=null", None),
        ("rewards.0.weight=2", 2.0),
        ("rewards[0].weight=0.5", 0.5),
        ("rollout.stop=['</answer>']", ("</answer>",)),
        ("rollout.engine.kv_cache_gib=2", 2.0),
        ("method.clip.high=0.28", 0.28),
        ("data.system_prompt='a=b'", "a=b"),
        ("data.system_prompt=a=b", "a=b"),
    ],
)
def test_overrides(recipe, override, value):
    loaded = load_recipe(recipe, [override])
    found = loaded.recipe
    key = override.partition("=")[0].replace("[", ".").replace("]", "")
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == value
    assert loaded.origins[key] == "command line"


def test_a_section_on_the_command_line_replaces_the_recipes(recipe):
    recipe.write_text(MINIMAL + "rollout: {engine: {type: vllm, kv_cache_gib: 2}}\n")
    loaded = load_recipe(recipe, ["rollout.engine={type: transformers}"])
    assert loaded.recipe.rollout.engine.type == "transformers"
    assert loaded.origins["rollout.engine.batch_size"] == "command line"


def test_part_of_a_slot_keeps_the_presets_type(recipe):
    clip = load_recipe(recipe, ["method.preset=cispo", "method.clip={low: 0.1}"]).recipe.method.clip
    assert (clip.type, clip.low, clip.high) == ("cispo", 0.1, 4.0)


def test_references_are_resolved(recipe, monkeypatch):
    monkeypatch.setenv("RUNS", "elsewhere")
    recipe.write_text(MINIMAL + "output_dir: ${oc.env:RUNS}\n")
    assert load_recipe(recipe).recipe.output_dir == "elsewhere"
    recipe.write_text(MINIMAL + "output_dir: ${nowhere}\n")
    assert "output_dir" in message(recipe) and "nowhere" in message(recipe)


def test_resolved_recipe_loads_to_the_same(recipe, tmp_path):
    first = load_recipe(recipe, ["method.preset=dapo", "model.lora={rank: 4}", "evaluation.k=[1]"]).recipe
    save_resolved(first, tmp_path / "run" / "recipe.yaml")
    assert load_recipe(tmp_path / "run" / "recipe.yaml").recipe == first


def test_missing_file_lists_the_recipes_that_exist(recipe):
    text = message(recipe.with_name("tyni.yaml"))
    assert "no such recipe file" in text and "tiny.yaml" in text


def test_hidden_files_are_no_recipes(tmp_path):
    (tmp_path / ".pre-commit-config.yaml").write_text("repos: []\n")
    found = [path.name for path in recipe_files(tmp_path)]
    assert "quickstart.yaml" in found and ".pre-commit-config.yaml" not in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [a\nseed: 1\n", ["line 2, column 5"]),
        ("name: a\n\tseed: 1\n", ["line 2, column 1"]),
        ("name: a\nname: b\n", ["line 2, column 1", "duplicate key name"]),
        ("- name\n", ["holds a list"]),
        ("only text", ["only text: there is no such key", "name is missing"]),
        ("3", ["mapping of sections"]),
        ("", ["name is missing", "model is missing", "data is missing", "method is missing"]),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, expected):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    found = message(path)
    for part in expected:
        assert part in found
    assert "r.yaml" in found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.temprature=1", ["rollout.temprature", "did you mean rollout.temperature?"]),
        ("rollot.temperature=1", ["did you mean rollout?"]),
        ("learning_rate=1", ["did you mean learner.learning_rate?"]),
        ("learner.zzz=1", ["learner has: rollouts, stop_after, minibatches"]),
        ("data.train.lmit=1", ["data.train.lmit", "type arithmetic has: type, size"]),
        ("rollout.engine.kv_cache_gb=1", ["did you mean rollout.engine.kv_cache_gib?"]),
        ("rollout.engine.type=sglang", ["rollout.engine.type", "'sglang'", "vllm, transformers"]),
        ("data.train={size: 3}", ["data.train.type is missing", "dataset, reasoning_gym, arithmetic"]),
        ("learner.rollouts=ten", ["learner.rollouts = 'ten'", "whole number above 0"]),
        ("learner.rollouts=0", ["learner.rollouts = 0", "whole number above 0"]),
        ("learner.rollouts=1.5", ["learner.rollouts = 1.5"]),
        ("learner.rollouts=yes", ["learner.rollouts = 'true'", "whole number"]),
        ("learner.learning_rate=nan", ["learner.learning_rate"]),
        ("learner.betas=[0.9]", ["learner.betas.1 is missing"]),
        ("learner.betas=[0.9, 1]", ["learner.betas.1 = 1"]),
        ("learner.layout=tre", ["one of: tree, sorted, padded; did you mean tree?"]),
        ("model.lora.rank=0", ["model.lora.rank = 0", "whole number above 0"]),
        ("model.lora.targets=4", ["all-linear or list of (text)"]),
        ("rollout.top_p=2", ["rollout.top_p = 2", "above 0 and at most 1"]),
        ("tracking.console=maybe", ["true or false"]),
        ("name=3", ["name = 3", "quotes"]),
        ("name='a b/c'", ["folder's name"]),
        ("rewards=3", ["rewards = 3", "list of sections"]),
        ("rewards.0.functoin=x", ["did you mean rewards.0.function?"]),
        ("evaluation=3", ["evaluation = 3", "mapping"]),
        ("data.train=null", ["data.train = null"]),
        ("method.preset=grop", ["method.preset", "grop", "grpo"]),
        ("method.clpi.low=1", ["method.clpi", "did you mean method.clip?"]),
        ("method.masks=[{type: curv}]", ["method.masks.0.type", "did you mean curvature?"]),
        ("method.reduction.constant=1", ["method", "reduction.constant"]),
        ("rewards.3.weight=2", ["rewards.3.weight=2", "index"]),
        ("rewards.x.weight=2", ["rewards.x.weight=2", "index"]),
        ("learner.rollouts", ["section.key=value"]),
        ("=3", ["section.key=value"]),
        ("rollout.stop=[a", ["rollout.stop=[a", "not valid YAML"]),
    ],
)
def test_wrong_values(recipe, override, expected):
    found = message(recipe, override)
    for part in expected:
        assert part in found
    assert "Error" not in found and "pydantic" not in found


def test_several_problems_are_listed_together(recipe):
    found = message(
        recipe, "learner.rollouts=ten", "rollout.temprature=1", "method.preset=nothing", "method.kl.where=moon"
    )
    assert "4 problems" in found
    for part in ("learner.rollouts", "rollout.temprature", "method.preset", "method.kl.where"):
        assert part in found


def test_command_line_problems_say_so(recipe):
    assert "from the command line" in message(recipe, "learner.rollouts=ten")
    recipe.write_text(MINIMAL + "learner: {rollouts: ten}\n")
    assert "from the command line" not in message(recipe)


def test_parse_values():
    assert parse_values(["a=1", "b=x", "c=[1, 2]", "d=1e-6"]) == {"a": 1, "b": "x", "c": [1, 2], "d": 1e-6}


@pytest.mark.parametrize("given", ["file", "command line"])
def test_the_former_name_of_rollouts_is_taken_and_said(tmp_path, write_recipe, given):
    import yaml

    path = write_recipe(tmp_path, {"learner.rollouts": 7})
    if given == "file":
        path.write_text(path.read_text().replace("rollouts: 7", "steps: 3"))
    loaded = load_recipe(path, ["learner.steps=3"] if given == "command line" else [])
    assert loaded.recipe.learner.rollouts == 3
    assert loaded.origins["learner.rollouts"] == ("recipe" if given == "file" else "command line")
    assert "learner.steps is the former name of learner.rollouts" in loaded.notes[0]
    assert load_recipe(write_recipe(tmp_path)).notes == ()
    tree = yaml.safe_load(path.read_text())
    tree["learner"] = {"steps": 3, "rollouts": 4}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(RecipeError, match="give `rollouts` alone"):
        load_recipe(path)

"""What is generated from the sections is up to date, and the recipes of the house are sound."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlpost.recipe.load import leaves, load_recipe
from rlpost.recipe.plan.describe import make_plan
from rlpost.recipe.rules.check import Setting, check
from rlpost.recipe.schema import json_schema, reference, sections_of
from rlpost.recipe.sections.method import MethodSection
from rlpost.recipe.sections.presets import preset_names
from rlpost.recipe.sections.root import Recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_json_schema_is_up_to_date():
    assert (ROOT / "recipes" / "schema.json").read_text() == json_schema(), "run: rlpost schema > recipes/schema.json"


def test_reference_is_up_to_date():
    assert (ROOT / "docs" / "recipe.md").read_text() == reference(), "run: rlpost recipe-docs > docs/recipe.md"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_are_sound(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    loaded = load_recipe(path, [f"output_dir={tmp_path / 'run'}"])  # its own may hold a run, the quickstart's above all
    # The header says how it is started; prompts must divide evenly among that many processes.
    processes = re.search(r"--num_processes (\d+)", path.read_text())
    count = int(processes[1]) if processes else 1
    assert check(loaded.recipe, Setting(count, path.parent)) == []
    assert make_plan(loaded, processes=count).problems == ()


def test_published_settings_of_the_solution_recipes():
    ghpo = load_recipe(ROOT / "recipes" / "ghpo_math.yaml").recipe
    assert ghpo.seed == 42 and ghpo.rollout.prompts_per_step == 7 * 28 and ghpo.rollout.top_k == 50
    hpt = load_recipe(ROOT / "recipes" / "hpt_math.yaml").recipe
    assert hpt.method.entropy.coefficient == 0.001 and hpt.method.gate.entropy and hpt.method.gate.gamma == 0
    assert hpt.learner.learning_rate == 5e-6 and hpt.optimizer_steps == 1000


def test_the_reference_lists_every_preset():
    said = MethodSection.model_fields["preset"].description
    assert set(re.findall(r"\w+", said)) >= set(preset_names())


@pytest.mark.parametrize("name", ["safe_hh.yaml", "ppo_hh.yaml"])
def test_the_hh_recipes_fit_one_large_gpu_with_their_reward_model(name, monkeypatch):
    """And their controls, as the recipe's head names them, are sound."""
    from rlpost.recipe.plan.describe import make_plan
    from rlpost.recipe.plan.memory import GIB

    monkeypatch.chdir(ROOT)
    plan = make_plan(load_recipe(ROOT / "recipes" / name))
    assert plan.problems == () and plan.batch.completions_per_step == 16 and plan.batch.optimizer_steps == 4000
    parts = {line.what: line.bytes for line in plan.memory}
    assert 14 * GIB < parts["reward model reward_model"] < 16 * GIB and "reference model" not in parts
    assert parts["critic with gradients and AdamW state"] > 0 and sum(parts.values()) < 75 * GIB
    assert any("Skywork" in step for step in plan.order) and any("critic" in step for step in plan.order)
    text = (ROOT / "recipes" / name).read_text()
    controls = [
        line.lstrip("# ").split("   ")[0].split() for line in text.splitlines() if line.startswith("#   method.")
    ]
    assert controls
    for overrides in controls if name == "safe_hh.yaml" else [sum(controls, [])]:
        loaded = load_recipe(ROOT / "recipes" / name, overrides)
        assert check(loaded.recipe, Setting(1, ROOT / "recipes")) == [], overrides


def test_the_full_size_capo_recipe_has_the_published_setting():
    recipe = load_recipe(ROOT / "recipes" / "capo_math.yaml").recipe
    rollout, learner, method = recipe.rollout, recipe.learner, recipe.method
    assert recipe.model.path == "Qwen/Qwen2.5-Math-7B" and recipe.model.dtype == "bfloat16"
    assert (rollout.prompts_per_step, rollout.completions_per_prompt, rollout.max_completion_tokens) == (12, 8, 1024)
    assert recipe.data.max_prompt_tokens == 512
    assert (learner.rollouts, learner.learning_rate, learner.schedule, learner.warmup_steps) == (
        100,
        1.5e-5,
        "cosine",
        10,
    )
    assert learner.minibatches == learner.epochs == 1 and learner.betas == (0.9, 0.999) and learner.eps == 1e-8
    assert learner.weight_decay == 0 and learner.max_grad_norm == 1.0
    assert method.kl.coefficient == 0 and method.clip.low == method.clip.high == 0.2
    assert method.reduction.type == "sequence" and method.reduction.denominator == "accepted"
    assert (method.advantage.eps, method.advantage.unbiased) == (1e-4, True)
    mask = method.curvature
    assert (mask.step, mask.kl, mask.form, mask.top_k, mask.thresholds.target) == (
        "adam",
        "sampled",
        "taylor",
        50,
        0.08,
    )


@pytest.mark.parametrize(
    ("name", "keys", "rollouts"),
    [
        ("random", {"method.preset", "method.masks"}, 100),
        ("probability", {"method.preset", "method.masks"}, 100),
        ("early_stop", {"method.preset", "method.masks", "learner.stop_after"}, 40),
        ("low_rate", {"method.preset", "method.masks", "learner.learning_rate"}, 100),
    ],
)
def test_capos_controls_differ_in_what_they_are_named_for(name, keys, rollouts):
    """And they are planned: the early stop's schedule is still that of all 100 steps."""
    main = leaves(load_recipe(ROOT / "recipes" / "capo_math.yaml").recipe)
    loaded = load_recipe(ROOT / "recipes" / f"capo_math_{name}.yaml")
    own = leaves(loaded.recipe)
    different = {key for key in main.keys() | own.keys() if main.get(key) != own.get(key)}
    assert {key for key in different if not key.startswith("method.masks")} == (keys - {"method.masks"}) | {"name"}
    assert any(key.startswith("method.masks") for key in different)
    plan = make_plan(loaded, processes=4, zero_stage=2)
    assert plan.problems == () and plan.batch.optimizer_steps == plan.batch.rollouts == rollouts
    assert loaded.recipe.learner.rollouts == 100
    masks = loaded.recipe.method.masks
    matched = name in ("random", "probability")
    assert [mask.type for mask in masks] == ([name] if matched else [])
    assert not matched or masks[0].match == load_recipe(ROOT / "recipes" / "capo_math.yaml").recipe.method.curvature
    assert any(line.what == "curvature mask's moments" for line in plan.memory) == matched


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
        "import sys, rlpost.recipe.load, rlpost.recipe.rules.check\n"
        "print([m for m in ('torch', 'transformers', 'vllm', 'datasets', 'trl') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(out) == []

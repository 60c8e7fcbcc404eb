"""One rule for a recipe's paths: the working directory first, then the recipe's own folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlpost.errors import RecipeError, RewardError
from rlpost.recipe.load import load_recipe, save_resolved
from rlpost.recipe.places import candidates, located
from rlpost.recipe.rules.check import Setting, check, known_size
from rlpost.scoring.load import load_reward

RECIPE = """
name: x
model: {path: tiny, chat_template: chat.jinja}
data: {train: {type: dataset, path: 'rows [1].jsonl'}, eval: {type: dataset, path: parts/*.jsonl}}
rewards: [{function: 'mine.py:score'}, {path: judge}, {function: number}]
method: {preset: grpo}
"""
REWARD = "def score(completions, **columns):\n    return [0.0 for _ in completions]\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe's folder with everything in it, and another working directory."""
    project = tmp_path / "project"
    (project / "parts").mkdir(parents=True)
    for name in ("tiny", "judge"):
        (project / name).mkdir()
        (project / name / "config.json").write_text("{}")
    (project / "recipe.yaml").write_text(RECIPE)
    (project / "chat.jinja").write_text("x")
    (project / "mine.py").write_text(REWARD)
    for name in ("rows [1].jsonl", "parts/a.jsonl"):
        (project / name).write_text('{"prompt": "q"}\n')
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return project


def paths(recipe):
    first, second, third = recipe.rewards
    data = recipe.data
    return [
        recipe.model.path, recipe.model.chat_template, data.train.path, data.eval.path, first.function, second.path,
        third.function,
    ]  # fmt: skip


def test_what_lies_beside_the_recipe_is_found_from_elsewhere(folder, tmp_path):
    beside = "../project/"
    names = ["tiny", "chat.jinja", "rows [1].jsonl", "parts/*.jsonl", "mine.py:score", "judge"]
    loaded = load_recipe("../project/recipe.yaml")
    assert paths(loaded.recipe) == [*(beside + name for name in names), "number"]
    assert known_size(loaded.recipe.data.train) == known_size(loaded.recipe.data.eval) == 1
    assert load_reward(loaded.recipe.rewards[0].function).name == "score"
    # A run's own copy of its recipe lies in another folder, and leads to the same files.
    save_resolved(loaded.recipe, tmp_path / "runs" / "x" / "recipe.yaml")
    assert paths(load_recipe(tmp_path / "runs" / "x" / "recipe.yaml").recipe) == paths(loaded.recipe)


def test_the_working_directory_comes_first_and_names_stay_names(folder):
    Path("rows [1].jsonl").write_text('{"prompt": "other"}\n')
    recipe = load_recipe(
        "../project/recipe.yaml", ["model.path=Qwen/Qwen2.5-0.5B", "data.eval.path=openai/gsm8k"]
    ).recipe
    assert (recipe.data.train.path, recipe.model.path, recipe.data.eval.path) == (
        "rows [1].jsonl",
        "Qwen/Qwen2.5-0.5B",
        "openai/gsm8k",
    )
    assert located("gone.jsonl", folder) == "gone.jsonl"
    assert candidates("a", folder) == [Path("a"), folder / "a"] and candidates("/a", folder) == [Path("/a")]


def test_what_is_in_neither_place_names_both(folder):
    changes = ["data.train.path=gone.jsonl", "model.chat_template=gone.jinja"]
    problems = "\n".join(check(load_recipe("../project/recipe.yaml", changes).recipe, Setting(base=folder)))
    assert (
        f"data.train.path=gone.jsonl: no file matches `gone.jsonl`: there is no such file (looked in {Path.cwd()}, then"
        in problems
    )
    assert (
        f"beside the recipe in {folder})" in problems
        and f"no such file (gone.jinja or {folder}/gone.jinja)" in problems
    )
    with pytest.raises(RewardError, match=r"looked at .*work/gone\.py.* and .*project/gone\.py|gone\.py"):
        load_reward("gone.py:score", folder)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("d.jsonl", "", "`d.jsonl` is empty"),
        ("d.txt", "x", "does not say what it holds"),
        ("d", "x", "does not say what it holds"),
        ("d.jsonl/x", "x", "`d.jsonl` is a folder"),
    ],
)
def test_what_exists_is_no_hub_name_for_the_rules_either(folder, name, text, said):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text)
    recipe = load_recipe("../project/recipe.yaml", [f"data.train.path={name.partition('/')[0]}"]).recipe
    assert any(said in problem for problem in check(recipe, Setting(base=folder)))


def test_what_stands_in_the_place_of_a_model_template_reward_or_recipe_is_said_as_it_is(folder):
    Path("notes").write_text("x")
    Path("drawer").mkdir()
    for key in ("model.path", "method.critic.path"):
        preset = ["method.preset=ppo", "method.critic.model=separate"] if "critic" in key else []
        recipe = load_recipe("../project/recipe.yaml", [*preset, f"{key}=notes"]).recipe
        assert any(p.startswith(f"{key}=notes: this is a file") for p in check(recipe, Setting(base=folder)))
    recipe = load_recipe("../project/recipe.yaml", ["model.chat_template=drawer"]).recipe
    assert "model.chat_template=drawer: drawer is a folder. Name the Jinja file in it" in check(
        recipe, Setting(base=folder)
    )
    for name, said in (("notes", "a file that is no Python source file"), ("drawer", "a folder")):
        with pytest.raises(RewardError, match=rf"The reward '{name}' is {said}.*ends in \.py"):
            load_reward(name, folder)
    with pytest.raises(RecipeError, match=r"drawer: this is a folder, not a recipe file"):
        load_recipe("drawer")

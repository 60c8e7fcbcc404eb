"""`rlpost plan` finds what a run would refuse before its model is loaded, and says what it could not look at."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path

import pytest
from conftest import save_tiny_model

from rlpost.recipe.load import load_recipe
from rlpost.recipe.plan.describe import make_plan, print_plan
from rlpost.run import rehearse

pytestmark = pytest.mark.thorough


@pytest.fixture
def plan(write_recipe, tmp_path):
    """`plan({...})`: the plan of the tiny recipe with these changes."""
    numbers = count()

    def make(changes=None, reward=None, overrides=()):
        more = {} if reward is None else {"reward": reward}
        folder = tmp_path / f"recipe_{next(numbers)}"  # a reward file is imported once
        return make_plan(load_recipe(write_recipe(folder, changes, **more), overrides))

    return make


def problem(plan, *words):
    (found,) = plan.problems
    assert all(word in found for word in words), found


def data(tmp_path, *rows):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data.train": {"type": "dataset", "path": str(tmp_path / "data.jsonl"), "prompt": "question"}}


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model's folder, to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_sound_recipe_and_its_prompts(plan, capsys):
    made = plan()
    assert made.problems == () and made.advice == ()
    print_plan(made)
    assert "No problems found" in capsys.readouterr().out


def test_columns_and_what_rewards_need_of_them(plan, tmp_path):
    rows = [{"quesion": f"{i}?"} for i in range(9)]
    problem(plan(data(tmp_path, *rows)), "data.train.prompt", "`question`", "`quesion`. Set")
    needs = "def reward(completions, solution):\n    return [0.0] * len(completions)\n"
    problem(plan(reward=needs), "needs solution", "answer", "Rename the parameter")
    problem(plan({"model.path": "nobody/tiny-7B"}, needs), "needs solution", "Rename the parameter")


def test_tasks_lengths_and_context(plan):
    problem(plan({"data.train": {"type": "reasoning_gym", "task": "countdwn", "size": 50}}), "countdwn", "countdown")
    problem(plan({"data.max_prompt_tokens": 20, "data.too_long": "refuse"}), "more than 20 tokens", "set data.too_long")
    changes = {"rollout.max_completion_tokens": 256, "learner.micro_batch_tokens": 4096}
    problem(plan(changes), "context of 256 tokens", "Lower rollout.max_completion_tokens")


def test_a_folder_that_lacks_something(plan, model):
    changes = {"model.path": str(model)}
    (model / "chat_template.jinja").unlink()
    problem(plan(changes), "no chat template", "model.chat_template")
    (model / "model.safetensors").unlink()
    assert len(plan(changes).problems) == 2
    assert "this folder has no weights" in plan(changes).problems[0]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert any("no tokenizer can be loaded" in one for one in plan(changes).problems)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "model.path"),
        ('{"model_type": "lama"}', "lama"),
        ('{"model_type": "llama", "hidden_size": "x"}', "hidden_size"),
    ],
)
def test_a_configuration_that_cannot_be_read(text, words, plan, model):
    (model / "config.json").write_text(text)
    made = plan({"model.path": str(model)})
    problem(made, "model.path", words)
    assert "cannot be read" in made.memory_source


@pytest.mark.parametrize(
    ("name", "reason"), [("T5Config", "an encoder-decoder"), ("ViTConfig", "no causal language model")]
)
def test_models_that_are_no_causal_language_models(name, reason, plan, model):
    import transformers

    getattr(transformers, name)().save_pretrained(model)
    problem(plan({"model.path": str(model)}), reason, "Use a decoder-only text model")


def test_hub_names_are_not_looked_at_and_the_plan_says_so(plan):
    made = plan({"model.path": "nobody/tiny-7B", "data.train": {"type": "dataset", "path": "nobody/sums"}})
    assert made.problems == ()
    assert any("model.path=nobody/tiny-7B is a hub name" in note for note in made.advice)
    assert any("data.train.path=nobody/sums is a hub name" in note for note in made.advice)


def test_of_a_large_source_a_sample_is_read(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearse, "SAMPLE", 20)
    made = plan(data(tmp_path, *({"question": f"{i}?", "answer": str(i)} for i in range(50))))
    assert made.problems == () and "data: only the first 20 rows of every source were looked at" in made.advice
    made = plan({"data.held_out": 20})
    assert made.problems == () and len(made.advice) == 1


def test_dropout_in_adapters_is_a_problem(plan):
    problem(plan({"model.lora": {"rank": 4, "dropout": 0.1}}), "model.lora.dropout=0.1", "Set it to 0")


def test_a_context_shorter_than_both_limits_is_used_as_far_as_it_goes(plan, tmp_path):
    save_tiny_model(tmp_path / "short")
    change_config(tmp_path / "short", max_position_embeddings=40)
    assert plan({"model.path": str(tmp_path / "short")}).problems == ()

"""What a recipe takes from the environment is nowhere in what a run writes, prints or sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlpost.errors import RewardError
from rlpost.recipe.load import load_recipe
from rlpost.recipe.plan.describe import make_plan, print_plan
from rlpost.recipe.secrets import conceal, hide, resolve
from rlpost.run.loop import train

SECRET = "sk-planted-4711-0815"
REWARD = """
def reward(completions, key, **columns):
    values = []
    for i, completion in enumerate(completions):
        if len(completion[-1]["content"]) % 3 == 0:
            raise ValueError(f"401 for {key}")
        values.append(float(len(completion[-1]["content"])))
    return values
"""


@pytest.fixture
def recipe(write_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("RLPOST_PLANTED", SECRET)

    def make(**changes) -> Path:
        settings = {
            "rewards.0.arguments": {"key": "${oc.env:RLPOST_PLANTED}", "url": "https://${oc.env:RLPOST_PLANTED}@host/"},
            "rewards.0.completions": "messages",
            "scoring.max_failed_share": 1.0,
            "learner.rollouts": 2,
            "checkpoint.every": 1,
            "tracking": {"wandb": {"mode": "offline"}, "console": False, "report": True},
        }
        return write_recipe(tmp_path, settings | changes, REWARD)

    return make


def leaks(folder: Path) -> list[str]:
    return [str(f) for f in folder.rglob("*") if f.is_file() and SECRET.encode() in f.read_bytes()]


@pytest.mark.thorough
def test_a_run_with_wandb_a_failing_reward_and_a_report_holds_no_secret(recipe, tmp_path, capfd):
    path = recipe()
    train(load_recipe(path))
    assert leaks(tmp_path) == []
    saved = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "key: ${oc.env:RLPOST_PLANTED}" in saved
    assert "https://${oc.env:RLPOST_PLANTED}@host/" in saved
    assert "401 for ${oc.env:RLPOST_PLANTED}" in "".join(
        f.read_text() for f in (tmp_path / "run" / "completions").glob("*.jsonl")
    )
    assert load_recipe(tmp_path / "run" / "recipe.yaml").recipe.rewards[0].arguments["key"] == SECRET
    train(load_recipe(recipe(resume="auto", **{"learner.rollouts": 3})))
    printed = "".join(capfd.readouterr())
    assert "Changed since it was saved" not in printed or "rewards" not in printed
    assert leaks(tmp_path) == [] and SECRET not in printed


def test_an_error_and_a_plan_name_the_reference(recipe, capsys):
    from rlpost.cli import _print_error

    loaded = load_recipe(recipe())
    print_plan(make_plan(loaded))
    print_plan(make_plan(loaded), as_json=True)
    _print_error(RewardError(f"the server refused {SECRET}"))
    out = "".join(capsys.readouterr())
    assert SECRET not in out and "refused ${oc.env:RLPOST_PLANTED}" in out


def test_a_reference_is_resolved_again_where_the_environment_has_it(monkeypatch):
    monkeypatch.setenv("RLPOST_PLANTED", SECRET)
    monkeypatch.delenv("RLPOST_ABSENT", raising=False)
    tree = {"a": ["${oc.env:RLPOST_PLANTED}/x", "${oc.env:RLPOST_ABSENT}", "${other}", 3], "b": None}
    assert resolve(tree) == {"a": [f"{SECRET}/x", "${oc.env:RLPOST_ABSENT}", "${other}", 3], "b": None}
    assert conceal(resolve(tree)) == tree


def test_short_values_are_hidden_where_they_stand_alone(monkeypatch, recipe):
    monkeypatch.setenv("RLPOST_PLANTED", "abc")
    load_recipe(recipe(**{"rewards.0.arguments": {"key": "${oc.env:RLPOST_PLANTED}"}}))
    assert conceal({"a": ["abc", "abcd", 3, None]}) == {"a": ["${oc.env:RLPOST_PLANTED}", "abcd", 3, None]}
    assert hide("abcd abc") == "abcd abc"

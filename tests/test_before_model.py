"""Whatever a run refuses before its model is loaded is a problem of the plan, in the same words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlpost.errors import RlpostError
from rlpost.recipe.load import load_recipe
from rlpost.recipe.plan.describe import make_plan
from rlpost.recipe.rules.check import refuse_unsound
from rlpost.run import assemble as assembling
from rlpost.run.loop import train

pytestmark = pytest.mark.thorough

SOLVED = {"type": "dataset", "demonstration": "solution"}


def rows(folder: Path, *lines: dict) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def earlier_run(folder: Path) -> dict:
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    return {}


def damaged_checkpoint(folder: Path) -> dict:
    checkpoint = folder / "run" / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": {"config.json": {"bytes": 1, "sha256": ""}}}')
    return {"resume": str(checkpoint)}


def duplicates(folder: Path) -> dict:
    return {"data.train": {"type": "dataset", "path": rows(folder, *[{"prompt": "one"}] * 9)}, "data.held_out": 1}


def few_prompts_left(folder: Path) -> dict:
    lines = [{"prompt": "one"}, *[{"prompt": "much too long " * 20 + str(i)} for i in range(9)]]
    return {
        "data.train": {"type": "dataset", "path": rows(folder, *lines)},
        "data.held_out": 0,
        "evaluation.prompts": 0,
    }


def pairs_all_dropped(folder: Path) -> dict:
    path = rows(folder, *[{"prompt": f"{i}", "chosen": "a " * 40, "rejected": "b"} for i in range(9)])
    source = {"type": "preference", "path": path}
    return {"data.train": source, "data.held_out": 1, "method": {"preset": "dpo"}, "rewards": []}


def solutions(texts: list[str], method: dict, **more) -> object:
    def make(folder: Path) -> dict:
        path = rows(folder, *[{"prompt": f"What is {i}?", "solution": text} for i, text in enumerate(texts)])
        changes = {"data.train": {**SOLVED, "path": path}, "data.held_out": 0, "evaluation.prompts": 0}
        return changes | {"method": method} | more

    return make


REFUSALS = {
    "a run of that name": (earlier_run, "already holds a run"),
    "a folder that cannot be written to": (
        lambda folder: {"output_dir": "/proc/x"},
        "Cannot write to the run directory",
    ),
    "a damaged checkpoint": (damaged_checkpoint, "missing or differs"),
    "all prompts too long": (lambda folder: {"data.max_prompt_tokens": 5}, "data.max_prompt_tokens"),
    "all prompts alike": (duplicates, "distinct"),
    "fewer prompts left than a step takes": (few_prompts_left, "Only 1 training prompts are left"),
    "all pairs dropped": (pairs_all_dropped, "No training pair is left"),
    "no solution fits": (
        solutions(["It is so. " * 9] * 9, {"preset": "sft"}, **{"data.max_demonstration_tokens": 12}),
        "can use only 0 of 9 training prompts",
    ),
    "an empty column of solutions": (solutions([""] * 9, {"preset": "hpt"}), "is empty in every row"),
    "no hint fits": (
        solutions(["It is so. " * 99] * 9, {"preset": "ghpo"}, **{"data.max_prompt_tokens": 30}),
        "method.guidance could hardly ever help",
    ),
}


def everything_in(folder):
    """But for what Python compiles of a reward that it imports."""
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


@pytest.mark.parametrize("name", REFUSALS)
def test_the_plan_finds_what_a_run_refuses(name, write_recipe, tmp_path, monkeypatch):
    make, words = REFUSALS[name]
    loaded = load_recipe(write_recipe(tmp_path, make(tmp_path)))
    before = everything_in(tmp_path)
    problems = make_plan(loaded).problems
    assert everything_in(tmp_path) == before, "a plan leaves nothing behind"
    monkeypatch.setattr(assembling, "build_policy", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(RlpostError) as caught:
        refuse_unsound(loaded)
        train(loaded)
    assert words in str(caught.value)
    assert [problem in str(caught.value) for problem in problems] == [True], (problems, str(caught.value))


def test_an_earlier_run_is_not_overwritten_by_one_that_is_refused(write_recipe, tmp_path):
    earlier_run(tmp_path)
    with pytest.raises(RlpostError, match=r"data\.max_prompt_tokens"):
        train(load_recipe(write_recipe(tmp_path, {"data.max_prompt_tokens": 5, "overwrite": True})))
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


@pytest.mark.thorough
def test_a_packaged_model_is_looked_at_before_it_is_unpacked(write_recipe, tmp_path, monkeypatch):
    from rlpost.recipe.plan.memory import find_model_size

    monkeypatch.setenv("RLPOST_CACHE", str(tmp_path / "cache"))
    changes = {"model.path": "package:smollm2-135m", "data.max_prompt_tokens": 5}
    loaded = load_recipe(write_recipe(tmp_path, changes))
    (problem,) = make_plan(loaded).problems
    assert "data.max_prompt_tokens" in problem
    size, _ = find_model_size(loaded.recipe.model)
    assert (size.layers, size.vocabulary, size.exact) == (30, 49152, True) and 134e6 < size.parameters < 135e6
    assert not (tmp_path / "cache" / "models").exists()

"""The command line: errors in one paragraph, exit codes, and no heavy imports where they are not needed."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from rlpost import cli
from rlpost.errors import CheckpointError, RecipeError
from rlpost.recipe.load import LoadedRecipe


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {path: nobody/model}\ndata: {train: {type: arithmetic, size: 200}}\n"
        "rewards: [{function: number}]\nmethod: {preset: grpo}\n"
    )
    return tmp_path / "r.yaml"


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the loop, so that no model is loaded."""
    made: list[LoadedRecipe] = []
    loop = ModuleType("rlpost.run.loop")
    loop.train = lambda loaded: made.append(loaded) or SimpleNamespace(interrupted=False, failed=None)
    monkeypatch.setitem(sys.modules, "rlpost.run.loop", loop)
    monkeypatch.setattr("rlpost.run.conclude.conclude", lambda result, recipe_path, launched, *, report: None)
    return made


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    return caught.value.code or 0


@pytest.mark.parametrize("head", [[], ["train"]])
def test_train_and_its_shorthand(recipe, calls, head):
    assert run(*head, "r.yaml", "learner.rollouts=3", "name=other") == 0
    assert calls[0].recipe.learner.rollouts == 3 and calls[0].recipe.name == "other"


def test_an_interrupted_run_says_so(recipe, calls, monkeypatch):
    monkeypatch.setattr(
        sys.modules["rlpost.run.loop"], "train", lambda loaded: SimpleNamespace(interrupted=True, failed=None)
    )
    assert run("r.yaml") == 130


def test_an_unsound_recipe_does_not_reach_the_loop(recipe, calls, capsys):
    assert run("r.yaml", "evaluation.k=[4]") == 2
    assert not calls
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("RecipeError: r.yaml: evaluation.k=4")


def test_missing_recipe(recipe, capsys):
    assert run("nothing.yaml") == 2
    error = capsys.readouterr().err
    assert "no such recipe file" in error and "Traceback" not in error


def test_mistyped_command(recipe, capsys):
    assert run("trian") == 2
    assert "trian" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "rank", "code", "printed"),
    [
        (RecipeError("bad"), "0", 2, "RecipeError: bad"),
        (RecipeError("bad"), "1", 2, ""),
        (CheckpointError("disk full"), "1", 3, "[process 1] CheckpointError: disk full"),
        (KeyboardInterrupt(), "0", 130, ""),
    ],
)
def test_errors_and_exit_codes(recipe, calls, monkeypatch, capsys, raised, rank, code, printed):
    def fail(_loaded):
        raise raised

    monkeypatch.setattr(sys.modules["rlpost.run.loop"], "train", fail)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("rlpost.errors.LAST_WORD_S", 0.0)
    assert run("r.yaml") == code
    assert capsys.readouterr().err.strip() == printed


def test_other_errors_keep_their_traceback(recipe, calls, monkeypatch):
    def fail(_loaded):
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["rlpost.run.loop"], "train", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["r.yaml"])


def test_plan_fails_on_problems_and_lists_all(recipe, capsys):
    assert run("plan", "r.yaml") == 0
    capsys.readouterr()
    assert run("plan", "r.yaml", "evaluation.k=[4]", "--processes", "3", "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert len(found["problems"]) == 2 and found["batch"]["processes"] == 3


def test_eval_and_report_hand_over(recipe, monkeypatch, capsys):
    seen = []
    evaluate = ModuleType("rlpost.evaluation.checkpoint")
    evaluate.evaluate_checkpoint = lambda loaded, checkpoint: seen.append((loaded.recipe.name, str(checkpoint)))
    report = ModuleType("rlpost.tracking.report")
    report.write_report = lambda run_dir: f"{run_dir}/report/index.html"
    monkeypatch.setitem(sys.modules, "rlpost.evaluation.checkpoint", evaluate)
    monkeypatch.setitem(sys.modules, "rlpost.tracking.report", report)
    assert run("eval", "r.yaml", "--checkpoint", "runs/r/checkpoints/step_1") == 0
    assert seen == [("r", "runs/r/checkpoints/step_1")]
    assert run("report", "runs/r") == 0
    assert "runs/r/report/index.html" in capsys.readouterr().out


def test_rewards(recipe, monkeypatch, capsys):
    tryout = ModuleType("rlpost.scoring.tryout")
    seen = []
    tryout.run_tryout = lambda *arguments, **keys: seen.append((*arguments, keys)) or 1
    monkeypatch.setitem(sys.modules, "rlpost.scoring.tryout", tryout)
    arguments = ["--samples", "s.jsonl", "--deadline", "3", "--argument", "a=1", "--argument", "b=x"]
    assert run("rewards", "try", "mine.py:reward", *arguments) == 1
    spec, samples, deadline, given, keys = seen[0]
    assert (spec, str(samples), deadline, given) == ("mine.py:reward", "s.jsonl", 3.0, {"a": 1, "b": "x"})
    assert keys == {"completions": "auto", "call": "sample", "timeout_score": None}
    assert (
        run(
            "rewards",
            "try",
            "mine.py",
            "--samples",
            "s.jsonl",
            "--completions",
            "text",
            "--call",
            "group",
            "--timeout-score",
            "0",
        )
        == 1
    )
    assert seen[1][-1] == {"completions": "text", "call": "group", "timeout_score": 0.0}
    (recipe.parent / "rewards").mkdir()
    (recipe.parent / "rewards" / "own.py").write_text('"""Rewards what I like.\n\nMore."""\n')
    capsys.readouterr()
    assert run("rewards", "list") == 0
    assert "own                  Rewards what I like.\n" in capsys.readouterr().out


def test_schema_and_reference(capsys):
    assert run("schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "rlpost recipe"
    assert run("recipe-docs") == 0
    assert capsys.readouterr().out.startswith("# Recipe reference")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["rewards", "list"], ["schema"]])
def test_light_commands_import_nothing_heavy(arguments):
    code = (
        "import sys, rlpost.cli\n"
        f"try:\n    rlpost.cli.main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'vllm', 'trl', 'wandb', 'datasets', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_as_accelerate_starts_it(recipe):
    command = [sys.executable, "-m", "rlpost", "r.yaml", "learner.rollouts=none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent)
    assert done.returncode == 2
    assert done.stderr.startswith("RecipeError: r.yaml: learner.rollouts = 'none'")
    assert done.stderr.count("\n") == 1


def test_habits_from_elsewhere_are_answered_with_the_right_form(tmp_path, monkeypatch, capsys):
    from rlpost.cli import main

    monkeypatch.chdir(tmp_path)
    text = "name: r\nmodel: a/b\ndata: {train: {type: arithmetic}}\nmethod: grpo\nrewards: [number]\n"
    (tmp_path / "mine.yaml").write_text(text)
    for arguments, words in (
        (["mine.yaml", "--learner.rollouts=3"], ["without dashes: learner.rollouts=3"]),
        (["mine"], ["Did you mean mine.yaml?"]),
        (["plan", "mine.yaml"], ["such as `path: a/b`", "such as `preset: grpo`", "such as `- function: number`"]),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        said = capsys.readouterr().err
        assert end.value.code == 2 and all(word in said for word in words), said

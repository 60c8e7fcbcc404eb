"""Bad input: one paragraph that names what is wrong, where, and what to do; an exit code of 2, 3 or 4; no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REWARD

from rlpost.cli import main
from rlpost.tracking import rundir
from rlpost.tracking.rundir import RunDirectory

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]

QUICK = {"evaluation.at_start": False, "learner.rollouts": 1}


@pytest.fixture
def refused(write_recipe, tmp_path, capsys):
    """`refused(words, changes, reward=..., code=2)`: runs the recipe, and what it says has all the words."""

    def run(*words: str, changes=None, reward=REWARD, code=2, overrides=(), recipe=None):
        path = recipe or write_recipe(tmp_path, {**QUICK, **(changes or {})}, reward)
        with pytest.raises(SystemExit) as caught:
            main([str(path), *overrides])
        said = capsys.readouterr().err
        assert caught.value.code == code, said
        assert "Traceback" not in said
        paragraph = said[said.index("Error: ") :].strip()
        assert "\n\n" not in paragraph
        missing = [word for word in words if word not in paragraph]
        assert not missing, paragraph
        return paragraph

    return run


def test_no_recipe_file(refused, tmp_path):
    refused("nothing.yaml", "no such recipe file", recipe=tmp_path / "nothing.yaml")


def test_broken_yaml(refused, tmp_path):
    (tmp_path / "broken.yaml").write_text("name: x\nmodel: {path: [}\n")
    refused("broken.yaml", "line 2", "Correct that line", recipe=tmp_path / "broken.yaml")


def test_an_unknown_key_and_its_nearest_name(refused):
    refused("recipe.yaml", "learner.learning_rat", "learning_rate", changes={"learner.learning_rat": 1.0})


def test_short_and_swapped_names(refused):
    refused("did you mean learner.learning_rate?", changes={"learner.lr": 1.0})
    refused("Did you mean `grpo`?", changes={"method.preset": "gpro"})


def test_a_mistyped_argument_of_a_shipped_reward(refused):
    changes = {"rewards": [{"function": "number", "arguments": {"onyl": True}}]}
    refused("number.py", "takes no argument onyl", changes=changes)


def test_dropout_in_adapters(refused):
    refused("model.lora.dropout=0.1", "Set it to 0", changes={"model.lora": {"rank": 4, "dropout": 0.1}})


def test_several_problems_at_once(refused):
    changes = {"rollout.completions_per_prompt": 1, "learner.minibatches": 4, "learner.warmup_steps": 99}
    refused("3 problems", "completions_per_prompt=1", "learner.minibatches=4", "warmup_steps=99", changes=changes)


def test_a_group_of_one(refused):
    refused("completions_per_prompt=1", "at least 2", changes={"rollout.completions_per_prompt": 1})


def test_a_batch_that_does_not_divide(refused):
    refused(
        "prompts_per_step=3",
        "learner.minibatches=2",
        "to 2 or 4",
        changes={"rollout.prompts_per_step": 3, "learner.minibatches": 2},
    )


def test_an_unknown_reward(refused):
    refused("rewards.0.function", "'nubmer'", "Did you mean 'number'", changes={"rewards.0.function": "nubmer"})


REWARDS = {
    "wrong_signature": ("def reward(texts):\n    return [0.0]\n", ("graded.py:reward", "`completions`", "texts"), {}),
    "needs_a_column_that_is_not_there": (
        "def reward(completions, solution):\n    return [0.0]\n",
        ("needs solution", "answer", "Rename the parameter"),
        {},
    ),
    "syntax_error": ("def reward(completions:\n", ("cannot be imported", "SyntaxError", "graded.py"), {}),
    "wrong_length": (
        "def reward(completions, **c):\n    return [0.0] * 3\n",
        ("returned 3 values", "1 were expected", "Let it `return` a list", "rewards try"),
        {},
    ),
    "no_list": (
        "def reward(completions, **c):\n    return 1.0\n",
        ("returned a float", "one number", "Let it `return` a list"),
        {},
    ),
    "nothing": ("def reward(completions, **c):\n    [1.0]\n", ("returned None", "Let it `return` a list"), {}),
    "ends_the_program": ("import sys\nsys.exit(2)\n", ("sys.exit(2)", "graded.py", "__main__"), {}),
    "always_raises": (
        "def reward(completions, **c):\n    raise KeyError('gold')\n",
        ("'graded'", "of 8 completions", "KeyError: 'gold'", "max_failed_share", "rewards try"),
        {},
    ),
    "always_nan": (
        "def reward(completions, **c):\n    return [float('nan')]\n",
        ("5 unparsable", "returned nan", "max_failed_share"),
        {},
    ),
    "always_hangs": (
        "import time\ndef reward(completions, **c):\n    time.sleep(1000)\n",
        ("2 timed_out", "no answer in 0.2 s", "max_failed_share"),
        {"rewards.0.deadline_s": 0.2, "rollout.prompts_per_step": 1, "rollout.completions_per_prompt": 2},
    ),
}


@pytest.mark.parametrize("case", REWARDS)
def test_broken_rewards(case, refused):
    source, words, changes = REWARDS[case]
    refused(*words, reward=source, changes=changes)


def data(tmp_path, *rows):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data.train": {"type": "dataset", "path": str(tmp_path / "data.jsonl"), "prompt": "question"}}


def test_no_such_data_file(refused, tmp_path):
    changes = {"data.train": {"type": "dataset", "path": str(tmp_path / "none.jsonl")}}
    refused("data.train.path", "none.jsonl", "no such file", changes=changes)


def test_a_column_that_is_not_there(refused, tmp_path):
    changes = data(tmp_path, *({"quesion": f"{i}?"} for i in range(9)))
    refused("data.train.prompt", "`question`", "`quesion`", changes=changes)


def test_a_broken_line(refused, tmp_path):
    changes = data(tmp_path, *({"question": f"{i}?"} for i in range(9)))
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('{"question": "3?"\n')
    refused("data.jsonl, line 10, is no JSON object", 'question": "3?"', changes=changes)


def test_no_data(refused, tmp_path):
    refused("data.jsonl` is empty", changes=data(tmp_path))


def test_all_prompts_too_long(refused):
    refused(
        "data.train",
        "36 of 36",
        "more than 8 tokens",
        "Raise the limit",
        changes={"data.max_prompt_tokens": 8, "data.held_out": 0, "data.train.size": 36, "evaluation.prompts": 0},
    )


def test_no_chat_template(refused, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    refused("no chat template", "model.chat_template", changes={"model.path": str(tmp_path / "model")})


def test_a_folder_without_a_model(refused, tmp_path):
    refused("model.path", "no such folder", changes={"model.path": str(tmp_path / "nowhere") + "/"})
    (tmp_path / "empty").mkdir()
    refused("model.path", "no config.json", changes={"model.path": str(tmp_path / "empty")})


def test_a_damaged_model(refused, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused("model.path", "model", changes={"model.path": str(tmp_path / "model")})


def test_weights_that_do_not_fit_their_configuration(refused, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace('"intermediate_size": 96', '"intermediate_size": 112'))
    refused("model.path", "cannot load a causal language model", changes={"model.path": str(tmp_path / "model")})


def test_a_run_directory_that_is_used_already(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    refused("run already holds a run", "resume=auto", "name=", "make quickstart ARGS=overwrite=true")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_run_directory_that_another_run_holds(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "LOCK_WAIT_S", 0.1)
    with RunDirectory.open(tmp_path / "run", fresh=True):
        refused("in use by process", str(os.getpid()), "another name")


def test_an_output_directory_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused("Cannot write", "file", "output_dir=", changes={"output_dir": str(tmp_path / "file" / "runs")})


def test_an_output_directory_on_a_read_only_disk(refused, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(place)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    try:
        refused("Cannot write", "the file system is read-only", "output_dir=", changes={"output_dir": str(place)})
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def test_resume_from_a_folder_that_is_no_checkpoint(refused, tmp_path):
    (tmp_path / "x").mkdir()
    refused("not a complete rlpost checkpoint", "resume=auto", code=3, overrides=[f"resume={tmp_path / 'x'}"])


def test_metrics_that_cannot_be_written_any_more(refused, monkeypatch, tmp_path):
    opened = Path.open

    def full(self, mode="r", *arguments, **keywords):
        if self.name == "metrics.jsonl" and "a" in mode:
            raise OSError(28, "No space left on device")
        return opened(self, mode, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", full)
    refused("metrics.jsonl", "no space left on the disk", "resume=auto", code=4)


@pytest.mark.engine
def test_under_a_launcher_the_message_comes_before_the_launchers_own(write_recipe, children, tmp_path):
    recipe = write_recipe(tmp_path, {**QUICK, "learner.learning_rat": 1.0})
    code, printed = children.run(recipe, launch="cpu.yaml")
    assert code != 0
    assert printed.lstrip().startswith("RecipeError: ") and printed.count("RecipeError: ") == 1, printed

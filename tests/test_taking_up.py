"""What a run says when it is taken up, what it keeps of every start, and how its checkpoints are evaluated afterwards."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from types import SimpleNamespace

import pytest
import yaml
from conftest import REWARD, rows

from rlpost.cli import main
from rlpost.errors import CheckpointError, RecipeError
from rlpost.evaluation.checkpoint import evaluate_checkpoint
from rlpost.learner.resume import check_changes, found_changes
from rlpost.recipe.load import load_recipe
from rlpost.run.conclude import closing_lines, resume_command
from rlpost.run.loop import train

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_recipe, one_thread):
    """Two rollouts of two optimizer steps with another seed, which only the command line says; (recipe, run)."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(
        folder, {"learner.rollouts": 2, "learner.minibatches": 2, "checkpoint.every": 1, "checkpoint.keep": 9}
    )
    train(load_recipe(recipe, ["seed=1"]))
    return recipe, folder / "run"


def kept(run, number):
    return yaml.safe_load((run / f"recipe.{number}.yaml").read_text())


def test_a_resumed_run_says_where_it_goes_on_and_what_was_changed(trained, tmp_path, capsys):
    recipe, original = trained
    run = shutil.copytree(original, tmp_path / "run")
    changes = [f"output_dir={tmp_path}", "seed=1", "learner.rollouts=3", "learner.learning_rate=1e-4"]
    train(load_recipe(recipe, ["resume=auto", *changes]))
    said = " ".join(capsys.readouterr().out.split())
    assert f"Going on from {run}/checkpoints/step_000004: optimizer step 4, after 2 rollouts of 3" in said
    assert "learner.learning_rate 0.001 -> 0.0001" in said and "learner.rollouts 2 -> 3" in said
    assert [kept(run, n)["learner"]["rollouts"] for n in (1, 2)] == [2, 3]
    assert kept(run, 2) == yaml.safe_load((run / "recipe.yaml").read_text())
    train(load_recipe(recipe, [*changes, "overwrite=true"]))
    assert sorted(f.name for f in run.glob("recipe*.yaml")) == ["recipe.1.yaml", "recipe.yaml"]


def test_resume_auto_says_that_it_found_nothing_and_names_the_run_that_may_be_meant(trained, tmp_path, capsys):
    recipe, original = trained
    shutil.copytree(original, tmp_path / "my-run")
    train(load_recipe(recipe, ["resume=auto", f"output_dir={tmp_path}", "name=my-rnu", "learner.rollouts=1"]))
    said = " ".join(capsys.readouterr().out.split())
    assert "there is no checkpoint in" in said and "the run starts anew" in said and "my-run" in said


@pytest.mark.parametrize("damage", ["model.safetensors", "manifest.json", "trainer/state.json", "manifest gone"])
def test_a_damaged_newest_checkpoint_is_answered_with_the_older_one_that_is_whole(damage, trained, tmp_path):
    recipe, original = trained
    run = shutil.copytree(original, tmp_path / "run")
    newest, older = (run / "checkpoints" / f"step_00000{n}" for n in (4, 2))
    if damage == "manifest gone":
        (newest / "manifest.json").unlink()
    else:
        (newest / damage).write_bytes(b"{")
    (run / "checkpoints" / "step_000003" / "trainer" / "rank_0.pt").unlink()
    metrics = (run / "metrics.jsonl").read_bytes()
    at = ["seed=1", f"output_dir={tmp_path}"]
    with pytest.raises(CheckpointError, match=r"optimizer step 2;.*resume=\S+step_000002$") as caught:
        train(load_recipe(recipe, ["resume=auto", *at]))
    assert (run / "metrics.jsonl").read_bytes() == metrics
    offered = str(caught.value).split()[-1]
    assert offered == f"resume={older}"
    train(load_recipe(recipe, [offered, *at]))
    assert rows(run) == rows(original)


def test_other_training_prompts_are_refused_before_a_model_is_loaded(trained, tmp_path, monkeypatch):
    recipe, original = trained
    shutil.copytree(original, tmp_path / "run")
    monkeypatch.setattr("rlpost.run.assemble.build_policy", lambda *_: pytest.fail("a model was loaded"))
    before = (tmp_path / "run" / "recipe.yaml").read_text(), sorted((tmp_path / "run").iterdir())
    with pytest.raises(
        CheckpointError, match="number of training prompts was 36 when it was written and is 32 now"
    ) as e:
        train(load_recipe(recipe, ["resume=auto", "seed=1", f"output_dir={tmp_path}", "data.held_out=8"]))
    assert "data.held_out 4 -> 8" in str(e.value)
    assert before == ((tmp_path / "run" / "recipe.yaml").read_text(), sorted((tmp_path / "run").iterdir()))


def test_a_checkpoint_of_a_version_that_did_not_keep_its_recipe_is_compared_with_the_runs(trained, tmp_path):
    recipe, original = trained
    run = shutil.copytree(original, tmp_path / "run")
    state = run / "checkpoints" / "step_000003" / "trainer" / "state.json"
    counters = {**json.loads(state.read_text()), "recipe": "run", "shape": {"learner.minibatches": 2}}
    state.write_text(json.dumps(counters))
    now = load_recipe(recipe, ["seed=1", "rollout.temperature=0.5"]).recipe
    checkpoint = run / "checkpoints" / "step_000003"
    assert [(c.key, c.before, c.now) for c in found_changes(checkpoint, counters, now)] == [
        ("rollout.temperature", 1.0, 0.5)
    ]
    with pytest.raises(
        CheckpointError, match=r"learner\.stop_after=2 with the old values goes on to the end of this one"
    ):
        check_changes(checkpoint, counters, now)


def test_a_runs_folder_is_answered_with_its_checkpoints(trained, capsys):
    recipe, run = trained
    for folder in (run, run / "checkpoints"):
        with pytest.raises(SystemExit):
            main(["eval", str(recipe), "--checkpoint", str(folder)])
        said = capsys.readouterr().err
        assert f"the newest is --checkpoint {run}/checkpoints/step_000004" in said and "step_000001" in said
    with pytest.raises(SystemExit):
        main([str(recipe), f"resume={run}"])
    assert f"the newest is resume={run}/checkpoints/step_000004" in capsys.readouterr().err


def test_the_checkpoints_run_says_what_was_held_out(trained, caplog):
    recipe, run = trained
    checkpoint = run / "checkpoints" / "step_000004"
    with caplog.at_level(logging.INFO, "rlpost"):
        assert "TRAINED ON" not in caplog.text
        evaluate_checkpoint(load_recipe(recipe), checkpoint)  # its seed is 0
        assert (
            "seed is that of the checkpoint's run: 1 (the recipe: 0)" in caplog.text and "TRAINED ON" not in caplog.text
        )
        page = json.loads(checkpoint.with_name("step_000004.eval.json").read_text())
        assert page["settings"]["seed"] == 1 and page["metrics"]["eval/trained_on"] == 0
        evaluate_checkpoint(load_recipe(recipe, ["seed=0"]), checkpoint)
    assert "OF THE 4 PROMPTS WERE TRAINED ON" in caplog.text
    other = json.loads(checkpoint.with_name("step_000004.eval-2.json").read_text())
    assert other["metrics"]["eval/trained_on"] > 0
    with pytest.raises(RecipeError, match="switches evaluation off"):
        evaluate_checkpoint(load_recipe(recipe, ["evaluation.prompts=0"]), checkpoint)


def test_the_printed_command_evaluates_with_the_runs_own_recipe(trained, capsys):
    _, run = trained
    result = SimpleNamespace(
        interrupted=False,
        accuracy_before=None,
        accuracy_after=None,
        checkpoint=run / "checkpoints" / "step_000004",
        run_dir=run,
    )
    lines = closing_lines(result, run / "r.yaml", "none", ["rlpost", "r.yaml"])
    [line] = [line for line in lines if " eval " in line]
    words = shlex.split(line)[1:]
    assert words[:2] == ["eval", str(run / "recipe.yaml")] and "evaluation.samples=8" in words
    with pytest.raises(SystemExit, match="0"):
        main([*words, "evaluation.samples=2", "evaluation.k=[1,2]"])
    assert "pass@2" in capsys.readouterr().out


def test_a_reward_beside_the_recipe_has_its_full_path_in_the_runs_recipe(write_recipe, tmp_path, monkeypatch):
    recipe = write_recipe(
        tmp_path / "there", {"learner.rollouts": 1, "evaluation.prompts": 0, "rewards.0.function": "graded.py"}
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = train(load_recipe(recipe)).run_dir
    assert kept(run, 1)["rewards"][0]["function"] == str(tmp_path / "there" / "graded.py")


def test_the_printed_resume_command_works_with_a_recipe_that_overwrites(trained, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**kept(trained[1], 1), "overwrite": True}))
    assert resume_command(["rlpost", "r.yaml"], tmp_path) == "rlpost r.yaml resume=auto overwrite=false"
    assert resume_command(["rlpost", "r.yaml"], trained[1]) == "rlpost r.yaml resume=auto"


STATE = REWARD.replace("def reward(completions, ", "def reward(completions, trainer_state, log_metric, ").replace(
    "    texts =",
    "    log_metric('at', trainer_state.global_step)\n    log_metric('of', trainer_state.max_steps)\n    texts =",
)


def test_rewards_see_optimizer_steps_and_evaluation_can_be_off(write_recipe, tmp_path):
    changes = {"learner.rollouts": 3, "learner.minibatches": 2, "evaluation.prompts": 0, "evaluation.every": 1}
    run = train(load_recipe(write_recipe(tmp_path, changes, STATE))).run_dir
    assert [(row["scores/at"], row["scores/of"]) for row in rows(run)[::2]] == [(0, 6), (2, 6), (4, 6)]
    assert not rows(run, "eval")


def test_pairs_without_evaluation(tmp_path, write_recipe):
    lines = [{"prompt": f"What is {i}?", "chosen": f"{i}.", "rejected": "no"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {
        "data.train": {"type": "preference", "path": str(tmp_path / "pairs.jsonl")},
        "data.held_out": 2,
        "rewards": [],
        "method.preset": "dpo",
        "learner.rollouts": 2,
        "evaluation.prompts": 0,
        "evaluation.every": 1,
    }
    result = train(load_recipe(write_recipe(tmp_path, changes)))
    assert result.optimizer_steps == 2 and not rows(result.run_dir, "eval")
    [line] = [line for line in closing_lines(result, tmp_path, "none", []) if " eval " in line]
    assert "evaluation.samples" not in line and "evaluation.k" not in line and "evaluation.prompts=64" in line

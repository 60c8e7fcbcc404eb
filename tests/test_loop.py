"""The main job in this process, on a tiny model: what a run leaves behind, and that its numbers are what they say."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import rows, weights

from rlpost.errors import CheckpointError
from rlpost.evaluation.checkpoint import evaluate_checkpoint, write_page
from rlpost.learner.checkpoint import verify
from rlpost.recipe.load import load_recipe
from rlpost.run.loop import train
from rlpost.tracking.report import write_report

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_recipe, one_thread):
    """A finished run of 3 rollouts: (its folder, its result, its recipe's path)."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(
        folder,
        {
            "learner.rollouts": 3,
            "learner.minibatches": 2,
            "learner.schedule": "linear",
            "learner.warmup_steps": 2,
            "checkpoint.every": 2,
            "evaluation.every": 1,
        },
    )
    return folder / "run", train(load_recipe(recipe)), recipe


def test_one_row_an_optimizer_step_and_evaluations_before_between_and_after(finished):
    run, result, _ = finished
    found = rows(run)
    assert [row["step"] for row in found if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in found if row["kind"] == "eval"] == [0, 2, 4, 6]
    assert [(row["step"], row["kind"]) for row in found][-1] == (6, "eval")
    assert [row["rollout"] for row in found if row["kind"] == "train"] == [0, 0, 1, 1, 2, 2]
    assert (result.optimizer_steps, result.interrupted, result.run_dir) == (6, False, run)
    assert result.accuracy_before == found[0]["eval/accuracy"] and result.accuracy_after == found[-1]["eval/accuracy"]


def test_rows_have_the_promised_keys(finished):
    keys = {
        "reward/mean",
        "reward/std",
        "rewards/graded/mean",
        "scores/failed_share",
        "completions/length_mean",
        "completions/truncated_share",
        "policy/entropy",
        "policy/ratio_mean",
        "mismatch/mean_abs_gap",
        "optimizer/loss",
        "optimizer/grad_norm",
        "optimizer/learning_rate",
        "optimizer/skipped",
        "tokens/useful",
        "tokens/padding_share",
        "time/update",
        "time/step",
    }
    for line in (finished[0] / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "train":
            assert keys <= row.keys()
            assert row["optimizer/grad_norm"] > 0 and row["reward/std"] > 0
            assert row["mismatch/mean_abs_gap"] < 1e-4, "engine and learner must hold the same weights"
            phases = sum(s for key, s in row.items() if key.startswith("time/") and key != "time/step")
            assert 0 < phases <= row["time/step"], "the clock runs through all phases, evaluation apart"
            assert all(value is None or math.isfinite(value) for key, value in row.items() if key != "kind")


def test_the_learning_rate_follows_its_schedule(finished):
    rates = [row["optimizer/learning_rate"] for row in rows(finished[0], "train")]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_completions_are_written_once_a_rollout(finished):
    files = sorted((finished[0] / "completions").iterdir())
    assert [file.name for file in files] == [f"step_{step:06d}.jsonl" for step in (1, 3, 5)]
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(records) == 3 * 2 * 4


def test_checkpoints_are_complete_few_and_in_hugging_face_layout(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, result, _ = finished
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step_000004", "step_000006"]
    assert result.checkpoint == checkpoints[-1]
    for path in checkpoints:
        verify(path)
    model = AutoModelForCausalLM.from_pretrained(checkpoints[-1])
    ids = AutoTokenizer.from_pretrained(checkpoints[-1])("What is 1 + 1?", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, 14, 258)
    old, new = (weights(path)["model.embed_tokens.weight"] for path in checkpoints)
    assert not torch.equal(old, new)


def test_the_saved_recipe_is_the_recipe(finished):
    run, _, recipe = finished
    assert load_recipe(run / "recipe.yaml").recipe == load_recipe(recipe).recipe


@pytest.mark.thorough
def test_the_report_is_a_page(finished):
    page = write_report(finished[0])
    text = page.read_text()
    assert "reward" in text and "s per step" in text, "how long a step took stands among the figures"


def test_a_finished_run_taken_up_again_says_so_and_changes_nothing(finished, capsys):
    run, first, recipe = finished
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "report" not in path.parts}
    result = train(load_recipe(recipe, ["resume=auto"]))
    assert (result.optimizer_steps, result.accuracy_after) == (first.optimizer_steps, first.accuracy_after)
    assert "This run is finished" in capsys.readouterr().out
    changed = [path.name for path, old in before.items() if path.is_file() and path.read_bytes() != old]
    assert changed in ([], ["recipe.yaml"]), "only the recipe may now say resume: auto"


def gradients(write_recipe, folder, **changes):
    recipe = write_recipe(
        folder,
        {
            "learner.rollouts": 2,
            "rollout.prompts_per_step": 4,
            "learner.learning_rate": 1e-4,
            "evaluation.prompts": 0,
            "data.max_prompt_tokens": 24,
            **changes,
        },
    )
    train(load_recipe(recipe))
    found = rows(folder / "run", "train")
    return [row["optimizer/grad_norm"] for row in found], [row["tokens/micro_batches"] for row in found]


@pytest.mark.thorough
def test_layouts_and_micro_batches_do_not_change_the_gradient(write_recipe, tmp_path):
    norms, batches = {}, {}
    for layout, tokens in (("tree", 4096), ("tree", 64), ("sorted", 64), ("padded", 4096)):
        changes = {"learner.layout": layout, "learner.micro_batch_tokens": tokens}
        key = layout, tokens
        norms[key], batches[key] = gradients(write_recipe, tmp_path / f"{layout}{tokens}", **changes)
    assert max(batches["tree", 4096]) == 1 < min(batches["tree", 64]) < min(batches["sorted", 64])
    for found in norms.values():
        assert found == pytest.approx(norms["tree", 4096], rel=1e-5)
    assert min(norms["tree", 4096]) > 0.1


def test_lora_trains_saves_and_resumes(write_recipe, tmp_path):
    changes = {"model.lora": {"rank": 4}, "checkpoint.every": 2, "learner.rollouts": 3, "evaluation.prompts": 0}
    whole = write_recipe(tmp_path / "whole", changes)
    train(load_recipe(whole))
    final = weights(tmp_path / "whole" / "run" / "checkpoints" / "step_000003")
    assert final and all("lora" in name for name in final)
    assert any(value.abs().max() > 0 for name, value in final.items() if "lora_B" in name)
    half = write_recipe(tmp_path / "half", changes)
    train(load_recipe(half, ["learner.rollouts=2"]))
    train(load_recipe(half, ["resume=auto"]))
    again = weights(tmp_path / "half" / "run" / "checkpoints" / "step_000003")
    assert all(torch.equal(again[name], value) for name, value in final.items())
    # The engine's copy is in bfloat16: it is compared after the last sync only, which the half run took for its own second.
    assert without_sync(rows(tmp_path / "half" / "run")) == without_sync(rows(tmp_path / "whole" / "run"))


def without_sync(found: list[dict]) -> list[dict]:
    """The rows without the probe's figures."""
    return [{key: value for key, value in row.items() if not key.startswith("sync/")} for row in found]


def test_one_evaluation_gives_greedy_accuracy_and_pass_at_k_and_replaces_no_other(finished, tmp_path):
    _, result, recipe = finished
    first = result.checkpoint.with_name(result.checkpoint.name + ".eval.json")
    second = first.with_name(first.name.replace(".eval", ".eval-2"))
    sampling = ["evaluation.samples=4", "evaluation.k=[1,4]"]
    for overrides in (sampling, [], sampling):
        evaluate_checkpoint(load_recipe(recipe, overrides), result.checkpoint)
    sampled, greedy = (json.loads(file.read_text()) for file in (first, second))
    assert {"eval/pass@1", "eval/pass@4", "eval/greedy_accuracy"} <= sampled["metrics"].keys()
    assert (len(sampled["completions"]), len(sampled["greedy_completions"])) == (16, 4)
    assert sampled["metrics"]["eval/greedy_accuracy"] == greedy["metrics"]["eval/accuracy"]
    assert [one["completion"] for one in sampled["greedy_completions"]] == [
        one["completion"] for one in greedy["completions"]
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written to .*file.*Its figures are above"):
        write_page(tmp_path / "file" / "step_000001", sampled)
    with pytest.raises(CheckpointError, match="holds a whole model and no adapter"):
        evaluate_checkpoint(load_recipe(recipe, ["model.lora={rank: 4}"]), result.checkpoint)


def test_the_probe_looks_at_a_group_where_none_has_signal(write_recipe, tmp_path, monkeypatch):
    """Also with several minibatches, whose old log-probs leave dead groups out; and other weights in the engine are found."""
    from rlpost.errors import RolloutError
    from rlpost.rollout.transformers_engine import TransformersRolloutEngine

    same = "def reward(completions, **columns):\n    return [1.0] * len(completions)\n"
    changes = {"learner.minibatches": 2, "learner.rollouts": 2, "evaluation.prompts": 0}
    found = rows(train(load_recipe(write_recipe(tmp_path / "well", changes, same))).run_dir)
    probed = [row for row in found if "mismatch/max_abs_gap" in row]
    assert [row["step"] for row in probed] == [1, 3] and all(row["optimizer/grad_norm"] == 0 for row in found)
    assert all(row["mismatch/max_abs_gap"] < 1e-4 and row["tokens/probed"] > 0 for row in probed)

    original = TransformersRolloutEngine.load_weights
    monkeypatch.setattr(
        TransformersRolloutEngine,
        "load_weights",
        lambda self, weights, version=0: original(self, ((n, w * 2) for n, w in weights)),
    )
    with pytest.raises(RolloutError, match="probe|log-prob"):
        train(load_recipe(write_recipe(tmp_path / "ill", changes, same)))

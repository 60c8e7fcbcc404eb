"""Whatever goes wrong at the end of a run: the weights are saved first, the error is said, and so is what was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import weights

from rlpost.errors import CheckpointError, RecipeError, TrainingError
from rlpost.learner.checkpoint import CheckpointStore
from rlpost.learner.learner import DataParallelLearner
from rlpost.policy.model import Policy
from rlpost.recipe.load import load_recipe
from rlpost.run import before_model
from rlpost.run.loop import train
from rlpost.run.parts import Parts
from rlpost.source.sampled import SampledSource

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
CHANGES = {"learner.rollouts": 2}


class Unexpected(Exception):
    """What nobody had thought of."""


def breaks(*_arguments, **_keywords):
    raise Unexpected("broken here")


def whole_model(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


@pytest.fixture
def straight(write_recipe, tmp_path):
    """The weights of the undisturbed run."""
    return weights(train(load_recipe(write_recipe(tmp_path / "straight", CHANGES))).checkpoint)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_policy_that_cannot_be_saved_leaves_its_weights(lora, write_recipe, tmp_path, monkeypatch):
    original, calls = Policy.save, []

    def save(self, *arguments, **keywords):  # the trial at the start works
        calls.append(1)
        return original(self, *arguments, **keywords) if len(calls) == 1 else breaks()

    monkeypatch.setattr(Policy, "save", save)
    recipe = write_recipe(tmp_path, {**CHANGES, "model.lora": lora})
    with pytest.raises(CheckpointError, match=r"step_000002 could not be written: Unexpected: broken here") as caught:
        train(load_recipe(recipe))
    folder = tmp_path / "run" / "checkpoints" / "weights_step_000002"
    assert f"saved in {folder}" in notes(caught.value) and caught.value.exit_code == 3
    monkeypatch.setattr(Policy, "save", original)
    expected = weights(train(load_recipe(recipe, ["name=other"])).checkpoint)
    found = weights(folder)
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)
    assert (folder / "tokenizer.json").is_file()
    if lora is None:
        assert whole_model(folder).config.num_hidden_layers == 2
    else:
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2


def test_a_disk_with_room_for_the_weights_alone_gets_them(straight, write_recipe, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DataParallelLearner, "shared_state", lambda self: SimpleNamespace(items=lambda: full(self)))
    with pytest.raises(CheckpointError, match="no space left on the disk") as caught:
        train(load_recipe(write_recipe(tmp_path / "full", CHANGES)))
    folder = tmp_path / "full" / "run" / "checkpoints" / "weights_step_000002"
    assert "without the optimizer's state" in notes(caught.value)
    assert all(weights(folder)[name].equal(straight[name]) for name in straight)


def test_where_not_even_the_weights_fit_it_is_said(write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("rlpost.run.rescue._weights", breaks)
    monkeypatch.setattr(CheckpointStore, "_finish", breaks)
    with pytest.raises(CheckpointError) as caught:
        train(load_recipe(write_recipe(tmp_path, CHANGES)))
    assert "could not be saved by themselves either: Unexpected: broken here" in notes(caught.value)
    assert not any((tmp_path / "run" / "checkpoints").glob("weights_*"))


def test_an_evaluation_that_breaks_at_the_end_costs_nothing_else(straight, write_recipe, tmp_path, monkeypatch):
    original, calls = SampledSource.evaluate, []

    def evaluate(self):
        calls.append(1)
        return original(self) if len(calls) == 1 else breaks()

    monkeypatch.setattr(SampledSource, "evaluate", evaluate)
    recipe = write_recipe(tmp_path / "eval", CHANGES)
    result = train(load_recipe(recipe))
    assert isinstance(result.failed, Unexpected) and "resume=auto to make up for it" in notes(result.failed)
    assert str(result.checkpoint) in notes(result.failed)
    assert all(weights(result.checkpoint)[name].equal(straight[name]) for name in straight)
    monkeypatch.setattr(SampledSource, "evaluate", original)
    again = train(load_recipe(recipe, ["resume=auto"]))
    assert again.failed is None and again.accuracy_after is not None and again.optimizer_steps == 2


@pytest.mark.parametrize("part", ["scorer", "tracker", "engine", "store", "run", "processes"])
def test_what_cannot_be_closed_is_said_and_the_run_is_whole(part, write_recipe, tmp_path, monkeypatch, caplog):
    original = Parts.close

    def close(self, status):
        broken = getattr(self, part)
        real = broken.close
        replaced = SimpleNamespace(close=lambda *a: (real(*a), breaks()))
        setattr(self, part, replaced)
        original(self, status)

    monkeypatch.setattr(Parts, "close", close)
    result = train(load_recipe(write_recipe(tmp_path, {**CHANGES, "evaluation.prompts": 0})))
    assert result.failed is None and result.checkpoint is not None
    assert "could not be closed (Unexpected: broken here)" in caplog.text


def test_a_report_that_cannot_be_drawn_is_no_error(write_recipe, tmp_path, monkeypatch, capsys):
    from rlpost.run.conclude import draw_report

    result = train(load_recipe(write_recipe(tmp_path, {**CHANGES, "evaluation.prompts": 0})))
    monkeypatch.setattr("rlpost.tracking.report.draw_columns", breaks)
    assert draw_report(result) == "no report: Unexpected: broken here"


def test_an_error_in_mid_run_saves_weights_that_no_checkpoint_has(write_recipe, tmp_path, monkeypatch):
    original = SampledSource.next

    def next_or_break(self, rollout):
        return breaks() if rollout == 3 else original(self, rollout)

    monkeypatch.setattr(SampledSource, "next", next_or_break)
    for every, said in ((0, "weights_step_000003"), (2, "weights_step_000003"), (3, "step_000003")):
        changes = {"learner.rollouts": 4, "checkpoint.every": every, "evaluation.prompts": 0}
        with pytest.raises(Unexpected) as caught:
            train(load_recipe(write_recipe(tmp_path / str(every), changes)))
        folder = tmp_path / str(every) / "run" / "checkpoints" / said
        assert str(folder) in notes(caught.value)
        assert whole_model(folder).config.hidden_size == 64
        kept = {path.name for path in folder.parent.iterdir()}
        assert kept == {0: {said}, 2: {said, "step_000002"}, 3: {"step_000003"}}[every]


def test_what_is_said_last_on_the_command_line(write_recipe, tmp_path, monkeypatch, capsys):
    from rlpost.cli import main

    monkeypatch.setattr(CheckpointStore, "_finish", breaks)
    with pytest.raises(SystemExit) as end:
        main([str(write_recipe(tmp_path, CHANGES))])
    assert end.value.code == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("The weights of step 2, without the optimizer's state, are saved in")


def test_an_evaluation_that_breaks_is_the_last_word_after_the_closing_lines(
    write_recipe, tmp_path, monkeypatch, capsys
):
    from rlpost.cli import main

    original, calls = SampledSource.evaluate, []

    def evaluate(self):
        calls.append(1)
        if len(calls) == 1:
            return original(self)
        raise TrainingError("The engine is gone.")

    monkeypatch.setattr(SampledSource, "evaluate", evaluate)
    with pytest.raises(SystemExit) as end:
        main([str(write_recipe(tmp_path, CHANGES))])
    said = capsys.readouterr()
    assert end.value.code == 4 and "Checkpoint (Hugging Face layout)" in said.out
    assert "TrainingError: The engine is gone.\nThis was the evaluation at the end" in said.err


def test_a_disk_too_small_for_one_checkpoint_is_refused_and_a_short_one_is_said(
    write_recipe, tmp_path, monkeypatch, capsys
):
    from rlpost.recipe.plan.describe import make_plan
    from rlpost.recipe.plan.disk import checkpoint_room
    from rlpost.recipe.plan.memory import find_model_size

    changes = {"learner.rollouts": 4, "checkpoint.every": 1, "evaluation.prompts": 0, "tracking.console": True}
    loaded = load_recipe(write_recipe(tmp_path, changes))
    size, _ = find_model_size(loaded.recipe.model)
    room = checkpoint_room(loaded.recipe, size)
    assert room.at_once == 3 and room.weights == 4 * size.parameters and room.state == 8 * size.parameters

    def disk(free):
        monkeypatch.setattr(before_model.shutil, "disk_usage", lambda _: SimpleNamespace(free=free, total=free))

    disk(room.each - 1)
    (problem,) = make_plan(loaded).problems
    with pytest.raises(CheckpointError, match="There is no room for a checkpoint") as caught:
        train(loaded)
    assert problem == str(caught.value).rstrip(".") and not (tmp_path / "run").exists()
    disk(2 * room.each)
    assert any("the disk will be full before the run ends" in note for note in make_plan(loaded).advice)
    result = train(loaded)
    assert "up to 3 of them at once" in capsys.readouterr().out
    (tmp_path / "run" / "checkpoints" / "step_000004" / "manifest.json").unlink()
    written = sum(f.stat().st_size for f in result.checkpoint.rglob("*") if f.is_file())
    assert written == pytest.approx(room.each, rel=0.1)


def test_a_policy_that_cannot_be_saved_is_refused_at_the_start(write_recipe, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", breaks)
    with pytest.raises(RecipeError, match="could not be saved at the end"):
        train(load_recipe(write_recipe(tmp_path, CHANGES)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


KINDS = {
    "sampling without do_sample": {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
    "beams without beams": {"early_stopping": True, "length_penalty": 0.8},
    "a pad token below 0": {"pad_token_id": -1},
    "output without a dictionary": {"output_scores": True},
    "several sequences of greedy decoding": {"num_return_sequences": 3, "eos_token_id": [1]},
    "a cache that is not known": {"cache_implementation": "foo", "top_k": 20, "do_sample": True},
    "no tokens": {"max_new_tokens": 0},
    "a list": [1],
    "no JSON": None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_generation_config_keeps_a_model_from_being_saved(kind, tiny_model, tmp_path):
    from rlpost.policy.model import load_policy
    from rlpost.recipe.sections.model import ModelSection

    settings, folder = KINDS[kind], tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text("{" if settings is None else json.dumps(settings))
    policy = load_policy(ModelSection(path=str(folder), autocast="none"), str(folder))
    assert "generation_config.json" in " ".join(policy.notes)
    policy.save(tmp_path / "saved")
    whole = policy.causal_lm.generation_config
    found = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    if kind in ("a list", "no JSON"):
        assert "temperature" not in found
    elif "read" in " ".join(policy.notes):  # transformers cannot even read it: what it can is kept
        dropped = {"num_return_sequences", "cache_implementation", "max_new_tokens"}
        assert {k: v for k, v in found.items() if k in settings} == {
            k: settings[k] for k in settings if k not in dropped
        }
    else:
        assert {k: found[k] for k in settings} == settings and whole.temperature == settings.get("temperature")
    again = load_policy(ModelSection(path=str(tmp_path / "saved"), autocast="none"), str(tmp_path / "saved"))
    assert all(a.equal(b) for a, b in zip(again.parameters(), policy.parameters(), strict=True))

"""Preference runs from a recipe: offline pairs without an engine, exact resume, the reference cache, pairs on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from conftest import rows, save_tiny_model, weights

from rlpost.errors import RecipeError
from rlpost.recipe.load import load_recipe
from rlpost.recipe.rules.check import Setting, check
from rlpost.run.loop import train

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLPOST_CACHE", str(tmp_path / "cache"))


def write_pairs(path: Path, count: int = 20, seed: int = 0) -> Path:
    """Pairs in which the chosen response repeats the prompt's letter and the rejected one does not."""
    draw = random.Random(seed)
    lines = []
    for i in range(count):
        letter = draw.choice("abcdef")
        bad = "".join(draw.choice("uvwxyz") for _ in range(draw.randint(2, 7)))
        lines.append({"prompt": f"{letter} {i}", "chosen": letter * draw.randint(2, 6), "rejected": bad})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def pair_recipe(folder: Path, tiny_model: str, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tree = {
        "name": "run",
        "output_dir": str(folder),
        "model": {"path": tiny_model, "dtype": "float32", "autocast": "none"},
        "data": {
            "train": {"type": "preference", "path": str(write_pairs(folder / "pairs.jsonl"))},
            "held_out": 4,
            "max_prompt_tokens": 32,
        },
        "rollout": {"prompts_per_step": 4, "max_completion_tokens": 16},
        "method": {"preset": "rpo", "pairs": {"beta": 0.5}},
        "learner": {"rollouts": 6, "learning_rate": 3e-3},
        "tracking": {"wandb": {"mode": "disabled"}, "console": False, "report": False},
    }
    for path, value in changes.items():
        *above, last = path.split("__")
        place = tree
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def run(recipe: Path, *overrides: str):
    loaded = load_recipe(recipe, overrides)
    assert check(loaded.recipe, Setting(1, recipe.parent)) == []
    return train(loaded)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_recipe_learns_from_pairs_without_an_engine(tmp_path, tiny_model, one_thread):
    result = run(pair_recipe(tmp_path, tiny_model))
    train_rows = rows(result.run_dir, "train")
    assert len(train_rows) == 6
    first, last = train_rows[0], train_rows[-1]
    assert first["pairs/margin"] == pytest.approx(0, abs=1e-5)
    assert first["pairs/preference_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert last["pairs/margin"] > 0.1
    assert result.accuracy_after == 1.0
    held_out = rows(result.run_dir, "eval")[-1]
    assert {"eval/chosen_logp", "eval/rejected_logp", "eval/margin", "eval/chosen_logp_per_token"} <= held_out.keys()
    assert result.checkpoint is not None and (result.checkpoint / "model.safetensors").is_file()


def test_every_pair_is_a_tie_before_the_first_update(tmp_path, tiny_model, one_thread):
    """The policy is its own reference then, in the same rows: not one bit differs."""
    changes = {"learner__rollouts": 1, "evaluation__prompts": 0, "data__held_out": 0}
    recipe = pair_recipe(tmp_path, tiny_model, method__pairs={"beta": 0.5, "reference": "live"}, **changes)
    (first,) = rows(run(recipe).run_dir, "train")
    assert (first["pairs/accuracy"], first["pairs/margin"]) == (0.5, 0.0)


def test_killed_and_resumed_equals_never_stopped(tmp_path, tiny_model, one_thread):
    whole = run(pair_recipe(tmp_path / "a", tiny_model, learner__minibatches=2))
    recipe = pair_recipe(tmp_path / "b", tiny_model, learner__minibatches=2, checkpoint__every=3, checkpoint__keep=9)
    run(recipe)
    stopped = tmp_path / "b" / "run" / "checkpoints" / "step_000003"  # in the middle of a rollout
    again = run(recipe, f"resume={stopped}")
    assert rows(whole.run_dir) == rows(again.run_dir)
    assert same(weights(whole.checkpoint), weights(again.checkpoint))


def test_resume_without_the_cache_computes_the_same_reference(tmp_path, tiny_model, one_thread, monkeypatch):
    recipe = pair_recipe(tmp_path, tiny_model, checkpoint__every=2, checkpoint__keep=9)
    whole = rows(run(recipe).run_dir)
    monkeypatch.setenv("RLPOST_CACHE", str(tmp_path / "another"))
    again = run(recipe, f"resume={tmp_path / 'run' / 'checkpoints' / 'step_000002'}")
    assert rows(again.run_dir) == whole


def test_the_reference_is_computed_once(tmp_path, tiny_model, one_thread):
    from rlpost.source.pairs import PairSource

    first = rows(run(pair_recipe(tmp_path, tiny_model)).run_dir)
    kept = sorted((tmp_path / "cache" / "reference").iterdir())
    assert len(kept) == 2  # training and held-out pairs
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairSource, "reference_logprobs", lambda self, buffer: calls.append(buffer))
        again = rows(run(pair_recipe(tmp_path / "again", tiny_model)).run_dir)
    assert calls == []
    assert again == first
    run(pair_recipe(tmp_path / "other", tiny_model, seed=3))  # other held-out pairs
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 4


def test_the_cache_tells_models_apart_and_mends_itself(tmp_path, tiny_model, one_thread):
    from rlpost.source.pairs import PairSource

    def kept() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (tmp_path / "cache" / "reference").iterdir()}

    short = {"learner__rollouts": 1}
    first = rows(run(pair_recipe(tmp_path / "a", tiny_model, **short)).run_dir)
    one = kept()
    save_tiny_model(tmp_path / "model", seed=1)  # of the same shape and size
    other = rows(run(pair_recipe(tmp_path / "b", str(tmp_path / "model"), **short)).run_dir)
    both = kept()
    assert len(one) == 2 and len(both) == 4 and one.items() <= both.items()
    assert other[0]["eval/chosen_logp"] != pytest.approx(first[0]["eval/chosen_logp"], rel=1e-3)

    damaged, calls = sorted(one), []
    folder = tmp_path / "cache" / "reference"
    (folder / damaged[0]).write_bytes(one[damaged[0]][:-9])  # cut off
    (folder / damaged[1]).write_bytes(b"no safetensors")
    computed = PairSource.reference_logprobs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairSource, "reference_logprobs", lambda loop, b: calls.append(b) or computed(loop, b))
        again = rows(run(pair_recipe(tmp_path / "c", tiny_model, **short)).run_dir)
    assert len(calls) == 2 and again == first
    assert kept() == both  # written anew, the same


@pytest.mark.parametrize("layout", ["sorted", "padded"])
def test_layouts_and_micro_batches_change_nothing(tmp_path, tiny_model, one_thread, layout):
    tree = rows(run(pair_recipe(tmp_path / "a", tiny_model, learner__layout="tree")).run_dir, "train")
    changes = {"learner__layout": layout, "learner__micro_batch_tokens": 96}
    other = rows(run(pair_recipe(tmp_path / "b", tiny_model, **changes)).run_dir, "train")
    assert other[0]["tokens/micro_batches"] > tree[0]["tokens/micro_batches"]
    for a, b in zip(tree, other, strict=True):
        for key in ("pairs/loss", "optimizer/grad_norm", "pairs/chosen_logp"):
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=2e-4), key


def test_eta_zero_is_dpo_bit_for_bit(tmp_path, tiny_model, one_thread):
    dpo = run(pair_recipe(tmp_path / "a", tiny_model, method={"preset": "dpo", "pairs": {"beta": 0.5}}))
    zero = {"preset": "rpo", "pairs": {"beta": 0.5, "sft": {"type": "sum", "eta": 0}}}
    rpo = run(pair_recipe(tmp_path / "b", tiny_model, method=zero))
    assert same(weights(dpo.checkpoint), weights(rpo.checkpoint))
    assert rows(dpo.run_dir) == rows(rpo.run_dir)


def test_lora_uses_the_model_without_its_adapter(tmp_path, tiny_model, one_thread):
    changes = {"model__lora": {"rank": 4}, "method__pairs": {"beta": 0.5, "reference": "live"}}
    live = rows(run(pair_recipe(tmp_path / "a", tiny_model, **changes)).run_dir, "train")
    cached = {"model__lora": {"rank": 4}, "method__pairs": {"beta": 0.5}}
    kept = rows(run(pair_recipe(tmp_path / "b", tiny_model, **cached)).run_dir, "train")
    assert live[-1]["pairs/margin"] > 0.01
    for a, b in zip(live, kept, strict=True):
        assert a["pairs/loss"] == pytest.approx(b["pairs/loss"], rel=1e-4)


def test_pairs_made_on_the_spot(tmp_path, write_recipe, one_thread):
    recipe = write_recipe(tmp_path, {"method": {"preset": "rpo", "pairs": {"beta": 0.5}}, "learner.rollouts": 3})
    result = run(recipe)
    found = rows(result.run_dir, "train")
    assert len(found) == 3
    assert all(row["pairs/made"] == 2 for row in found)
    assert {"reward/mean", "pairs/chosen_logp", "mismatch/mean_abs_gap"} <= found[0].keys()
    assert found[0]["pairs/margin"] == pytest.approx(0, abs=1e-5)
    sampled = [
        json.loads(line) for line in (result.run_dir / "completions" / "step_000001.jsonl").read_text().splitlines()
    ]
    assert len(sampled) == 8  # everything that was sampled, not only the pairs


ONLINE = {"method": {"preset": "rpo", "pairs": {"beta": 0.5}}, "learner.rollouts": 3}


def test_online_pairs_killed_and_resumed_equal_never_stopped(tmp_path, write_recipe, one_thread):
    changes = ONLINE | {"learner.minibatches": 2}
    whole = run(write_recipe(tmp_path / "a", changes))
    recipe = write_recipe(tmp_path / "b", changes | {"checkpoint": {"every": 1, "keep": 9}})
    run(recipe)
    for step in (3, 2):  # in the middle of a rollout, whose pairs are in the checkpoint; and between two
        again = run(recipe, f"resume={tmp_path / 'b' / 'run' / 'checkpoints' / f'step_{step:06d}'}")
        assert rows(whole.run_dir) == rows(again.run_dir)
        assert same(weights(whole.checkpoint), weights(again.checkpoint))
    sampled = [sorted((r.run_dir / "completions").rglob("*.jsonl")) for r in (whole, again)]
    assert [f.name for f in sampled[0]] == [f.name for f in sampled[1]]


def test_rollouts_without_a_pair_change_nothing(tmp_path, write_recipe, tiny_model, one_thread):
    level = "def reward(completions, **columns):\n    return [0.5 for _ in completions]\n"
    result = run(write_recipe(tmp_path, ONLINE | {"learner.minibatches": 2}, reward=level))
    found = rows(result.run_dir, "train")
    assert len(found) == 6 and all(row["pairs/made"] == row["pairs/made_share"] == 0 for row in found)
    assert all(row["optimizer/grad_norm"] == 0 and not row["optimizer/skipped"] for row in found)
    assert not any("pairs/loss" in row for row in found)  # no mean over nothing
    assert same(weights(result.checkpoint), weights(Path(tiny_model)))


@pytest.mark.engine
@pytest.mark.parametrize("launch", ["cpu2.yaml", pytest.param("cpu-zero3.yaml", marks=pytest.mark.slow)])
def test_two_processes_take_the_same_steps(tmp_path, tiny_model, children, one_thread, launch):
    alone = rows(run(pair_recipe(tmp_path / "a", tiny_model)).run_dir)
    recipe = pair_recipe(tmp_path / "b", tiny_model)
    code, printed = children.run(recipe, launch=launch, RLPOST_CACHE=str(tmp_path / "cache2"))
    assert code == 0, printed
    two = rows(tmp_path / "b" / "run")
    assert len(two) == len(alone)
    for a, b in zip(alone, two, strict=True):
        for key in a.keys() & {
            "pairs/loss",
            "pairs/accuracy",
            "pairs/chosen_logp",
            "optimizer/grad_norm",
            "eval/margin",
        }:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key


def test_advice_when_chosen_responses_fall():
    from rlpost.tracking.advice import advise

    def row(step: int, accuracy: float, fall: float) -> dict:
        return {"kind": "train", "step": step, "pairs/accuracy": accuracy, "pairs/chosen_log_ratio_per_token": fall}

    falling = [row(i, 0.5 + 0.04 * i, -0.01 * i) for i in range(1, 9)]
    assert [one.id for one in advise(falling)] == ["chosen-falls"]
    assert "method.pairs.sft.eta" in advise(falling)[0].text
    assert "from 0.50 to 0.74" in advise(falling)[0].text
    assert advise([row(i, 0.5 + 0.04 * i, 0.01 * i) for i in range(1, 9)]) == []
    assert advise([row(i, 0.5, -0.01 * i) for i in range(1, 9)]) == []
    # What the first batch happens to show is noise; accuracy starts at a tie.
    assert [one.id for one in advise([row(0, 0.9, 0.0), *falling])] == ["chosen-falls"]
    assert advise([row(0, 0.1, 0.0)] + [row(i, 0.54, -0.1) for i in range(1, 9)]) == []


def test_the_report_shows_the_over_optimisation_curve(tmp_path, tiny_model, one_thread, monkeypatch):
    from matplotlib.figure import Figure

    from rlpost.tracking.report import write_report

    result = run(pair_recipe(tmp_path, tiny_model, learner__rollouts=3, evaluation__every=1))
    drawn: dict[str, list[dict]] = {}
    save = Figure.savefig

    def read(figure, path, **options):
        panels = [{line.get_label(): list(zip(*line.get_data(), strict=True)) for line in a.lines} for a in figure.axes]
        drawn[Path(path).name] = panels
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", read)
    page = write_report(result.run_dir)
    assert "Log-prob of chosen responses" in page.read_text()

    def points(kind: str, key: str) -> list:
        return [(row["step"], row[key]) for row in rows(result.run_dir, kind)]

    logps, margins = drawn["chosen_logp.png"]
    assert logps["chosen, training batches"] == points("train", "pairs/chosen_logp")
    assert logps["chosen, held out"] == points("eval", "eval/chosen_logp")
    assert logps["rejected, held out"] == points("eval", "eval/rejected_logp")
    assert margins["training batches"] == points("train", "pairs/margin")
    assert margins["held out"] == points("eval", "eval/margin")
    assert len(points("eval", "eval/margin")) == 4  # before, after each step


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"preset": "grpo"}}, "does not learn from pairs"),
        ({"learner__micro_batch_tokens": 60}, "a pair is never split"),
        ({"rollout__temperature": 0.7}, "rollout.temperature"),
        ({"rewards": [{"function": "number"}]}, "Remove the rewards"),
        ({"data__eval": {"type": "arithmetic"}}, "data.eval"),
        ({"data__train__baseline": "own"}, "method.pairs.baseline=initial"),
    ],
)
def test_unsound_recipes_are_refused(tmp_path, tiny_model, changes, words):
    recipe = load_recipe(pair_recipe(tmp_path, tiny_model, **changes)).recipe
    assert any(words in problem for problem in check(recipe, Setting(1, tmp_path)))


@pytest.mark.parametrize("slot", [{"masks": [{"type": "random", "rate": 0.1}]}, {"kl": {"coefficient": 0.1}}])
def test_slots_that_cannot_act_on_pairs_are_refused(tmp_path, tiny_model, slot):
    with pytest.raises(RecipeError, match="cannot act together"):
        load_recipe(pair_recipe(tmp_path, tiny_model, method={"preset": "dpo", **slot}))


def test_eval_judges_a_checkpoint_as_the_run_did(tmp_path, tiny_model, one_thread, monkeypatch):
    from rlpost.evaluation.pairs import evaluate_pairs

    recipe = pair_recipe(tmp_path, tiny_model)
    result = run(recipe)
    last = rows(result.run_dir, "eval")[-1]
    monkeypatch.setenv("RLPOST_CACHE", str(tmp_path / "none"))  # the reference model is loaded then
    found = evaluate_pairs(load_recipe(recipe), result.checkpoint)
    assert found["margin"] == pytest.approx(last["eval/margin"], rel=1e-4)
    assert found["accuracy"] == last["eval/accuracy"]
    assert result.checkpoint.with_name(result.checkpoint.name + ".eval.json").is_file()

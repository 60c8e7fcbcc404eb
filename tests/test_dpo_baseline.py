"""`method.pairs.baseline: initial`: responses of the initial model, from the data set or sampled before training."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import rows, weights
from test_dpo_run import pair_recipe, run, same

from rlpost.data.pairs import build_pairs
from rlpost.data.tokenizer import load_tokenizer
from rlpost.recipe.load import load_recipe
from rlpost.recipe.plan.describe import make_plan

pytestmark = pytest.mark.engine

TERMS = {
    "sum": {"type": "sum", "eta": 0.2},
    "sequence_mean": {"type": "sequence_mean", "weight": 0.3},
    "token_mean": {"type": "token_mean", "weight": 0.4},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLPOST_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def initial(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def recipe_with(folder, tiny_model, sft="sum", **changes):
    """Every step has all 16 training pairs, so the first one's figures are of the initial model on all of them."""
    pairs = {"beta": 0.5, "baseline": "initial", "sft": TERMS[sft]}
    changes = {"method__pairs": pairs, "rollout__prompts_per_step": 16, "learner__rollouts": 2} | changes
    return pair_recipe(folder, tiny_model, rollout__engine={"type": "transformers"}, **changes)


def training_pairs(path):
    recipe = load_recipe(path).recipe
    tokenizer = load_tokenizer(recipe.model)
    return build_pairs(recipe.data, tokenizer, max_context=256, seed=recipe.seed, max_completion_tokens=16).train


def logp(model, prompt, response) -> float:
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(scores.gather(1, torch.tensor(response)[:, None]).sum())


def greedy(model, prompt, limit=16, end=1) -> tuple[int, ...]:
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] != end):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def printed(sft, found) -> float:
    """The SFT term of (sum of log-probs, tokens) of every pair's response of the initial model."""
    if sft == "sum":
        return -0.2 * 0.5 * sum(lp for lp, _ in found) / len(found)
    if sft == "sequence_mean":
        return -0.3 * sum(lp / n for lp, n in found) / len(found)
    return -0.4 * sum(lp for lp, _ in found) / sum(n for _, n in found)


@pytest.mark.parametrize("sft", TERMS)
def test_responses_of_a_column_are_held_up(tmp_path, tiny_model, initial, one_thread, sft):
    recipe = recipe_with(tmp_path, tiny_model, sft, data__train__baseline="own")
    file = tmp_path / "pairs.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps(line | {"own": f"own {i}" * (1 + i % 2)}) for i, line in enumerate(lines)))
    first = rows(run(recipe).run_dir, "train")[0]
    found = [(logp(initial, pair.token_ids, pair.baseline), len(pair.baseline)) for pair in training_pairs(recipe)]
    assert first["pairs/sft_loss"] == pytest.approx(printed(sft, found), rel=1e-4)
    assert not (tmp_path / "cache" / "baseline").exists()


def test_without_a_column_they_are_sampled_once_and_kept(tmp_path, tiny_model, initial, one_thread, monkeypatch):
    from rlpost.evaluation.pairs import evaluate_pairs
    from rlpost.rollout.transformers_engine import TransformersRolloutEngine

    recipe = recipe_with(tmp_path / "a", tiny_model, checkpoint__every=1, checkpoint__keep=9)
    assert make_plan(load_recipe(recipe)).order[0].startswith("once, before training: a greedy response")
    result = run(recipe)
    own = [greedy(initial, pair.token_ids) for pair in training_pairs(recipe)]
    found = [
        (logp(initial, pair.token_ids, ids), len(ids)) for pair, ids in zip(training_pairs(recipe), own, strict=True)
    ]
    first = rows(result.run_dir, "train")[0]
    assert first["pairs/sft_loss"] == pytest.approx(printed("sum", found), rel=1e-4)
    (kept,) = (tmp_path / "cache" / "baseline").iterdir()

    def refuse(*_arguments, **_keywords):
        raise AssertionError("an engine was started")

    with monkeypatch.context() as patch:
        patch.setattr(TransformersRolloutEngine, "from_path", refuse)
        whole, last = rows(result.run_dir), weights(result.checkpoint)
        again = run(recipe, f"resume={tmp_path / 'a' / 'run' / 'checkpoints' / 'step_000001'}")
        assert rows(again.run_dir) == whole and same(weights(again.checkpoint), last)
        judged = evaluate_pairs(load_recipe(recipe), result.checkpoint)
    assert judged["sft_loss"] == pytest.approx(whole[-1]["eval/sft_loss"], rel=1e-4)

    kept.write_bytes(kept.read_bytes()[:-5])  # damaged: sampled anew, the same
    assert rows(run(recipe_with(tmp_path / "b", tiny_model)).run_dir) == whole

"""Tokens of a tokenizer that the model's embedding does not have: refused where a run would use them, noted where not."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from conftest import save_tiny_model
from transformers import AutoTokenizer

from rlpost.data.vocabulary import check_vocabulary, special_problem, tokens_beyond
from rlpost.errors import DataError, RecipeError, RewardError
from rlpost.experience import Completion, Demonstration, Group, Message, Outcome, Prompt
from rlpost.recipe.load import load_recipe
from rlpost.recipe.rules.check import Setting, check
from rlpost.recipe.sections.reward import RewardModelSection
from rlpost.run.loop import train
from rlpost.scoring.reward_model import RewardModel

ROWS = 258  # of the tiny model's embedding, and its tokenizer's tokens as it is saved
SIZES = "the tokenizer has 260 tokens, the embedding 258 rows"


def extend(folder: str | Path, **changes: str) -> str:
    """Gives the tokenizer in `folder` two tokens more; `changes` are to be set on it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(tmp_path) -> Path:
    save_tiny_model(tmp_path / "model")
    return tmp_path / "model"


def prompt(token_ids=(5, 6), text="What?", **more) -> Prompt:
    return Prompt("data/7", (Message(role="user", content=text),), text, tuple(token_ids), **more)


def test_tokens_that_nothing_writes_are_noted(model, caplog):
    """As in Gemma 3's text models, whose tokenizer has one for images."""
    tokenizer = AutoTokenizer.from_pretrained(extend(model))
    assert tokens_beyond(tokenizer, ROWS) == {258: "<think>", 259: "</think>"}
    assert special_problem(tokenizer, ROWS) is None
    with caplog.at_level(logging.WARNING, logger="rlpost"):
        check_vocabulary(tokenizer, ROWS, [prompt()], path="here")
    assert "<think> (258), </think> (259), beyond the embedding" in caplog.text and SIZES in caplog.text
    caplog.clear()
    check_vocabulary(tokenizer, 260, [prompt((258,))], path="here")
    assert not caplog.text


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eos_token": "</think>"}, "its eos_token </think> is </think> (259), beyond"),
        ({"pad_token": "<think>"}, "its pad_token <think> is <think> (258), beyond"),
        ({"chat_template": TEMPLATE}, "its chat template writes <think> (258), beyond"),
    ],
    ids=["eos", "pad", "template"],
)
def test_tokens_that_every_run_uses_are_refused_by_the_plan(model, write_recipe, tmp_path, changes, said):
    extend(model, **changes)
    recipe = load_recipe(write_recipe(tmp_path, {"model.path": str(model)}))
    (problem,) = check(recipe.recipe, Setting(1, tmp_path))
    assert said in problem and SIZES in problem and "resize_token_embeddings" in problem
    with pytest.raises(RecipeError, match="does not know all of its tokenizer's tokens"):
        train(recipe)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_tokens_that_the_data_write_are_refused_by_the_prompts_name(model):
    tokenizer = AutoTokenizer.from_pretrained(extend(model))
    with pytest.raises(
        DataError, match=r"The text of prompt data/7 has </think> \(259\), beyond .* 260 tokens.* 258 rows"
    ):
        check_vocabulary(tokenizer, ROWS, [prompt(), prompt((5, 259))], path="here")
    solved = prompt(demonstration=Demonstration("because <think> so"))
    with pytest.raises(DataError, match=r"The worked solution of prompt data/7 has <think> \(258\)"):
        check_vocabulary(tokenizer, ROWS, [solved], path="here")


@pytest.mark.thorough
def test_a_literal_token_in_a_data_set_is_refused_before_the_model_is_loaded(
    model, write_recipe, tmp_path, monkeypatch
):
    extend(model)
    monkeypatch.setattr("rlpost.run.assemble.build_policy", lambda *_: pytest.fail("too late"))
    rows = [{"question": f"{i} {'<think>' if i == 5 else ''}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"type": "dataset", "path": str(tmp_path / "rows.jsonl"), "prompt": "question"}
    recipe = load_recipe(write_recipe(tmp_path, {"model.path": str(model), "data.train": data}))
    with pytest.raises(DataError, match=r"The text of prompt .*5 has <think> \(258\)"):
        train(recipe)


def test_pairs_are_looked_at_too(model):
    from rlpost.data.pairs import Pair

    def response(*ids):
        return Completion(ids, (), "", "stop")

    pair = Pair("p/3", (), "What?", (5, 6), chosen=response(7, 1), rejected=response(258, 1))
    tokenizer = AutoTokenizer.from_pretrained(extend(model))
    with pytest.raises(DataError, match=r"The response of prompt p/3 has <think> \(258\)"):
        check_vocabulary(tokenizer, ROWS, [pair], path="here")


def test_a_reward_model_does_not_score_what_it_does_not_know(classifier, tmp_path):
    import shutil

    folder = tmp_path / "reward"
    shutil.copytree(classifier, folder)
    extend(folder)
    completions = tuple(Completion((5,), (0.0,), text, "stop") for text in ("fine", "well <think> well"))
    with RewardModel(RewardModelSection(type="model", path=str(folder))) as scorer:
        (group,) = scorer.score([Group(prompt(), completions)])
    first, second = (scores[0] for scores in group.scores)
    assert first.outcome is Outcome.SCORED and second.outcome is Outcome.UNPARSABLE
    assert "does not know" in second.detail and "<think>" in second.detail
    extend(folder, chat_template=TEMPLATE)
    with pytest.raises(RewardError, match=r"its chat template writes <think> \(258\)"):
        RewardModel(RewardModelSection(type="model", path=str(folder)))

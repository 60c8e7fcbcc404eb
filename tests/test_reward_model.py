"""Reward models: loaded whole or not at all, batched without changing a score, and usable beside reward functions."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from rlpost.errors import RewardError
from rlpost.experience import Completion, Group, Outcome, Prompt
from rlpost.recipe.sections.reward import RewardModelSection, RewardSection, ScoringSection
from rlpost.scoring.factory import JoinedScorers, make_scorer
from rlpost.scoring.reward_model import RewardModel
from rlpost.scoring.scorer import Scorer

TEXTS = [["four", "it is 4, I think", ""], ["Paris"]]
pytestmark = pytest.mark.usefixtures("one_thread")


def section(path: str, **changes) -> RewardModelSection:
    return RewardModelSection.model_validate({"path": path, "dtype": "float32", "device": "cpu", **changes})


def groups() -> list[Group]:
    def prompt(i: int, question: str) -> Prompt:
        return Prompt(f"p/{i}", ({"role": "user", "content": question},), f"u:{question}\na:", (5, 6))

    def completion(text: str) -> Completion:
        return Completion((7,) * len(text), (-1.0,) * len(text), text, "stop")

    questions = ["2+2?", "The capital of France, please?"]
    return [
        Group(prompt(i, q), tuple(map(completion, texts)))
        for i, (q, texts) in enumerate(zip(questions, TEXTS, strict=True))
    ]


def flat(scored: list[Group]) -> list[float | None]:
    return [score.value for group in scored for row in group.scores for score in row]


def test_scores_are_the_models_own_on_the_templated_conversation(classifier):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    expected = []
    for group in groups():
        for completion in group.completions:
            chat = [*group.prompt.messages, {"role": "assistant", "content": completion.text}]
            ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False).input_ids
            with torch.no_grad():
                expected.append(float(model(input_ids=torch.tensor([ids])).logits[0, 0]))
    with RewardModel(section(classifier)) as reward:
        assert reward.names == ("reward_model",)
        scored = reward.score(groups())
        assert flat(scored) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert len(set(expected)) == len(expected)
        assert [len(g.scores) for g in scored] == [3, 1] and all(len(r) == 1 for g in scored for r in g.scores)
        assert reward.counts == {"reward_model": {Outcome.SCORED: 4}} and reward.slowest["reward_model"] > 0
        small = RewardModel(section(classifier, batch_tokens=1))
        assert flat(small.score(groups())) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    with pytest.raises(RewardError, match="closed"):
        reward.score(groups())


def test_scores_without_a_label_dimension_are_taken_too(classifier):
    """Public copies of ArmoRM, among others, return logits of shape [R]."""
    reward = RewardModel(section(classifier))
    expected, forward = flat(reward.score(groups())), reward.model.forward

    def bare(**inputs):
        output = forward(**inputs)
        output.logits = output.logits[:, 0]
        return output

    reward.model.forward = bare
    assert flat(reward.score(groups())) == expected


def test_plain_text_is_another_reading(classifier, tmp_path):
    plain = RewardModel(section(classifier, text="plain"))
    assert flat(plain.score(groups())) != flat(RewardModel(section(classifier)).score(groups()))
    bare = tmp_path / "bare"
    shutil.copytree(classifier, bare)
    for file in ("chat_template.jinja",):
        (bare / file).unlink()
    with pytest.raises(RewardError, match="no chat template"):
        RewardModel(section(str(bare)))
    RewardModel(section(str(bare), text="plain"))


def test_a_model_without_padding_token_scores_one_text_at_a_time(classifier, tmp_path):
    folder = tmp_path / "no_pad"
    shutil.copytree(classifier, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    found = flat(RewardModel(section(str(folder))).score(groups()))
    assert found == pytest.approx(flat(RewardModel(section(classifier)).score(groups())), rel=1e-4, abs=1e-5)


def test_nothing_replaces_a_model_that_cannot_be_loaded(classifier, tiny_model, tmp_path):
    with pytest.raises(RewardError, match="no fallback"):
        RewardModel(section(str(tmp_path / "missing")))
    with pytest.raises(RewardError, match="made up at random"):  # a causal LM: transformers only warns
        RewardModel(section(tiny_model))
    damaged = tmp_path / "damaged"
    shutil.copytree(classifier, damaged)
    (damaged / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(RewardError, match="cannot be loaded"):
        RewardModel(section(str(damaged)))
    with pytest.raises(RewardError, match="device"):
        RewardModel(section(classifier, device="gpu0"))
    if not torch.cuda.is_available():
        with pytest.raises(RewardError, match="does not exist"):
            RewardModel(section(classifier, device="cuda:3"))


def test_several_outputs_must_be_chosen_from(classifier, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path / "three"
    config = LlamaConfig.from_pretrained(classifier, num_labels=3)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(folder)
    with pytest.raises(RewardError, match="3 outputs"):
        RewardModel(section(str(folder)))
    with pytest.raises(RewardError, match="at most 2"):
        RewardModel(section(str(folder), label=3))
    first, last = (flat(RewardModel(section(str(folder), label=i)).score(groups())) for i in (0, 2))
    assert first != last


def test_long_and_broken_scores_are_unknown(classifier, tmp_path):
    longest = section(classifier, max_tokens=24)
    reward = RewardModel(longest)
    with pytest.raises(RewardError, match="max_failed_share"):
        RewardModel(longest, max_failed_share=0.2).score(groups())
    scored = reward.score(groups())
    outcomes = [row[0] for group in scored for row in group.scores]
    assert [o.outcome for o in outcomes].count(Outcome.UNPARSABLE) == 2
    assert all(o.value is None and "max_tokens=24" in o.detail for o in outcomes if o.failed)
    with torch.no_grad():
        reward.model.score.weight.fill_(float("nan"))
    with pytest.raises(RewardError, match="score is nan"):
        reward.score(groups())


def test_beside_reward_functions(classifier, tmp_path):
    source = "def reward(completions, **c):\n    return [float(len(x[-1]['content'])) for x in completions]\n"
    (tmp_path / "length.py").write_text(source)
    function = RewardSection(function=str(tmp_path / "length.py"), name="length", deadline_s=60.0)
    scorer = Scorer([function], ScoringSection(workers=1))
    both = JoinedScorers([scorer, RewardModel(section(classifier))])
    try:
        both.check(())
        scored = both.score(groups())
        assert both.names == ("length", "reward_model") and set(both.counts) == set(both.slowest) == set(both.names)
        for group, texts in zip(scored, TEXTS, strict=True):
            assert [row[0].value for row in group.scores] == [float(len(t)) for t in texts]
            assert all(row[1].outcome is Outcome.SCORED for row in group.scores)
        weighted = scored[0].reward(0, (1.0, 2.0))
        assert weighted == pytest.approx(4.0 + 2 * scored[0].scores[0][1].value)
        assert both.logged == {}
    finally:
        both.close()
    with pytest.raises(RewardError, match="Two rewards"):
        JoinedScorers([RewardModel(section(classifier)), RewardModel(section(classifier))])


LENGTH = "def reward(completions, **c):\n    return [float(len(x[-1]['content'])) for x in completions]\n"


def test_scores_stand_in_the_recipes_order(classifier, tmp_path):
    """Weights go by place: a model between two functions must stay between them."""
    (tmp_path / "length.py").write_text(LENGTH)
    first, last = (RewardSection(function="length.py", name=n, deadline_s=60.0) for n in ("first", "last"))
    scorer = make_scorer([first, section(classifier), last], ScoringSection(workers=1), tmp_path)
    alone = flat(RewardModel(section(classifier)).score(groups()))
    try:
        assert scorer.names == ("first", "reward_model", "last")
        rows = [row for group in scorer.score(groups()) for row in group.scores]
    finally:
        scorer.close()
    lengths = [float(len(text)) for texts in TEXTS for text in texts]
    assert [[score.value for score in row] for row in rows] == [[n, x, n] for n, x in zip(lengths, alone, strict=True)]


def test_what_was_started_is_closed_when_a_model_cannot_be_loaded(classifier, tmp_path, monkeypatch):
    (tmp_path / "length.py").write_text(LENGTH)
    closed, close = [], Scorer.close
    monkeypatch.setattr(Scorer, "close", lambda self: closed.append(close(self)))
    function = RewardSection(function="length.py")
    with pytest.raises(RewardError, match="no fallback"):
        make_scorer([function, section(str(tmp_path / "missing"))], ScoringSection(workers=1), tmp_path)
    assert len(closed) == 1


def test_functions_alone_need_no_torch(tmp_path):
    (tmp_path / "length.py").write_text(LENGTH)
    scorer = make_scorer([RewardSection(function="length.py")], ScoringSection(workers=1), tmp_path)
    scorer.close()
    assert isinstance(scorer, Scorer) and scorer.names == ("length",)


@pytest.mark.engine
def test_a_recipe_trains_on_a_reward_model(classifier, write_recipe, tmp_path):
    """From a recipe to the weights: the model's scores are the rewards, in training and in evaluation."""
    from conftest import rows

    from rlpost.evaluation.checkpoint import evaluate_checkpoint
    from rlpost.recipe.load import load_recipe
    from rlpost.recipe.rules.check import refuse_unsound
    from rlpost.run.loop import train

    model = {"path": classifier, "dtype": "float32", "device": "cpu", "weight": 2.0, "accuracy": True}
    changes = {"rewards": [model], "learner.rollouts": 2, "evaluation.at_start": False}
    loaded = load_recipe(write_recipe(tmp_path, changes))
    refuse_unsound(loaded)
    result = train(loaded)
    for row in rows(result.run_dir, "train"):
        assert row["reward/mean"] == pytest.approx(2 * row["rewards/reward_model/mean"])
        assert row["scores/reward_model/scored"] == 8 and row["optimizer/grad_norm"] > 0
    sampled = next((result.run_dir / "completions").glob("step_*.jsonl")).read_text().splitlines()
    record = json.loads(sampled[0])
    prompt = Prompt("p", (), record["prompt"], (1,))
    group = Group(prompt, (Completion((7,), (-1.0,), record["completion"], "stop"),))
    plain = RewardModel(section(classifier, text="plain"))
    # The tiny template ends a turn with a new line, which a completion alone does not have.
    ended = Group(prompt, (Completion((7,), (-1.0,), record["completion"] + "\n", "stop"),))
    values = [flat(plain.score([g]))[0] for g in (group, ended)]
    assert record["reward"] == pytest.approx(2 * values[1], rel=1e-4) and values[0] != values[1]
    judged = evaluate_checkpoint(loaded, result.checkpoint)
    assert judged.reward == pytest.approx(rows(result.run_dir, "eval")[-1]["eval/reward"])

"""GHPO in the real loop, on a tiny model: the prompt that is learned under, resume, and evaluation without hints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import rows, weights

from rlpost.errors import DataError
from rlpost.experience import TokenRows

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]

# Every prompt needs a level of its own (0: no hint, 3: the last, 4: never), by the part of the solution that it is shown;
# solved groups are half right.
REWARD = """
import zlib
def reward(prompts, completions, demonstration, **columns):
    found = []
    for prompt, completion, solution in zip(prompts, completions, demonstration):
        question, _, hint = prompt[-1]["content"].partition("HINT")
        level = round(4 * len(hint) / len(solution))
        solved = level >= zlib.crc32(question.encode()) % 5
        found.append(float(solved and zlib.crc32(completion[-1]["content"].encode()) % 2 == 0))
    return found
"""
GHPO = {
    "method": {"preset": "ghpo", "guidance": {"wording": "HINT{hint}", "memory": True}},
    "data.max_prompt_tokens": 160,
    "rollout.prompts_per_step": 4,
    "rollout.completions_per_prompt": 6,
    "learner.micro_batch_tokens": 4096,
    "evaluation.prompts": 0,
}


def run(recipe: Path, *overrides: str):
    from rlpost.loop import train
    from rlpost.recipe.load import load_recipe

    return train(load_recipe(recipe, overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_recipe, one_thread):
    """A run of 7 rollouts over 16 prompts, with a checkpoint after every optimizer step."""
    folder = tmp_path_factory.mktemp("ghpo")
    changes = {**GHPO, "learner.steps": 7, "learner.minibatches": 2, "checkpoint.every": 1, "checkpoint.keep": 20}
    changes |= {"data.train": {"type": "arithmetic", "size": 20}}
    recipe = write_recipe(folder, changes, REWARD)
    return run(recipe, "name=straight"), recipe


def test_levels_are_tried_and_reported(finished) -> None:
    found = rows(finished[0].run_dir)
    for key in ("hard_share", "solved_level_1", "solved_level_2", "solved_level_3", "unsolved_share", "tokens_level_3"):
        assert any(row[f"guidance/{key}"] > 0 for row in found), key
    assert all(row["guidance/accuracy_trained"] >= row["guidance/accuracy_without_hints"] for row in found)
    assert any(row["guidance/accuracy_trained"] > row["guidance/accuracy_without_hints"] for row in found)


def test_completions_are_learned_under_the_prompt_that_they_were_sampled_from(finished) -> None:
    """The engine reported their log-probs under the hinted prompt; the learner's are the same to rounding."""
    found = rows(finished[0].run_dir)
    first = [row for row in found if row["step"] % 2 == 1]  # before the second minibatch the policy has moved
    assert any(row["guidance/hinted_share"] == 1.0 for row in first)
    assert all(row["mismatch/max_abs_gap"] < 1e-3 for row in first if "mismatch/max_abs_gap" in row)


def test_the_record_shows_the_hinted_prompt(finished) -> None:
    files = sorted((finished[0].run_dir / "completions").iterdir())
    prompts = [json.loads(line)["prompt"] for file in files for line in file.read_text().splitlines()]
    assert any("HINT" in text for text in prompts) and any("HINT" not in text for text in prompts)


@pytest.mark.parametrize("step", [4, 5])  # at a rollout's end, and in the middle of one
def test_resumed_equals_uninterrupted(finished, step) -> None:
    straight, recipe = finished
    again = run(recipe, f"name=again{step}", f"resume={straight.run_dir}/checkpoints/step_{step:06d}")
    assert rows(again.run_dir) == rows(straight.run_dir)[step:]
    one, two = weights(straight.checkpoint), weights(again.checkpoint)
    assert all(one[name].equal(two[name]) for name in one)
    states = [json.loads((r.checkpoint / "trainer" / "state.json").read_text()) for r in (straight, again)]
    assert states[0]["hint_levels"] == states[1]["hint_levels"] and states[0]["hint_levels"]


def test_evaluation_never_shows_a_hint(tmp_path, write_recipe, monkeypatch) -> None:
    import rlpost.evaluation
    import rlpost.loop

    seen: dict[str, list] = {"train": [], "eval": []}
    for place, name in ((rlpost.loop, "train"), (rlpost.evaluation, "eval")):
        original = place.sample_groups

        def spy(engine, prompts, *rest, original=original, name=name, **keywords):
            seen[name] += list(prompts)
            return original(engine, prompts, *rest, **keywords)

        monkeypatch.setattr(place, "sample_groups", spy)
    never = "def reward(completions, **columns):\n    return [0.0 for _ in completions]\n"
    changes = {**GHPO, "evaluation.prompts": 4, "evaluation.every": 1, "learner.steps": 2}
    result = run(write_recipe(tmp_path, changes, never))
    assert len(rows(result.run_dir, "eval")) == 3 and len(seen["eval"]) == 3 * 4
    assert any(prompt.hint for prompt in seen["train"])
    assert all("HINT" in prompt.text for prompt in seen["train"] if prompt.hint)
    for prompt in seen["eval"]:
        assert not prompt.hint and prompt.origin is None and "HINT" not in prompt.text
        assert prompt.demonstration.text not in prompt.text


def test_a_dataset_without_solutions_is_refused_by_the_column_to_map(tmp_path, write_recipe) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {i}?", "solution": "It is."}) + "\n" for i in range(12)))
    source = {"type": "dataset", "path": str(data)}
    recipe = write_recipe(tmp_path, {**GHPO, "data.train": source, "data.held_out": 0, "learner.steps": 1})
    with pytest.raises(DataError, match="data.train.demonstration=solution"):
        run(recipe)
    empty = {**source, "demonstration": "solution"}
    data.write_text("".join(json.dumps({"prompt": f"What is {i}?", "solution": ""}) + "\n" for i in range(12)))
    with pytest.raises(DataError, match="empty in every row"):
        run(write_recipe(tmp_path, {**GHPO, "data.train": empty, "data.held_out": 0, "learner.steps": 1}))


def learned_logprobs(tiny_model, condition: str):
    """(log-probs of the samples as the buffer would be learned from, under the hinted prompt, under the bare one)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlpost.data.hints import Hinter
    from rlpost.experience import Completion, Demonstration, Group, Outcome, Prompt, Score
    from rlpost.guide import guide
    from rlpost.learner.buffer import micro_batches
    from rlpost.learner.learner import token_logprobs
    from rlpost.policy.model import load_policy
    from rlpost.recipe.guidance import HintGuidance
    from rlpost.recipe.model import ModelSection
    from rlpost.weigh import open_buffer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = ({"role": "user", "content": "What is 2 + 3?"},)
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    prompt = Prompt("q", messages, text, tuple(tokenizer(text)["input_ids"]), {}, Demonstration("Two and three. Five."))

    def score(groups):
        return [Group(g.prompt, g.completions, ((Score(Outcome.SCORED, float(bool(g.prompt.hint))),),)) for g in groups]

    def sample(prompts, level):
        made = Completion(tuple(tokenizer("5 it is")["input_ids"]), (-1.0,) * 7, "5 it is", "stop")
        return [Group(p, (made,)) for p in prompts]

    section = HintGuidance(condition=condition)
    hinter = Hinter(section, tokenizer, 200)
    keywords = {"accuracy_rewards": (True,), "rollout": 0, "rollouts": 1, "memory": {}}
    guided = guide(score(sample([prompt], 0)), section, sample=sample, score=score, hint=hinter, **keywords)
    buffer = open_buffer(guided.groups, step=0, minibatches=1)
    policy = load_policy(ModelSection(path=tiny_model, autocast="none"), tiny_model)
    batches: list[TokenRows] = micro_batches(buffer.row_groups(), layout="tree", micro_batch_tokens=512, pad_id=0)
    found = token_logprobs(policy, batches, buffer.tokens)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    under = []
    (hinted,) = hinter([prompt], 0.25)
    assert hinted is not None and hinted.hint == "Two"
    for p in (hinted, prompt):
        ids = list(p.token_ids) + list(guided.groups[0].completions[0].token_ids)
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits.float().log_softmax(-1)[0]
        start = len(p.token_ids)
        under.append(torch.stack([logp[start - 1 + i, ids[start + i]] for i in range(len(ids) - start)]))
    return found, *under


def test_log_probs_are_those_under_the_conditioning_prompt(tiny_model) -> None:
    found, hinted, bare = learned_logprobs(tiny_model, "hinted")
    torch.testing.assert_close(found, hinted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(hinted, bare, atol=1e-2)
    found, hinted, bare = learned_logprobs(tiny_model, "question")
    torch.testing.assert_close(found, bare, atol=1e-5, rtol=1e-5)

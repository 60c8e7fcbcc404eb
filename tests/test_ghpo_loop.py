"""GHPO in the real loop, on a tiny model: the prompt that is learned under, resume, and evaluation without hints."""

from __future__ import annotations

import json
import math
import re
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
    from rlpost.recipe.load import load_recipe
    from rlpost.run.loop import train

    return train(load_recipe(recipe, overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_recipe, one_thread):
    """A run of 7 rollouts over 16 prompts, with a checkpoint after every optimizer step."""
    folder = tmp_path_factory.mktemp("ghpo")
    changes = {**GHPO, "learner.rollouts": 7, "learner.minibatches": 2, "checkpoint.every": 1, "checkpoint.keep": 20}
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
    import rlpost.evaluation.accuracy
    import rlpost.source.collect

    seen: dict[str, list] = {"train": [], "eval": []}
    for place, name in ((rlpost.source.collect, "train"), (rlpost.evaluation.accuracy, "eval")):
        original = place.sample_groups

        def spy(engine, prompts, *rest, original=original, name=name, **keywords):
            seen[name] += list(prompts)
            return original(engine, prompts, *rest, **keywords)

        monkeypatch.setattr(place, "sample_groups", spy)
    never = "def reward(completions, **columns):\n    return [0.0 for _ in completions]\n"
    changes = {**GHPO, "evaluation.prompts": 4, "evaluation.every": 1, "learner.rollouts": 2}
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
    recipe = write_recipe(tmp_path, {**GHPO, "data.train": source, "data.held_out": 0, "learner.rollouts": 1})
    with pytest.raises(DataError, match="data.train.demonstration=solution"):
        run(recipe)
    empty = {**source, "demonstration": "solution"}
    data.write_text("".join(json.dumps({"prompt": f"What is {i}?", "solution": ""}) + "\n" for i in range(12)))
    with pytest.raises(DataError, match="empty in every row"):
        run(write_recipe(tmp_path, {**GHPO, "data.train": empty, "data.held_out": 0, "learner.rollouts": 1}))


RATIOS = (0.25, 0.5, 0.75)
SOLVED_AT = (0, 1, 2, 3, None)  # of five prompts in one batch


def mixed_batch(tokenizer):
    """Prompts of different lengths, every one with a solution of its own."""
    from rlpost.experience import Demonstration, Prompt

    prompts = []
    for i in range(len(SOLVED_AT)):
        messages = ({"role": "user", "content": f"What is {10**i} + 3?"},)
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        solution = Demonstration(f"Take {10**i} and add three to it. Then it is {10**i + 3}.")
        prompts.append(Prompt(f"q{i}", messages, text, tuple(tokenizer(text)["input_ids"]), {}, solution))
    return prompts


def guided_batch(tokenizer, condition: str):
    """The five prompts after guidance, with two completions each, and what makes their hinted prompts."""
    from rlpost.data.hints import Hinter
    from rlpost.experience import Completion, Group, Outcome, Score
    from rlpost.recipe.sections.guidance import HintGuidance
    from rlpost.teaching.guide import SEED_LEVEL, guide

    def sample(prompts, level):
        made = []
        for p in prompts:
            need = SOLVED_AT[int(p.id[1:])]
            solved = need is not None and max(0, level - SEED_LEVEL) >= need
            texts = (f"{p.id} it is", "5")  # of the last level only: completions are replaced
            ids = [tuple(tokenizer(f"{level}{t}")["input_ids"]) for t in texts]
            completions = tuple(Completion(x, (-1.0,) * len(x), "right" if solved else "wrong", "stop") for x in ids)
            made.append(Group(p, completions))
        return made

    def score(groups):
        return [
            Group(
                g.prompt,
                g.completions,
                tuple((Score(Outcome.SCORED, float(c.text == "right")),) for c in g.completions),
            )
            for g in groups
        ]

    section = HintGuidance(condition=condition, wording="\nHINT {hint}")
    hinter = Hinter(section, tokenizer, 200)
    keywords = {"accuracy_rewards": (True,), "rollout": 0, "rollouts": 1, "memory": {}}
    groups = score(sample(mixed_batch(tokenizer), 0))
    return guide(groups, section, sample=sample, score=score, hint=hinter, **keywords), hinter


def logprobs_under(model, prompt_ids, token_ids):
    """The log-probs of a completion behind a prompt, by the model alone."""
    ids = [*prompt_ids, *token_ids]
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits.float().log_softmax(-1)[0]
    start = len(prompt_ids)
    return torch.stack([logp[start - 1 + i, token] for i, token in enumerate(token_ids)])


@pytest.mark.parametrize("layout", ["tree", "sorted"])
@pytest.mark.parametrize(
    ("condition", "learned_at"),
    [("hinted", (0, 1, 2, 3, 3)), ("question", (0, 0, 0, 0, 0)), ("released", (0, 0, 0, 3, 3))],
)
def test_log_probs_are_those_under_the_conditioning_prompt(tiny_model, condition, learned_at, layout) -> None:
    """One batch of prompts solved without a hint, at each of three levels, and never: each under its own prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlpost.learner.buffer import micro_batches
    from rlpost.learner.learner import token_logprobs
    from rlpost.policy.model import load_policy
    from rlpost.recipe.sections.model import ModelSection
    from rlpost.source.weigh import open_buffer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    guided, hinter = guided_batch(tokenizer, condition)
    assert guided.levels == [0, 1, 2, 3, 3]
    buffer = open_buffer(guided.groups, step=0, minibatches=1)
    policy = load_policy(ModelSection(path=tiny_model, autocast="none"), tiny_model)
    batches: list[TokenRows] = micro_batches(buffer.row_groups(), layout=layout, micro_batch_tokens=512, pad_id=0)
    found = iter(token_logprobs(policy, batches, buffer.tokens).split(buffer.lengths))
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for bare, group, level in zip(mixed_batch(tokenizer), guided.groups, learned_at, strict=True):
        prompts = [bare.token_ids] + [hinter([bare], ratio)[0].token_ids for ratio in RATIOS]
        assert len(set(map(len, prompts))) == 4, "every level shows more"
        for completion in group.completions:
            mine = next(found)
            under = [logprobs_under(model, ids, completion.token_ids) for ids in prompts]
            torch.testing.assert_close(mine, under[level], atol=1e-5, rtol=1e-5)
            others = [x for i, x in enumerate(under) if i != level]
            assert not any(torch.allclose(mine, other, atol=1e-2) for other in others)


def test_one_hard_group_with_timeouts_at_a_hint_does_not_end_the_run(tmp_path, write_recipe) -> None:
    """scoring.max_failed_share is of the whole step: here every hinted sample of one prompt in four crashes."""
    crashing = """
def reward(prompts, completions, **columns):
    found = []
    for prompt, completion in zip(prompts, completions):
        question, _, hint = prompt[-1]["content"].partition("HINT")
        if hint:
            raise RuntimeError("no verdict on hinted answers")
        found.append(float(len(question) % 2))
    return found
"""
    changes = {**GHPO, "learner.rollouts": 2, "scoring.max_failed_share": 0.8}
    found = rows(run(write_recipe(tmp_path, changes, crashing)).run_dir)
    hinted = [row for row in found if row["guidance/hinted_share"] > 0]
    assert hinted and all(row["guidance/solved_level_3"] == 0 for row in hinted), "unknown is not solved"
    assert all(row["guidance/unsolved_share"] == row["guidance/hard_share"] for row in hinted)


def test_with_dynamic_sampling_the_figures_are_of_what_is_trained_on(tmp_path, write_recipe, monkeypatch) -> None:
    """Guidance acts first; groups that are still flat are then replaced by unhinted ones, and counted as such."""
    import rlpost.source.collect
    from rlpost.teaching.verdict import accuracies

    trained = []
    original = rlpost.source.sampled.open_buffer

    def spy(groups, **keywords):
        trained.append(list(groups))
        return original(groups, **keywords)

    monkeypatch.setattr(rlpost.source.sampled, "open_buffer", spy)
    method = {"preset": "dapo", "guidance": {"type": "hint", "wording": "HINT{hint}"}, "overlong": {"penalty": 0.0}}
    changes = {**GHPO, "method": method, "learner.rollouts": 5, "data.train": {"type": "arithmetic", "size": 60}}
    found = rows(run(write_recipe(tmp_path, changes, REWARD)).run_dir)
    assert any(row["dynamic_sampling/replaced"] > 0 for row in found)
    assert any(row["guidance/hinted_share"] > 0 for row in found)
    for row, groups in zip(found, trained, strict=True):
        shares = [sum(accuracies(g, (True,))) / len(g.completions) for g in groups]
        hinted = [share for share, g in zip(shares, groups, strict=True) if g.prompt.hint]
        assert row["guidance/accuracy_trained"] == pytest.approx(sum(shares) / len(shares))
        assert row["guidance/hinted_share"] == len(hinted) / len(groups)
        if hinted:
            assert row["guidance/accuracy_trained_hinted"] == pytest.approx(sum(hinted) / len(hinted))


@pytest.mark.parametrize("preset", ["ppo", "safe"])
def test_with_a_critic_values_are_of_the_hinted_prompt_and_resume_is_exact(preset, tmp_path, write_recipe) -> None:
    """A critic reads the rows that the policy is learned from, so its values are of the prompt that was sampled from."""
    method = {"preset": preset, "guidance": {"type": "hint", "wording": "HINT{hint}"}}
    changes = {**GHPO, "method": method, "learner.rollouts": 3, "learner.minibatches": 2, "learner.learning_rate": 1e-4}
    changes |= {"checkpoint.every": 1, "checkpoint.keep": 20}
    recipe = write_recipe(tmp_path, changes, REWARD)
    straight = run(recipe, "name=straight")
    found = rows(straight.run_dir)
    assert any(row["guidance/hinted_share"] > 0 for row in found)
    assert all(math.isfinite(row["critic/loss"]) and row["optimizer/skipped"] == 0 for row in found)
    first = [row for row in found if row["step"] % 2 == 1]
    assert all(row["mismatch/max_abs_gap"] < 1e-3 for row in first), "policy rows are under the sampled prompt"
    again = run(recipe, "name=again", f"resume={straight.run_dir}/checkpoints/step_000003")
    assert rows(again.run_dir) == found[3:]
    one, two = weights(straight.checkpoint), weights(again.checkpoint)
    assert all(one[name].equal(two[name]) for name in one)
    sorted_ = run(recipe, "name=sorted", "learner.layout=sorted")
    for a, b in zip(found, rows(sorted_.run_dir), strict=True):
        for name in ("critic/loss", "critic/value_mean", "optimizer/grad_norm", "guidance/hinted_share"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5)


def test_hints_that_do_not_fit_are_counted_at_the_start_or_refused(tmp_path, write_recipe, capsys) -> None:
    changes = {**GHPO, "learner.rollouts": 1, "data.max_prompt_tokens": 45, "tracking.console": True}
    run(write_recipe(tmp_path / "a", changes, REWARD))
    said = capsys.readouterr().out
    assert re.search(r"75% of it as a hint does not fit 45 tokens .* for [1-9]\d* of them, 25% not for \d+", said), said
    with pytest.raises(DataError, match=r"75% of their worked solution.*45 tokens.*data.long_demonstrations: drop"):
        run(write_recipe(tmp_path / "b", {**changes, "data.long_demonstrations": "refuse"}, REWARD))

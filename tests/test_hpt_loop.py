"""HPT in the real loop, on a tiny model: mixed batches, both extremes, other gates, and all of it with GHPO and CAPO."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import rows, weights

from rlpost.errors import DataError, TrainingError
from rlpost.recipe.load import load_recipe
from rlpost.recipe.plan.describe import make_plan
from rlpost.run.loop import train

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]

# Some prompts are never solved, others by half of their completions.
REWARD = """
import zlib
def reward(prompts, completions, **columns):
    return [
        float(zlib.crc32(p[-1]["content"].split("\\n")[0].encode()) % 2 and zlib.crc32(c[-1]["content"].encode()) % 2)
        for p, c in zip(prompts, completions)
    ]
"""
BASE = {
    "rollout.prompts_per_step": 4,
    "learner.rollouts": 3,
    "evaluation.prompts": 0,
    "data.max_demonstration_tokens": 120,
    "learner.micro_batch_tokens": 4096,
}


def run(recipe: Path, *overrides: str):
    return train(load_recipe(recipe, overrides))


def same_weights(one, two) -> bool:
    a, b = weights(one.checkpoint), weights(two.checkpoint)
    return all(a[name].equal(b[name]) for name in a)


def test_prompts_are_divided_between_rl_and_sft(tmp_path, write_recipe) -> None:
    found = rows(run(write_recipe(tmp_path, {**BASE, "method": {"preset": "hpt"}}, REWARD)).run_dir)
    shares = [row["gate/sft_share"] for row in found]
    assert any(0 < share < 1 for share in shares)
    for row in found:
        assert row["gate/no_demonstration"] == 0 and row["gate/loss_demonstrations"] > 0
        assert row["gate/demonstration_nll"] > 0 and row["gate/demonstration_tokens"] > 0
        parts = row["gate/loss_demonstrations"] + row["gate/loss_samples"]
        assert row["optimizer/loss"] == pytest.approx(parts, rel=1e-5)


def test_micro_batches_and_layouts_do_not_change_a_mixed_step(tmp_path, write_recipe) -> None:
    norms, batches = [], []
    for i, (layout, tokens) in enumerate((("tree", 4096), ("tree", 190), ("sorted", 190), ("padded", 4096))):
        method = {"preset": "hpt", "gate": {"gamma": 0.25}}
        changes = {**BASE, "learner.layout": layout, "learner.micro_batch_tokens": tokens, "method": method}
        changes |= {"learner.learning_rate": 1e-4}
        found = rows(run(write_recipe(tmp_path / str(i), changes, REWARD)).run_dir)
        assert any(0 < row["gate/sft_share"] < 1 for row in found)
        norms.append([row["optimizer/grad_norm"] for row in found])
        batches.append(found[0]["tokens/micro_batches"])
    assert batches[0] == 1 < batches[1] < batches[2]
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-4)


def test_gamma_below_zero_is_plain_rl_bit_for_bit(tmp_path, write_recipe) -> None:
    plain = run(write_recipe(tmp_path / "a", {**BASE, "method": {"advantage": {"scale": "none"}}}, REWARD))
    gated = run(write_recipe(tmp_path / "b", {**BASE, "method": {"preset": "hpt", "gate": {"gamma": -1}}}, REWARD))
    found = [{k: v for k, v in row.items() if not k.startswith("gate/")} for row in rows(gated.run_dir)]
    assert found == rows(plain.run_dir) and same_weights(plain, gated)


def test_gamma_one_is_plain_sft_bit_for_bit(tmp_path, write_recipe) -> None:
    """Against SFT without any sampling, and, to rounding, against a loop written here."""
    gated = run(write_recipe(tmp_path / "a", {**BASE, "method": {"preset": "hpt", "gate": {"gamma": 1}}}, REWARD))
    method = {"preset": "grpo", "gate": {"type": "sft_first", "rollouts": 3}}
    plain = run(write_recipe(tmp_path / "b", {**BASE, "method": method}, REWARD))
    assert same_weights(plain, gated)
    keys = ("optimizer/grad_norm", "optimizer/loss", "tokens/useful", "gate/demonstration_nll")
    for one, two in zip(rows(gated.run_dir), rows(plain.run_dir), strict=True):
        assert {k: one[k] for k in keys} == {k: two[k] for k in keys}
        assert one["gate/sft_share"] == two["gate/sft_share"] == 1.0 and "reward/mean" not in two


def test_preset_sft_is_the_gate_with_gamma_one_without_sampling_a_token(tmp_path, write_recipe, monkeypatch) -> None:
    """No engine, no reward: the weights are those of gamma = 1, bit for bit."""
    from rlpost.rollout import transformers_engine

    gated = run(write_recipe(tmp_path / "a", {**BASE, "method": {"preset": "hpt", "gate": {"gamma": 1}}}, REWARD))
    monkeypatch.setattr(transformers_engine.TransformersEngine, "__init__", lambda *_, **__: pytest.fail("an engine"))
    plain = run(write_recipe(tmp_path / "b", {**BASE, "method": {"preset": "sft"}, "rewards": []}))
    assert same_weights(plain, gated)
    found = rows(plain.run_dir)
    assert [row["gate/sft_share"] for row in found] == [1.0] * 3
    assert found[-1]["gate/demonstration_nll"] < found[0]["gate/demonstration_nll"]
    assert not any(key.startswith(("reward/", "completions/")) for row in found for key in row)


def test_sft_is_evaluated_by_sampling(tmp_path, write_recipe) -> None:
    changes = {**BASE, "method": {"preset": "sft"}, "evaluation.prompts": 4, "evaluation.every": 1}
    result = run(write_recipe(tmp_path, changes, REWARD))
    assert len(rows(result.run_dir, "eval")) == 4 and len(rows(result.run_dir, "train")) == 3


def test_the_first_step_is_the_mean_nll_of_the_solutions(tmp_path, write_recipe, tiny_model) -> None:
    from transformers import AutoModelForCausalLM

    from rlpost.recipe.load import load_recipe
    from rlpost.run.assemble import assemble
    from rlpost.source.factory import make_source

    recipe = write_recipe(tmp_path, {**BASE, "method": {"preset": "hpt", "gate": {"gamma": 1}}}, REWARD)
    parts = assemble(load_recipe(recipe))
    try:
        buffer = make_source(parts).next(0)
        metrics = parts.updater.update(buffer, 0)
        model, losses = AutoModelForCausalLM.from_pretrained(tiny_model), []
        end = parts.tokenizer.eos_token_id
        for group in buffer.groups:
            solution = [*parts.tokenizer(group.prompt.demonstration.text)["input_ids"], end]
            ids = [*group.prompt.token_ids, *solution]
            labels = [-100] * len(group.prompt.token_ids) + solution
            losses.append(model(torch.tensor([ids]), labels=torch.tensor([labels])).loss)
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        assert metrics["optimizer/loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert metrics["optimizer/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    finally:
        parts.close("finished")


@pytest.mark.parametrize(
    "gate",
    [
        {"type": "luffy"},
        {"type": "srft"},
        {"type": "soft"},
        {"type": "solve_rate", "below": "off_policy"},
        {"type": "solve_rate", "below": "both", "sft_weight": 0.1},
        {"type": "sft_first", "rollouts": 1},
    ],
    ids=lambda gate: gate["type"] + gate.get("below", ""),
)
def test_other_gates_train(gate, tmp_path, write_recipe) -> None:
    found = rows(run(write_recipe(tmp_path, {**BASE, "method": {"gate": gate}}, REWARD)).run_dir)
    assert all(math.isfinite(row["optimizer/loss"]) and row["optimizer/skipped"] == 0 for row in found)
    assert any(row["gate/demonstration_share"] > 0 for row in found)
    if gate["type"] == "sft_first":
        assert "reward/mean" not in found[0] and "reward/mean" in found[1]
        assert [row["gate/sft_share"] for row in found] == [1, 0, 0]


def test_ghpo_hpt_and_capo_in_one_run_and_resumed(tmp_path, write_recipe) -> None:
    """Prompts still unsolved at the last hint go to SFT, under the bare question; the mask leaves them alone."""
    limits = {"type": "fixed", "max_kl": 1e-3}
    method = {
        "preset": "capo",
        "masks": [{"type": "curvature", "verify_every": 1, "thresholds": limits}],
        "guidance": {"type": "hint", "memory": True},
        "gate": {"type": "solve_rate"},
        "kl": {"coefficient": 0.01},
    }
    changes = {**BASE, "method": method, "data.max_prompt_tokens": 200, "learner.minibatches": 2, "learner.rollouts": 4}
    changes |= {"checkpoint.every": 1, "checkpoint.keep": 20}
    recipe = write_recipe(tmp_path, changes, REWARD)
    straight = run(recipe, "name=straight")
    found = rows(straight.run_dir)
    for row in found:
        assert row["gate/sft_share"] == row["guidance/unsolved_share"]
    assert any(row["gate/sft_share"] > 0 for row in found)
    assert any(row.get("mask/curvature/rejected_share", 0) > 0 for row in found)
    again = run(recipe, "name=again", f"resume={straight.run_dir}/checkpoints/step_000005")
    assert rows(again.run_dir) == found[5:] and same_weights(straight, again)


def test_long_solutions_are_dropped_or_refused(tmp_path, write_recipe, capsys) -> None:
    changes = {**BASE, "method": {"preset": "hpt", "gate": {"gamma": 1}}, "data.max_demonstration_tokens": 40}
    changes |= {"tracking.console": True}
    found = rows(run(write_recipe(tmp_path / "a", changes, REWARD)).run_dir)
    assert any(row["gate/no_demonstration"] > 0 for row in found)
    said = capsys.readouterr().out
    assert "more than 40 tokens" in said and "left to RL although method.gate.gamma=1 asks for SFT alone" in said
    with pytest.raises(DataError, match="data.max_demonstration_tokens"):
        run(write_recipe(tmp_path / "b", {**changes, "data.long_demonstrations": "refuse"}, REWARD))


def test_solutions_beyond_the_models_context_are_never_learned_from(tmp_path, write_recipe, capsys) -> None:
    """The tiny model has 256 positions: a solution of 361 tokens would be trained at places that it does not have."""
    data = tmp_path / "data.jsonl"
    solutions = ["It is so. " * 36 if i % 2 else "It is so." for i in range(12)]
    lines = [json.dumps({"prompt": f"What is {i}?", "solution": text}) for i, text in enumerate(solutions)]
    data.write_text("\n".join(lines))
    source = {"type": "dataset", "path": str(data), "demonstration": "solution"}
    changes = {**BASE, "method": {"preset": "sft"}, "data.train": source, "data.held_out": 0, "tracking.console": True}
    changes |= {"data.max_demonstration_tokens": 400, "rollout.prompts_per_step": 12, "learner.rollouts": 1}
    (found,) = rows(run(write_recipe(tmp_path / "a", changes, REWARD)).run_dir)
    assert found["gate/no_demonstration"] == 6 and found["gate/sft_share"] == 0.5
    assert found["gate/demonstration_tokens"] == 6 * 10
    assert "6 of them have more than 400 tokens, or do not fit the model's context of 256" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"6 of 12 worked solutions.*context of 256"):
        run(write_recipe(tmp_path / "b", {**changes, "data.long_demonstrations": "refuse"}, REWARD))
    with pytest.raises(DataError, match=r"solutions alone.*only 0 of 12.*Raise data.max_demonstration_tokens"):
        run(write_recipe(tmp_path / "c", {**changes, "data.max_demonstration_tokens": 5}, REWARD))


def test_steps_without_a_row_to_learn_from_are_said_and_end_the_run(tmp_path, write_recipe, capsys) -> None:
    """One solution in ten can be used: most rollouts of one prompt have nothing to learn from."""
    data, source = tmp_path / "data.jsonl", {"type": "dataset", "path": str(tmp_path / "data.jsonl")}
    texts = ["No. " if i % 10 else "It is so. " * 9 for i in range(20)]
    data.write_text(
        "".join(json.dumps({"prompt": f"What is {i}?", "solution": t * 2}) + "\n" for i, t in enumerate(texts))
    )
    changes = {**BASE, "method": {"preset": "sft"}, "data.train": {**source, "demonstration": "solution"}}
    changes |= {"data.held_out": 0, "data.shuffle": False, "data.max_demonstration_tokens": 12, "learner.rollouts": 9}
    changes |= {"rollout.prompts_per_step": 1, "tracking.console": True, "evaluation.prompts": 0}
    # Rollout 1 has the long solution, the others have short ones: one line, and the run goes on.
    result = run(write_recipe(tmp_path / "a", changes, REWARD))
    assert result.optimizer_steps == 9
    said = capsys.readouterr().out
    assert said.count("not a single row to learn from") == 1 and "Rollout 1 has not a single row" in said
    # The other way round nine in ten are empty: the third in a row ends the run, with the cause.
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines:
        line["solution"] = "It is so. " * 9 if len(line["solution"]) < 20 else "No."
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        TrainingError, match=r"3 rollouts in a row.*at most 12 tokens \(data.max_demonstration_tokens\)"
    ):
        run(write_recipe(tmp_path / "b", changes, REWARD))


def test_a_run_that_could_use_hardly_any_solution_is_refused(tmp_path, write_recipe) -> None:
    """The default limit has nothing to do with sampling; where too few solutions fit, the run does not start."""
    for preset, samples in (("sft", True), ("hpt", True), ("hpt", False)):
        changes = {**BASE, "method": {"preset": preset}, "rollout.max_completion_tokens": 4, "learner.rollouts": 1}
        changes.pop("data.max_demonstration_tokens", None)
        if samples:
            assert make_plan(load_recipe(write_recipe(tmp_path / "a", changes, REWARD))).problems == ()
            continue
        changes["data.max_demonstration_tokens"] = 3
        recipe = load_recipe(write_recipe(tmp_path / "b", changes, REWARD))
        with pytest.raises(DataError, match="can use only 0 of"):
            train(recipe)
        (problem,) = make_plan(recipe).problems
        assert "can use only 0 of" in problem


def test_one_threshold_for_guidance_gate_and_evaluation(tmp_path, write_recipe) -> None:
    """Completions earn 0.3 or 0.6: at the default all are wrong, at scoring.threshold 0.5 some are right, for all alike."""
    partial = REWARD.replace("float(zlib", "0.3 + 0.3 * bool(zlib")
    method = {"preset": "hpt", "guidance": {"type": "hint"}}
    changes = {
        **BASE,
        "method": method,
        "data.max_prompt_tokens": 200,
        "evaluation.prompts": 4,
        "evaluation.samples": 4,
    }
    for name, threshold, hard in (("a", 1.0, True), ("b", 0.5, False)):
        result = run(write_recipe(tmp_path / name, {**changes, "scoring.threshold": threshold}, partial))
        found = rows(result.run_dir, "train")
        assert all(row["guidance/hard_share"] == 1.0 for row in found) is hard
        assert all(row["gate/sft_share"] == 1.0 for row in found) is hard
        assert all(row["guidance/accuracy_trained"] == row["gate/solve_rate"] for row in found)
        assert all(row["gate/sft_share"] == row["guidance/unsolved_share"] for row in found)
        assert all(row["eval/accuracy"] == 0 for row in rows(result.run_dir, "eval")) is hard


def test_two_processes_are_one_run(tmp_path, write_recipe, children) -> None:
    """Escalation is local to a process, with other numbers of hard groups in each; what comes of it is not."""
    method = {"guidance": {"type": "hint", "memory": True}, "gate": {"type": "solve_rate", "gamma": 0.25}}
    changes = {**BASE, "method": method, "data.max_prompt_tokens": 200, "learner.learning_rate": 1e-4}
    changes |= {"learner.minibatches": 2, "learner.layout": "sorted"}
    single = run(write_recipe(tmp_path / "one", changes, REWARD))
    code, printed = children.run(write_recipe(tmp_path / "two", changes, REWARD), launch="cpu2.yaml")
    assert code == 0, printed
    expected, found = rows(single.run_dir), rows(tmp_path / "two" / "run")
    assert any(0 < row["guidance/hard_share"] < 1 and 0 < row["gate/sft_share"] < 1 for row in expected)
    for one, two in zip(expected, found, strict=True):
        for key in one:
            if key not in ("kind", "policy/kl_old") and not key.startswith(("tokens/", "mismatch/", "sync/")):
                assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), (one["step"], key)

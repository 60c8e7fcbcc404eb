"""Two real processes (gloo) against one: the same run; and an error or a death of one of them ends both, soon."""

from __future__ import annotations

import json
import signal
import time

import pytest
from conftest import REWARD, before_the_table, rows, weights

from rlpost.recipe.load import load_recipe
from rlpost.run.loop import train

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]

CHANGES = {
    "rollout.prompts_per_step": 4,
    "learner.rollouts": 2,
    "learner.minibatches": 2,
    "learner.learning_rate": 1e-4,
    "learner.layout": "sorted",
    "method.masks": [{"type": "random", "rate": 0.2}],  # drawn by the token, whichever process holds it
}


def completions(run):
    """Everything sampled, by (file, prompt, text): which process sampled it does not count."""
    records = [
        {**json.loads(line), "file": file.name}
        for file in sorted((run / "completions").iterdir())
        for line in file.read_text().splitlines()
    ]
    return sorted(json.dumps({k: v for k, v in r.items() if k != "group"}, sort_keys=True) for r in records)


@pytest.fixture(scope="module")
def single(tmp_path_factory, write_recipe, one_thread):
    folder = tmp_path_factory.mktemp("single")
    train(load_recipe(write_recipe(folder, CHANGES)))
    return folder / "run"


# Own rows in few and in many micro-batches; rows that both share (Ulysses), in micro-batches of unequal number.
LAYOUTS = {
    "own rows": {"learner.micro_batch_tokens": 4096},
    "many micro-batches": {"learner.micro_batch_tokens": 64},
    "shared rows": {"learner.micro_batch_tokens": 64, "learner.sequence_parallel": 2},
    "shared trees": {"learner.micro_batch_tokens": 64, "learner.sequence_parallel": 2, "learner.layout": "tree"},
}


@pytest.mark.parametrize(
    ("layout", "launch"),
    [
        ("own rows", "cpu2.yaml"),
        ("many micro-batches", "cpu2.yaml"),
        ("many micro-batches", "cpu-zero3.yaml"),
        pytest.param("shared rows", "cpu2.yaml", marks=pytest.mark.slow),
        ("shared trees", "cpu2.yaml"),
        pytest.param("shared trees", "cpu-zero2.yaml", marks=pytest.mark.slow),
        ("shared trees", "cpu-zero3.yaml"),
    ],
)
def test_two_processes_are_one_run(layout, launch, single, write_recipe, children, tmp_path):
    recipe = write_recipe(tmp_path, {**CHANGES, "data.max_prompt_tokens": 24, **LAYOUTS[layout]})
    code, printed = children.run(recipe, launch=launch)
    assert code == 0, printed
    mine, theirs = rows(tmp_path / "run"), rows(single)
    assert [(row["step"], row["kind"]) for row in mine] == [(row["step"], row["kind"]) for row in theirs]
    for row, expected in zip(mine, theirs, strict=True):
        for key in expected:
            if key not in ("kind", "policy/kl_old") and not key.startswith(("tokens/", "mismatch/", "sync/")):
                # The loss is a sum of terms of order 1 that cancel: float32 leaves more of it than of the gradient.
                bound = 2e-6 if key == "optimizer/loss" else 1e-6
                assert row[key] == pytest.approx(expected[key], rel=1e-5, abs=bound), (row["step"], key)
        assert row.get("tokens/useful") == expected.get("tokens/useful")
    assert completions(tmp_path / "run") == completions(single)
    got, expected = (weights(path / "checkpoints" / "step_000004") for path in (tmp_path / "run", single))
    for name, value in expected.items():
        assert (got[name] - value).abs().max() < 1e-5, name


@pytest.mark.parametrize(
    ("body", "code_word", "said"),
    [
        ('    if os.environ.get("RANK") == "1": raise ValueError("only here")\n', "RewardError", "only here"),
        ('    if os.environ.get("RANK") == "1": return []\n', "RewardError", "returned 0 values"),
        ('    raise ValueError("everywhere")\n', "RewardError", "everywhere"),
    ],
    ids=["raises_on_one", "breaks_its_contract_on_one", "raises_on_both"],
)
def test_an_error_on_one_process_ends_both_and_is_said_once(body, code_word, said, write_recipe, children, tmp_path):
    head, rest = REWARD.split('    """Graded', 1)
    recipe = write_recipe(
        tmp_path, {**CHANGES, "evaluation.at_start": False}, "import os\n" + head + body + '    """' + rest
    )
    start = time.monotonic()
    code, printed = children.run(recipe, launch="cpu2.yaml")
    assert code != 0 and time.monotonic() - start < 150
    ours = before_the_table(printed)
    assert ours.count(f"{code_word}: ") == 1 and said in ours, printed
    assert 'File "' not in printed.split(f"{code_word}: ")[0], "no traceback before the message"


def test_the_death_of_one_process_ends_the_other(write_recipe, children, tmp_path):
    deadly = REWARD.replace("def reward(completions, ", "import os\ndef reward(completions, trainer_state, ").replace(
        "    texts =",
        '    if os.environ["RANK"] == "1" and trainer_state.global_step == 2: os.kill(os.getppid(), 9)\n    texts =',
    )
    recipe = write_recipe(tmp_path, {**CHANGES, "checkpoint.every": 1}, deadly)
    start = time.monotonic()
    code, printed = children.run(recipe, launch="cpu2.yaml")
    assert code != 0 and time.monotonic() - start < 150
    assert "Process 0 has lost the other processes" in printed or str(signal.SIGKILL.value) in printed
    (tmp_path / "graded.py").write_text(REWARD)
    code, printed = children.run(recipe, "resume=auto", launch="cpu2.yaml")
    assert code == 0, printed
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == [1, 2, 3, 4]


def test_an_unsound_recipe_is_said_once_by_both(write_recipe, children, tmp_path):
    recipe = write_recipe(tmp_path, {**CHANGES, "rollout.prompts_per_step": 5})
    code, printed = children.run(recipe, launch="cpu2.yaml")
    assert code != 0
    assert before_the_table(printed).count("RecipeError: ") == 1 and "the 2 processes of this launch" in printed

"""Finding reward functions and checking their signatures, and trying them out on samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlpost.errors import RewardError
from rlpost.experience import Outcome
from rlpost.recipe.sections.reward import RewardSection, ScoringSection
from rlpost.scoring import Scorer, check_signature, load_reward
from rlpost.scoring.tryout import _read_samples, run_tryout, try_reward

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples" / "samples.jsonl"


def write(folder: Path, text: str, name: str = "own.py") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_names(tmp_path, monkeypatch):
    file = write(
        tmp_path, "from helper import two\ndef reward(completions, **c): return [two]\ndef other(completions): ...\n"
    )
    write(tmp_path, "two = 2.0\n", "helper.py")
    assert load_reward(str(file)).name == "own"
    assert load_reward(str(file)).function([1]) == [2.0]
    assert load_reward(f"{file}:other").name == "other"
    assert load_reward("own.py:other", base=tmp_path).spec == f"{file}:other"
    monkeypatch.chdir(tmp_path)
    assert load_reward("own.py").spec == f"{file}:reward"
    assert load_reward("math").spec.endswith("rewards/math.py:reward") and load_reward("math").name == "math"
    assert load_reward("length:linear").name == "linear"
    (tmp_path / "rewards").mkdir()
    own = write(tmp_path / "rewards", "def reward(completions): ...\n", "math.py")
    assert load_reward("math").spec == f"{own}:reward"  # your own come first


def test_our_file_names_hide_no_module():
    import math

    load_reward("math")
    import reasoning_gym

    load_reward("reasoning_gym")
    assert math.sqrt(4) == 2 and hasattr(reasoning_gym, "create_dataset")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mathh", "no reward named 'mathh'. Did you mean 'math'.*choice, code, format, length, math, number"),
        ("nowhere/own.py", "no reward file nowhere/own.py"),
        ("math:rewards", "no function 'rewards'. Did you mean 'reward'"),
        ("no_such_package.rewards:f", "cannot be imported: ModuleNotFoundError"),
        ("json:loads", "needs s, which"),  # it has **kwargs, so only the check against the columns can tell
        ("os.path:join", "must take the keyword `completions`"),
        ("", "needs a function"),
    ],
)
def test_unknown_names(spec, message):
    with pytest.raises(RewardError, match=message):
        check_signature(load_reward(spec), set())


def test_a_file_that_fails_says_why(tmp_path):
    with pytest.raises(RewardError, match="ZeroDivisionError: division by zero"):
        load_reward(str(write(tmp_path, "1 / 0")))
    with pytest.raises(RewardError, match=r"\(completions, \*\*columns\).*parameters are texts"):
        load_reward(str(write(tmp_path, "def reward(texts): ...", "positional.py")))
    with pytest.raises(RewardError, match="keyword `completions`"):
        load_reward(str(write(tmp_path, "def reward(completions, /): ...", "slash.py")))


def test_signatures(tmp_path):
    text = "def reward(completions, answer, *, scale, offset=0): ...\nasync def soon(completions, **columns): ...\n"
    file = write(tmp_path, text)
    plain, soon = load_reward(str(file)), load_reward(f"{file}:soon")
    assert soon.is_async and not plain.is_async
    check_signature(plain, {"answer", "extra"}, {"scale"})
    check_signature(soon, set(), {"anything"})
    with pytest.raises(RewardError, match=r"needs answer, .*columns \(answers, question\).*Did you mean 'answers'"):
        check_signature(plain, {"answers", "question"}, {"scale"})
    with pytest.raises(RewardError, match="needs scale"):
        check_signature(plain, {"answer"})
    with pytest.raises(RewardError, match="no argument ofset.*Did you mean 'offset'"):
        check_signature(plain, {"answer"}, {"scale", "ofset"})
    with pytest.raises(RewardError, match="given completions by rlpost itself"):
        check_signature(soon, set(), {"completions"})


def test_a_scorer_checks_names_and_arguments():
    number = RewardSection(function="number")
    with pytest.raises(RewardError, match="Two rewards are named 'number'"):
        Scorer([number, number], ScoringSection())
    with pytest.raises(RewardError, match="needs buffer, max_tokens"):  # noqa: SIM117
        with Scorer([RewardSection(function="length")], ScoringSection()) as s:
            s.check({"answer"})


@pytest.mark.engine
def test_tryout(tmp_path, capsys):
    rows = try_reward("number", EXAMPLES)
    assert [row.score.value for row in rows] == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    bad_gold = write(
        tmp_path, '{"completion": "1", "answer": "one"}\n\n{"completions": ["1", "2"], "answer": 1}\n', "s.jsonl"
    )
    assert run_tryout("number", bad_gold, 5.0, {"only": True}) == 1
    printed = capsys.readouterr().out
    assert "1 unparsable, 2 scored, mean 0.5" in printed and Outcome.UNPARSABLE in printed
    assert run_tryout("number", EXAMPLES, 5.0, {}) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"completion": "a"}\n{"completion": ', "line 2, is no JSON object"),
        ("[1]", "line 1, is no JSON object but a JSON array"),
        ('\n{"prompt": "a"}', "line 2: `completion` is missing"),
        ('{"prompt": [{"role": "user"}], "completion": "a"}', "line 1: `prompt` is neither"),
        ('{"completion": "a", "completion_ids": "b"}', "line 1: `completion_ids`"),
        ("", "are empty"),
    ],
)
def test_bad_samples(tmp_path, text, message):
    with pytest.raises(RewardError, match=message):
        _read_samples(write(tmp_path, text, "samples.jsonl"))


HOSTILE = "\x1b[2J\x1b]0;owned\x07 12\x9b31m"


def test_what_a_completion_holds_cannot_drive_the_terminal(tmp_path, capsys):
    """Nor what a reward says of it."""
    (tmp_path / "graded.py").write_text(
        "def reward(completions, **columns):\n    raise ValueError('bad ' + completions[0])\n"
    )
    lines = write(tmp_path, json.dumps({"prompt": "?", "completion": HOSTILE}) + "\n", "samples.jsonl")
    assert run_tryout(str(tmp_path / "graded.py"), lines, 30.0, {}) == 1
    printed = capsys.readouterr().out
    assert "12" in printed and "bad" in printed
    assert not [c for c in printed if not c.isprintable() and c != "\n"]


def test_an_error_that_quotes_a_completion_cannot_drive_the_terminal(capsys):
    from rlpost.cli import _print_error

    _print_error(RewardError(f"it said {HOSTILE}"))
    printed = capsys.readouterr().err
    assert "it said" in printed
    assert not [c for c in printed if not c.isprintable() and c != "\n"]

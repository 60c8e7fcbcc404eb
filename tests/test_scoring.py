"""Scoring in processes: what becomes of functions that hang, raise, die, return nonsense, or are written for TRL."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlpost.errors import RewardError
from rlpost.experience import Completion, Demonstration, Group, Outcome, Prompt
from rlpost.recipe.sections.reward import RewardSection, ScoringSection
from rlpost.scoring import Scorer

pytestmark = pytest.mark.engine

# As in TRL's documentation ("Using a custom reward function"), unchanged.
TRL_STYLE = """
import re

def reward_func(completions, ground_truth, **kwargs):
    # Regular expression to capture content inside \\\\boxed{}
    matches = [re.search(r"\\\\boxed\\{(.*?)\\}", completion[0]["content"]) for completion in completions]
    contents = [match.group(1) if match else "" for match in matches]
    # Reward 1 if the content is the same as the ground truth, 0 otherwise
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]
"""

MOODS = '''
import asyncio, ctypes, os, re, signal, subprocess, sys, time
from rlpost.scoring import Unparsable

def mood(completions, **columns):
    """Does what the completion says."""
    return [act(c[0]["content"]) for c in completions]

def act(text):
    verb, _, value = text.partition(" ")
    if verb == "value":
        return eval(value)
    if verb == "hang":
        time.sleep(60)
    if verb == "hang_in_c":
        re.match(r"(a|a)*$", "a" * 60 + "b")
    if verb == "raise":
        raise ValueError("no " + value)
    if verb == "unparsable":
        raise Unparsable("strange gold")
    if verb == "exit":
        os._exit(3)
    if verb == "sys_exit":
        sys.exit(1)
    if verb == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if verb == "torch":
        return float("torch" in sys.modules)
    if verb == "child":
        child = subprocess.Popen(["sleep", "60"])
        open(value, "w").write(f"{os.getpid()} {child.pid}")
        time.sleep(60)
    if verb == "numpy":
        import numpy as np
        return {"f": np.float32(0.5), "i": np.int64(2), "b": np.bool_(True), "a": np.array([1.0, 2.0])}[value]

async def slow(completions, **columns):
    text = completions[0][0]["content"]
    if text.startswith("wait"):
        await asyncio.sleep(float(text.split()[1]))
        return [1.0]
    return [act(text)]

def wrong_length(completions, **columns):
    return [1.0] * (len(completions) + 1)

def forgot_return(completions, **columns):
    pass

def group_mean(completions, answer, **columns):
    assert len(set(answer)) == 1, "more than one group"
    mean = sum(float(c[0]["content"]) for c in completions) / len(completions)
    return [float(c[0]["content"]) - mean for c in completions]

def everything(completions, prompts, completion_ids, trainer_state, log_metric, log_extra, answer, truncated,
               demonstration, bonus=0.0):
    assert prompts[0] == [{"role": "user", "content": "question"}], prompts
    assert completions[0][0]["role"] == "assistant"
    log_metric("tokens", len(completion_ids[0]))
    log_extra("answer", answer)
    return [trainer_state.global_step + len(completion_ids[0]) + 100 * truncated[0] + 1000 * len(demonstration[0]) + bonus]

def names(completions, **kwargs):
    expected = {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric", "answer"}
    return [float(set(kwargs) == expected)] * len(completions)
'''


def reward_file(name: str, text: str):
    """A fixture: the path of a file of rewards."""

    @pytest.fixture(scope="module", name=name)
    def written(tmp_path_factory) -> Path:
        file = tmp_path_factory.mktemp("rewards") / f"{name}.py"
        file.write_text(text)
        return file

    return written


moods = reward_file("moods", MOODS)


def group(*texts: str, demonstration: str | None = None, finish="stop", **columns) -> Group:
    prompt = Prompt("p/0", ({"role": "user", "content": "question"},), "question", (1, 2), columns)
    if demonstration:
        prompt = Prompt(
            prompt.id, prompt.messages, prompt.text, prompt.token_ids, columns, Demonstration(demonstration)
        )
    return Group(prompt, tuple(Completion((5, 6, 7), (0.0,) * 3, text, finish) for text in texts))


def scorer(spec: str, workers: int = 2, max_failed_share: float = 1.0, **section) -> Scorer:
    rewards = [RewardSection(function=spec, **section)]
    return Scorer(rewards, ScoringSection(workers=workers, max_failed_share=max_failed_share))


def score(spec: str, *groups: Group, **settings) -> list:
    with scorer(spec, **settings) as s:
        return [row[0] for g in s.score(groups) for row in g.scores]


@pytest.fixture(scope="module")
def mood(moods):
    with scorer(f"{moods}:mood", deadline_s=1.5) as s:
        yield s


def verdicts(s: Scorer, *texts: str) -> list:
    return [row[0] for row in s.score([group(*texts)])[0].scores]


def test_every_outcome_and_the_order(mood):
    texts = [
        "value 1",
        "raise luck",
        "value None",
        "value float('nan')",
        "exit",
        "value 0.25",
        "unparsable",
        "sys_exit",
    ]
    found = verdicts(mood, *texts)
    assert [f.outcome for f in found] == [
        Outcome.SCORED,
        Outcome.CRASHED,
        Outcome.NOT_APPLICABLE,
        Outcome.UNPARSABLE,
        Outcome.CRASHED,
        Outcome.SCORED,
        Outcome.UNPARSABLE,
        Outcome.CRASHED,
    ]
    assert [f.value for f in found] == [1.0, None, None, None, None, 0.25, None, None]
    assert found[1].detail.startswith("ValueError: no luck (moods.py:")
    assert "exit code 3" in found[4].detail
    assert found[6].detail == "strange gold"
    assert mood.counts["mood"][Outcome.CRASHED] == 3 and mood.counts["mood"].total() == len(texts)


@pytest.mark.parametrize("verb", ["hang", "hang_in_c"])
def test_a_hang_costs_only_its_own_sample(mood, verb):
    verdicts(mood, "value 0")  # started
    start = time.monotonic()
    found = verdicts(mood, "value 1", verb, *(f"value {i}" for i in range(12)))
    assert time.monotonic() - start < 10
    assert found[1].outcome is Outcome.TIMED_OUT and "1.5 s" in found[1].detail
    assert [f.value for f in found[2:]] == [float(i) for i in range(12)] and found[0].value == 1.0


def test_dead_processes_cost_only_their_own_samples(mood):
    found = verdicts(mood, "value 1", "exit", "segfault", "value 2", "exit", "value 3")
    assert [f.value for f in found] == [1.0, None, None, 2.0, None, 3.0]
    assert "SIGSEGV" in found[2].detail


@pytest.mark.parametrize(
    ("expression", "value"),
    [("value True", 1.0), ("value 3", 3.0), ("numpy f", 0.5), ("numpy i", 2.0), ("numpy b", 1.0)]
    + [("value __import__('fractions').Fraction(1, 4)", 0.25), ("value -0.0", 0.0), ("torch", 0.0)],
)
def test_numbers(mood, expression, value):
    assert verdicts(mood, expression)[0].value == value


def test_what_is_no_number(mood):
    texts = [
        "value '1.0'",
        "value float('inf')",
        "value 1j",
        "value 10**400",
        "value [1.0]",
        "numpy a",
        "value object()",
    ]
    assert {f.outcome for f in verdicts(mood, *texts)} == {Outcome.UNPARSABLE}


def test_a_killed_process_takes_its_children_along(moods, tmp_path):
    pids = tmp_path / "pids"
    assert score(f"{moods}:mood", group(f"child {pids}"), deadline_s=1.0)[0].outcome is Outcome.TIMED_OUT
    assert_gone(pids)


def test_a_trainer_that_dies_leaves_no_process_behind(moods, tmp_path):
    pids, script = tmp_path / "pids", tmp_path / "trainer.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_scoring import group, scorer\n"
        "if __name__ == '__main__':\n"
        f"    scorer('{moods}:mood', deadline_s=60).score([group('child {pids}', 'hang')])\n"
    )
    trainer = subprocess.Popen([sys.executable, str(script), str(Path(__file__).parent)])
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2, 60)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert_gone(pids)


def test_ctrl_c_reaches_only_the_trainer(moods, tmp_path):
    script, pids = tmp_path / "trainer.py", tmp_path / "pids"
    script.write_text(
        "import signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_scoring import group, scorer\n"
        "if __name__ == '__main__':\n"
        # A shell's background job starts with SIGINT ignored, and the tests may run in one.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    try:\n"
        f"        scorer('{moods}:mood', deadline_s=60).score([group('child {pids}')])\n"
        "    except KeyboardInterrupt:\n"
        "        print('stopped')\n"
    )
    command = [sys.executable, str(script), str(Path(__file__).parent)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2, 60)
    for process in [trainer, *psutil.Process(trainer.pid).children(recursive=True)]:
        if process.pid not in map(int, pids.read_text().split()[1:]):
            process.send_signal(signal.SIGINT)
    output, _ = trainer.communicate(timeout=180)
    assert output.decode().strip() == "stopped"
    assert_gone(pids)


def test_async_calls_run_at_the_same_time_and_end_by_themselves(moods):
    texts = ["wait 0.5"] * 20 + ["wait 30", "raise luck", "value 1"]
    with scorer(f"{moods}:slow", deadline_s=2.0) as s:
        s.score([group("wait 0")])
        start = time.monotonic()
        found = verdicts(s, *texts)
        assert time.monotonic() - start < 8  # 20 x 0.5 s one after the other would be 10 s
    assert [f.value for f in found[:20]] == [1.0] * 20
    assert [f.outcome for f in found[20:]] == [Outcome.TIMED_OUT, Outcome.CRASHED, Outcome.SCORED]


def test_an_async_call_that_kills_or_blocks_its_process_costs_only_its_own_sample(moods):
    found = score(f"{moods}:slow", group("wait 0.1", "exit", "wait 0.1", "hang"), deadline_s=1.0, workers=1)
    outcomes = [Outcome.SCORED, Outcome.CRASHED, Outcome.SCORED, Outcome.TIMED_OUT]
    assert [f.outcome for f in found] == outcomes


def test_a_reward_written_for_trl_runs_unchanged(tmp_path):
    file = tmp_path / "trl_style.py"
    file.write_text(TRL_STYLE)
    right, wrong = "The answer is \\boxed{4}", "\\boxed{5}"
    groups = [group(right, wrong, ground_truth="4"), group(wrong, ground_truth="5")]
    for call in ("sample", "group", "batch"):
        assert [s.value for s in score(f"{file}:reward_func", *groups, call=call)] == [1.0, 0.0, 1.0]


def test_a_group_call_sees_its_group(moods):
    found = score(f"{moods}:group_mean", group("1", "3", answer=1), group("5", answer=2), call="group")
    assert [f.value for f in found] == [-1.0, 1.0, 0.0]


def test_a_crash_in_a_group_call_costs_its_group(moods):
    found = score(f"{moods}:group_mean", group("1", "x", answer=1), group("5", answer=2), call="group")
    assert [f.outcome for f in found] == [Outcome.CRASHED, Outcome.CRASHED, Outcome.SCORED]


def test_all_keywords(moods):
    with scorer(f"{moods}:everything", arguments={"bonus": 0.5}) as s:
        s.check({"answer"})
        scored = s.score([group("a", answer=1, demonstration="d" * 7, finish="length")], step=10_000)
    assert scored[0].scores[0][0].value == 10_000 + 3 + 100 + 7000 + 0.5
    assert s.logged == {"tokens": 3.0}


def test_kwargs_hold_what_trl_would_put_there(moods):
    assert score(f"{moods}:names", group("a", answer=1, demonstration="d"), call="batch")[0].value == 1.0


@pytest.mark.parametrize(
    ("function", "words"),
    [("wrong_length", ["wrong_length", "2 values", "1 were expected"]), ("forgot_return", ["None"])],
)
def test_a_broken_contract_stops_the_run(moods, function, words):
    with pytest.raises(RewardError) as error:
        score(f"{moods}:{function}", group("a", "b"))
    assert all(word in str(error.value) for word in words)


def test_too_many_failures_stop_the_run(moods):
    with scorer(f"{moods}:mood", max_failed_share=0.5) as s:
        assert s.score([group("raise a", "value 1")])
        with pytest.raises(
            RewardError,
            match=r"'mood'.* 2 of 3 completions \(2 crashed(; without waiting for \d more)?\).*ValueError: no a",
        ):
            s.score([group("raise a", "value 1", "raise b")])


def test_failures_are_judged_over_all_calls_of_a_step(moods):
    """A hinted group with 5 of 8 failures does not end a run whose other completions were scored; a broken reward does."""
    right, failing = ["value 1"] * 8, ["raise a"] * 5 + ["value 1"] * 3
    with scorer(f"{moods}:mood", max_failed_share=0.5) as s:
        s.score([group(*right)])
        assert s.score([group(*failing)], more=True)
        with pytest.raises(RewardError, match=r"15 of 29 completions \(15 crashed(; without waiting for \d more)?\)"):
            s.score([group(*["raise b"] * 10, "value 1", "value 2", "value 3")], more=True)
        with pytest.raises(RewardError, match="5 of 8 completions"):
            s.score([group(*failing)])


def test_several_rewards_and_empty_groups(moods):
    rewards = [
        RewardSection(function=f"{moods}:mood", name="first"),
        RewardSection(function="length:linear", arguments={"cost": 0.5}),
    ]
    with Scorer(rewards, ScoringSection()) as s:
        assert s.names == ("first", "linear")
        scored = s.score([group("value 1"), group(), group("value 2", "value 3")])
        assert s.score([]) == []
    assert [[[v.value for v in row] for row in g.scores] for g in scored] == [
        [[1.0, -1.5]],
        [],
        [[2.0, -1.5], [3.0, -1.5]],
    ]


def test_a_reward_that_cannot_be_loaded_in_a_process_is_named(tmp_path):
    file = tmp_path / "flaky.py"
    file.write_text("def reward(completions, **columns):\n    return [1.0]\n")
    with scorer(str(file), workers=1) as s:
        file.write_text("import nothing_like_this\n")
        s._pool.stop()
        with pytest.raises(RewardError, match="nothing_like_this"):
            s.score([group("a")])


def test_columns_that_cannot_be_sent_are_named(moods):
    with pytest.raises(RewardError, match="plain data"):
        score(f"{moods}:mood", group("value 1", answer=lambda: 1))


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def assert_gone(pids: Path) -> None:
    def running(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    wait_for(lambda: not any(running(int(pid)) for pid in pids.read_text().split()), 15)

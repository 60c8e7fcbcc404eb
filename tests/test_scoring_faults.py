"""Whatever a reward does to its process, to its event loop or to the trainer: an outcome of its own completion, no more."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from test_scoring import group, reward_file, score, scorer, verdicts

from rlpost.errors import RewardError
from rlpost.experience import Outcome
from rlpost.recipe.sections.reward import RewardSection, ScoringSection
from rlpost.scoring import Scorer, describe_reward
from rlpost.scoring.tryout import run_tryout, try_reward

pytestmark = pytest.mark.engine

ACTS = '''
import asyncio, concurrent.futures, multiprocessing, os, shutil, signal, sys, tempfile, time

def chdir_away():
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    shutil.rmtree(folder)

def fork(code=None):
    child = os.fork()
    if child == 0 and code is not None:
        sys.exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")

ACTS = {
    "exit": lambda: sys.exit(1),
    "exit 0": lambda: sys.exit(0),
    "exit None": lambda: sys.exit(),
    "exit text": lambda: sys.exit("bye"),
    "_exit 0": lambda: os._exit(0),
    "_exit 7": lambda: os._exit(7),
    "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt()),
    "cancelled": lambda: (_ for _ in ()).throw(asyncio.CancelledError()),
    "future cancelled": lambda: (_ for _ in ()).throw(concurrent.futures.CancelledError()),
    "timeout": lambda: (_ for _ in ()).throw(concurrent.futures.TimeoutError()),
    "group": lambda: (_ for _ in ()).throw(BaseExceptionGroup("several", [SystemExit(3)])),
    "mute": lambda: (_ for _ in ()).throw(Mute()),
    "close descriptors": lambda: os.closerange(0, 4096),
    "abort": lambda: os.abort(),
    # From here on: what TRL lets pass. It scores, and the call behind it finds the process as it was.
    "close streams": lambda: [one.close() for one in (sys.stdout, sys.stderr, sys.stdin)],
    "close 1": lambda: (os.close(1), os.close(2)),
    "replace": lambda: [setattr(sys, "stdout", None), setattr(sys, "stderr", open(os.devnull, "w"))],
    "chdir": lambda: os.chdir("/"),
    "no directory": chdir_away,
    "alarm": lambda: signal.setitimer(signal.ITIMER_REAL, 0.05),
    "handler": lambda: (signal.signal(signal.SIGALRM, lambda *_: sys.exit(9)), signal.setitimer(signal.ITIMER_REAL, 0.05)),
    "start method": lambda: multiprocessing.set_start_method("spawn"),
    "recursion": lambda: sys.setrecursionlimit(70),
    "forked": lambda: fork() == 0 or 1 / 0,
    "forked exit": lambda: fork(3) == 3 or 1 / 0,
}

def check():
    """The state in which a call is to find its process."""
    print("said", file=sys.stderr)
    os.fstat(1), os.fstat(2)
    assert os.getcwd() != "/" and sys.getrecursionlimit() >= 1000
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    time.sleep(0.1)  # for alarms

def act(text):
    ACTS.get(text, check)()
    return 1.0

def plain(completions, **columns):
    return [act(c[0]["content"]) for c in completions]

SEMAPHORE, LOOPS = asyncio.Semaphore(1), []

async def exits():
    sys.exit(4)

async def in_a_group():
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(exits())

async def soon(completions, **columns):
    text = completions[0][0]["content"]
    await asyncio.sleep(0.05)
    loop = asyncio.get_running_loop()
    LOOPS.append(loop)
    if text == "cancel itself":
        asyncio.current_task().cancel()
    if text == "cancel all":
        [task.cancel() for task in asyncio.all_tasks()]
    if text == "stop":
        loop.stop()
    if text == "close":
        loop.close()
    if text == "call exit":
        loop.call_soon(sys.exit, 5)
    if text == "child":
        await asyncio.create_task(exits())
    if text == "task group":
        await in_a_group()
    if text == "nested":
        asyncio.run(asyncio.sleep(0))
    if text == "same loop":
        assert set(LOOPS) == {loop}
        async with SEMAPHORE:
            pass
    await asyncio.sleep(0.05)
    return [act(text)]
'''

CRASHING = [
    "exit",
    "exit 0",
    "exit None",
    "exit text",
    "_exit 0",
    "_exit 7",
    "interrupt",
    "cancelled",
    "future cancelled",
]
CRASHING += ["timeout", "group", "mute", "close descriptors", "abort"]
PASSING = ["close streams", "close 1", "replace", "chdir", "no directory", "alarm", "handler", "start method"]
PASSING += ["start method", "recursion", "forked", "forked exit"]
IN_LOOP = ["cancel itself", "cancel all", "stop", "close", "call exit", "child", "task group", "nested"]


acts = reward_file("acts", ACTS)


def between(texts):
    return [text for one in texts for text in ("check", one)] + ["check"]


def wanted(texts):
    return [Outcome.CRASHED if text in CRASHING + IN_LOOP else Outcome.SCORED for text in texts]


@pytest.mark.parametrize("function", ["plain", "soon"])
def test_every_end_is_an_outcome_of_its_own_completion(acts, function):
    texts = between([*CRASHING, *PASSING, *(IN_LOOP if function == "soon" else [])])
    found = score(f"{acts}:{function}", group(*texts), workers=1, deadline_s=20)
    assert [
        (t, f.outcome, f.detail) for t, f, w in zip(texts, found, wanted(texts), strict=True) if f.outcome != w
    ] == []
    said = {text: one.detail for text, one in zip(texts, found, strict=True)}
    assert (
        "exit code 0" in said["_exit 0"] and "exit code 7" in said["_exit 7"] and "SystemExit: bye" in said["exit text"]
    )
    assert "closed file descriptors" in said["close descriptors"] and said["mute"].startswith("acts.Mute: ")
    if function == "soon":
        assert "Event loop stopped" in said["stop"] and "SystemExit: 4" in said["child"]


def test_an_event_loop_lasts_as_a_trainers_does(acts):
    with scorer(f"{acts}:soon", workers=1) as s:
        for _ in range(2):
            assert [one.value for one in verdicts(s, "same loop", "same loop")] == [1.0, 1.0]


POOLS = """
import asyncio, multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from neighbour import double

@dataclass
class Answer:
    value: float

def answer(x):
    return Answer(double(x) / 2)

def context(completion):
    text = completion[0]["content"]
    return multiprocessing if text == "default" else multiprocessing.get_context(text)

def pool(completions, **columns):
    with context(completions[0]).Pool(1) as made:
        return [one.value for one in made.map(answer, [1.0])]

def executor(completions, **columns):
    text = completions[0][0]["content"]
    with ProcessPoolExecutor(1, mp_context=None if text == "default" else context(completions[0])) as made:
        return [made.submit(answer, 1.0).result().value]

async def soon(completions, **columns):
    with ProcessPoolExecutor(1) as made:
        return [(await asyncio.get_running_loop().run_in_executor(made, answer, 1.0)).value]
"""


@pytest.mark.parametrize("function", ["pool", "executor", "soon"])
def test_process_pools_work_in_every_way_of_starting(tmp_path, function):
    folder = tmp_path / "odd folder-\N{LATIN SMALL LETTER U WITH DIAERESIS}"
    folder.mkdir()
    (folder / "neighbour.py").write_text("def double(x):\n    return 2 * x\n")
    (folder / "my-pools.v2.py").write_text(POOLS)
    texts = ["default", "fork", "spawn", "forkserver"]
    found = score(f"{folder}/my-pools.v2.py:{function}", group(*texts), workers=2, deadline_s=60)
    assert [(one.value, one.detail) for one in found] == [(1.0, "")] * 4


def test_files_and_neighbours_of_the_same_names_are_kept_apart(tmp_path):
    text = (
        "import grader\n"
        "def reward(completions, **columns):\n"
        "    import late.inner\n"
        "    return [grader.VALUE + late.inner.VALUE] * len(completions)\n"
    )
    sections = []
    for i, name in enumerate(("a", "b"), start=1):
        (tmp_path / name / "late").mkdir(parents=True)
        (tmp_path / name / "reward.py").write_text(text)
        (tmp_path / name / "grader.py").write_text(f"VALUE = {i}\n")
        (tmp_path / name / "late" / "__init__.py").write_text("")
        (tmp_path / name / "late" / "inner.py").write_text(f"VALUE = {10 * i}\n")
        sections.append(RewardSection(function=str(tmp_path / name / "reward.py"), name=name))
    with Scorer(sections, ScoringSection(workers=1)) as s:
        for _ in range(2):
            [row] = s.score([group("x")])[0].scores
            assert [one.value for one in row] == [11.0, 22.0]


def test_a_file_does_nothing_to_the_trainer_when_it_is_imported(tmp_path):
    file = tmp_path / "busy.py"
    file.write_text(
        "import multiprocessing, os, signal, sys\n"
        "os.chdir('/')\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.alarm(1)\nsys.setrecursionlimit(5000)\n"
        "sys.stdout = None\nmultiprocessing.set_start_method('spawn', force=True)\n"
        "def reward(completions, **columns):\n"
        "    return [float(os.getcwd() == '/' and multiprocessing.get_start_method() == 'spawn')]\n"
    )
    before = os.getcwd(), signal.getsignal(signal.SIGINT), sys.stdout, sys.getrecursionlimit()  # noqa: PTH109
    method, left = multiprocessing.get_start_method(allow_none=True), signal.getitimer(signal.ITIMER_REAL)[0]
    describe_reward(str(file))
    assert before == (os.getcwd(), signal.getsignal(signal.SIGINT), sys.stdout, sys.getrecursionlimit())  # noqa: PTH109
    assert multiprocessing.get_start_method(allow_none=True) == method
    assert abs(signal.getitimer(signal.ITIMER_REAL)[0] - left) < 5 and (left or signal.alarm(0) == 0)
    assert score(str(file), group("a"))[0].value == 1.0  # but what it sets up for its own process holds there


@pytest.mark.parametrize(
    "end",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "raise KeyboardInterrupt",
        "import asyncio; raise asyncio.CancelledError",
    ],
)
def test_a_file_that_ends_the_program_is_refused(tmp_path, end):
    file = tmp_path / "ends.py"
    file.write_text(f"{end}\ndef reward(completions): ...\n")
    with pytest.raises(RewardError, match="cannot be imported"):
        describe_reward(str(file))


def test_a_file_may_close_what_it_opened_itself(tmp_path):
    """Pipes and pools of the module's own, made when it was imported."""
    file = tmp_path / "own.py"
    file.write_text(
        "import multiprocessing, subprocess\n"
        "def square(x):\n    return x * x\n"
        "POOL = multiprocessing.Pool(1)\n"
        "CAT = subprocess.Popen(['cat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        "def reward(completions, **columns):\n"
        "    if CAT.stdin.closed:\n        return [2.0]\n"
        "    said = float(CAT.communicate('3')[0])\n"
        "    with POOL:\n        return [said + POOL.map(square, [2])[0]]\n"
    )
    assert [one.value for one in score(str(file), group("a", "b"), workers=1)] == [7.0, 2.0]


def test_what_a_call_prints_is_shown_up_to_a_limit(tmp_path, capfd):
    file = tmp_path / "loud.py"
    file.write_text(
        "def reward(completions, **columns):\n"
        "    for i in range(1000):\n"
        "        print(completions[0][0]['content'], i)\n"
        "    return [1.0]\n"
    )
    assert [one.value for one in score(str(file), group("a", "b"), workers=1)] == [1.0, 1.0]
    lines = capfd.readouterr().out.split("\n")
    assert [f"a {i}" for i in range(50)] == [line for line in lines if line.startswith("a ")]
    assert sum(line.startswith("b ") for line in lines) == 50
    assert lines.count("[reward loud] what else it printed in this call is not shown (950 lines)") == 2


def test_messages_are_text_that_any_file_takes(tmp_path, capsys):
    file, samples = tmp_path / "odd.py", tmp_path / "samples.jsonl"
    file.write_text("def reward(completions, **columns):\n    raise ValueError('\\ud800' + 'x' * 1000)\n")
    samples.write_text('{"prompt": "q", "completion": "a"}\n')
    assert run_tryout(str(file), samples, 5.0, {}) == 1
    assert "crashed" in capsys.readouterr().out
    assert try_reward(str(file), samples)[0].score.detail.startswith("ValueError: \\ud800xxx")


HANGS = """
import time
CALLS = open(__file__ + ".calls", "a")
def reward(completions, **columns):
    texts = [c[-1]["content"] for c in completions]
    print(*texts, file=CALLS, flush=True)
    if "hang" in texts or (len(texts) > 2 and "slow" in texts):
        time.sleep(60)
    return [float(text == "right") + len(texts) / 10 for text in texts]
"""


@pytest.fixture
def hangs(tmp_path):
    file = tmp_path / "hangs.py"
    file.write_text(HANGS)
    return file


def outcomes(found):
    return [(one.outcome, one.value) for one in found]


def test_a_hang_has_a_score_where_the_recipe_gives_one(hangs):
    known = score(str(hangs), group("right", "hang"), deadline_s=1.0, timeout_score=-0.5)
    assert outcomes(known) == [(Outcome.SCORED, 1.1), (Outcome.HUNG, -0.5)] and not known[1].failed
    assert known[1].detail == "no answer in 1 s"
    unknown = score(str(hangs), group("right", "hang"), deadline_s=1.0)
    assert outcomes(unknown) == [(Outcome.SCORED, 1.1), (Outcome.TIMED_OUT, None)] and unknown[1].failed


@pytest.mark.parametrize("call", ["group", "batch"])
def test_in_a_call_of_several_only_those_hang_on_which_the_function_hangs_alone(hangs, call):
    found = score(str(hangs), group("right", "hang", "wrong"), deadline_s=0.5, timeout_score=0, call=call)
    # The others are scored by a call of their own: a group function has seen two completions.
    assert outcomes(found) == [(Outcome.SCORED, 1.2), (Outcome.HUNG, 0.0), (Outcome.SCORED, 0.2)]


def test_no_completion_is_to_blame_for_a_call_that_hangs_as_a_whole(hangs):
    found = score(str(hangs), group("right", "slow", "wrong"), deadline_s=0.5, timeout_score=0, call="group")
    assert [one.outcome for one in found] == [Outcome.TIMED_OUT] * 3


def test_a_verifier_that_hangs_on_most_completions_is_broken_whatever_a_hang_is_worth(hangs):
    with pytest.raises(
        RewardError, match=r"failed on 2 of 3 completions \(2 (hung|timed_out)(; without waiting for 1 more)?\)"
    ):
        score(str(hangs), group("hang", "hang", "right"), deadline_s=0.5, timeout_score=0, max_failed_share=0.5)


LEAVING = """
import os, signal, subprocess, sys, threading, time

def act(text):
    if text == "child holds the pipes":
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        os._exit(0)
    if text == "half a frame":
        for fd in range(3, 40):
            try:
                os.write(fd, b"\\0" * 7)
            except OSError:
                pass
        os._exit(0)
    if text == "later":
        threading.Timer(0.3, os._exit, (0,)).start()
    if text == "kill the group":
        os.killpg(0, signal.SIGKILL)
    if text == "much":
        return float(len(bytearray(2 * 2**30)) > 0)
    if text == "hang":
        time.sleep(600)
    if text == "pid":
        return float(os.getpid())
    if text == "asked":
        with open(os.environ["RLPOST_ASKED"], "a") as file:
            file.write("x")
        time.sleep(0.05)
    return 1.0

def reward(completions, **columns):
    return [act(c[0]["content"]) for c in completions]
"""


leaving = reward_file("leaving", LEAVING)


def test_a_death_is_noticed_at_once_however_it_comes(leaving):
    texts = ["child holds the pipes", "half a frame", "kill the group"]
    with scorer(f"{leaving}:reward", workers=2, deadline_s=120) as s:
        verdicts(s, "started")
        began = time.monotonic()
        found = verdicts(s, *(text for one in texts for text in ("right", one)), "right")
        assert time.monotonic() - began < 30, "a deadline was waited for"
    assert [one.outcome for one in found] == [Outcome.SCORED, Outcome.CRASHED] * 3 + [Outcome.SCORED]
    assert "exit code 0" in found[1].detail and "exit code 0" in found[3].detail and "SIGKILL" in found[5].detail


def test_many_deaths_at_once_cost_their_own_completions(leaving):
    with scorer(f"{leaving}:reward", workers=4, deadline_s=120) as s:
        verdicts(s, *["started"] * 8)
        began = time.monotonic()
        found = verdicts(s, *["kill the group"] * 12, *["right"] * 12)
        assert time.monotonic() - began < 60
    assert [one.outcome for one in found] == [Outcome.CRASHED] * 12 + [Outcome.SCORED] * 12


def test_a_process_that_dies_with_nothing_to_do_costs_no_completion(leaving):
    with scorer(f"{leaving}:reward", workers=1, deadline_s=60) as s:
        first = verdicts(s, "pid")[0].value
        os.kill(int(first), signal.SIGKILL)
        time.sleep(0.5)
        again = verdicts(s, "pid", "right")
        assert again[0].outcome is Outcome.SCORED and again[0].value != first and again[1].value == 1.0
        verdicts(s, "later")
        time.sleep(1.0)
        assert verdicts(s, "right")[0].value == 1.0


def test_a_worker_may_take_so_much_memory_and_no_more(leaving):
    rewards = [RewardSection(function=f"{leaving}:reward")]
    with Scorer(rewards, ScoringSection(workers=1, max_failed_share=1.0, memory_gib=1.0)) as s:
        found = verdicts(s, "much", "right")
    assert found[0].outcome is Outcome.CRASHED and "MemoryError" in found[0].detail and found[1].value == 1.0


def test_what_cannot_become_few_failures_any_more_is_not_waited_for(leaving):
    rewards = [RewardSection(function=f"{leaving}:reward", deadline_s=0.5)]
    with Scorer(rewards, ScoringSection(workers=2, max_failed_share=0.1)) as s:
        verdicts(s, "started")
        began = time.monotonic()
        with pytest.raises(RewardError, match=r"of 200 completions \(\d+ timed_out; without waiting for 1\d\d more\)"):
            verdicts(s, *["hang"] * 200)
        assert time.monotonic() - began < 40, "200 hangs of half a second on two processes take 50 s"
        assert verdicts(s, "right")[0].value == 1.0


def test_a_group_that_was_begun_ahead_is_scored_once_and_as_any_other(leaving, monkeypatch, tmp_path):
    monkeypatch.setenv("RLPOST_ASKED", str(tmp_path / "asked"))
    with scorer(f"{leaving}:reward", workers=2, deadline_s=60) as s:
        groups = [group("asked", "asked"), group("right"), group("asked")]
        s.ahead(groups[2], 5, 9)
        s.ahead(groups[0], 5, 9)
        s.ahead(groups[1], 4, 9)  # of another step: made anew
        found = s.score(groups, 5, 9)
        assert [[row[0].value for row in one.scores] for one in found] == [[1.0, 1.0], [1.0], [1.0]]
        assert (tmp_path / "asked").read_text() == "xxx" and not s._begun
        s.score(groups, 5, 9)
        assert (tmp_path / "asked").read_text() == "xxx" * 2, "what was begun serves one `score`"


def test_a_process_whose_trainer_is_gone_before_it_is_up_says_nothing(leaving):
    """Its words would stand behind the run's own message."""
    code = f"from rlpost.scoring.pool import WorkerPool; import os; WorkerPool(['{leaving}:reward'], 2).start(); "
    code += "import time; time.sleep(0.3); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout + done.stderr == ""

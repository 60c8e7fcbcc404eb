"""What a reward's code does outside its calls: in the pipes, in what is left of a call, and while its file is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from test_scoring import reward_file, scorer, verdicts

from rlpost.errors import RewardError
from rlpost.experience import Outcome
from rlpost.scoring import describe_reward

pytestmark = pytest.mark.engine

AFTERWARDS = """
import asyncio, os, pickle, struct, sys

class Ends:
    def __reduce__(self):
        return sys.exit, (0,)

def into_pipes(data):
    for fd in range(3, 40):
        try:
            os.write(fd, data)
        except OSError:
            pass

def reward(completions, **columns):
    text = completions[0][-1]["content"]
    if text == "text":
        into_pipes(b"hello\\n")
    if text == "pickle":
        data = pickle.dumps(Ends())
        into_pipes(struct.pack(">Q", len(data)) + data)
    return [float(len(input()))] if text == "input" else [1.0]

async def exits():
    await asyncio.sleep(0.2)
    sys.exit(0)

async def cancels():
    await asyncio.sleep(0.2)
    [task.cancel() for task in asyncio.all_tasks()]

async def soon(completions, **columns):
    text, loop = completions[0][-1]["content"], asyncio.get_running_loop()
    if text == "exit":
        loop.call_later(0.2, sys.exit, 0)
    if text == "stop":
        loop.call_later(0.2, loop.stop)
    if text == "task":
        loop.left = asyncio.ensure_future(exits())
    if text == "cancel":
        loop.left = asyncio.ensure_future(cancels())
    await asyncio.sleep(0.5 if text == "right" else 0)
    return [1.0]
"""


afterwards = reward_file("afterwards", AFTERWARDS)


@pytest.mark.parametrize("text", ["text", "pickle"])
def test_what_a_reward_writes_into_the_pipes_costs_its_own_completion_at_once(afterwards, text):
    with scorer(f"{afterwards}:reward", workers=1, deadline_s=120) as s:
        began = time.monotonic()
        assert [one.outcome for one in verdicts(s, text, "right")] == [Outcome.CRASHED, Outcome.SCORED]
        assert time.monotonic() - began < 60, "a deadline was waited for"


def test_a_reward_has_no_part_in_the_trainers_input(afterwards):
    theirs, ours = os.pipe()  # an input that stays open and says nothing, as a terminal
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_scoring import group, score\n"
    code += f"print(*(one.detail for one in score('{afterwards}:reward', group('input'), workers=1, deadline_s=60)))"
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]  # noqa: PTH120
    try:
        done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=50, check=True)
    finally:
        os.close(theirs)
        os.close(ours)
    assert "EOFError" in done.stdout


@pytest.mark.parametrize("text", ["exit", "stop", "task", "cancel"])
def test_what_an_async_call_leaves_in_the_loop_costs_no_later_call(afterwards, text):
    with scorer(f"{afterwards}:soon", workers=1, deadline_s=60) as s:
        assert [one.outcome for one in verdicts(s, text)] == [Outcome.SCORED]
        assert [(one.outcome, one.detail) for one in verdicts(s, "right")] == [(Outcome.SCORED, "")]


LEAVES = {
    "timer": "import os, threading\nthreading.Timer(0.5, lambda: os._exit(0)).start()",
    "interrupt": "import _thread, threading\nthreading.Timer(0.5, _thread.interrupt_main).start()",
    "at exit": "import atexit, os\natexit.register(lambda: os._exit(0))",
    "for ever": "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()",
    "loops": (
        "import asyncio\nclass Policy(asyncio.DefaultEventLoopPolicy):\n"
        "    def new_event_loop(self):\n        raise RuntimeError\n"
        "asyncio.set_event_loop_policy(Policy())"
    ),
}


@pytest.mark.parametrize("leaves", LEAVES)
def test_what_a_file_leaves_when_it_is_imported_cannot_end_the_trainer(tmp_path, leaves):
    file = tmp_path / "leaves.py"
    file.write_text(f"{LEAVES[leaves]}\ndef reward(completions, **columns):\n    return [1.0]\n")
    code = "import sys, time; sys.path.insert(0, sys.argv[1]); from test_scoring import group, score\n"
    code += f"score('{file}', group('a', 'b'), workers=1, deadline_s=60); time.sleep(0.7); print('came to its end')\n"
    code += "sys.exit(7)"
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]  # noqa: PTH120
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (7, "came to its end\n")


def test_a_file_that_crashes_or_hangs_when_it_is_imported_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "falls.py"
    file.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    with pytest.raises(RewardError, match=r"cannot be imported: it ends the program \(signal SIGSEGV\)"):
        describe_reward(str(file))
    file.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr("rlpost.scoring.describe.IMPORT_S", 2.0)
    with pytest.raises(RewardError, match="cannot be imported: it takes longer than 2 s"):
        describe_reward(str(file))

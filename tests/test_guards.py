"""What ends a run that hangs, and what keeps a second process out of a live run's folder."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

import pytest
from conftest import REWARD, rows

from rlpost.cli import main
from rlpost.learner.deadline import ends_without_lock
from rlpost.learner.watch import Interrupt
from rlpost.tracking.rundir import RunDirectory

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]

HANGING_SYNC = """
import time
from rlpost.run.loop import Loop
def hangs_for_ever(self):
    time.sleep(1000)
Loop.sync = hangs_for_ever
"""


def test_a_phase_that_hangs_is_named_with_its_stack_and_ends_the_process(write_recipe, children, tmp_path):
    recipe = write_recipe(tmp_path, {"evaluation.prompts": 0})
    code, printed = children.run(recipe, "learner.watchdog_s=1", before=HANGING_SYNC)
    assert code == 75, printed
    assert "the phase 'sync' has taken longer than learner.watchdog_s = 1 s" in printed
    assert "in hangs_for_ever" in printed.split("learner.watchdog_s = 1 s")[1], "the stack of the thread that hangs"
    assert "resume=auto" in printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


HOLDS_THE_LOCK = """
from itertools import repeat
from rlpost.learner import watch
from rlpost.run.loop import Loop
watch.GRACE_S = 1.0
def holds_the_lock(self):
    sum(repeat(1, 10**15))  # one call of C code, which lets no other thread run
Loop.sync = holds_the_lock
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the system's timers")
def test_a_process_whose_interpreter_lock_is_held_is_named_and_ended_too(write_recipe, children, tmp_path):
    recipe = write_recipe(tmp_path, {"evaluation.prompts": 0})
    code, printed = children.run(recipe, "learner.watchdog_s=1", before=HOLDS_THE_LOCK)
    assert code == 75, printed
    assert "in holds_the_lock" in printed, "the stack of the thread that holds it"
    assert "the phase 'sync' has taken longer than learner.watchdog_s = 1 s, and something that is no Python" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="needs the system's timers")
def test_a_deadline_that_is_met_leaves_nothing_behind():
    with ends_without_lock(0.05, "never said", 75):
        pass
    time.sleep(1.3)  # longer than all of its timers
    with pytest.raises(ZeroDivisionError), ends_without_lock(0.05, "never said", 75):
        raise ZeroDivisionError
    time.sleep(1.3)


HANGS_BETWEEN_PHASES = """
import os, sys, threading, time
def hangs_between_phases(self):
    time.sleep(1000)
def change():
    while not hasattr(sys.modules.get("rlpost.run.loop"), "train"):
        time.sleep(0.01)
    sys.modules["rlpost.run.loop"].Loop.stop_asked = hangs_between_phases
if os.environ.get("RANK") == "1":
    threading.Thread(target=change, daemon=True).start()
"""


def test_a_process_that_waits_for_a_hung_one_between_phases_ends_the_run(write_recipe, children, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sitecustomize.py").write_text(HANGS_BETWEEN_PHASES)  # every interpreter runs it at its start
    places = os.pathsep.join(filter(None, (str(tmp_path / "first"), os.environ.get("PYTHONPATH"))))
    recipe = write_recipe(tmp_path, {"evaluation.prompts": 0, "rollout.probe": None})
    code, printed = children.run(recipe, "learner.watchdog_s=15", launch="cpu2.yaml", script=True, PYTHONPATH=places)
    assert "the phase 'wait for the other processes' has taken longer than learner.watchdog_s = 15 s" in printed, (
        printed
    )
    assert "in gather" in printed and code == 75


@pytest.mark.parametrize("launch", ["cpu.yaml", "cpu2.yaml"])
def test_a_run_whose_launcher_alone_was_killed_saves_and_ends(launch, write_recipe, children, tmp_path):
    changes = {"learner.rollouts": 100_000, "evaluation.prompts": 0, "checkpoint.every": 0}
    recipe, run = write_recipe(tmp_path, changes), tmp_path / "run"
    launcher = children.start(recipe, launch=launch)
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists():
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()[0]
        time.sleep(0.05)
    os.kill(launcher.pid, signal.SIGKILL)
    printed, _ = launcher.communicate(timeout=240)  # until the last process has closed what it prints to
    assert f"the launcher (process {launcher.pid}) has ended without its run" in printed, printed
    last = rows(run, "train")[-1]["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{last:06d}"]
    RunDirectory.open(run, fresh=False).close()  # nobody holds it any more


def test_a_second_process_is_kept_out_of_a_live_runs_folder(write_recipe, children, tmp_path, capsys):
    go, run = tmp_path / "go", tmp_path / "run"
    waiting = f"    import pathlib, time\n    while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)\n"
    changes = {"learner.rollouts": 1, "evaluation.prompts": 0, "rewards.0.deadline_s": 600.0, "tracking.report": True}
    recipe = write_recipe(tmp_path, changes, REWARD.replace("    texts =", waiting + "    texts ="))
    child = children.start(recipe)
    deadline = time.monotonic() + 240
    while not (run / "recipe.yaml").exists():
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0]
        time.sleep(0.05)
    resolved = (run / "recipe.yaml").read_text()
    for override in ("resume=auto", "overwrite=true", "learner.rollouts=2"):
        with pytest.raises(SystemExit) as caught:
            main([str(recipe), override])
        said = capsys.readouterr().err
        assert caught.value.code == 2
        assert f"{run} is in use by process {child.pid} on host {socket.gethostname()}" in said, said
        assert "two runs in one directory would destroy each other's files" in said and "name=" in said
        assert "Traceback" not in said
    assert child.poll() is None and (run / "recipe.yaml").read_text() == resolved
    go.touch()
    printed, _ = child.communicate(timeout=240)
    assert child.returncode == 0, printed
    assert [row["step"] for row in rows(run, "train")] == [1]
    assert f"Report: {run}/report/index.html" in printed and (run / "report" / "index.html").is_file()


def test_a_stop_that_comes_in_the_middle_of_a_write_is_said_and_obeyed(monkeypatch, capfd):
    """A signal handler may interrupt a write to the same stream, which then refuses a second one ("reentrant call")."""

    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(sys, "stderr", Busy())
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested
    assert "stopping at the next safe moment" in capfd.readouterr().err

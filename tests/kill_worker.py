"""Started by test_checkpoint.py: runs a recipe again and again, each time killed (SIGKILL) at a random moment.

Not a test by itself: the imports take longer than a run of the tiny model, so all runs are forks of this process.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

# Nothing heavy here: scoring processes import the main module once more.


def slower(place, name: str, seconds: float) -> None:
    """Makes a function take longer, so that kills fall into it as often as into the rest."""
    original = getattr(place, name)

    def wrapped(*arguments, **keywords):
        time.sleep(seconds)
        return original(*arguments, **keywords)

    setattr(place, name, wrapped)


def telling(file: Path, held: bool) -> None:
    """Has this process write a file when its first step begins, or with `held` wait there to be killed."""
    from rlpost.run.loop import Loop

    original = Loop.rollout

    def step(self):
        if held:
            time.sleep(3600)
        Loop.rollout = original
        file.touch()
        return original(self)

    Loop.rollout = step


def run(recipe: str, resume: str, started: Path, held: bool) -> int:
    """Forks a run; returns its process."""
    from rlpost.recipe.load import load_recipe
    from rlpost.run.loop import train

    pid = os.fork()
    if pid == 0:
        telling(started, held)
        try:
            train(load_recipe(recipe, [f"resume={resume}"]))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


class Life:
    """One run of the recipe, from its start to its end or to the moment at which it is killed."""

    def __init__(self, recipe: str, resume: str, started: Path, held: bool = False) -> None:
        started.unlink(missing_ok=True)
        self.started, self.pid, self.code = started, run(recipe, resume, started, held), None

    def over(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self, seconds: float = float("inf"), *, until_steps: bool = False) -> float:
        """Returns after so many seconds, at its end, or with `until_steps` when its first step begins: the time it took."""
        begin = time.monotonic()
        while not self.over() and time.monotonic() - begin < seconds and not (until_steps and self.started.exists()):
            time.sleep(0.002)
        return time.monotonic() - begin

    def kill(self) -> None:
        if not self.over():
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def all_runs(recipe: str, folder: Path, kills: int, longest: float, seed: int) -> dict:
    """Kills the run `kills` times, or until it has come to its end; then lets it come to it.

    A kill falls with one chance in two into the time until the first step (reading, locking, loading, taking up a
    checkpoint, cutting back the files), anywhere in it, and else into the `longest` seconds after that. How long a start
    takes is known from the last one only, so a run to be killed in it does not go on beyond it. Now and then the run is
    taken up from its last checkpoint but one, whose successor is then set aside.
    """
    moments, places = random.Random(seed), random.Random(seed)
    lives, halves, start_up = [], 0, 2.0
    while len(lives) < kills and (not lives or lives[-1]["code"] == -signal.SIGKILL):
        moment = moments.uniform(0.0, 2.0)
        complete = sorted(folder.glob("step_*"))
        earlier = len(complete) > 1 and places.random() < 0.3
        resume = str(complete[-2]) if earlier else "auto"
        life = Life(recipe, resume, folder.parent.parent / "started", held=moment < 1.0)
        if moment < 1.0:
            life.wait(moment * start_up)
        else:
            start_up = life.wait(until_steps=True)
            life.wait((moment - 1.0) * longest)
        in_start_up = not life.started.exists()
        life.kill()
        lives.append({"code": life.code, "in_start_up": in_start_up, "earlier": earlier})
        halves += len(list(folder.glob(".writing_*")))
        look(folder)
    last = Life(recipe, "auto", folder.parent.parent / "started")
    last.wait()
    killed = [life for life in lives if life["code"] == -signal.SIGKILL]
    return {
        "kills": len(killed),
        "in_start_up": sum(life["in_start_up"] for life in killed),
        "from_earlier": sum(life["earlier"] for life in killed),
        "half_written": halves,
        "lives": lives,
        "last": last.code,
    }


def look(folder: Path) -> None:
    """Whatever the moment: every checkpoint is whole, and the metrics of all steps before the newest are there."""
    from rlpost.learner.checkpoint import verify

    saved = sorted([*folder.glob("step_*"), *folder.glob(".replaced_step_*")], key=lambda path: path.name[-6:])
    for path in folder.glob("step_*"):
        verify(path)
    metrics = folder.parent / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1)), steps
    assert not saved or len(steps) >= int(saved[-1].name[-6:]), (saved, steps)


def prepare() -> None:
    """Imports what a run will need, and slows down what kills are to fall into."""
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from rlpost.learner import checkpoint, learner
    from rlpost.tracking import rundir

    torch.set_num_threads(1)
    for place, name in (
        (rundir.RunDirectory, "truncate_after"),
        (rundir, "keep_rows"),
        (checkpoint.CheckpointStore, "recover"),
        (checkpoint.CheckpointStore, "set_aside_after"),
        (Path, "rename"),
        (Path, "unlink"),
    ):
        slower(place, name, 0.02)
    slower(checkpoint, "_sync_file", 0.005)
    slower(checkpoint, "_sync_folder", 0.01)
    slower(learner.DataParallelLearner, "step", 0.03)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    prepare()
    print(json.dumps(all_runs(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))))

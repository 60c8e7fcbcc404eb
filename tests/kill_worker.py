"""Started by test_checkpoint.py: runs a recipe again and again, each time killed (SIGKILL) at a random moment.

Not a test by itself: the imports take longer than a run of the tiny model, so all runs are forks of this process.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
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


def killed_after(seconds: float) -> None:
    """Has this process killed so long after its first step has begun."""
    from rlpost.loop import Loop

    original = Loop.step

    def step(self):
        Loop.step = original
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        return original(self)

    Loop.step = step


def run(recipe: str, seconds: float | None) -> int:
    """Forks a run; returns how it ended, as `os.waitstatus_to_exitcode` says."""
    from rlpost.loop import train
    from rlpost.recipe.load import load_recipe

    pid = os.fork()
    if pid == 0:
        if seconds is not None:
            killed_after(seconds)
        try:
            train(load_recipe(recipe, ["resume=auto"]))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def all_runs(recipe: str, folder: Path, kills: int, longest: float) -> dict:
    """Kills the run `kills` times, or until it has come to its end; then lets it come to it."""
    from rlpost.learner.checkpoint import verify

    draw, codes, halves = random.Random(3), [], 0
    while len(codes) < kills and (not codes or codes[-1] == -signal.SIGKILL):
        codes.append(run(recipe, draw.uniform(0.0, longest)))
        halves += len(list(folder.glob(".writing_*")))
        for saved in folder.glob("step_*"):
            verify(saved)
    return {"kills": codes.count(-signal.SIGKILL), "codes": codes, "half_written": halves, "last": run(recipe, None)}


def prepare() -> None:
    """Imports what a run will need, and slows down what kills are to fall into."""
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from rlpost.learner import checkpoint, learner

    torch.set_num_threads(1)
    slower(checkpoint, "_sync_file", 0.005)
    slower(checkpoint, "_sync_folder", 0.01)
    slower(learner.DataParallelLearner, "step", 0.03)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    prepare()
    print(json.dumps(all_runs(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))

"""What runs inside a scoring process: loads the reward functions once, calls them, and reports plain data."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rlpost.errors import RewardError
from rlpost.scoring.contract import Call, LoadedReward, Reply
from rlpost.scoring.event_loop import run_async
from rlpost.scoring.files import know, settle
from rlpost.scoring.frames import from_replies, read, write
from rlpost.scoring.load import load_reward
from rlpost.scoring.outcome import failure, run_plain
from rlpost.scoring.surroundings import Printed, Surroundings, die_with, open_pipes

GRACE_S = 15.0  # a process whose trainer is gone ends itself so long after the call's deadline

_rewards: list[LoadedReward | str] = []  # a string is why the function could not be loaded here
_printed: list[Printed] = []  # standard output and error, as rewards see them
_surroundings: list[Surroundings] = []  # those that every call is to find


def initialize(specs: Sequence[str], memory: int | None) -> None:
    """Sets a scoring process up. Never raises: a function that cannot be loaded is reported by its first call.

    `memory`: the bytes that this process, and each that it starts, may take for itself (not counting files that are mapped)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # dies at once, also inside C code
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    threading.Thread(target=die_with, args=(os.getppid(),), daemon=True).start()
    # Process pools of a reward start as they do in a program of its own: this process's way of starting is not theirs.
    multiprocessing.set_start_method(None, force=True)
    pipes = open_pipes()
    sys.stdout, sys.stderr = _printed[:] = [Printed(sys.stdout), Printed(sys.stderr)]
    know(filter(None, map(_folder, specs)))
    for spec in specs:
        try:
            _rewards.append(load_reward(spec))
        except RewardError as error:
            _rewards.append(str(error))
    _surroundings.append(Surroundings(pipes=pipes))


def main(jobs: int, replies: int) -> None:
    """The life of a scoring process: what it is to do comes over one descriptor, what became of it goes over another. It ends
    when the trainer closes the first, or is gone."""
    gone = contextlib.suppress(EOFError, BrokenPipeError)  # around the pipes: closing one writes what is left
    with gone, os.fdopen(jobs, "rb") as asked, os.fdopen(replies, "wb") as answers:
        specs, memory = pickle.loads(read(asked))
        initialize(specs, memory)
        write(answers, b"ready")
        while True:
            write(answers, from_replies(run(pickle.loads(read(asked)))))


def run(calls: Sequence[Call]) -> list[Reply]:
    """Makes the calls: one call of a plain function, or any number of one async function, concurrently. Never raises:
    whatever a reward function does, sys.exit included, is its own outcome and not the trainer's."""
    reward = _rewards[calls[0].reward]
    if isinstance(reward, str):
        return [Reply(breach=reward) for _ in calls]
    try:
        return _run(reward, calls)
    except BaseException as error:
        return [failure(error, call, time.perf_counter()) for call in calls]


def _run(reward: LoadedReward, calls: Sequence[Call]) -> list[Reply]:
    if folder := _folder(reward.spec):
        settle(folder)
    with Path(os.devnull).open("w") as nowhere:
        # A C thread, so it fires even where the interpreter's lock is held; for the case that the trainer is gone.
        faulthandler.dump_traceback_later(max(c.deadline_s for c in calls) * 2 + GRACE_S, exit=True, file=nowhere)
        for stream in _printed:
            stream.begin()
        try:
            with _surroundings[0].kept():
                if reward.is_async:
                    return run_async(reward, calls)
                return [run_plain(reward, call) for call in calls]
        finally:
            for stream in _printed:
                stream.end(reward.name)
            faulthandler.cancel_dump_traceback_later()


def _folder(spec: str) -> Path | None:
    """The folder of a reward's file; None for a module's."""
    file = Path(spec.rpartition(":")[0])
    return file.parent if file.suffix == ".py" else None

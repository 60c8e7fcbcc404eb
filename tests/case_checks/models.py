"""Checks of the cases about models."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import runpy
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CHECKS: dict[str, Callable[[Path], None]] = {}


@dataclass(frozen=True, slots=True)
class Trained:
    """What a user saw of a run."""

    code: int  # the exit code; 1 with a traceback
    printed: str  # everything printed or noted, and the traceback if there was one
    rows: tuple[dict, ...]  # of metrics.jsonl, training steps only

    @property
    def gap(self) -> float:
        """The largest difference between a sampler's log-prob and the learner's, of all steps that learned, in nats.

        ValueError where none did: with equal rewards in every group nothing is compared. Then sample at a higher temperature.
        """
        return max(row["mismatch/max_abs_gap"] for row in self.rows if "mismatch/max_abs_gap" in row)

    @property
    def mean_gap(self) -> float:
        """The largest of the steps' mean differences between sampler's and learner's log-probs, in nats."""
        return max(row["mismatch/mean_abs_gap"] for row in self.rows if "mismatch/mean_abs_gap" in row)


def make_model(folder: Path) -> None:
    """Runs the case's make_model.py in this process; the run's random state stays as it was."""
    import torch

    with contextlib.chdir(folder), torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path("make_model.py", run_name="__main__")


def train(folder: Path, *overrides: str) -> Trained:
    """`python -m rlpost recipe.yaml OVERRIDES` in `folder`, in this process."""
    from rlpost.cli import main

    printed, code = io.StringIO(), 0
    with contextlib.chdir(folder), _one_thread(), _everything_into(printed):
        try:
            main(["recipe.yaml", *overrides])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc(file=printed)
            code = 1
    return Trained(code, printed.getvalue(), _training_rows(folder))


def made_and_trained(folder: Path, *overrides: str) -> Trained:
    """Both commands of a case's README."""
    make_model(folder)
    return train(folder, *overrides)


def assert_trains(run: Trained, *, gap: float = 2e-5) -> None:
    """It came to its end, and sampler and learner are the same float32 model."""
    assert run.code == 0, run.printed
    assert run.rows and run.gap < gap, run.gap


def assert_refused(run: Trained, *words: str) -> None:
    """It was refused in words, all of `words` among them, before a step was trained."""
    assert run.code == 2 and "Traceback" not in run.printed and not run.rows, run.printed
    missing = [word for word in words if word not in run.printed]
    assert not missing, f"{missing} not in: {run.printed}"


def _training_rows(folder: Path) -> tuple[dict, ...]:
    file = folder / "runs" / "run" / "metrics.jsonl"
    if not file.is_file():
        return ()
    return tuple(row for row in map(json.loads, file.read_text().splitlines()) if row["kind"] == "train")


@contextlib.contextmanager
def _everything_into(stream: io.StringIO) -> Iterator[None]:
    """Standard output, standard error and rlpost's own notes go to `stream`."""
    notes = logging.StreamHandler(stream)
    logging.getLogger("rlpost").addHandler(notes)
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield
    finally:
        logging.getLogger("rlpost").removeHandler(notes)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """On a busy machine two threads that wait for each other cost more than they give."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gpt_oss(folder: Path) -> None:
    make_model(folder)
    assert_refused(train(folder, "model.attention=sdpa"), "model.attention=sdpa", "gpt_oss", "eager, flex_attention")
    run = train(folder)
    assert_trains(run)
    assert "model.attention: eager instead of sdpa" in run.printed


def gemma2(folder: Path) -> None:
    # At a higher temperature, since at 1 the model repeats one token, and steps without signal compare nothing.
    assert_trains(made_and_trained(folder, "rollout.temperature=20"))


def longrope(folder: Path) -> None:
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        runpy.run_path("check.py", run_name="__main__")
    assert float(printed.getvalue().rsplit(maxsplit=1)[1]) < 1e-4, printed.getvalue()


def trains(folder: Path) -> None:
    assert_trains(made_and_trained(folder))


def mamba2(folder: Path) -> None:
    trains(folder)
    assert_trains(train(folder, "overwrite=true", "model.attention=eager"))


def tokens_beyond_embedding(folder: Path) -> None:
    assert_refused(made_and_trained(folder), "<think> (258)", "tokenizer has 260 tokens", "embedding 258 rows")


CHECKS |= {
    "moe-weights-qwen3": trains,
    "moe-weights-mixtral": trains,
    "renamed-head-gpt-neox": trains,
    "persistent-buffers-apertus": trains,
    "attention-auto-gpt-oss": gpt_oss,
    "attention-softcap-gemma2": gemma2,
    "longrope-micro-batches": longrope,
    "hybrid-cache-lfm2": trains,
    "hybrid-cache-mamba2": mamba2,
    "verify-head-llama4": trains,
    "verify-head-opt": trains,
    "tokens-beyond-embedding": tokens_beyond_embedding,
}

"""The run directory: where a run's recipe, metrics, completions and checkpoints lie, and whose it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from rlpost.errors import RlpostError, TrainingError, in_words
from rlpost.tracking.metrics import drop_partial_line, keep_rows, step_of, write_atomically

LOCK_WAIT_S = 2.0  # long enough for the workers of a run that was just killed to go
_WRITE_TEST = ".write-test-"
_COMPLETIONS = re.compile(r"step_(\d+)\.jsonl")
_RECIPES = re.compile(r"recipe\.(\d+)\.yaml")
_ABANDONED_METRICS, _ABANDONED_COMPLETIONS = "abandoned_metrics.jsonl", "abandoned_completions"
_WRITTEN_BY_A_RUN = (
    *("recipe.yaml", "metrics.jsonl", _ABANDONED_METRICS, _ABANDONED_COMPLETIONS, "timeline.jsonl"),
    *("completions", "checkpoints", "wandb", "report"),
)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """`runs/<name>/`. Open it with `RunDirectory.open` (the run's main process: locked) or look into it with `at`."""

    path: Path
    _lock: BaseFileLock | None = field(default=None, repr=False, compare=False)
    _mark: tuple[int, int] | None = field(default=None, repr=False, compare=False)  # the lock's file: device, number

    @classmethod
    def at(cls, path: Path | str) -> RunDirectory:
        """The directory without a lock: for the other processes of a run, and for readers such as the report."""
        return cls(Path(path))

    @classmethod
    def open(cls, path: Path | str, *, fresh: bool, overwrite: bool = False) -> RunDirectory:
        """Makes the directory if need be, takes its lock until `close`, and checks that it can be written to.

        `fresh`: the run starts from nothing, so earlier metrics or checkpoints are refused; with `overwrite` they are
        deleted instead (only what a run writes, nothing else that lies there). A resumed run passes `fresh=False`, and
        then calls `truncate_after` with its checkpoint's optimizer step, or with -1 when it found no checkpoint.

        Raises RlpostError when another run holds the directory, when it cannot be written to, or when it is not empty.
        """
        path = Path(path)
        _make(path)
        lock = _take_lock(path)
        run = cls(path, lock, _mark(path))
        try:
            _write_test(path)
            if fresh and overwrite:
                run._remove_earlier_run()
            elif fresh:
                run._refuse_earlier_run()
            for folder in (run.completions, run.checkpoints):
                _make(folder)
            for left in (*path.glob(f"{_WRITE_TEST}*"), *path.glob(".*.tmp")):  # by a run that was killed in between
                left.unlink(missing_ok=True)
            drop_partial_line(run.metrics)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def look(cls, path: Path | str, *, fresh: bool, overwrite: bool = False) -> None:
        """Raises what `open` would raise, tries to write wherever a run writes, and leaves nothing behind."""
        run, made = cls.at(path), []
        try:
            for folder in reversed((run.path, *run.path.parents)):
                if not folder.exists():
                    folder.mkdir()
                    made.append(folder)
            if (run.path / ".lock").exists():
                cls(run.path, _take_lock(run.path), _mark(run.path)).close()
            for folder in (run.path, run.completions, run.checkpoints, run.wandb, run.report):
                if folder is run.path or folder.exists():
                    _write_test(folder)
            if fresh and not overwrite:
                run._refuse_earlier_run()
        except OSError as error:
            raise _unwritable(run.path, error) from error
        finally:
            for folder in reversed(made):
                with suppress(OSError):  # another run may have begun there
                    folder.rmdir()

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def abandoned_metrics(self) -> Path:
        return self.path / _ABANDONED_METRICS

    @property
    def timeline(self) -> Path:
        return self.path / "timeline.jsonl"

    @property
    def completions(self) -> Path:
        return self.path / "completions"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def write_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Writes the resolved recipe, as `recipe.model_dump(mode="json")` gives it, as `recipe.yaml`, and as `recipe.N.yaml`
        for the N-th start of the run: these are never overwritten, so that the folder tells what each start was told."""
        import yaml

        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        starts = [int(name[1]) for file in self.path.iterdir() if (name := _RECIPES.fullmatch(file.name))]
        if not starts and self.recipe.is_file():  # by a version of rlpost that kept only the last one
            self.recipe.replace(self.path / "recipe.1.yaml")
            starts = [1]
        write_atomically(self.path / f"recipe.{max(starts, default=0) + 1}.yaml", text)
        write_atomically(self.recipe, text)

    def truncate_after(self, step: int) -> None:
        """Forgets what was written after optimizer step `step`, so that a resumed run's files equal an unbroken one's.

        A completions file carries the number of the first optimizer step that its rollout feeds, so the file of a
        rollout that the checkpoint is in the middle of stays. -1 forgets everything. Rows and files that are cut are kept
        under names that begin with `abandoned_`: nobody reads them but people.
        """
        keep_rows(self.metrics, lambda line: (at := step_of(line)) is not None and at <= step, self.abandoned_metrics)
        if not self.completions.is_dir():
            return
        for file in self.completions.iterdir():
            match = _COMPLETIONS.fullmatch(file.name)
            if match and int(match[1]) > step:
                aside = self.path / _ABANDONED_COMPLETIONS
                aside.mkdir(exist_ok=True)
                file.replace(aside / file.name)
            elif file.name.endswith(".tmp"):
                file.unlink()

    def check_held(self) -> None:
        """Raises TrainingError where the folder that this run has locked was removed, moved or replaced: what is written from
        then on would lie elsewhere, perhaps among the files of another run."""
        if self._mark is not None and _mark(self.path) != self._mark:
            raise TrainingError(
                f"The run's folder {self.path} was removed, moved or replaced while the run wrote to it, so the run ends. "
                "If it was moved, move it back and start again with resume=auto; else start anew, under another name if "
                "another run is there now."
            )

    def close(self) -> None:
        """Gives the lock back. May be called twice."""
        if self._lock is not None and self._lock.is_locked:
            if _mark(self.path) == self._mark:  # else it is the note of another run that is there now
                _holder_file(self.path).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _earlier_run(self) -> str | None:
        if self.metrics.exists() and self.metrics.stat().st_size:
            return self.metrics.name
        if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
            return f"{self.checkpoints.name}/"
        return None

    def _refuse_earlier_run(self) -> None:
        if (earlier := self._earlier_run()) is not None:
            raise RlpostError(
                f"{self.path} already holds a run ({earlier} is there), and this run would mix with it. Go on with that "
                "run (resume=auto), give this run another name (name=...), or delete the earlier one (overwrite=true). "
                "Each of these is put behind the command; with make: make quickstart ARGS=overwrite=true."
            )

    def _remove_earlier_run(self) -> None:
        for name in (*_WRITTEN_BY_A_RUN, *(f.name for f in self.path.iterdir() if _RECIPES.fullmatch(f.name))):
            target = self.path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        look = (path / ".lock").stat()
    except OSError:
        return None
    return look.st_dev, look.st_ino


def _holder_file(path: Path) -> Path:
    return path / ".holder.json"


def _take_lock(path: Path) -> BaseFileLock:
    # Only one thread may write; which of them closes the directory does not matter (a watchdog may).
    lock = FileLock(path / ".lock", thread_local=False)
    try:
        lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout as error:
        raise RlpostError(_held_by(path)) from error
    except (OSError, NotImplementedError) as error:
        raise _unwritable(path, error) from error
    holder = {"pid": os.getpid(), "host": socket.gethostname()}
    try:
        write_atomically(_holder_file(path), json.dumps(holder))
    except BaseException:
        lock.release()
        raise
    return lock


def _held_by(path: Path) -> str:
    try:
        holder = json.loads(_holder_file(path).read_text())
        who = f"by process {holder['pid']} on host {holder['host']}"
    except (OSError, ValueError, KeyError):
        who = "by a process that has not left its name"
    return (
        f"{path} is in use {who}: two runs in one directory would destroy each other's files. Wait for that run or "
        "stop it (if it was killed, look for worker processes that it left), or give this run another name (name=...)."
    )


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _write_test(path: Path) -> None:
    """Writes a little, for real: a full disk or a quota shows only then."""
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=_WRITE_TEST) as file:
            file.write(b"\0" * 65536)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> RlpostError:
    reason = in_words(error) if isinstance(error, OSError) else str(error)
    return RlpostError(
        f"Cannot write to the run directory {path}: {reason}. Free space there, make the folder writable, or put runs "
        "somewhere else (output_dir=/another/folder)."
    )

"""Checkpoints on disk: written atomically, verified before they are read, old ones removed only after a new one stands.

checkpoints/step_000012/
    config.json model.safetensors tokenizer.json ...   Hugging Face layout: load it with transformers or vLLM
    trainer/state.json                                 counters, the sampler, the recipe
    trainer/optimizer.pt, trainer/zero_rank_0.pt ...   optimizer state, whole or DeepSpeed's shard of each process
    trainer/rank_0.pt ...                              each process's RNGs and rollout in progress
    manifest.json                                      size and SHA-256 of every file; its presence marks completion
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path

from rlpost.errors import CheckpointError, in_words, system_error
from rlpost.learner.process import Processes
from rlpost.learner.vetted import PICKLES, refuse_code

MANIFEST = "manifest.json"
_LOADED = (*PICKLES, ".safetensors", ".json", ".py", ".jinja", ".model")  # kinds of files that are read again


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int, processes: Processes, *, asynchronous: bool = False) -> None:
        """With `asynchronous`, `write` returns at once and a thread writes; to be made on all processes then."""
        self.folder = folder
        self.keep = keep
        self.processes = processes
        self.asynchronous = asynchronous
        self._writer = BackgroundTask() if asynchronous else None
        self._writing = processes.apart() if asynchronous else processes

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        complete = [path for path in self._all() if (path / MANIFEST).is_file()]
        return complete[-1] if complete else None

    def write(self, step: int, write_shared: Callable[[Path], None], write_own: Callable[[Path], None]) -> Path:
        """Writes checkpoint `step`: `write_shared` runs on the main process, `write_own` on every process.

        Raises CheckpointError, on all processes alike, when any of them could not write; what was saved before stands.
        When asynchronous, waits for the checkpoint before and raises its error; this one's comes with the next `wait`.
        """
        if self._writer is None:
            return self._write(step, write_shared, write_own)
        self._writer.wait()
        self._writer.start(lambda: self._write(step, write_shared, write_own))
        return self.path(step)

    def wait(self) -> None:
        """Returns when nothing is being written any more. Raises CheckpointError when that failed."""
        if self._writer is not None:
            self._writer.wait()

    def close(self) -> None:
        """Lets what is being written be finished, at the end of a run that has failed already."""
        try:
            self.wait()
        except (CheckpointError, SystemExit) as error:
            logging.getLogger(__name__).warning("%s", error)

    def newest(self) -> Path | None:
        """The newest checkpoint. It was complete when its folder got this name; whether it still is, is not looked at."""
        return next(reversed(self._all()), None)

    def recover(self) -> None:
        """Clears away what a killed run left half written; a checkpoint caught between two renames is put back."""
        for aside in self.folder.glob(".replaced_*"):
            target = self.folder / aside.name.removeprefix(".replaced_")
            if (aside / MANIFEST).is_file() and not target.exists():
                aside.rename(target)
            shutil.rmtree(aside, ignore_errors=True)
        for pattern in (".writing_*", ".removing_*"):
            for left in self.folder.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)

    def _write(self, step: int, write_shared: Callable[[Path], None], write_own: Callable[[Path], None]) -> Path:
        is_main = self.processes.is_main
        target = self.path(step)
        staging = self.folder / f".writing_{target.name}"
        problem = self._guarded(lambda: self._start(staging)) if is_main else None
        self._agree(problem, target)
        problem = self._guarded(lambda: write_own(staging))
        if is_main and problem is None:
            problem = self._guarded(lambda: write_shared(staging))
        self._agree(problem, target, staging)
        problem = self._guarded(lambda: self._finish(staging, target)) if is_main else None
        self._agree(problem, target, staging)
        return target

    def try_out(self, write_own: Callable[[Path], None]) -> None:
        """Writes what `write_own` writes, looks at it as a resumed run would, and removes it; collective. So that a run's last
        checkpoint, which may be its only one, is not the first that anybody tried to write. Raises CheckpointError."""
        staging, is_main = self.folder / ".writing_trial", self.processes.is_main
        named = self.folder / "(one at the start, to try)"
        self._agree(self._guarded(lambda: self._start(staging)) if is_main else None, named)
        self._agree(self._guarded(lambda: write_own(staging)), named, staging)

        def look() -> None:
            _write_manifest(staging)
            refuse_code(staging)
            _sync_folder(self.folder)

        self._agree(self._guarded(look) if is_main else None, named, staging)
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps: a run that goes on from an earlier one makes these steps again, and must not
        take the old ones for its newest.

        The newest is renamed first, and metrics and completions are cut after all of them. So a run that is killed in between
        goes on from a checkpoint whose metrics and completions are all still there.
        """
        for path in reversed(self._all()):
            if int(path.name.removeprefix("step_")) > step:
                aside = path.with_name(f"abandoned_{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

    def _start(self, staging: Path) -> None:
        shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed while writing
        self.folder.mkdir(exist_ok=True)  # but no run's folder that somebody has removed
        staging.mkdir()
        (staging / "trainer").mkdir()

    def _finish(self, staging: Path, target: Path) -> None:
        _write_manifest(staging)
        if target.exists():  # the same step, saved again: the old one must not be lost before the new one stands
            aside = self.folder / f".replaced_{target.name}"
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
            staging.rename(target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            staging.rename(target)
        _sync_folder(self.folder)
        for old in self._all()[: -self.keep]:
            doomed = self.folder / f".removing_{old.name}"  # never a half-removed folder under a checkpoint's name
            shutil.rmtree(doomed, ignore_errors=True)
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _all(self) -> list[Path]:
        return checkpoints_in(self.folder)

    @staticmethod
    def _guarded(action: Callable[[], None]) -> str | None:
        """Runs `action`; what went wrong, in words. What no full disk explains is logged with its traceback too."""
        try:
            action()
        except Exception as error:
            if (of_system := system_error(error)) is not None:
                return in_words(of_system)
            logging.getLogger(__name__).error("A checkpoint could not be written:", exc_info=True)
            return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return None

    def _agree(self, problem: str | None, target: Path, staging: Path | None = None) -> None:
        problems = [p for p in self._writing.gather(problem) if p]
        if not problems:
            return
        if staging is not None and self.processes.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        latest = self.latest()
        kept = f"The last complete checkpoint is {latest}" if latest else "No checkpoint had been written before"
        self.processes.fail(
            CheckpointError(
                f"Checkpoint {target} could not be written: {problems[0].rstrip('.')}. {kept}; nothing saved earlier was "
                f"touched. Make room or choose another output_dir where the disk is at fault, then start again with "
                f"resume=auto."
            )
        )


class BackgroundTask:
    """One action at a time in a thread; its error is raised by whoever waits for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, action: Callable[[], object]) -> None:
        self._thread = threading.Thread(target=self._run, args=(action,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _run(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:  # SystemExit too: it is how the processes beside the main one leave
            self._error = error


def file_writer(files: Mapping[str, object], *, snapshot: bool) -> Callable[[Path], None]:
    """What writes `files` (name -> object, by `torch.save`) into a folder; with `snapshot` as they are at this moment."""
    import torch

    if not snapshot:

        def write(folder: Path) -> None:
            for name, value in files.items():
                # Through a file of Python's own: torch's says nothing of why a write failed.
                with (folder / name).open("wb") as file:
                    torch.save(value, file)

        return write
    streams = {name: BytesIO() for name in files}
    for name, value in files.items():
        torch.save(value, streams[name])

    def write_streams(folder: Path) -> None:
        for name, stream in streams.items():
            (folder / name).write_bytes(stream.getbuffer())

    return write_streams


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that lie in a folder, complete or not, the oldest first."""
    return sorted((p for p in folder.glob("step_*") if p.is_dir()), key=lambda p: (len(p.name), p.name))


def refuse_run_folder(path: Path, key: str) -> None:
    """Raises CheckpointError where `path` is a run's folder, naming the checkpoints in it; `key` is what it was given as."""
    if (path / "config.json").is_file() or (path / MANIFEST).is_file():
        return
    checkpoints = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
    if checkpoints:
        raise CheckpointError(
            f"{path} is a run's folder, not a checkpoint. It has {', '.join(p.name for p in checkpoints)}; the newest is "
            f"{key}{checkpoints[-1]}"
        )
    if (path / "metrics.jsonl").is_file():
        raise CheckpointError(f"{path} is the folder of a run that has saved no checkpoint yet.")


def verify(path: Path) -> None:
    """Checks a checkpoint against its manifest, and that loading it runs no code. Raises CheckpointError naming the first file
    that is not as it should be."""
    manifest = path / MANIFEST
    refuse_run_folder(path, "resume=")
    if not manifest.is_file():
        raise CheckpointError(
            f"{path} is not a complete rlpost checkpoint: it has no {MANIFEST}. Name a folder checkpoints/step_<N> of a "
            "run, or resume=auto for the newest one."
        )
    try:
        listed = [
            (name, entry["bytes"], entry["sha256"]) for name, entry in json.loads(manifest.read_text())["files"].items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The checkpoint {path} is damaged: its {MANIFEST} cannot be read ({error}).") from error
    unlisted = {f.relative_to(path).as_posix() for f in _files(path)} - {MANIFEST, *(name for name, _, _ in listed)}
    if strange := sorted(name for name in unlisted if Path(name).suffix in _LOADED):
        raise CheckpointError(
            f"The checkpoint {path} is not as it was saved: {strange[0]} is not in its {MANIFEST}. Remove what was added, or "
            "name another checkpoint."
        )
    if not listed:
        raise CheckpointError(f"The checkpoint {path} is damaged: its {MANIFEST} lists no files.")
    for name, size, digest in listed:
        file = path / name
        if not file.is_file() or file.stat().st_size != size or _sha256(file) != digest:
            raise CheckpointError(
                f"The checkpoint {path} is damaged: {file} is missing or differs from what was saved (checked by size and "
                "SHA-256)."
            )
    refuse_code(path)


def _write_manifest(folder: Path) -> None:
    files = {}
    for file in _files(folder):
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        _sync_file(file)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"version": 1, "files": files}, indent=1))
    _sync_file(manifest)
    for sub in {f.parent for f in _files(folder)}:
        _sync_folder(sub)


def _files(folder: Path) -> Iterator[Path]:
    return (f for f in sorted(folder.rglob("*")) if f.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints on disk: written atomically, verified before they are read, old ones removed only after a new one stands.

checkpoints/step_000012/
    config.json model.safetensors tokenizer.json ...   Hugging Face layout: load it with transformers or vLLM
    trainer/state.json                                 counters, the sampler
    trainer/optimizer*.pt  trainer/rank_0.pt ...       optimizer state; each process's RNGs and rollout in progress
    manifest.json                                      size and SHA-256 of every file; its presence marks completion
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from rlpost.errors import CheckpointError
from rlpost.learner.process import Processes

MANIFEST = "manifest.json"


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        self.folder = folder
        self.keep = keep
        self.processes = processes

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        complete = [path for path in self._all() if (path / MANIFEST).is_file()]
        return complete[-1] if complete else None

    def write(self, step: int, write_shared: Callable[[Path], None], write_own: Callable[[Path], None]) -> Path:
        """Writes checkpoint `step`: `write_shared` runs on the main process, `write_own` on every process.

        Raises CheckpointError, on all processes alike, when any of them could not write; what was saved before stands.
        """
        target = self.path(step)
        staging = self.folder / f".writing_{target.name}"
        problem = self._guarded(lambda: self._start(staging)) if self.processes.is_main else None
        self._agree(problem, target)
        problem = self._guarded(lambda: write_own(staging))
        if self.processes.is_main and problem is None:
            problem = self._guarded(lambda: write_shared(staging))
        self._agree(problem, target, staging)
        problem = self._guarded(lambda: self._finish(staging, target)) if self.processes.is_main else None
        self._agree(problem, target, staging)
        return target

    def _start(self, staging: Path) -> None:
        shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed while writing
        (staging / "trainer").mkdir(parents=True)

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
            shutil.rmtree(old, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step_*") if p.is_dir())

    @staticmethod
    def _guarded(action: Callable[[], None]) -> str | None:
        """Runs `action`; what went wrong with the disk, in words. Other errors are bugs and pass through."""
        try:
            action()
        except OSError as error:
            return _in_words(error)
        except RuntimeError as error:  # torch and safetensors report a full disk this way
            if "file write" in str(error) or "No space" in str(error) or "inline_container" in str(error):
                return f"{error} (is the disk full?)"
            raise
        except Exception as error:
            if type(error).__name__ == "SafetensorError":
                return f"{error} (is the disk full?)"
            raise
        return None

    def _agree(self, problem: str | None, target: Path, staging: Path | None = None) -> None:
        problems = [p for p in self.processes.gather(problem) if p]
        if not problems:
            return
        if staging is not None and self.processes.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        latest = self.latest()
        kept = f"The last complete checkpoint is {latest}" if latest else "No checkpoint had been written before"
        self.processes.fail(
            CheckpointError(
                f"Checkpoint {target} could not be written: {problems[0]}. {kept}; nothing saved earlier was touched. "
                f"Make room or choose another output_dir, then start again with resume=auto."
            )
        )


def verify(path: Path) -> None:
    """Checks a checkpoint against its manifest. Raises CheckpointError naming the first file that differs."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(
            f"{path} is not a complete rlpost checkpoint: it has no {MANIFEST}. Name a folder checkpoints/step_<N> of a "
            f"run, or resume=auto for the newest complete one."
        )
    try:
        listed = json.loads(manifest.read_text())["files"]
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{manifest} is damaged ({error}). Resume from an earlier checkpoint.") from error
    for name, entry in listed.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
            raise CheckpointError(
                f"{file} is missing or differs from what was saved (checked by size and SHA-256). The checkpoint {path} "
                f"is damaged: resume from an earlier one with resume=<folder>."
            )


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


def _in_words(error: OSError) -> str:
    known = {
        errno.ENOSPC: "no space left on the disk",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied",
    }
    return known.get(error.errno or 0, str(error))

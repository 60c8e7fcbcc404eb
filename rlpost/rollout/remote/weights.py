"""The learner's weights as files that the servers read: in shared memory on one machine, in a shared folder between several."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from rlpost.errors import RolloutError
from rlpost.rollout.fingerprint import Sent, sent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BUCKET_BYTES = 2**30
_SHARED_MEMORY = Path("/dev/shm")


def weights_folder(wanted: str | None, size: int) -> Path:
    """A new folder, readable by this user only, for `size` bytes of weights: in `wanted`, or in shared memory where they fit,
    else in the folder for temporary files. Raises RolloutError where `wanted` cannot be written."""
    if wanted is None:
        shared = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 1.1 * size
        wanted = str(_SHARED_MEMORY) if shared else tempfile.gettempdir()
    try:
        folder = Path(wanted).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        return Path(tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-", dir=folder))
    except OSError as error:
        raise RolloutError(
            f"rollout.engine.weights_folder={wanted} cannot be written ({error}). Name a folder that the learner can write "
            "and every rollout server can read under the same path."
        ) from error


def _prefix() -> str:
    return f"rlpost-weights-{socket.gethostname()}-"


def _sweep(folder: Path) -> None:
    """Removes the folders of learners that were killed together with the process that should have removed them."""
    for left in folder.glob(f"{glob.escape(_prefix())}*"):
        pid = left.name.removeprefix(_prefix()).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


class WeightFiles:
    """One version of the weights, as safetensors files of about a gibibyte."""

    def __init__(self, folder: Path, engine: torch.dtype | None = None) -> None:
        """`engine`: the precision that the servers cast to, for fingerprints."""
        self.folder, self._engine = folder, engine
        self.files: list[tuple[Path, list[str]]] = []  # with the names in each
        self.sent: dict[str, Sent] = {}
        self.seconds = 0.0  # that looking at the last version took

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the files. Tensors come one at a time (a sharded learner gathers each); as many are held as fill a file."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self.remove()
        for number, bucket in enumerate(_buckets(self.noted(weights))):
            path = self.folder / f"{number}.safetensors"
            try:
                save_file(bucket, path)
            except (OSError, SafetensorError) as error:
                raise RolloutError(
                    f"The weights for the rollout servers cannot be written to {self.folder} ({error}). Free space there, or "
                    "name another place with rollout.engine.weights_folder."
                ) from error
            self.files.append((path, list(bucket)))

    def noted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, with their fingerprints taken."""
        self.sent, self.seconds = {}, 0.0
        for name, tensor in weights:
            began = time.perf_counter()
            self.sent[name] = sent(tensor.detach(), self._engine)
            self.seconds += time.perf_counter() - began
            yield name, tensor

    def names(self) -> list[str]:
        return [name for _, names in self.files for name in names]

    def remove(self) -> None:
        """The files; the folder stays."""
        for path, _ in self.files:
            path.unlink(missing_ok=True)
        self.files = []

    def close(self) -> None:
        """The folder too."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.files = []


def _buckets(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file. A tensor is never cut; a layer's may be in two files, for servers copy what they read."""
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        bucket[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += bucket[name].nbytes
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = {}, 0
    if bucket:
        yield bucket

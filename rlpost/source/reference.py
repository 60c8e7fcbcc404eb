"""Reference log-probs of a preference data set: computed once, kept on disk under a name made of model and data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlpost.data.pairs import Pair, fingerprint

if TYPE_CHECKING:
    from rlpost.recipe.sections.root import Recipe

_HEAD = 1 << 16  # bytes of a weights file that, with its size and date, tell it from another


@dataclass(frozen=True, slots=True)
class ReferenceTable:
    """Log-probs of all responses of a sequence of pairs under the reference model."""

    logp: Tensor  # [N] float32, pair after pair, each as `Pair.responses`
    offsets: tuple[int, ...]  # [pairs + 1]

    @staticmethod
    def of(pairs: Sequence[Pair], logp: Tensor) -> ReferenceTable:
        """The table of `pairs` from their flat log-probs."""
        sizes = (sum(map(len, pair.responses)) for pair in pairs)
        return ReferenceTable(logp, tuple(accumulate(sizes, initial=0)))

    @staticmethod
    def joined(pairs: Sequence[Pair], parts: Sequence[Tensor]) -> ReferenceTable:
        """The table of `pairs` from the parts of W processes, of which number r computed every W-th pair from pair r on."""
        table = ReferenceTable.of(pairs, torch.zeros(sum(len(ids) for pair in pairs for ids in pair.responses)))
        for rank, part in enumerate(parts):
            start = 0
            for i in range(rank, len(pairs), len(parts)):
                size = table.offsets[i + 1] - table.offsets[i]
                table.logp[table.offsets[i] : table.offsets[i + 1]] = part[start : start + size]
                start += size
        return table

    def take(self, indices: Sequence[int]) -> Tensor:
        """The log-probs of some pairs, in that order."""
        parts = [self.logp[self.offsets[i] : self.offsets[i + 1]] for i in indices]
        return torch.cat(parts) if parts else self.logp[:0]


def cache_path(recipe: Recipe, model_path: str, pairs: Sequence[Pair]) -> Path:
    """Where the log-probs of `pairs` under the recipe's model belong: model, precision and tokens are in the name."""
    from rlpost.data.packaged import cache_folder

    model = recipe.model
    parts = [model_identity(model_path), model.dtype, model.autocast, model.attention, recipe.rollout.temperature]
    if model.quantized:
        parts.append("4 bits")
    parts += rotary_parts(recipe)
    key = hashlib.blake2b(json.dumps([*parts, fingerprint(pairs)]).encode(), digest_size=12).hexdigest()
    return cache_folder() / "reference" / f"{key}.safetensors"


def rotary_parts(recipe: Recipe) -> list[str]:
    """What belongs to the name of something made by a model whose rotary frequencies depend on the run's longest sequence."""
    from rlpost.policy.local_config import local_config
    from rlpost.policy.rotary import chosen_length

    config = local_config(recipe.model)
    length = None if config is None else chosen_length(config, recipe.longest_sequence)
    return [] if length is None else [f"frequencies for {length}"]


def model_identity(path: str) -> str:
    """What tells a model's weights from others: of a folder its configuration and each weights file's size, date and first
    bytes; of a hub name the name and the commit in the local cache."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        # The file lies in the cache in a folder named after its commit.
        config = cached_file(path, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        return f"{path}@{Path(config).parent.name if config else 'unknown'}"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin") or file.name == "config.json":
            stat = file.stat()
            with file.open("rb") as stream:
                digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode() + stream.read(_HEAD))
    return digest.hexdigest()


def read_cache(path: Path, tokens: int) -> Tensor | None:
    """What was kept under `path`; None when there is nothing, or nothing usable."""
    kept = load_tensors(path, "logp")
    if kept is None:
        return None
    logp = kept["logp"]
    return logp if logp.shape == (tokens,) and bool(torch.isfinite(logp).all()) else None


def write_cache(path: Path, logp: Tensor) -> str | None:
    """Keeps `logp`. Returns what went wrong, in words."""
    return save_tensors(path, logp=logp)


def load_tensors(path: Path, *names: str) -> dict[str, Tensor] | None:
    """The named tensors of a safetensors file; None when it is not there, damaged, or lacks one of them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    try:
        kept = load_file(path)
    except (OSError, SafetensorError):
        return None  # damaged: it is made again
    return kept if kept.keys() >= set(names) else None


def save_tensors(path: Path, **tensors: Tensor) -> str | None:
    """Writes a safetensors file, as a whole or not at all. Returns what went wrong, in words: a run does not fail over its
    cache."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging)
        staging.rename(path)
    except (OSError, SafetensorError) as error:
        staging.unlink(missing_ok=True)
        return str(error)
    return None

"""LoRA adapters on their way to servers by themselves: a folder, as peft writes it, and a name of its own for each version."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.errors import RolloutError
from rlpost.recipe.sections.model import LoraSection
from rlpost.rollout.place import Place

if TYPE_CHECKING:
    from torch import Tensor

    from rlpost.rollout.remote.client import Client


class Adapters:
    """The adapters of one run, under a new name each version.

    What vLLM has of an old one, in its memory or its prefix cache, cannot be taken for the new one, and a request for one that
    is not there is refused. (One without a name would silently be answered by the model without adapters.)"""

    def __init__(self, lora: LoraSection, folder: Path | None) -> None:
        """`folder`: in the process that hands weights over."""
        self._lora, self._folder = lora, folder
        self._run: str | None = None
        self._names: list[str] = []
        self._tensors: dict[str, Tensor] = {}
        self._expected: set[str] | None = None

    @property
    def name(self) -> str | None:
        """Of the newest version; None before the first."""
        return self._names[-1] if self._names else None

    def taken(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What of the weights is no adapter; the adapters are kept."""
        self._tensors = {}
        for name, tensor in weights:
            if ".lora_" in name:
                self._tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
            else:
                yield name, tensor

    def begin(self, version: str, place: Place) -> None:
        """A new name, the same in all processes. Collective."""
        if self._run is None:
            self._run = place.gather(uuid.uuid4().hex[:8])[0]
        self._names.append(f"rlpost-{self._run}-{len(self._names)}-step-{version}")

    def write(self) -> None:
        """What was taken, into the folder of the newest name. Raises RolloutError where an adapter came in part, or nothing can
        be written."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        names = set(self._tensors)
        halves = {name.replace(".lora_A.", ".lora_B.") for name in names} | {
            name.replace(".lora_B.", ".lora_A.") for name in names
        }
        missing = sorted((halves | (self._expected or set())) - names)
        if missing or not names:
            raise RolloutError(
                f"{len(missing)} of the adapters' tensors did not come from the learner ({', '.join(missing[:3]) or 'all'}). "
                "Every sync must send all of them; use `rollout.sync.lora=merged` and report it."
            )
        self._expected = names
        try:
            self.path.mkdir()
            save_file(self._tensors, self.path / "adapter_model.safetensors")
            (self.path / "adapter_config.json").write_text(json.dumps(self._config(names)))
        except (OSError, SafetensorError) as error:
            raise RolloutError(
                f"The adapters for the rollout servers cannot be written to {self.path} ({error}). Free space there, or name "
                "another place with rollout.engine.weights_folder."
            ) from error

    @property
    def path(self) -> Path:
        """Of the newest version's folder."""
        assert self._folder is not None and self._names
        return self._folder / self._names[-1]

    def _config(self, names: set[str]) -> dict[str, object]:
        layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in names}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self._lora.rank,
            "lora_alpha": self._lora.alpha,
            "target_modules": sorted(layers),
            "bias": "none",
        }

    async def give(self, client: Client, version: str, *, fresh: bool) -> None:
        """The newest to a server, in place of the one before. Raises ServerLost or ServerRefused."""
        await client.call("/v1/load_lora_adapter", {"lora_name": self.name, "lora_path": str(self.path)}, json=False)
        await client.call("/update_weight_version", {"new_version": version})
        if not fresh and len(self._names) > 1:
            await client.call("/v1/unload_lora_adapter", {"lora_name": self._names[-2]}, json=False)

    def forget_old(self) -> None:
        """Removes the folder of the version before."""
        if self._folder is not None and len(self._names) > 1:
            shutil.rmtree(self._folder / self._names[-2], ignore_errors=True)

"""Imported by vLLM in each of its worker processes (`--worker-extension-cls`): takes weights from files, answers pings.

vLLM makes its weight-transfer engine after this module is imported, so registering ours here is enough.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rlpost.rollout.fingerprint import as_json
from rlpost.rollout.remote.broadcast import broadcast, make_group
from rlpost.rollout.remote.held import HeldWeights
from rlpost.rollout.sync_errors import not_replaced
from rlpost.rollout.vllm_generators import keep_generators
from rlpost.rollout.vllm_logprobs import report_whole_distribution
from rlpost.rollout.vllm_lora import no_adapter_on_logits
from rlpost.rollout.vllm_reload import begin_replacing, end_replacing


@dataclass
class FilesInit(WeightTransferInitInfo):
    """There is nothing to set up."""


@dataclass
class FilesUpdate(WeightTransferUpdateInfo):
    """One file of weights."""

    path: str
    names: list[str]
    """What must lie in it."""


class FilesEngine(WeightTransferEngine[FilesInit, FilesUpdate]):
    """Takes every weight of the model from safetensors files, in one transaction of start, updates and finish."""

    init_info_cls = FilesInit
    update_info_cls = FilesUpdate

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.held = HeldWeights(self.model)
        self._names: list[str] = []

    def init_transfer_engine(self, init_info: FilesInit) -> None: ...

    def start_weight_update(self) -> None:
        begin_replacing(self.model, on_cpu=self.device.type == "cpu")
        self.held.begin()
        self._names = []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(
            self.parse_update_info(update_info)
        )  # vLLM's own then waits for an accelerator, and fails on CPU

    def receive_weights(self, update_info: FilesUpdate) -> None:
        from safetensors import safe_open

        with safe_open(update_info.path, "pt") as file:
            there = set(file.keys())
            if absent := [name for name in update_info.names if name not in there]:
                raise ValueError(f"{len(absent)} weights are not in {update_info.path}, the first is {absent[0]}")
            self._names += update_info.names
            weights = ((name, file.get_tensor(name)) for name in update_info.names)
            with self.held.loading(weights) as watched:
                self.model.load_weights(watched)

    def finish_weight_update(self) -> None:
        self._replaced()
        self.held.end(self._names)

    def _replaced(self) -> None:
        if unreached := end_replacing(self.model, self.model_config, on_cpu=self.device.type == "cpu"):
            raise ValueError(not_replaced(unreached))

    def shutdown(self) -> None: ...


@dataclass
class GroupInit(WeightTransferInitInfo):
    """The learner is rank 0 of a group of `world_size`, this server's first worker `rank_offset`."""

    address: str
    port: int
    rank_offset: int
    world_size: int


@dataclass
class GroupUpdate(WeightTransferUpdateInfo):
    """Tensors that are about to come, in this order."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class GroupEngine(FilesEngine):
    """The same from the learner's memory, by broadcast (`rlpost.rollout.remote.broadcast`)."""

    init_info_cls = GroupInit
    update_info_cls = GroupUpdate
    _group: Any = None

    def init_transfer_engine(self, init_info: GroupInit) -> None:
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = make_group(init_info.address, init_info.port, rank, init_info.world_size, self.device)

    def receive_weights(self, update_info: GroupUpdate) -> None:
        if self._group is None:
            raise ValueError("the server belongs to no group yet")
        self._names += update_info.names
        room = (
            torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            for shape, dtype in zip(update_info.shapes, update_info.dtypes, strict=True)
        )
        weights = [(name, broadcast(self._group, at)) for name, at in zip(update_info.names, room, strict=True)]
        with self.held.loading(weights) as watched:
            self.model.load_weights(watched)

    def shutdown(self) -> None:
        group, self._group = self._group, None
        if hasattr(group, "destroy"):
            group.destroy()


for backend, engine in {"rlpost_files": FilesEngine, "rlpost_nccl": GroupEngine}.items():
    if backend not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(backend, engine)


class Extension:
    """Mixed into vLLM's worker: its methods can be called by name through `/collective_rpc`."""

    def rlpost_ping(self) -> dict[str, int]:
        """Also says how many steps of the model were made: an engine with requests that makes none has forgotten them."""
        return {"pid": os.getpid(), "steps": getattr(self, "_rlpost_steps", 0)}

    def rlpost_held(self) -> dict[str, Any]:
        """After an update: the fingerprints of what this process holds, and what is wrong by itself."""
        held: HeldWeights = self.weight_transfer_engine.held  # type: ignore[attr-defined]
        found = {"stale": held.stale, "unloaded": held.unloaded, "seconds": held.seconds}
        return {"held": [as_json(part) for part in held.held], **found}

    def rlpost_end(self) -> None:
        """Ends this process without an answer; vLLM then ends the others of the server."""
        os._exit(1)

    def rlpost_prepare(self) -> dict[str, bool]:
        """Once, before the first request: whether log-probs are of the whole distribution from now on."""
        if not hasattr(self, "_rlpost_whole"):
            self._rlpost_whole = report_whole_distribution(self)
            keep_generators(self)
            no_adapter_on_logits(self)
            self._rlpost_count_steps()
        return {"whole": self._rlpost_whole}

    def _rlpost_count_steps(self) -> None:
        runner = self.model_runner  # type: ignore[attr-defined]
        execute, self._rlpost_steps = runner.execute_model, 0

        def counted(*arguments: Any, **keywords: Any) -> Any:
            self._rlpost_steps += 1
            return execute(*arguments, **keywords)

        runner.execute_model = counted

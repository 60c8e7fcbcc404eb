"""Imported by vLLM in each of its worker processes (`--worker-extension-cls`): takes weights from files, answers pings.

vLLM makes its weight-transfer engine after this module is imported, so registering ours here is enough.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rlpost.rollout.sync_errors import not_replaced
from rlpost.rollout.vllm_generators import keep_generators
from rlpost.rollout.vllm_logprobs import report_whole_distribution
from rlpost.rollout.vllm_reload import begin_replacing, end_replacing

BACKEND = "rlpost_files"


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

    def init_transfer_engine(self, init_info: FilesInit) -> None: ...

    def start_weight_update(self) -> None:
        begin_replacing(self.model, on_cpu=self.device.type == "cpu")

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
            self.model.load_weights((name, file.get_tensor(name)) for name in update_info.names)

    def finish_weight_update(self) -> None:
        if unreached := end_replacing(self.model, self.model_config, on_cpu=self.device.type == "cpu"):
            raise ValueError(not_replaced(unreached))

    def shutdown(self) -> None: ...


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FilesEngine)


class Extension:
    """Mixed into vLLM's worker: its methods can be called by name through `/collective_rpc`."""

    def rlpost_ping(self) -> dict[str, int]:
        """Also says how many steps of the model were made: an engine with requests that makes none has forgotten them."""
        return {"pid": os.getpid(), "steps": getattr(self, "_rlpost_steps", 0)}

    def rlpost_end(self) -> None:
        """Ends this process without an answer; vLLM then ends the others of the server."""
        os._exit(1)

    def rlpost_prepare(self) -> dict[str, bool]:
        """Once, before the first request: whether log-probs are of the whole distribution from now on."""
        if not hasattr(self, "_rlpost_whole"):
            self._rlpost_whole = report_whole_distribution(self)
            keep_generators(self)
            self._rlpost_count_steps()
        return {"whole": self._rlpost_whole}

    def _rlpost_count_steps(self) -> None:
        runner = self.model_runner  # type: ignore[attr-defined]
        execute, self._rlpost_steps = runner.execute_model, 0

        def counted(*arguments: Any, **keywords: Any) -> Any:
            self._rlpost_steps += 1
            return execute(*arguments, **keywords)

        runner.execute_model = counted

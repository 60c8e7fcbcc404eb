"""How vLLM's server is started for a recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Literal

from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.rollout.vllm_options import as_arguments, passed_on

# What a launcher tells the learner's processes about each other: vLLM would take it for its own.
_LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    *(
        "MASTER_ADDR",
        "MASTER_PORT",
        "GROUP_WORLD_SIZE",
        "ROLE_NAME",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
    ),
    *("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_SERVER_DEV_MODE"),
)

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


def server_arguments(
    model_path: str,
    engine_settings: VllmEngine,
    *,
    max_model_len: int,
    seed: int,
    on_cpu: bool,
    trust_remote_code: bool,
    address: str,
    generation_config: str | None = None,
    adapter_rank: int | None = None,
    transfer: Literal["files", "nccl"] = "files",
) -> list[str]:
    """The arguments of `vllm serve`. `address`: `unix:` and a path, or HOST:PORT. `generation_config`: vLLM's own option.
    `adapter_rank`: of LoRA adapters that come by themselves.

    The same options as in process (`rlpost.rollout.vllm_engine`), so that the same requests give the same tokens.
    """
    eager = on_cpu if engine_settings.eager is None else engine_settings.eager
    arguments = [
        model_path,
        *("--dtype", engine_settings.dtype, "--max-model-len", str(max_model_len), "--seed", str(seed)),
        *("--max-num-seqs", str(engine_settings.max_sequences), "--logprobs-mode", "processed_logprobs"),
        *("--gpu-memory-utilization", str(engine_settings.memory_fraction)),
        *(
            "--tensor-parallel-size",
            str(engine_settings.tensor_parallel),
            "--data-parallel-size",
            str(engine_settings.replicas),
        ),
        *("--weight-transfer-config", json.dumps({"backend": f"rlpost_{transfer}"})),
        *("--worker-extension-cls", "rlpost.rollout.remote.worker.Extension"),
        *("--enable-scale-out", "--disable-log-stats", "--disable-uvicorn-access-log"),
    ]
    arguments += as_arguments(passed_on(engine_settings))
    arguments += ["--enforce-eager"] if eager else []
    arguments += ["--trust-remote-code"] if trust_remote_code else []
    arguments += ["--generation-config", generation_config] if generation_config else []
    if adapter_rank is not None:  # one at a time: the next one takes the place of the last
        largest = next(rank for rank in _RANKS if rank >= adapter_rank)
        arguments += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(largest)]
    if on_cpu:
        arguments += ["--kv-cache-memory-bytes", str(int(engine_settings.kv_cache_gib * 2**30)), "--block-size", "32"]
    if address.startswith("unix:"):
        return [*arguments, "--uds", address.removeprefix("unix:")]
    host, _, port = address.rpartition(":")
    return [*arguments, "--host", host, "--port", port]


def server_environment(
    engine_settings: VllmEngine,
    *,
    on_cpu: bool,
    deadline_s: float,
    devices: tuple[int, ...] = (),
    adapters: bool = False,
) -> dict[str, str]:
    """The environment of the server: the learner's without what is the learner's own. A user's own settings win."""
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # weights and pings go by routes that vLLM offers to developers only
    if adapters:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    defaults: Mapping[str, str] = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(max(1, int(deadline_s))),
    }
    if on_cpu:
        cores = engine_settings.cores or tuple(sorted(os.sched_getaffinity(0)))
        defaults = {
            **defaults,
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the server is pinned as a whole, to `rollout.engine.cores`
            "OMP_WAIT_POLICY": "passive",
        }
        if engine_settings.cores:
            environment["OMP_NUM_THREADS"] = str(len(cores))
        else:
            defaults = {**defaults, "OMP_NUM_THREADS": str(len(cores))}
    for key, value in defaults.items():
        environment.setdefault(key, value)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = _visible(devices)
    return environment


def _visible(devices: tuple[int, ...]) -> str:
    """The cards as vLLM is to see them: `devices` counts those that this machine shows."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if not shown else shown.split(",")
    return ",".join(str(d) if names is None or d >= len(names) else names[d] for d in devices)

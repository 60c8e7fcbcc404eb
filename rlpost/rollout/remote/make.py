"""Makes the engine of `rollout.engine.where: worker | server`, and the processes of servers."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.errors import RolloutError
from rlpost.policy.generation import loading_options
from rlpost.policy.precision import sampler_dtype
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.model import LoraSection
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.rollout.place import Place
from rlpost.rollout.remote.adapters import Adapters
from rlpost.rollout.remote.arguments import server_arguments, server_environment
from rlpost.rollout.remote.client import ServerLost
from rlpost.rollout.remote.engine import RemoteEngine
from rlpost.rollout.remote.lanes import Server
from rlpost.rollout.remote.process import ServerProcess
from rlpost.rollout.remote.weights import WeightFiles, weights_folder
from rlpost.rollout.served import Served
from rlpost.rollout.vllm_errors import explain_startup
from rlpost.rollout.vllm_names import checkpoint_names, load_config
from rlpost.rollout.vllm_versions import check_version

if TYPE_CHECKING:
    from rlpost.rollout.remote.broadcast import Sender


def make_remote_engine(
    engine_settings: VllmEngine,
    served: Served,
    ends: Sequence[int],
    place: Place,
    *,
    device: str = "cpu",
    lora: LoraSection | None = None,
    in_flight: bool = False,
) -> RemoteEngine:
    """The engine of this process. `ends`: tokens that end a completion beside the tokenizer's and the generation
    configuration's. `lora`: of adapters that are sent by themselves. Raises RolloutError when a worker cannot start."""
    config = load_config(served.model_path, served.trust_remote_code)
    names = checkpoint_names(config, served.trust_remote_code)
    engine_settings = engine_settings.model_copy(update={"dtype": sampler_dtype(engine_settings)})

    def new_files() -> WeightFiles:
        import torch

        folder = weights_folder(engine_settings.weights_folder, 4 * names.size())
        return WeightFiles(folder, getattr(torch, engine_settings.dtype))

    files: WeightFiles | None
    match engine_settings.where:
        case "worker":
            files = new_files()
            try:
                servers = [_worker(engine_settings, served, place, files)]
            except BaseException:
                files.close()
                raise
        case "server":
            files = new_files() if place.rank == 0 else None
            servers = [Server(url) for url in engine_settings.urls]
        case "colocated":
            raise ValueError("A colocated engine is made by `rlpost.rollout.factory`.")
        case _:
            raise unknown_choice("rollout.engine.where", engine_settings.where)
    return RemoteEngine(
        servers,
        engine_settings,
        names,
        vocabulary=config.get_text_config().vocab_size,
        max_model_len=served.max_model_len,
        ends=ends,
        place=place,
        files=files,
        in_flight=in_flight,
        sender=_sender(served, engine_settings, device) if files is not None else None,
        adapters=None if lora is None else Adapters(lora, files.folder if files else None),
    )


def _worker(engine_settings: VllmEngine, served: Served, place: Place, files: WeightFiles) -> Server:
    """This process's own server, started."""
    process = server_process(
        engine_settings,
        served,
        devices=() if served.on_cpu else own_devices(engine_settings, place.local_rank),
        log=(place.logs or Path(tempfile.mkdtemp(prefix="rlpost-logs-"))) / f"vllm_{place.rank}.log",
        remove=files.folder,
    )
    start(process, engine_settings, served)
    return Server(process.address, process)


def _sender(served: Served, engine_settings: VllmEngine, device: str) -> Sender | None:
    match served.transfer:
        case "files":
            return None
        case "nccl":
            import torch

            from rlpost.rollout.remote.broadcast import Sender

            return Sender(torch.device(device), engine_settings.deadline_s)
        case _:
            raise unknown_choice("rollout.sync.transfer", served.transfer)


def own_devices(engine_settings: VllmEngine, local_rank: int) -> tuple[int, ...]:
    """The GPUs of the worker of a node's learner process number `local_rank`. Raises RolloutError when there are too few."""
    needed = engine_settings.tensor_parallel * engine_settings.replicas
    devices = engine_settings.devices[local_rank * needed : (local_rank + 1) * needed]
    if len(devices) < needed:
        raise RolloutError(
            f"rollout.engine.where=worker: the worker of learner process {local_rank} of this node needs {needed} GPUs of its "
            f"own, and rollout.engine.devices={list(engine_settings.devices)} has none left for it. Name tensor_parallel x "
            "replicas GPUs for each learner process, none of which a learner uses."
        )
    return devices


def server_process(
    engine_settings: VllmEngine,
    served: Served,
    *,
    log: Path,
    devices: tuple[int, ...] = (),
    remove: Path | None = None,
    address: str | None = None,
) -> ServerProcess:
    """A server that is not started yet: on a Unix socket, or at HOST:PORT (`address`). See `ServerProcess`."""
    if importlib.util.find_spec("vllm") is None:
        raise RolloutError(
            "vLLM is not installed here. Install `rlpost[cuda]` or `rlpost[cpu]`, or sample with servers on machines that "
            "have it (rollout.engine.where=server)."
        )
    check_version()
    options = "vllm" if loading_options(served.model_path)[0] else None
    return ServerProcess(
        lambda where: server_arguments(
            served.model_path,
            engine_settings,
            max_model_len=served.max_model_len,
            seed=served.seed,
            on_cpu=served.on_cpu,
            trust_remote_code=served.trust_remote_code,
            address=where,
            generation_config=options,
            adapter_rank=served.adapter_rank,
            transfer=served.transfer,
        ),
        server_environment(
            engine_settings,
            on_cpu=served.on_cpu,
            deadline_s=engine_settings.deadline_s,
            devices=devices,
            adapters=served.adapter_rank is not None,
        ),
        cores=engine_settings.cores,
        log=log,
        remove=remove,
        start_s=engine_settings.start_s,
        address=address,
    )


def start(process: ServerProcess, engine_settings: VllmEngine, served: Served) -> None:
    """Starts a server for the first time. Raises RolloutError, with the recipe key to change, when it cannot."""
    try:
        process.start()
    except ServerLost as error:
        raise explain_startup(error, served.model_path, engine_settings, served.max_model_len) from error

"""Rules about who samples, and where."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from rlpost.recipe.rules.setting import Setting
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.rollout import MAX_RANK, VllmEngine
from rlpost.recipe.sections.root import Recipe


def engine_problems(r: Recipe, _: Setting) -> Iterator[str]:
    """What is wrong with where the rollout engine runs."""
    engine = r.rollout.engine
    beside = isinstance(engine, VllmEngine) and engine.where != "colocated"
    if (lag := r.rollout.staleness) and (r.data.has_pairs or not r.method.samples):
        yield f"rollout.staleness={lag}: this recipe samples nothing that could lag behind. Leave the key out"
    elif lag and not beside:
        yield (
            f"rollout.staleness={lag}: an engine inside the learner's process cannot sample while that learns. Set "
            "rollout.engine.type=vllm with rollout.engine.where=worker or server, or rollout.staleness=0"
        )
    if not lag and any(mask.type == "stale" for mask in r.method.masks):
        yield (
            "method.masks: stale rejects what old weights have sampled, and with rollout.staleness=0 samples are never older "
            "than their own rollout. Leave the mask out, or set rollout.staleness"
        )
    if r.rollout.in_flight and not lag:
        yield (
            "rollout.in_flight=true with rollout.staleness=0: sampling and learning take turns, so nothing is under way when "
            "weights change. Set rollout.staleness to 1 or more, or leave in_flight out"
        )
    if isinstance(engine, VllmEngine):
        yield from placement_problems(engine)
        yield from passed_on_problems(r, engine)


def passed_on_problems(r: Recipe, engine: VllmEngine) -> Iterator[str]:
    """Which of vLLM's own options cannot be used. What a CPU lacks is asked about this machine only; of servers
    elsewhere `rlpost serve` asks it."""
    key, rollout = "rollout.engine", r.rollout
    if engine.speculative is not None and (rollout.top_p < 1 or rollout.top_k > 0):
        yield (
            f"{key}.speculative with rollout.top_p={rollout.top_p:g} and rollout.top_k={rollout.top_k}: vLLM then reports "
            "log-probs of the tokens kept only, which the learner cannot compare with its own. Set top_p to 1 and top_k to "
            "-1, or leave speculative out"
        )
    if engine.quantization != "none" and engine.sleep:
        yield (
            f"{key}.quantization={engine.quantization} with {key}.sleep=true: new weights cannot be loaded over quantised ones "
            "that were asleep; nobody has tried it. Leave one of them out"
        )
    if (engine.speculative is not None or engine.in_eight_bits) and engine.where != "server":
        import torch  # a second or two, and only for recipes that need the answer

        if not torch.cuda.is_available():
            yield from no_cpu(engine)


def no_cpu(engine: VllmEngine) -> Iterator[str]:
    """What vLLM 0.32 cannot do on a CPU."""
    if engine.speculative is not None:
        yield (
            "rollout.engine.speculative needs a CUDA GPU: on a CPU vLLM 0.32 samples other tokens than it should and reports "
            "log-probs that are wrong by whole nats, or not numbers, as soon as the temperature is not 0. Leave the key out"
        )
    if engine.quantization != "none":
        yield (
            f"rollout.engine.quantization={engine.quantization} needs a CUDA GPU: vLLM 0.32 has no such layers for a CPU. "
            "Set it to none; rollout.engine.kv_cache_dtype=fp8 works where the CPU has AVX-512 or AMX"
        )
    if engine.kv_cache_dtype != "auto" and not has_fp8_cache():
        yield (
            f"rollout.engine.kv_cache_dtype={engine.kv_cache_dtype} needs a CUDA GPU, or a CPU with AVX-512 or AMX. This "
            "one has neither: set it to auto"
        )


def has_fp8_cache() -> bool:
    """Whether vLLM's attention on this CPU reads a cache of 8-bit numbers."""
    import torch

    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_f") or able.get("amx_tile"))


def sync_problems(r: Recipe, _: Setting) -> Iterator[str]:
    """Where stochastic rounding at the sync would do nothing, or nothing that is known."""
    engine, model = r.rollout.engine, r.model
    if r.rollout.sync.lora == "adapter":
        yield from adapter_problems(r)
    if r.rollout.sync.transfer == "nccl":
        yield from transfer_problems(r)
    if r.rollout.sync.rounding == "nearest":
        return
    asked = f"rollout.sync.rounding={r.rollout.sync.rounding}"
    if not r.samples:
        yield f"{asked}: this recipe samples nothing, so no weights are sent. Leave the key out"
        return
    dtype = engine.dtype
    if isinstance(engine, VllmEngine) and dtype == "auto" and engine.where != "server":
        from rlpost.policy.precision import sampler_dtype  # imports torch

        dtype = sampler_dtype(engine)
    if dtype != "bfloat16":
        why = {
            "float32": "gets float32 weights whole",
            "float16": "rounds more finely than a step and is not supported",
            "auto": "has the precision of the servers' machine, which the learner does not know",
        }[dtype]
        yield f"{asked} is for engines in bfloat16, and one with rollout.engine.dtype={dtype} {why}. " + (
            "Set rollout.engine.dtype=bfloat16, or rollout.sync.rounding=nearest"
        )
    if isinstance(engine, VllmEngine) and engine.quantization != "none":
        yield (
            f"{asked} with rollout.engine.quantization={engine.quantization}: the engine rounds again, to the nearest, more "
            "coarsely than bfloat16, and what chance has kept is lost. Set one of them to its default"
        )
    if model.dtype == "bfloat16":
        what = "are bfloat16 already" if model.lora is None else "are merged with the adapters in bfloat16 already"
        yield (
            f"{asked} with model.dtype=bfloat16: the learner's weights {what}, so there is nothing left to round. "
            "Set model.dtype=float32, or rollout.sync.rounding=nearest"
        )


def transfer_problems(r: Recipe) -> Iterator[str]:
    """Where weights cannot go from GPU to GPU."""
    engine, asked = r.rollout.engine, "rollout.sync.transfer=nccl"
    if not isinstance(engine, VllmEngine) or engine.where != "server":
        yield (
            f"{asked} is for vLLM on servers: a worker is on the learner's own machine, where files in shared memory can "
            "also be given to the one that replaces it. Set rollout.engine.where=server, or transfer=files"
        )
        return
    if r.rollout.sync.lora == "adapter":
        yield f"{asked} with rollout.sync.lora=adapter: adapters are small, and go as files. Set one of them to its default"
        return
    import torch  # a second or two, and only for recipes that need the answer

    if not torch.cuda.is_available():
        yield f"{asked} needs a CUDA GPU here and on the servers: set rollout.sync.transfer=files"


def adapter_problems(r: Recipe) -> Iterator[str]:
    """Where adapters cannot be sent by themselves."""
    engine, lora, asked = r.rollout.engine, r.model.lora, "rollout.sync.lora=adapter"
    if lora is None:
        yield f"{asked} needs adapters to send: set model.lora, or leave the key out"
    elif lora.rank > MAX_RANK:
        yield f"{asked} with model.lora.rank={lora.rank}: vLLM takes {MAX_RANK} at the most. Lower it, or set lora=merged"
    elif head := [target for target in lora.targets if "lm_head" in target]:
        yield f"{asked} with model.lora.targets={head}: vLLM scores by the output layer without adapters. Set lora=merged"
    if not isinstance(engine, VllmEngine) or engine.where == "colocated":
        yield f"{asked} is for vLLM as a worker or on servers. Set rollout.engine.where=worker, or lora=merged"
    if r.rollout.in_flight:
        yield (
            f"{asked} with rollout.in_flight=true: a running request keeps the adapter that it began with, so new ones would "
            "never reach it. Set one of them to its default"
        )
    if r.rollout.sync.rounding != "nearest":
        yield (
            f"{asked} with rollout.sync.rounding={r.rollout.sync.rounding}: adapters are not added to weights that are "
            "rounded, so there is nothing for chance to keep. Set one of them to its default"
        )


def placement_problems(engine: VllmEngine) -> Iterator[str]:
    """What is wrong with where vLLM runs and what it runs on, whatever the rest of the recipe says."""
    key, where = "rollout.engine", f"rollout.engine.where={engine.where}"
    match engine.where:
        case "colocated":
            for name in ("tensor_parallel", "replicas"):
                if (number := getattr(engine, name)) > 1:
                    yield (
                        f"{key}.{name}={number} with {where}: a colocated engine lives in one process and uses its one GPU. "
                        "Set it to 1 and start more processes, or set where=worker"
                    )
        case "worker":
            needed = engine.tensor_parallel * engine.replicas
            if engine.devices and len(engine.devices) % needed:
                yield (
                    f"{key}.devices names {len(engine.devices)} GPUs, and each worker takes tensor_parallel x replicas = "
                    f"{needed}. Name as many as the workers of a node (one for each learner process) take together"
                )
            last = (os.cpu_count() or 1) - 1
            if engine.cores and not hasattr(os, "sched_setaffinity"):
                yield f"{key}.cores: this operating system does not let programs be bound to cores. Leave the key out"
            elif engine.cores and max(engine.cores) > last:
                yield f"{key}.cores names core {max(engine.cores)}, and this machine's are 0 to {last}. Name others"
        case "server":
            if not engine.urls:
                yield f"{where} needs {key}.urls: where `rlpost serve` listens, such as [http://10.0.0.2:8000]"
            for url in engine.urls:
                if not re.fullmatch(r"https?://[^/\s]+/?", url):
                    yield f"{key}.urls: {url!r} is no address of a server. Write it as http://10.0.0.2:8000"
            if len(set(engine.urls)) < len(engine.urls):
                yield f"{key}.urls names the same server twice. Name each once"
        case _:
            raise unknown_choice(f"{key}.where", engine.where)
    if engine.urls and engine.where != "server":
        yield f"{key}.urls with {where}: they are for where=server. Set it, or leave the key out"
    for name in ("devices", "cores"):
        if getattr(engine, name) and engine.where != "worker":
            yield f"{key}.{name} with {where}: it is for where=worker. Set it, or leave the key out"
    if engine.sleep and engine.where != "colocated":
        yield (
            f"{key}.sleep with {where}: only an engine on the learner's own GPU gives memory back between rollouts. "
            "Leave the key out"
        )

"""The processes of `benchmarks.offload`: each arm in turn, timed, in the order of a job's file.

    torchrun --nproc_per_node 2 -m benchmarks.offload_side JOB.json

Whatever an arm raises is written down as the reason why it could not run. One that hangs or kills its process is found by the
starter, from what stands last in the file of results, and left out from then on.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import peak_memory_mib, reset_peak_memory, synchronize
from benchmarks.models import QWEN, TINY
from benchmarks.offload_arms import BETAS, RATE, Arm, arms, configuration, offload_of
from rlpost.learner.deepspeed_import import import_deepspeed
from rlpost.learner.process import Processes
from rlpost.offload.arithmetic import TorchArithmetic
from rlpost.offload.calibrate import ELEMENTS, calibrate
from rlpost.offload.plan import Kind, Predicted, Room, Way, choose, predict, ways
from rlpost.offload.program import Program
from rlpost.offload.simulate import Rates

CLIP = 1.0


def make_model(size: str, device: torch.device) -> torch.nn.Module:
    """A random model on the host; `tiny` or a size of `benchmarks.models.QWEN`."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if size == "tiny":
        return LlamaForCausalLM(LlamaConfig(**TINY, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    shape: dict[str, Any] = {**QWEN[size], "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    with torch.device(device):  # drawn there: a minute on a CPU
        model = Qwen2ForCausalLM(Qwen2Config(**shape, max_position_embeddings=32768)).to(torch.bfloat16)
    return model.cpu()


class Bench:
    """What all arms share: processes, the model as it begins, data, and this machine's rates."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.processes = job, Processes()
        self.deepspeed = import_deepspeed()
        with redirect_stdout(StringIO()):
            self.deepspeed.init_distributed(
                dist_backend=None if torch.distributed.is_initialized() else _backend(), verbose=False
            )
        device = self.processes.device
        self.model = make_model(job["model"], device)
        if job["checkpointing"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.bf16 = next(self.model.parameters()).dtype == torch.bfloat16
        self.parameters = -(-sum(p.numel() for p in self.model.parameters()) // self.processes.world)
        self.kind = Kind(job["piece_size"], 4, 2 if self.bf16 else 4, serial=device.type != "cuda")
        elements = max(64, min(ELEMENTS, self.parameters, job["piece_size"]))
        self.processes.barrier()
        mine = calibrate(
            device, TorchArithmetic(), weights=torch.bfloat16 if self.bf16 else torch.float32, elements=elements
        )
        everyone = [asdict(rates) for rates in self.processes.gather(mine)]
        self.rates = Rates(**{name: min(rates[name] for rates in everyone) for name in everyone[0]})
        generator = torch.Generator().manual_seed(1 + self.processes.rank)
        words = self.model.config.vocab_size
        shape = (job["warmup"] + job["steps"], job["micro_batches"], 1, job["tokens"])
        self.data = torch.randint(words, shape, generator=generator).to(device)

    def planned(self) -> Predicted:
        """What the planner takes where no more of the accelerator may be used than by what is streamed."""
        streamed = predict(self.parameters, Way(1, 1), self.rates, self.kind)
        among = ways(4, (0.0, 0.1, 0.25, 0.5))
        best, _ = choose(self.parameters, self.rates, self.kind, Room(1.02 * streamed.accelerator), among=among)
        assert best is not None  # streamed fits
        return best

    def run(self, arm: Arm) -> dict[str, Any]:
        """One visit of an arm: times of its measured steps, and what came out."""
        if arm.planned:
            arm = replace(arm, ours=self.planned().way)
        if arm.cuda_only and self.processes.device.type != "cuda":
            raise RuntimeError("DeepSpeed has it on CUDA only")
        if arm.optimizer != "torch" and self.job["cpu_adam"]:
            raise RuntimeError(f"DeepSpeedCPUAdam: {self.job['cpu_adam']}")
        with _bound_to_cores(self.processes, on=arm.bound):
            config = configuration(arm, self.job["micro_batches"], clip=CLIP, bf16=self.bf16)
            with redirect_stdout(StringIO()):
                engine = self._engine(arm, config)
            try:
                return self._measure(arm, engine)
            finally:
                engine.destroy()
                del engine
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _engine(self, arm: Arm, config: dict[str, Any]) -> Any:
        from rlpost.offload.zero3 import host_state

        model = copy.deepcopy(self.model)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer: Any = None
        match arm.optimizer:
            case "torch":
                optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
            case "cpu_adam":
                from deepspeed.ops.adam import DeepSpeedCPUAdam

                optimizer = DeepSpeedCPUAdam(groups, lr=RATE, betas=BETAS)
        if optimizer is not None:  # ZenFlow transposes weights before it cuts them
            self.deepspeed.zero.Init(module=model, config_dict_or_path=config)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.processes.device)
        offload = None if arm.ours is None else offload_of(arm.ours, self.job["piece_size"])
        with host_state(offload, optimizer if offload is not None else None):
            engine, *_ = self.deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                model_parameters=groups if optimizer is None else None,
                config=config,
                dist_init_required=False,
            )
        return engine

    def _measure(self, arm: Arm, engine: Any) -> dict[str, Any]:
        times: dict[str, list[float]] = {name: [] for name in ("forward", "backward", "update", "sync")}
        losses: list[float] = []
        for step, batches in enumerate(self.data):
            if step == self.job["warmup"]:
                reset_peak_memory()
            taken = self._step(engine, batches, losses)
            if step >= self.job["warmup"]:
                for name, seconds in taken.items():
                    times[name].append(seconds)
        found: dict[str, Any] = {"times": times, "losses": losses, "bits": self._bits(engine)}
        found["peak_mib"] = self.processes.gather(peak_memory_mib())
        if arm.ours is not None:
            predicted = predict(self.parameters, arm.ours, self.rates, self.kind)
            found |= {"way": arm.ours.name, "predicted_s": predicted.seconds, **self._moved(engine)}
        if arm.ours is not None and arm.ours.parked:
            found["park_s"], found["unpark_s"] = _timed(engine.optimizer.park), _timed(engine.optimizer.unpark)
        return found

    def _step(self, engine: Any, batches: torch.Tensor, losses: list[float]) -> dict[str, float]:
        taken = {"forward": 0.0, "backward": 0.0}
        total = 0.0
        for i, tokens in enumerate(batches):
            output = _Kept(partial(engine, input_ids=tokens, labels=tokens, use_cache=False))
            taken["forward"] += _timed(output)
            loss = output.value.loss
            taken["backward"] += _timed(partial(engine.backward, loss))
            total += float(loss.detach())
            seconds = _timed(engine.step)
            if i == len(batches) - 1:
                taken["update"] = seconds
        losses.append(sum(self.processes.gather(total)) / len(batches) / self.processes.world)
        taken["sync"] = _timed(lambda: self._gather_weights(engine))
        return taken

    def _gather_weights(self, engine: Any) -> None:
        """What the learner does of a sync: every weight is gathered, one at a time."""
        for parameter in engine.module.parameters():
            with self.deepspeed.zero.GatheredParameters([parameter]):
                pass

    def _bits(self, engine: Any) -> list[int]:
        """Of this process's weights and master weights, sums of their bits that tell any two apart but by accident; all
        processes' together."""
        optimizer = engine.optimizer
        if hasattr(optimizer, "update"):
            optimizer.update.bring_home()
        found = [_checksum(optimizer.lp_param_buffer)]
        found += [_checksum(flat.data) for flat in optimizer.fp32_partitioned_groups_flat]
        return [number for numbers in self.processes.gather(found) for number in numbers]

    def _moved(self, engine: Any) -> dict[str, float]:
        """Bytes that one update moves over the link in each direction."""
        program: Program = engine.optimizer.update.program
        weights = engine.optimizer.lp_param_buffer.element_size()
        gradients = engine.optimizer.grad_partitions_flat_buffer.element_size()
        width = {"fetch": 12, "flush": 12, "up": weights, "down": gradients}
        moved = {lane: sum(op.size for op in program.ops if op.lane == lane) * width[lane] for lane in width}
        return {"up_bytes": moved["fetch"] + moved["up"], "down_bytes": moved["flush"] + moved["down"]}


def _checksum(values: torch.Tensor) -> int:
    """Of a vector's bits and their places."""
    total = 0
    for part in values.detach().reshape(-1).split(2**24):
        bits = part.view(torch.int16 if part.element_size() == 2 else torch.int32).long()
        places = torch.arange(1, bits.numel() + 1, device=bits.device) % 65521
        total = (total * 1_000_003 + int((bits * places).sum()) + int(bits.sum())) % 2**61
    return total


def _said(error: Exception) -> str:
    """An error and where it was raised, in a line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "/".join(Path(last.filename).parts[-2:])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]} ({where}:{last.lineno})"


class _Kept:
    """A call whose result is kept."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self.value: Any = None

    def __call__(self) -> None:
        self.value = self._action()


def _timed(action: Callable[[], object]) -> float:
    synchronize()
    began = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - began


@contextmanager
def _bound_to_cores(processes: Processes, *, on: bool) -> Iterator[None]:
    """Gives every process of the node cores of its own, as `--bind_cores_to_rank` does (its memory is not bound)."""
    if not on or not hasattr(os, "sched_setaffinity"):
        yield
        return
    everything, threads = sorted(os.sched_getaffinity(0)), torch.get_num_threads()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    each = max(1, len(everything) // local)
    mine = everything[processes.local_rank * each :][:each] or everything
    _set_affinity(mine)
    torch.set_num_threads(max(1, min(threads, len(mine))))
    try:
        yield
    finally:
        _set_affinity(everything)
        torch.set_num_threads(threads)


def _set_affinity(cores: list[int]) -> None:
    for task in Path("/proc/self/task").iterdir():  # OpenMP's threads are there already
        try:
            os.sched_setaffinity(int(task.name), cores)
        except OSError:  # a thread that has ended meanwhile
            continue


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def main(file: Path) -> None:
    job = json.loads(file.read_text())
    torch.set_num_threads(job["threads"])
    bench = Bench(job)
    known = arms(bench.parameters, job["piece_size"])
    main_process, failed = bench.processes.is_main, set[int]()

    def say(line: dict[str, Any]) -> None:
        if main_process:
            with Path(job["results"]).open("a") as out:
                out.write(json.dumps(line) + "\n")

    planned = bench.planned()
    say(
        {
            "rates": asdict(bench.rates),
            "parameters_a_process": bench.parameters,
            "processes": bench.processes.world,
            "planned": {"way": planned.way.name, "predicted_s": planned.seconds},
        }
    )
    for repeat, number in job["visits"]:
        late = bench.processes.gather(time.time() > job["until"])[0]
        if late or number in failed:
            continue
        say({"begun": number, "repeat": repeat})
        try:
            found = bench.run(known[number])
        except Exception as error:
            found = {"cannot": _said(error)}
            failed.add(number)
        say({"arm": number, "repeat": repeat, **found})
        bench.processes.barrier()
    say({"ended": True})
    bench.processes.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

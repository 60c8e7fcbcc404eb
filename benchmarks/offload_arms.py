"""What `benchmarks.offload` compares: the arms, each as DeepSpeed's configuration and, for ours, `learner.offload`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlpost.offload.plan import PARKED, RESIDENT, STAGING, Way, section_of
from rlpost.recipe.sections.offload import AutoOffload, SettledOffload

REFERENCE = "ZeRO-3, no offload"
PLANNED = "ours, planned"
RATE, BETAS = 1e-4, (0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of keeping and updating the optimizer's state.

    `zero`: what stands in `zero_optimization` beside the stage. `optimizer`: torch's fused AdamW (`torch`), or DeepSpeed's own
    for the CPU (`cpu_adam`), which has to be built, or ZenFlow's variant of that. `ours`: a way of `rlpost.offload`. `exact`:
    whether it takes AdamW's step of the same gradients at all; ZenFlow does not. `bits`: whether its results are to be the
    reference's to the bit on any machine; DeepSpeed's offload sums norms in another order, so its need not be.
    """

    name: str
    zero: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "torch"
    bound: bool = False
    ours: Way | None = None
    planned: bool = False
    exact: bool = True
    bits: bool = False
    cuda_only: bool = False


def arms(parameters: int, piece_size: int) -> list[Arm]:
    """All arms for a model of which a process has so many parameters."""
    ratio = equal_memory_ratio(parameters, piece_size)
    cpu: dict[str, Any] = {"device": "cpu", "pin_memory": False}
    pinned = {"device": "cpu", "pin_memory": True}
    zenflow = {"topk_ratio": 0.1, "select_strategy": "auto", "select_interval": "auto", "update_interval": 4}
    found = [
        Arm(REFERENCE, bits=True),
        Arm("DeepSpeed offload, torch's AdamW", {"offload_optimizer": cpu}),
        Arm("DeepSpeed offload", {"offload_optimizer": cpu}, "cpu_adam"),
        Arm("DeepSpeed offload, pinned", {"offload_optimizer": pinned}, "cpu_adam"),
        Arm("DeepSpeed offload, pinned, bound", {"offload_optimizer": pinned}, "cpu_adam", bound=True),
        Arm(
            f"Twin-Flow {ratio:.2f} (equal memory), pinned, bound",
            {"offload_optimizer": {**pinned, "ratio": ratio}},
            "cpu_adam",
            bound=True,
            cuda_only=True,
        ),
        Arm(
            f"SuperOffload {ratio:.2f} (equal memory)",
            {"offload_optimizer": {**pinned, "ratio": ratio, "super_offload": True}, "overlap_comm": False},
            "cpu_adam",
            cuda_only=True,
        ),
        Arm(
            "ZenFlow (not exact)",
            {"offload_optimizer": pinned, "zenflow": {**zenflow, "overlap_step": False}},
            "zenflow",
            exact=False,
        ),
    ]
    own = [RESIDENT, PARKED, Way(1, 1), Way(3, 4), Way(2, 3), Way(1, 2), Way(1, 3), Way(0, 1), Way(1, 2, 0.25)]
    # On a CPU every way has the reference's bits; on a GPU, whose kernel rounds otherwise, those that update all there.
    found += [Arm(f"ours, {way.name}", ours=way, bits=way.gpu_of == way.every) for way in own]
    return [*found, Arm(PLANNED, planned=True)]


def equal_memory_ratio(parameters: int, piece_size: int) -> float:
    """Twin-Flow's share on the CPU with which it keeps as many bytes of state on the accelerator as ours, streamed, has there
    of gradient sums and staging."""
    ours = 4 * parameters + STAGING * 12 * min(piece_size, parameters)
    return min(1.0, max(0.0, round(1 - ours / (12 * parameters), 2)))


def offload_of(way: Way, piece_size: int) -> SettledOffload:
    """The recipe's section for a way."""
    return section_of(way, AutoOffload(piece_size=piece_size))


def configuration(arm: Arm, micro_batches: int, *, clip: float, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration: as rlpost makes it (`zero_config`), with accumulation by DeepSpeed itself."""
    own: dict[str, Any] = {}
    if arm.optimizer == "zenflow":  # DeepSpeed makes it by itself only
        own["optimizer"] = {"type": "AdamW", "params": {"lr": RATE, "betas": list(BETAS)}}
    return {
        **own,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0, **arm.zero},
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }

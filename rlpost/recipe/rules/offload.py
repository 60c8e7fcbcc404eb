"""Rules about where the optimizer's state lies (`learner.offload`)."""

from __future__ import annotations

from collections.abc import Iterator

from rlpost.recipe.rules.setting import Setting
from rlpost.recipe.sections.offload import NOTHING_GAINED
from rlpost.recipe.sections.root import Recipe


def offload_problems(r: Recipe, setting: Setting) -> Iterator[str]:
    """What stands against `learner.offload` in this launch."""
    offload = r.learner.offload
    if offload is None or not setting.learns:
        return
    asked = f"learner.offload.type={offload.type}"
    if setting.zero_stage != 3:
        here = f"is ZeRO-{setting.zero_stage}" if setting.zero_stage else "does not use DeepSpeed"
        yield (
            f"{asked} works with DeepSpeed ZeRO-3, and this launch {here}. Start with launch/zero3.yaml (on CPU "
            "launch/cpu-zero3.yaml; `rlpost plan --zero 3`), or leave learner.offload out"
        )
        return
    if r.model.lora is not None:
        yield (
            f"{asked} with model.lora: adapters have so little optimizer state that moving it costs more than it frees. "
            "Leave learner.offload out"
        )
    from rlpost.learner.deepspeed import config_file, launcher_settings, zero_section  # imports torch

    launcher = launcher_settings()
    zero, whole = zero_section(launcher), config_file(launcher)
    # 16-bit master weights need no word here: DeepSpeed's precision is the recipe's, whatever the file says.
    for name, asked_for, why in (
        ("zero_optimization.zenflow", zero.get("zenflow"), "it updates by stale gradients, in a step of its own"),
        ("sparse_gradients", whole.get("sparse_gradients"), "every gradient is read from one dense buffer"),
        (
            "torch_autocast",
            (whole.get("torch_autocast") or {}).get("enabled"),
            "model.autocast says what is computed how",
        ),
    ):
        if asked_for:
            yield (
                f"{asked} with {name} in the launch file's deepspeed_config_file cannot be: {why}. Remove "
                f"{name} there, or leave learner.offload out"
            )
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device", "none") != "none":
            yield (
                f"{asked} beside DeepSpeed's own {part}, which the launch configuration switches on: only one of them can "
                f"hold the state. Set {part}_device to none there (launch/zero3.yaml), or leave learner.offload out"
            )


def offload_advice(r: Recipe, setting: Setting) -> Iterator[str]:
    """What an offload without a GPU is worth: `rlpost plan` says it, and a run at its start."""
    offload = r.learner.offload
    if offload is None or setting.zero_stage != 3:
        return
    if offload.type == "parked" and not (r.samples and r.rollout.staleness == 0):
        yield (
            "learner.offload.type=parked parks nothing here: only completions that are sampled in turn with learning "
            "(rollout.staleness=0) leave the accelerator to the engine. It is resident"
        )
    import torch  # a second or two, and only for recipes that need the answer

    if not torch.cuda.is_available():
        yield NOTHING_GAINED

"""When a run cannot go on or cannot save as it should: its weights first, in the plainest way, then the rest."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rlpost.run.closing import first_line

if TYPE_CHECKING:
    from rlpost.policy.model import Policy
    from rlpost.run.parts import Parts
    from rlpost.run.state import RunState

logger = logging.getLogger(__name__)
PREFIX = "weights_"
"""Of a folder with weights alone, beside the checkpoints: nothing takes it for one to resume from."""


def rescue_together(parts: Parts, state: RunState) -> str:
    """Saves the weights of optimizer step `state.optimizer_step` alone, after a checkpoint could not be written on any
    process; collective. Returns a sentence about what came of it (on the main process). Never raises."""
    said = ""
    try:
        weights = parts.learner.full_state_dict()
        if parts.processes.is_main:
            said = write_weights(parts, state, weights)
        parts.processes.gather(None)  # as soon as one process leaves, the launcher ends the others
    except (Exception, SystemExit) as error:
        said = said or f"Its weights could not be saved either: {first_line(error)}."
    return said


def rescue_alone(parts: Parts, state: RunState, saved_step: int | None) -> str:
    """The same on this process alone, when anything else has ended the run in between: for weights that are newer than the
    last checkpoint, where the main process holds them whole."""
    latest = parts.store.latest()
    kept = f"The last checkpoint is {latest}" if latest else "No checkpoint had been written before"
    if not parts.processes.is_main:
        return ""
    changed = state.optimizer_step - state.skipped_in_a_row  # skipped steps leave the weights as they were
    if changed <= (saved_step or 0) or state.empty_in_a_row >= state.optimizer_step:
        return f"{kept}." if latest else ""
    if getattr(parts.learner, "stage", 0) == 3:
        return (
            f"{kept}; the weights of step {state.optimizer_step} were spread over the processes (ZeRO-3) and are lost."
        )
    return f"{kept}. {write_weights(parts, state, None)}"


def write_weights(parts: Parts, state: RunState, weights: Mapping[str, Tensor] | None) -> str:
    """Writes a folder in Hugging Face layout: the weights, then what of the rest can be written. `weights`: where the policy's
    module does not hold them. Returns a sentence about it; never raises."""
    folder = parts.store.folder / f"{PREFIX}{parts.store.path(state.optimizer_step).name}"
    policy = parts.learner.policy
    missing: list[str] = []
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _weights(policy, folder, weights)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        return (
            f"The weights of step {state.optimizer_step} could not be saved by themselves either: {first_line(error)}."
        )
    rest: dict[str, Callable[[], object]] = {
        "configuration": lambda: _configuration(policy, folder),
        "tokenizer": lambda: parts.tokenizer.save_pretrained(folder),
    }
    for name, write in rest.items():
        try:
            write()
        except Exception as error:
            missing.append(f"{name} ({first_line(error)})")
    lacking = f" It lacks the {' and the '.join(missing)}; take it from {parts.model_path}." if missing else ""
    return (
        f"The weights of step {state.optimizer_step}, without the optimizer's state, are saved in {folder}: go on from them "
        f"in a new run with model.path={folder}, or load them with transformers.{lacking}"
    )


def _weights(policy: Policy, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
    """The weights as safetensors under the module's own names, which transformers reads; of adapters under peft's."""
    from safetensors.torch import save_file

    if policy.has_adapter:
        from peft import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(policy.model, state_dict=None if weights is None else dict(weights))
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
        return
    held = dict(weights) if weights is not None else dict(_module_state(policy))
    save_file(
        {name: t.detach().contiguous() for name, t in held.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def _module_state(policy: Policy) -> dict[str, Tensor]:
    """The module's parameters (a tied one once) and its buffers that belong to a checkpoint; not copied."""
    persistent = policy.model.state_dict().keys()
    own: dict[str, Tensor] = dict(policy.model.named_parameters())
    return own | {name: buffer for name, buffer in policy.model.named_buffers() if name in persistent}


def _configuration(policy: Policy, folder: Path) -> None:
    if policy.has_adapter:
        policy.model.peft_config["default"].save_pretrained(folder)
        return
    config = policy.config
    config.architectures = [type(policy.causal_lm).__name__]
    config.dtype = str(policy.causal_lm.dtype).removeprefix("torch.")
    config.to_json_file(folder / "config.json", use_diff=True)
    with suppress(Exception):  # its settings are the base model's, and nothing depends on them
        policy.causal_lm.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)

"""TRL's update on a frozen rollout, through its own `rollout_func`, timed without generation, scoring and padding."""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.frozen import FrozenRollout, TrlRollout, frozen_reward
from benchmarks.measure import StepClock, reset_peak_memory

# vLLM is not used here; without this TRL imports it, which costs start-up time and would be counted as TRL's memory.
vars(importlib.import_module("trl.import_utils"))["is_vllm_available"] = lambda *_args, **_kwargs: False

from datasets import Dataset  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


@dataclass(frozen=True, slots=True)
class TrlSetting:
    """TRL's settings for speed, and the loss. `loss` names keys of GRPOConfig."""

    micro_batch: int = 8
    autocast: Literal["bfloat16", "none"] = "bfloat16"
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-6


class FrozenTrainer(GRPOTrainer):
    """GRPOTrainer that can be given log-probs of an older policy, and keeps the value of its loss."""

    frozen: TrlRollout
    clock: StepClock | None = None
    loss_total = 0.0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if self.clock is None:
            return self._frozen(inputs)
        with self.clock.paused():
            return self._frozen(inputs)

    def _frozen(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        old = self.frozen.old_logprobs()
        if old is not None:
            padded = torch.zeros(output["completion_ids"].shape)
            for row, values in enumerate(old):
                padded[row, : len(values)] = torch.tensor(values)
            output["old_per_token_logps"] = padded.to(output["completion_ids"].device)
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        self.loss_total += float(loss.detach())  # TRL has divided it by the number of micro-batches
        return loss


class _Steps(TrainerCallback):
    """Starts and stops the clock with every optimizer step, and takes the gradients before the first one if asked."""

    def __init__(self, clock: StepClock, *, keep_gradients: bool) -> None:
        self.clock, self.keep = clock, keep_gradients
        self.gradients: dict[str, Tensor] = {}

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self.clock.start()

    def on_pre_optimizer_step(self, *_args: Any, model: Any, **_kwargs: Any) -> None:
        if self.keep and not self.gradients:
            self.gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.clock.stop()
        if len(self.clock.cpu) == 1:
            reset_peak_memory()


@dataclass(frozen=True, slots=True)
class TrlRun:
    """What came of some optimizer steps with TRL."""

    clock: StepClock
    loss: float  # of all steps together
    gradients: dict[str, Tensor]  # of the first step, unclipped, where asked for


def run_trl(
    model: str,
    rollout: FrozenRollout,
    setting: TrlSetting,
    *,
    steps: int = 1,
    loss: dict[str, Any] | None = None,
    max_grad_norm: float = 1.0,
    keep_gradients: bool = False,
) -> TrlRun:
    """Takes `steps` optimizer steps, all on the same rollout; peak memory is counted from the second on."""
    frozen, clock = TrlRollout(rollout), StepClock()
    tokenizer = AutoTokenizer.from_pretrained(model)
    steps_callback = _Steps(clock, keep_gradients=keep_gradients)
    with tempfile.TemporaryDirectory() as folder:
        trainer = FrozenTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa"),
            reward_funcs=frozen_reward,
            args=_config(folder, rollout, setting, steps, loss or {}, max_grad_norm),
            train_dataset=Dataset.from_list(frozen.prompts()),
            processing_class=tokenizer,
            rollout_func=frozen.sample,
            callbacks=[steps_callback],
        )
        trainer.frozen, trainer.clock = frozen, clock
        trainer.train()
    return TrlRun(clock, trainer.loss_total, steps_callback.gradients)


def _config(
    folder: str, rollout: FrozenRollout, setting: TrlSetting, steps: int, loss: dict[str, Any], max_grad_norm: float
) -> GRPOConfig:
    spec = rollout.spec
    batch = spec.prompts * spec.completions
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=batch // setting.micro_batch,
        num_generations=spec.completions,
        max_completion_length=spec.max_completion_tokens,
        max_steps=steps,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=max_grad_norm,
        beta=0.0,
        temperature=1.0,
        bf16=setting.autocast == "bfloat16",
        gradient_checkpointing=setting.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        shuffle_dataset=False,
        report_to="none",
        logging_steps=1000,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **loss,
    )

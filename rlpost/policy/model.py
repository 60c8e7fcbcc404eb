"""The policy: a causal language model that scores the completion tokens of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rlpost.errors import RecipeError, TrainingError
from rlpost.experience import TokenRows
from rlpost.gradient.types import HeadStatistics, StatisticsRequest
from rlpost.policy.adapters import adapted_experts, add_lora, check_targets, expert_note
from rlpost.policy.attention import mask_for, plain_attention
from rlpost.policy.critic import Critic, states_at
from rlpost.policy.family import choose_layout
from rlpost.policy.generation import loading_options as generation_options
from rlpost.policy.generation import unwritable, written_as_it_came
from rlpost.policy.head import HeadRequest, LogitRule, as_statistics
from rlpost.policy.loading import (
    backbone,
    load_causal_lm,
    load_config,
    logit_rule,
    without_progress_bars,
)
from rlpost.policy.precision import autocast_of
from rlpost.policy.quantized import quantization_note, refuse_misread, saved_unquantized
from rlpost.policy.rows import Layout, spare_rows, to_device
from rlpost.policy.sequence_parallel import SequenceParallel, take_turns
from rlpost.policy.verify import verify_policy
from rlpost.policy.weights import Form, Gather, adapter_weights, gather_nothing, module_weights, named_weights
from rlpost.recipe.sections.model import ModelSection

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PolicyOutput(NamedTuple):
    """Per completion token, in nats, float32. A tuple, so that the hooks of DDP and ZeRO find the tensors."""

    logp: Tensor  # [N]
    entropy: Tensor  # [N] over the full vocabulary
    statistics: HeadStatistics | None = None
    values: Tensor | None = None  # [M, H] of the critic, see `Critic.forward`


class Policy(nn.Module):
    """A Hugging Face causal LM, seen as a distribution over completion tokens at the sampling temperature.

    `model` is the causal LM, or peft's wrapper around it; `notes` tell the user what was changed on load.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        rule: LogitRule,
        autocast: torch.dtype | None = None,
        head_chunk_tokens: int = 1024,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.rule = rule
        self.autocast = autocast
        self.head_chunk_tokens = head_chunk_tokens
        self.notes = notes
        self.has_adapter = hasattr(model, "disable_adapter")
        self.critic: Critic | None = None  # a submodule: sharded, moved and trained with the policy, saved beside it
        self.sequence_parallel: SequenceParallel | None = None
        self.maximum: Callable[[int], int] | None = None  # over processes, where all must make as many passes (ZeRO)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model itself, without peft's wrapper."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.causal_lm.config

    @property
    def context_window(self) -> int | None:
        """How many tokens the model can attend to; None where its configuration does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    def forward(self, rows: TokenRows, *, statistics: StatisticsRequest | None = None) -> PolicyOutput:
        """Log-probs and entropies of `rows.target`, in the order of `rows`; collective like `passes`."""
        causal_lm = self.causal_lm
        own = to_device(rows, self.device)
        with self.precision():
            if self.sequence_parallel is None:
                picked = states_at(self._states(own), own)
            else:
                picked = self.sequence_parallel.picked(rows, self._states)
            rows = own
            request = HeadRequest(
                rows.target,
                self.rule,
                self.head_chunk_tokens,
                statistics,
            )
            logp, entropy, *more = causal_lm.get_output_embeddings()(picked, request)
            values = None if self.critic is None else self.critic(rows, picked)
        return PolicyOutput(logp, entropy, as_statistics(more, statistics) if statistics else None, values)

    def passes(self, rows: Sequence[TokenRows]) -> list[TokenRows]:
        """What to call the policy with for these micro-batches, in order; collective where processes share work.

        ZeRO gathers weights and reduces gradients within passes, so all processes make equally many of them, at least one;
        processes that share rows take turns. Spare rows (`useful_tokens` 0) stand for a pass that others need.
        """
        if self.maximum is None:
            return list(rows)
        return take_turns(rows, max(1, self.maximum(len(rows))), self.sequence_parallel, spare_rows())

    def _states(self, rows: TokenRows, columns: slice = slice(None)) -> Tensor:
        """Hidden states [R, columns, d] of the rows; of some of their columns only where attention sees the others."""
        rows = to_device(rows, self.device)
        return backbone(self.causal_lm)(
            input_ids=rows.input_ids[:, columns].contiguous(),
            position_ids=rows.position_ids[:, columns].contiguous(),  # of several rows a slice lies scattered
            attention_mask=mask_for(self.causal_lm, rows),
            use_cache=False,
        ).last_hidden_state

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context of forward passes."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)

    def disable_adapter(self) -> AbstractContextManager[Any]:
        """While open, the policy is the frozen model under its LoRA adapter: a reference policy without a second copy.

        Raises TrainingError for a policy without an adapter.
        """
        if not self.has_adapter:
            raise TrainingError("the policy has no LoRA adapter to disable; a reference policy needs a second model")
        return self.model.disable_adapter()

    def named_weights(self, gather: Gather = gather_nothing, *, form: Form = "merged") -> Iterator[tuple[str, Tensor]]:
        """Full weights under their Hugging Face names, one at a time, LoRA merged on the fly, or as `form` says; see `weights`.
        Raises RecipeError for adapters that cannot be told from their layers."""
        if form != "merged" and (fused := adapted_experts(self.model)):
            raise RecipeError(
                f"rollout.sync.lora=adapter: {fused} has adapters and belongs to no linear layer, which vLLM cannot take by "
                "themselves. Set rollout.sync.lora=merged, or leave it out of model.lora.targets"
            )
        if form != "adapters":
            yield from named_weights(self.causal_lm, gather, merged=form == "merged")
        if form != "merged":
            yield from adapter_weights(self.model, gather)

    def save(
        self,
        directory: Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        merged: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes Hugging Face layout; with LoRA the adapter, and with `merged` the full model in `<directory>/merged`.

        `state_dict` replaces the module's own where those are sharded, with the names of `model.state_dict()`.
        """
        folders = [directory]
        with without_progress_bars(), written_as_it_came(self.causal_lm, directory):
            self.model.save_pretrained(directory, state_dict=None if state_dict is None else dict(state_dict))
            if merged and self.has_adapter:
                folders.append(directory / "merged")
                with saved_unquantized(self.causal_lm), written_as_it_came(self.causal_lm, folders[-1]):
                    self.causal_lm.save_pretrained(folders[-1], state_dict=dict(module_weights(self.causal_lm)))
        if tokenizer is not None:
            for folder in folders:
                tokenizer.save_pretrained(folder)


def load_policy(
    model: ModelSection,
    path: str,
    *,
    device: torch.device | str = "cpu",
    temperature: float = 1.0,
    head_chunk_tokens: int = 1024,
    layout: Layout = "tree",
    longest: int | None = None,
    runs_on: torch.device | None = None,
) -> Policy:
    """Loads the policy of a recipe from `path` (a folder or a hub name; `package:` paths are resolved by the caller).

    `device` is where it is loaded, `runs_on` where it will run if that is elsewhere; that and the rows' `layout` decide
    what `model.attention: auto` means. Log-probs are of the distribution sampled from: softmax(scores / `temperature`).
    Raises RecipeError naming the setting at fault where the model is missing, is not a causal LM, or scores tokens in an
    unknown way.
    """
    config, notes = load_config(model, path, device=runs_on or device, layout=layout, longest=longest)
    if model.lora is not None:  # before anything large is loaded
        check_targets(config, model.lora, trust_remote_code=model.trust_remote_code)
    causal_lm = load_causal_lm(model, path, config, device, longest)
    policy = Policy(
        causal_lm,
        rule=logit_rule(config, temperature),
        autocast=torch.bfloat16 if autocast_of(model) == "bfloat16" else None,
        head_chunk_tokens=head_chunk_tokens,
        notes=notes,
    )
    rows_layout, _ = choose_layout(config, layout, config._attn_implementation, longest)
    with plain_attention(policy.config):  # not the one that was asked with: transformers may have copied it
        verify_policy(policy, rows_layout)
    policy.notes += tuple(filter(None, (generation_options(path)[1], unwritable(causal_lm))))
    if model.quantized:
        refuse_misread(causal_lm)
        policy.notes += (quantization_note(causal_lm),)
    if model.lora is not None:
        policy.model = add_lora(causal_lm, model.lora)
        policy.has_adapter = True
        policy.notes = (*policy.notes, *filter(None, [expert_note(causal_lm)]))
    return policy

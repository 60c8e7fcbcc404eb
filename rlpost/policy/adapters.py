"""LoRA adapters: put onto a model, or refused by the names of the model's own layers."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlpost.errors import RecipeError
from rlpost.policy.head import ScoringLinear
from rlpost.policy.linear import RecastLinear
from rlpost.policy.weights import held_tensors
from rlpost.recipe.sections.model import LoraSection

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

_PLAIN = (nn.Linear, RecastLinear, ScoringLinear)


def add_lora(causal_lm: PreTrainedModel, lora: LoraSection) -> PeftModel:
    """Wraps the model with peft's LoRA and freezes all else. Raises RecipeError for targets that cannot be.

    Experts that the model holds as one tensor get adapters by the names that they have in a checkpoint, where peft knows the
    family. Layers that compute more than a product, such as some routers, are left out of "all-linear".
    """
    from peft import LoraConfig, get_peft_model

    if lora.dropout:
        raise RecipeError(
            f"model.lora.dropout={lora.dropout} would make the update's log-probs differ from those of the policy that"
            " sampled; set it to 0"
        )
    _refuse_targets(causal_lm, lora)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        exclude_modules=_more_than_products(causal_lm) or None,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():  # peft's own rewriting of experts' names sets patterns that may match nothing
            warnings.filterwarnings("ignore", message=".*_pattern keys did not match", category=RuntimeWarning)
            wrapped = get_peft_model(causal_lm, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(
            f"model.lora.targets={lora.targets} does not fit this model: {_first_sentence(error)}. {_what_there_is(causal_lm)}"
        ) from error
    if type(causal_lm.get_output_embeddings()) is not ScoringLinear:
        raise RecipeError("model.lora.targets names the output layer, which is scored in chunks and cannot be adapted")
    return wrapped


def check_targets(config: PreTrainedConfig, lora: LoraSection, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Tries the adapters on a model of this configuration without weights, and returns it. Raises RecipeError as `add_lora`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        head = skeleton.get_output_embeddings()
        if type(head) is nn.Linear:
            head.__class__ = ScoringLinear
        add_lora(skeleton, lora)
    return skeleton


def adapted_experts(model: nn.Module) -> str | None:
    """The name of a tensor with an adapter that belongs to no linear layer, such as fused experts; None if there is none."""
    from peft.tuners.lora.layer import ParamWrapper

    wrappers = ((name, module) for name, module in model.named_modules() if isinstance(module, ParamWrapper))
    return next((f"{name.replace('.base_layer', '')}.{module.parameter_name}" for name, module in wrappers), None)


def expert_note(causal_lm: PreTrainedModel) -> str | None:
    """How much of a mixture's weights the adapters leave as they are, where its experts have none."""
    held = held_tensors(causal_lm)
    fused = [
        part for part in held.values() if len(part.shape) == 3 and min(part.shape) > 1
    ]  # not convolutions' [d, 1, k]
    bare = sum(part.shape.numel() for part in fused if not part.adapters)
    total = sum(part.shape.numel() for part in held.values())
    if not bare:
        return None
    return f"model.lora: no adapter on the experts, {bare / 1e6:,.1f} M of {total / 1e6:,.1f} M weights; they stay as they are"


def _more_than_products(model: nn.Module) -> list[str]:
    """Layers that are made from linear ones but compute something else: an adapter's product could not be added."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward not in {plain.forward for plain in _PLAIN}
        and not type(module).__module__.startswith("bitsandbytes")
    ]


def _refuse_targets(causal_lm: PreTrainedModel, lora: LoraSection) -> None:
    """Raises RecipeError for a tensor with two owners, where an adapter at one would reach the other when it is merged, and
    for a layer that is no plain product."""
    if isinstance(lora.targets, str):
        return
    owners = Counter(id(p) for _, p in causal_lm.named_parameters(remove_duplicate=False))
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        layer = name.rpartition(".")[0]
        if owners[id(parameter)] > 1 and any(layer == t or layer.endswith(f".{t}") for t in lora.targets):
            others = [n for n, p in causal_lm.named_parameters(remove_duplicate=False) if p is parameter and n != name]
            raise RecipeError(
                f"model.lora.targets names {layer}, whose tensor is also {', '.join(others)} (tied weights): merged for the "
                "sampler, the adapter would change that too, which it does not in training. Leave it out"
            )
    for name in _more_than_products(causal_lm):
        if any(name == t or name.endswith(f".{t}") for t in lora.targets):
            kind = type(causal_lm.get_submodule(name)).__name__
            raise RecipeError(
                f"model.lora.targets names {name}, a {kind}, which computes more than a product and cannot be adapted. "
                f"{_what_there_is(causal_lm)}"
            )


def _what_there_is(model: nn.Module) -> str:
    """What a user can name instead."""
    skipped = set(_more_than_products(model))
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module) is not ScoringLinear and name not in skipped
    }
    fused = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name}
    held = f"; its experts are fused into {', '.join(sorted(fused))}, which are no layers" if fused else ""
    return f"Linear layers of this model: {', '.join(sorted(linear)) or 'none'}{held}. Or use all-linear"


def _first_sentence(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0].removesuffix(".")

"""Cross-field rules about how the model is held and attends. No model is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlpost.errors import RecipeError, RlpostError
from rlpost.recipe.sections.root import Recipe

if TYPE_CHECKING:
    from rlpost.recipe.rules.setting import Setting


def quantization_problems(r: Recipe, setting: Setting) -> Iterator[str]:
    """What stands against `model.lora.quantize`."""
    if r.model.lora is None or not r.model.quantized:
        return
    asked = f"model.lora.quantize={r.model.lora.quantize}"
    if importlib.util.find_spec("bitsandbytes") is None:
        yield f"{asked}, but the package bitsandbytes is not installed. Run `pip install rlpost[qlora]`, or set it to none"
    if setting.zero_stage == 3:
        yield (
            f"{asked} with DeepSpeed ZeRO-3, which would cut the packed 4-bit weights into pieces that nothing can unpack. "
            "Use ZeRO-2 (launch/zero2.yaml) or plain processes (launch/gpus.yaml), or set it to none"
        )


def flex_problems(r: Recipe, _: Setting) -> Iterator[str]:
    """What stands against `model.attention=flex_attention` on this machine."""
    if r.model.attention != "flex_attention":
        return
    import torch  # a second or two, and only for recipes that need the answer

    if not torch.cuda.is_available():
        yield (
            "model.attention=flex_attention needs a CUDA GPU (torch's FlexAttention has no backward pass on the CPU), and "
            "torch sees none here. Use model.attention=auto or sdpa"
        )


def adapter_problems(r: Recipe, setting: Setting) -> Iterator[str]:
    """What stands against `model.lora.targets`, tried on the model without its weights; where its config.json is not on this
    machine, the start of the run says so."""
    lora = r.model.lora
    if lora is None or lora.dropout or (lora.targets == "all-linear" and setting.zero_stage != 3):
        return
    from rlpost.policy.family import why_untrainable
    from rlpost.policy.local_config import local_config

    config = local_config(r.model)
    if config is None or why_untrainable(config):
        return
    from rlpost.policy.adapters import adapted_experts, check_targets

    try:
        skeleton = check_targets(config, lora, trust_remote_code=r.model.trust_remote_code)
    except RlpostError as error:
        yield str(error)
        return
    if setting.zero_stage == 3 and (tensor := adapted_experts(skeleton)):
        yield (
            f"model.lora.targets={lora.targets} puts an adapter on {tensor}, the experts of a layer in one tensor, which peft "
            "adds to as a whole and DeepSpeed ZeRO-3 keeps in shards. Name the attention's layers only, or use ZeRO-2 "
            "(launch/zero2.yaml)"
        )


def family_problems(r: Recipe, _: Setting) -> Iterator[str]:
    """What speaks against the model's type, its attention kernel and its tokenizer; where it is not on this machine, the start
    of the run says so."""
    from rlpost.policy.local_config import local_config

    config = local_config(r.model)
    if config is None:
        return
    from rlpost.policy.family import choose_attention, why_untrainable

    critic = r.method.critic
    trunk = None if critic is None or critic.path is None else r.model.model_copy(update={"path": critic.path})
    if trunk is not None and (other := local_config(trunk)) is not None and (problem := why_untrainable(other)):
        yield f"method.critic.path={trunk.path}: {problem.rstrip('.')}"
    if problem := why_untrainable(config):
        yield f"model.path={r.model.path}: {problem.rstrip('.')}"
        return
    try:
        choose_attention(r.model.attention, config, device="cpu", layout=r.learner.layout, longest=r.longest_sequence)
    except RecipeError as error:
        yield str(error).rstrip(".")
    yield from _token_problems(r, int(config.get_text_config().vocab_size))


def _token_problems(r: Recipe, rows: int) -> Iterator[str]:
    from rlpost.data.tokenizer import load_tokenizer
    from rlpost.data.vocabulary import special_problem

    try:
        tokenizer = load_tokenizer(r.model)
    except RlpostError:
        return  # said where prompts are made
    if problem := special_problem(tokenizer, rows):
        yield f"model.path={r.model.path}: the model does not know all of its tokenizer's tokens: {problem}"


def capped_logits(r: Recipe, _: Setting) -> Iterator[str]:
    """CAPO's SGD form is of plain logits; where the model is not on this machine, the first step says so."""
    mask = r.method.curvature
    if mask is None or mask.by_adam:
        return
    from rlpost.policy.local_config import local_config

    config = local_config(r.model)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        yield (
            f"method.masks: the curvature mask's step `sgd` has no form for capped logits, and {r.model.path} caps them "
            f"(final_logit_softcapping={cap:g}). Use step: adam"
        )


def rotary_advice(r: Recipe, _: Setting) -> Iterator[str]:
    """Which rotary frequencies a run has where they depend on length."""
    from rlpost.policy.local_config import local_config

    config = local_config(r.model)
    if config is None:
        return
    from rlpost.policy.rotary import rotary_note

    if note := rotary_note(config, r.longest_sequence):
        yield note


def quantization_advice(r: Recipe, _: Setting) -> Iterator[str]:
    """What is wasteful beside 4-bit weights."""
    if r.model.quantized and r.model.dtype == "float32":
        yield (
            "model.dtype=float32 with 4-bit weights: embeddings, output layer and activations stay in float32. "
            "model.dtype=bfloat16 needs half of that, and adapters are in float32 all the same"
        )

"""An estimate of what a process will hold in memory. Formulas are stated beside every line; nothing is measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlpost.policy.local_config import local_config
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.offload import AutoOffload, Offload
from rlpost.recipe.sections.reward import RewardModelSection
from rlpost.recipe.sections.rollout import VllmEngine
from rlpost.recipe.sections.root import Recipe

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
STATE = ("gradients", "staged optimizer state", "AdamW state and float32 weights", "AdamW state")
"""Lines of `estimate` that `rlpost.recipe.plan.update` counts for itself where there is `learner.offload`."""
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes: the number, its 64th of a byte of scale, and of that scale's float32


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The sizes that memory depends on. `exact` is False when they were guessed from the model's name."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int  # key-value heads x head dimension
    vocabulary: int
    exact: bool

    @property
    def linear(self) -> int:
        """How many parameters are in the layers' linear maps: q, k, v, o and gate, up, down."""
        each = 2 * self.hidden * (self.hidden + self.kv_width) + 3 * self.hidden * self.intermediate
        return min(self.layers * each, self.parameters)


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One part of the estimate: bytes, and how they come about."""

    what: str
    bytes: int
    formula: str


def find_model_size(model: ModelSection) -> tuple[ModelSize | None, str]:
    """The model's size and where it is known from. Looks at local files only, never at the network."""
    config = local_config(model)
    if config is not None:
        try:
            return _size_of(config), "the model's config.json"
        except (AttributeError, ValueError, TypeError, KeyError, ImportError):  # no decoder of text, or no known one
            return None, f"unknown: models of type {getattr(config, 'model_type', '?')} are not counted"
    if Path(model.path).expanduser().is_dir():
        return None, "unknown: the model's config.json cannot be read"
    size = guess_from_name(model.path)
    if size is not None:
        return size, "unknown: the model is not on this machine; guessed from its name"
    return None, "unknown: the model is not on this machine"


def guess_from_name(name: str) -> ModelSize | None:
    """A guess from names such as `Qwen2.5-7B`; shapes follow P ~ 12 L h^2 (Kaplan et al. 2020) with L = h / 128."""
    match = re.search(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name, re.IGNORECASE)
    if match is None:
        return None
    parameters = int(float(match[1]) * (1e9 if match[2].lower() == "b" else 1e6))
    hidden = max(64, round((parameters * 128 / 12) ** (1 / 3) / 64) * 64)
    layers = max(1, hidden // 128)
    return ModelSize(parameters, layers, hidden, 3 * hidden, max(64, hidden // 4), 128_000, exact=False)


def estimate(recipe: Recipe, size: ModelSize, *, processes: int = 1, zero_stage: int = 0) -> list[MemoryLine]:
    """Bytes per process, line by line. `zero_stage` is DeepSpeed's: 1 shares the optimizer's state among processes,
    2 the gradients too, 3 the weights too."""
    trained = trained_parameters(recipe, size)
    lines = _weights(recipe, size, trained, processes, zero_stage)
    lines.append(_activations(recipe, size))
    chunk = min(recipe.learner.head_chunk_tokens, recipe.learner.micro_batch_tokens)
    formula = f"{chunk} tokens x {size.vocabulary} words x 3 copies x 4 bytes"
    lines.append(MemoryLine("head chunk", 12 * chunk * size.vocabulary, formula))
    lines += _curvature(recipe, size)
    lines += _critic(recipe, size, processes, zero_stage) + _reward_models(recipe)
    return lines + (_engine(recipe, size) if recipe.samples else [])


def cache_per_token(recipe: Recipe, size: ModelSize) -> int:
    """Bytes of key-value cache per token in the rollout engine."""
    width = _BYTES[getattr(recipe.rollout.engine, "dtype", "bfloat16")]
    return 2 * size.layers * size.kv_width * width


def _weights(recipe: Recipe, size: ModelSize, trained: int, processes: int, stage: int) -> list[MemoryLine]:
    width = _BYTES[recipe.model.dtype]

    def line(what: str, count: int, each: float, shared: bool) -> MemoryLine:
        share = processes if shared else 1
        by = f" / {share} processes (ZeRO-{stage})" if share > 1 else ""
        return MemoryLine(what, int(count * each // share), f"{count / 1e6:,.1f} M x {each:.4g} bytes{by}")

    packed = size.linear if recipe.model.quantized else 0
    lines = [line("weights", size.parameters - packed, width, stage >= 3)]
    if packed:
        lines.append(line("weights in 4 bits", packed, _NF4, False))
        lines.append(line("one layer's weights unpacked", size.hidden * size.intermediate, width + 2, False))
    offload = recipe.learner.offload if stage == 3 else None
    lines.append(line("gradients", trained, width if offload is None else 4, stage >= 2))
    if offload is not None:  # `rlpost.recipe.plan.update` says what `auto` may take beside or in place of this
        lines += _offloaded(offload, trained, processes)
    elif stage >= 1 and recipe.model.dtype == "bfloat16":  # ZeRO keeps the weights in float32 too and updates those
        lines.append(line("AdamW state and float32 weights", trained, 12, True))
    else:
        lines.append(line("AdamW state", trained, 2 * width, stage >= 1))
    if recipe.model.dtype == "float32" and recipe.model.autocast != "none":
        # The head's, and a layer's at a time (`policy/linear.py`).
        lines.append(line("autocast copies", size.vocabulary * size.hidden + size.hidden * size.intermediate, 2, False))
    pairs = recipe.method.pairs
    live = pairs is not None and (not pairs.cached or not recipe.data.has_pairs)
    if (recipe.method.kl_place is not None or live) and recipe.model.lora is None:
        lines.append(line("reference model", size.parameters, width, stage >= 3))
    return lines


def _offloaded(offload: Offload, trained: int, processes: int) -> list[MemoryLine]:
    """The optimizer's state of `learner.offload` on the accelerator. Of `auto` the least, which `streamed` takes."""
    own = trained // processes
    gpu_of, resident = (1, 0.0) if isinstance(offload, AutoOffload) else (offload.gpu_of, offload.resident)
    lines = []
    if resident:
        text = f"{resident:.0%} of {trained / 1e6:,.1f} M x 12 bytes / {processes} processes (learner.offload)"
        lines.append(MemoryLine("AdamW state and float32 weights", int(12 * resident * own), text))
    if resident < 1:
        piece = min(offload.piece_size, own)
        text = f"2 x 12 bytes x {piece / 1e6:,.1f} M (learner.offload)"
        lines.append(MemoryLine("staged optimizer state", 2 * 12 * piece if gpu_of else 0, text))
    return lines


def _activations(recipe: Recipe, size: ModelSize) -> MemoryLine:
    """What layers keep for the backward pass (counted for Llama and Qwen2, see tests/test_recipe_plan.py): residual stream,
    normalised and scaled states, queries, repeated keys and values; gate, up, activation and product of the MLP. Under
    autocast the first two stay in float32."""
    mixed = recipe.model.dtype == "float32" and recipe.model.autocast != "none"
    width = 2 if mixed else _BYTES[recipe.model.dtype]
    states = 16 if mixed else 11 if width == 4 else 14
    tokens = recipe.learner.micro_batch_tokens
    one_layer = tokens * width * (states * size.hidden + 4 * size.intermediate)
    if recipe.model.gradient_checkpointing:
        stream = _BYTES[recipe.model.dtype]
        kept = tokens * stream * size.hidden * size.layers
        return MemoryLine(
            "activations", kept + one_layer, f"{tokens} tokens x {stream} bytes x h x layers, plus one layer"
        )
    formula = f"{tokens} tokens x {size.layers} layers x {width} bytes x ({states}h + 4h_mlp)"
    return MemoryLine("activations", one_layer * size.layers, formula)


def _engine(recipe: Recipe, size: ModelSize) -> list[MemoryLine]:
    engine = recipe.rollout.engine
    width = _BYTES[getattr(engine, "dtype", "bfloat16")]
    weights = MemoryLine(
        "rollout engine weights", size.parameters * width, f"{size.parameters / 1e6:,.1f} M x {width} bytes"
    )
    each = cache_per_token(recipe, size)
    if isinstance(engine, VllmEngine):
        cache = int(engine.kv_cache_gib * GIB)
        fits = f"holds {cache // each:,} tokens at {each:,} bytes"
        text = f"rollout.engine.kv_cache_gib ({fits}); on CUDA: what memory_fraction leaves beside the weights"
        return [weights, MemoryLine("rollout engine KV cache", cache, text)]
    own = min(engine.batch_size, recipe.rollout.prompts_per_step * recipe.rollout.completions_per_prompt)
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_completion_tokens
    text = f"{own} sequences x {longest} tokens x {each:,} bytes"
    return [weights, MemoryLine("rollout engine KV cache", own * longest * each, text)]


def _curvature(recipe: Recipe, size: ModelSize) -> list[MemoryLine]:
    """CAPO's tracker, at its largest: when every row of the head was among some token's most likely ones."""
    mask = recipe.method.curvature
    if mask is None or not mask.by_adam:
        return []
    rows, chunk = 3 * size.vocabulary * size.hidden * 4, 2 * mask.chunk_tokens * mask.top_k * size.hidden * 4
    formula = (
        f"3 (M, V, the step's sums) x up to {size.vocabulary} rows of the head x {size.hidden} x 4 bytes, and 2 x "
        f"{mask.chunk_tokens} tokens x {mask.top_k} x {size.hidden} x 4 bytes"
    )
    return [MemoryLine("curvature mask's moments", rows + chunk, formula)]


def _critic(recipe: Recipe, policy: ModelSize, processes: int, stage: int) -> list[MemoryLine]:
    """The critic's weights, gradients and AdamW state, and what a model of its own keeps for its backward pass."""
    critic = recipe.method.critic
    if critic is None:
        return []
    size: ModelSize | None = policy
    if critic.path is not None:
        size, _source = find_model_size(recipe.model.model_copy(update={"path": critic.path}))
    if size is None:
        return [MemoryLine("critic", 0, f"unknown: {critic.path} is not on this machine")]
    inner = round(critic.hidden_share * size.hidden)
    head = critic.heads * (size.hidden * (inner or 1) + inner)
    own = size.parameters if critic.model == "separate" else 0
    width = _BYTES[recipe.model.dtype]
    count = own * 4 * width + head * 16
    share = processes if stage >= 3 else 1
    by = f" / {share} processes (ZeRO-3)" if share > 1 else ""
    formula = f"({own / 1e6:,.1f} M x {4 * width} + heads {head / 1e6:,.1f} M x 16) bytes{by}"
    lines = [MemoryLine("critic with gradients and AdamW state", count // share, formula)]
    if own:
        lines.append(replace(_activations(recipe, size), what="critic's activations"))
    return lines


def _reward_models(recipe: Recipe) -> list[MemoryLine]:
    """Weights only: scoring keeps nothing for a backward pass."""
    lines = []
    for reward in recipe.rewards:
        if not isinstance(reward, RewardModelSection):
            continue
        what, width = f"reward model {reward.name}", _BYTES[reward.dtype]
        model = recipe.model.model_copy(update={"path": reward.path, "trust_remote_code": reward.trust_remote_code})
        config = local_config(model)
        guess = guess_from_name(reward.path)
        count = _count_parameters(config, "AutoModelForSequenceClassification") if config is not None else None
        count = guess.parameters if count is None and guess is not None else count
        where = "" if reward.device == "auto" else f", on {reward.device}"
        formula = (
            f"unknown: {reward.path} is not on this machine"
            if count is None
            else f"{count / 1e6:,.1f} M x {width} bytes{' (guessed from its name)' if config is None else ''}{where}"
        )
        lines.append(MemoryLine(what, (count or 0) * width, formula))
    return lines


def bytes_per_number(dtype: str) -> int:
    """How many bytes a number of this type takes."""
    return _BYTES[dtype]


def trained_parameters(recipe: Recipe, size: ModelSize) -> int:
    """How many parameters the optimizer updates: all, or those of the adapters."""
    if recipe.model.lora is None:
        return size.parameters
    # A rank-r pair for the attention's q, k, v, o and the MLP's gate, up, down: r x (inputs + outputs) each.
    attention = 4 * size.hidden + 2 * (size.hidden + size.kv_width)
    mlp = 3 * (size.hidden + size.intermediate)
    return recipe.model.lora.rank * size.layers * (attention + mlp)


def _size_of(config: Any) -> ModelSize:
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelSize(
        parameters=_count_parameters(config),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        kv_width=(getattr(config, "num_key_value_heads", None) or heads) * head,
        vocabulary=config.vocab_size,
        exact=True,
    )


def _count_parameters(config: Any, kind: str = "AutoModelForCausalLM") -> int:
    """Builds the model, of an Auto class of transformers, without memory (meta device) and counts; tied weights count
    once."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, kind).from_config(config)
    return sum(p.numel() for p in model.parameters())

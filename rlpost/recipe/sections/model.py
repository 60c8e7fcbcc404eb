"""`model`: which policy is trained, and how it is held."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from rlpost.recipe.sections.base import Section


class LoraSection(Section):
    """Low-rank adapters (peft) on a frozen model."""

    rank: PositiveInt = 16
    """Rank of the update matrices."""
    alpha: float = Field(32.0, gt=0)
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input. Keep 0 for exact log-probs."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which modules get an adapter: "all-linear" or a list of module names."""
    quantize: Literal["none", "nf4"] = "none"
    """How the frozen weights under the adapters are held. nf4: linear layers in 4 bits (QLoRA, arXiv 2305.14314), which needs
    `rlpost[qlora]`; embeddings, norms and the output layer stay in `model.dtype`, adapters in float32."""


class ModelSection(Section):
    """The policy."""

    path: str
    """A Hugging Face model name, a local folder, or `package:smollm2-135m` (a real model inside a Python package)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How the trained weights are stored. float32 is the safe choice: small updates vanish in bfloat16."""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """The precision of matrix products in forward and backward. auto: bfloat16 where the device has instructions for it, else
    that of the weights (a CPU without them emulates bfloat16, some thirty times slower)."""
    attention: Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"] = "auto"
    """The attention kernel of the learner. auto: flex_attention for tree rows on a CUDA device, where the model takes it
    (it skips blocks of the mask in which nothing attends), else sdpa, or eager where sdpa is not the model's own attention."""
    lora: LoraSection | None = None
    """Train adapters instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    chat_template: str | None = None
    """A Jinja file to use as chat template, for tokenizers that have none."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    @property
    def quantized(self) -> bool:
        """Whether the frozen weights under adapters are held in 4 bits."""
        return self.lora is not None and self.lora.quantize != "none"

"""Which weights vLLM must be given: by the model's configuration alone, nothing is loaded."""

from __future__ import annotations

from typing import Any

from rlpost.policy.names import WeightNames
from rlpost.policy.weights import weight_names


def load_config(model_path: str, trust_remote_code: bool) -> Any:
    """The model's Hugging Face configuration."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)


def checkpoint_names(config: Any, trust_remote_code: bool) -> WeightNames:
    """The names of the model's weights, here and in its checkpoint. No memory is used: tensors are on `meta`."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return weight_names(model)

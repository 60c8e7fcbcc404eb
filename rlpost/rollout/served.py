"""What vLLM is to serve, in this process or in others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Served:
    """The model and how it is held, wherever vLLM runs."""

    model_path: str  # a folder with weights and tokenizer
    max_model_len: int  # prompt plus completion, in tokens
    seed: int
    trust_remote_code: bool
    on_cpu: bool
    transfer: Literal["files", "nccl"] = "files"
    adapter_rank: int | None = None
    """Of adapters that come by themselves; None: they are merged, or there are none."""

"""Imports DeepSpeed without its noise and without compiling anything."""

from __future__ import annotations

import logging
import os
import warnings
from types import ModuleType

import torch


def import_deepspeed() -> ModuleType:
    """DeepSpeed, told which device to use and not to compile a kernel that training never calls.

    On CPU it would build `deepspeed_shm_comm` at its first start with several processes: a minute with a compiler, an
    exception without one, and an endless wait where an earlier build was killed and left its lock behind. Only
    `inference_all_reduce` uses that kernel; gradients and weights travel over gloo.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as buildable

    buildable["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # skipped steps are in our own reports
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return deepspeed

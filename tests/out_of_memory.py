"""A worker of vLLM whose memory is full from a moment on: what torch then raises, at the place where it would."""

from __future__ import annotations

from typing import Any

import torch

from rlpost.rollout.remote.worker import Extension as Sound


def full(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (raised by a test)")


class Extension(Sound):
    def full_while_sampling(self) -> None:
        self.model_runner.execute_model = full

    def full_while_sync(self) -> None:
        self.model_runner.model.load_weights = full

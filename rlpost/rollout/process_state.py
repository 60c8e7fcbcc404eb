"""Keeps what vLLM changes for the whole process from reaching the learner that shares it."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts Python's, numpy's and torch's global random states back on leaving, the GPUs' included.

    vLLM draws from torch's global generator on CPU even when every request has its own seed, and seeds all generators
    when it starts: without this, an exact resume of the learner would depend on the engine.
    """
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def threads_kept() -> Iterator[None]:
    """Puts the CPU affinity, torch's thread count and `torch.set_num_threads` itself back on leaving.

    vLLM's CPU worker replaces `torch.set_num_threads` by a function that only warns.
    """
    import torch

    setter, threads = torch.set_num_threads, torch.get_num_threads()
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        yield
    finally:
        torch.set_num_threads = setter
        if affinity is not None and os.sched_getaffinity(0) != affinity:
            os.sched_setaffinity(0, affinity)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def process_group_kept() -> Iterator[None]:
    """Keeps torch.distributed's default group, if there is one on entering, from being destroyed.

    vLLM destroys it when an engine shuts down or fails to start, even where the learner had made it.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        yield
        return
    destroy = dist.destroy_process_group

    def destroy_others(group: Any = None) -> None:
        if group is not None and group is not dist.GroupMember.WORLD:
            destroy(group)

    dist.destroy_process_group = destroy_others
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


@contextmanager
def memory_binding_kept() -> Iterator[None]:
    """Puts the NUMA nodes that this process may allocate on back on leaving, where libnuma is there.

    vLLM's CPU worker binds the whole process to one node; a learner may need the memory of all.
    """
    try:
        numa = ctypes.CDLL("libnuma.so.1")
        nodes = _membind(numa) if numa.numa_available() >= 0 else None
    except (OSError, AttributeError):  # no libnuma, hence no binding either
        nodes = None
    try:
        yield
    finally:
        if nodes is not None:
            numa.numa_set_membind(nodes)


def _membind(numa: ctypes.CDLL) -> ctypes.c_void_p:
    numa.numa_get_membind.restype = ctypes.c_void_p
    return ctypes.c_void_p(numa.numa_get_membind())

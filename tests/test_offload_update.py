"""Where an offloaded update's host memory comes from."""

from __future__ import annotations

import pytest
import torch

import rlpost.offload.update as update_module


class FakeCudart:
    """Registers nothing, and says what it was asked for."""

    def __init__(self, code: int) -> None:
        self.code, self.registered, self.released = code, [], []

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        self.registered.append((address, size))
        return self.code

    def cudaHostUnregister(self, address):  # noqa: N802
        self.released.append(address)
        return 0


@pytest.mark.parametrize("code", [0, 2])
def test_pinned_vectors_take_no_more_than_their_size(monkeypatch, code):
    """torch's pinned memory, which comes in powers of two, is for where CUDA refuses to register ordinary memory."""
    cudart, asked = FakeCudart(code), []
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)

    def recorded(*arguments, pin_memory=False, **options):
        asked.append(pin_memory)
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", recorded)
    vector = update_module.host_vector(1000, torch.float32, pinned=True)
    assert vector.shape == (1000,) and asked == ([False] if code == 0 else [False, True])
    [(address, size)] = cudart.registered
    assert size == 4000
    if code == 0:
        assert address == vector.data_ptr()
        del vector
        assert cudart.released == [address]
    assert update_module.host_vector(0, torch.float32, pinned=True).numel() == 0
    update_module.host_vector(10, torch.float32, pinned=False)
    assert len(cudart.registered) == 1

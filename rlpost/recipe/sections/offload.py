"""`learner.offload`: where the optimizer's state lies, and who updates it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from rlpost.recipe.sections.base import Section


class OffloadSection(Section):
    """What both ways share."""

    park: bool = False
    """While completions are sampled, weights and gradients are not on the accelerator either: room for the rollout engine's
    cache. They come back in one copy before the update."""
    arithmetic: Literal["torch", "own"] = "torch"
    """Of the pieces that the CPU updates. torch: its fused AdamW. own: a C kernel in a fixed order of operations, which reads
    gradients in 16 or 32 bits and clips in one pass; needs a C compiler, else torch's is used and said."""
    piece_size: PositiveInt = 2**25
    """Parameters per piece, at the most. Two pieces of 12 bytes a parameter are staged on the accelerator at once."""


class StreamedOffload(OffloadSection):
    """Master weights and moments lie on the host, and pass through the accelerator piece by piece to be updated there."""

    type: Literal["streamed"] = "streamed"

    @property
    def gpu_of(self) -> int:
        return 1

    @property
    def every(self) -> int:
        return 1


class InterleavedOffload(OffloadSection):
    """Some pieces pass through the accelerator, and the CPU updates the others meanwhile."""

    type: Literal["interleaved"] = "interleaved"
    gpu_of: int = Field(1, ge=0)
    """Of every `every` pieces so many are updated on the accelerator; 0: the CPU updates all."""
    every: PositiveInt = 2
    """Of how many pieces `gpu_of` are updated on the accelerator."""

    @model_validator(mode="after")
    def _no_more_than_all(self) -> InterleavedOffload:
        if self.gpu_of > self.every:
            raise ValueError(f"gpu_of={self.gpu_of} of every={self.every} pieces is more than all. Lower gpu_of")
        return self


Offload = Annotated[StreamedOffload | InterleavedOffload, Field(discriminator="type")]

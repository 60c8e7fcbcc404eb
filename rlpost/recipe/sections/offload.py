"""`learner.offload`: where the optimizer's state lies, and who updates it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from rlpost.recipe.sections.base import Section


class OffloadSection(Section):
    """What both ways share."""

    piece_size: PositiveInt = 2**25
    """Parameters per piece, at the most. Two pieces of 12 bytes a parameter are staged on the accelerator at once."""
    park: bool = True
    """Give the learner's weights and gradients back while completions are sampled in turn with learning (6 bytes a parameter of
    the process in bfloat16); weights come back from their float32 copy. Of use beside a colocated engine that sleeps."""
    arithmetic: Literal["torch", "own"] = "torch"
    """torch: its fused AdamW. own: a kernel with a fixed order of operations, whose bits depend neither on pieces nor on their
    alignment, built with the machine's C compiler (without one torch's is used, and the run says so). Without a GPU only."""


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

NOTHING_GAINED = (
    "learner.offload without a GPU: the state is in host memory anyway, and pieces meant for the GPU are updated by the CPU, "
    "one after the other. The results are the same and nothing is gained; it is there to try a recipe"
)

"""`learner.offload`: where the optimizer's state lies, and who updates it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlpost.recipe.sections.base import Section


class OffloadSection(Section):
    """What all ways share."""

    piece_size: PositiveInt = 2**25
    """Parameters per piece, at the most. Two pieces of 12 bytes a parameter are staged on the accelerator at once."""
    park: bool = True
    """Give the learner's weights and gradients back while completions are sampled in turn with learning (6 bytes a parameter of
    the process in bfloat16); weights come back from their float32 copy. Of use beside a colocated engine that sleeps."""
    arithmetic: Literal["torch", "own"] = "torch"
    """torch: its fused AdamW. own: a kernel with a fixed order of operations, whose bits depend neither on pieces nor on their
    alignment, built with the machine's C compiler, and for a GPU with Triton. Where one cannot be built, or their bits differ,
    torch's is used, and the run says so."""


class _Settled(OffloadSection):
    """What all ways but `auto` have: `gpu_of`, `every` and `resident`, too."""

    @property
    def state_on(self) -> Literal["host", "accelerator"]:
        """Where the state is at home."""
        return "host"

    @property
    def parks_state(self) -> bool:
        """Whether the state leaves the accelerator while completions are sampled."""
        return False


class _Way(_Settled):
    """All pieces alike, through the accelerator."""

    @property
    def gpu_of(self) -> int:
        return 1

    @property
    def every(self) -> int:
        return 1

    @property
    def resident(self) -> float:
        return 0.0


class _OnAccelerator(_Way):
    @property
    def resident(self) -> float:
        return 1.0

    @property
    def state_on(self) -> Literal["host", "accelerator"]:
        return "accelerator"


class ResidentOffload(_OnAccelerator):
    """Master weights and moments stay on the accelerator."""

    type: Literal["resident"] = "resident"


class ParkedOffload(_OnAccelerator):
    """Master weights and moments lie on the accelerator, and on the host while completions are sampled in turn with
    learning."""

    type: Literal["parked"] = "parked"

    @property
    def parks_state(self) -> bool:
        return True

    @model_validator(mode="after")
    def _parks(self) -> ParkedOffload:
        if not self.park:
            raise ValueError("type=parked with park=false parks nothing. Set type to resident, or leave park out")
        return self


class StreamedOffload(_Way):
    """Master weights and moments lie on the host, and pass through the accelerator piece by piece to be updated there."""

    type: Literal["streamed"] = "streamed"


class InterleavedOffload(_Settled):
    """Some pieces pass through the accelerator, and the CPU updates the others meanwhile."""

    type: Literal["interleaved"] = "interleaved"
    gpu_of: int = Field(1, ge=0)
    """Of every `every` pieces so many are updated on the accelerator; 0: the CPU updates all."""
    every: PositiveInt = 2
    """Of how many pieces `gpu_of` are updated on the accelerator."""
    resident: float = Field(0.0, ge=0.0, lt=1.0)
    """The share of the state that stays on the accelerator beside its copy on the host (12 bytes a parameter on both): it is
    updated without passing over the link. `gpu_of` and `every` are of the rest."""

    @model_validator(mode="after")
    def _no_more_than_all(self) -> InterleavedOffload:
        if self.gpu_of > self.every:
            raise ValueError(f"gpu_of={self.gpu_of} of every={self.every} pieces is more than all. Lower gpu_of")
        return self


class AutoOffload(OffloadSection):
    """The run measures its machine for a few seconds at its start and takes the fastest of the other ways that fits."""

    type: Literal["auto"] = "auto"
    accelerator_gib: PositiveFloat | None = None
    """Memory of the accelerator, per process, for sums of gradients and for state in the update; by default what `rlpost plan`
    leaves over of it."""
    host_gib: PositiveFloat | None = None
    """Host memory, per process, for state; by default the process's share of what is free at the start."""


SettledOffload = ResidentOffload | ParkedOffload | StreamedOffload | InterleavedOffload
Offload = Annotated[SettledOffload | AutoOffload, Field(discriminator="type")]

NOTHING_GAINED = (
    "learner.offload without a GPU: the state is in host memory anyway, and pieces meant for the GPU are updated by the CPU, "
    "one after the other. The results are the same and nothing is gained; it is there to try a recipe"
)

"""Which of a method's slots are in force, and their settings in words: for `rlpost plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rlpost.recipe.sections.base import Section

if TYPE_CHECKING:
    from rlpost.recipe.sections.method import MethodSection

# When a slot acts although it is filled by default; slots that are not named here act where they are not null.
_IN_FORCE: Mapping[str, Callable[[MethodSection], bool]] = {
    "preset": lambda m: False,  # the other slots are what it stands for
    "masks": lambda m: bool(m.masks),
    "correction": lambda m: m.correction.action != "none",
    "kl": lambda m: m.kl_place is not None,
    "entropy": lambda m: m.entropy.coefficient != 0,
    "dynamic_sampling": lambda m: m.dynamic_sampling.enabled,
    "overlong": lambda m: m.overlong.filter or m.overlong.penalty > 0,
}


def slots_in_force(method: MethodSection) -> tuple[str, ...]:
    """The names of the slots that act in this method, in the order of `MethodSection`.

    Pairs have coefficients of their own, and plain SFT samples nothing: there only what touches them acts.
    """
    names, gate = tuple(type(method).model_fields), method.gate
    if method.pairs is not None:
        names = ("dynamic_sampling", "pairs")
    elif not method.samples and gate is not None:
        of_samples = (("entropy", gate.entropy), ("reduction", gate.reduction == "as_samples"))
        names = (*(name for name, acts in of_samples if acts), "gate")
    return tuple(
        name for name in names if getattr(method, name) is not None and _IN_FORCE.get(name, lambda m: True)(method)
    )


def slot_sections(method: MethodSection) -> dict[str, Section]:
    """The filled sections of the slots in force by their dotted key: `method.kl`, `method.masks.0`."""
    sections: dict[str, Section] = {}
    for name in slots_in_force(method):
        value = getattr(method, name)
        parts = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        sections |= {f"method.{name}" + ("" if i is None else f".{i}"): part for i, part in parts}
    return sections

"""What all recipe sections share. Nothing in `rlpost.recipe` imports torch: a recipe is checked in a second."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Never, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo


def unknown_choice(slot: str, choice: Never) -> NotImplementedError:
    """To be raised by the last branch of every dispatch on a recipe's choice: there is no code for `choice`, which stands
    in `slot` (a dotted key).

    The annotation lets mypy refuse a dispatch that leaves a choice out, as `typing.assert_never` does; at run time the
    error names the key, so that a choice without code never runs as another one.
    """
    kind = getattr(choice, "type", choice)
    return NotImplementedError(
        f"There is no code for {slot} = `{kind}`: a choice that a recipe may make was added without the branch that carries "
        "it out. This is a defect of rlpost, not of the recipe."
    )


def members(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows: `Annotated[A | B, ...] | None` gives A, B and NoneType."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from members(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from members(part)
    else:
        yield annotation


class Section(BaseModel):
    """A frozen section of a recipe. Unknown keys are errors; a docstring under a field becomes its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, data: Any) -> Any:
        """Fills in default types and keeps truth values out of numbers."""
        if not isinstance(data, dict):
            return data
        known = [(name, field) for name, field in cls.model_fields.items() if name in data]
        return {**data, **{name: _with_type(_no_bool(data[name], field), field) for name, field in known}}


def _with_type(value: Any, field: FieldInfo) -> Any:
    """A section with a default `type` may be given without: `engine: {kv_cache_gib: 2}` is about the default engine."""
    if isinstance(value, dict) and "type" not in value and not field.is_required():
        default = getattr(field.get_default(call_default_factory=True), "type", None)
        if default is not None:
            return {"type": default, **value}
    return value


def _no_bool(value: Any, field: FieldInfo) -> Any:
    """YAML's yes and no would pass as the numbers 1 and 0; as text they are refused where a number is wanted."""
    if isinstance(value, bool):
        allowed = list(members(field.annotation))
        if bool not in allowed and (int in allowed or float in allowed):
            return str(value).lower()
    return value

"""Sets of real numbers: intervals, unions, and what inequalities of one variable say, compared by where they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

from rlpost.answers.evaluate import Meter, Unbounded, Undefined, exact, is_infinite, symbols
from rlpost.answers.tree import (
    Braced,
    Bracketed,
    Call,
    Combined,
    Constant,
    Everything,
    Expression,
    Listing,
    Quantity,
    Relation,
    Symbol,
    Value,
)

_DIGITS = 50
_NEAR = Fraction(1, 10**38)


@dataclass(frozen=True, slots=True)
class End:
    """A place on the real line; `certain` tells that the value is exact rather than fifty digits of it."""

    value: Fraction
    certain: bool = True


@dataclass(frozen=True, slots=True)
class RealSet:
    """A set that changes at its `ends` alone, with a test of whether it has a number."""

    ends: tuple[End, ...]
    has: Callable[[End], bool]

    def equals(self, other: RealSet) -> bool:
        """Whether both have the same numbers: tried at every end of either, and once between each two."""
        ends = sorted({*self.ends, *other.ends}, key=lambda end: end.value)
        kept = [end for i, end in enumerate(ends) if i == 0 or _compare(ends[i - 1], end)]
        inner = [End((a.value + b.value) / 2) for a, b in pairwise(kept)]
        outer = [End(kept[0].value - 1), End(kept[-1].value + 1)] if kept else [End(Fraction(0))]
        return all(self.has(place) == other.has(place) for place in [*kept, *inner, *outer])


EMPTY = RealSet((), lambda _: False)
REALS = RealSet((), lambda _: True)


def as_set(value: Value) -> RealSet | None:
    """The set of real numbers that a value is; None if it is none, or has variables in its ends."""
    try:
        return _set(value)
    except (Undefined, Unbounded, RecursionError):
        return None


def is_set_like(value: Value) -> bool:
    """Whether a value can be nothing but a set: an inequality, a union, an interval with a closed or an infinite end."""
    match value:
        case Everything() | Combined():
            return True
        case Relation(signs=signs, sides=sides):
            return (
                signs[0] not in ("=", "~")
                if signs[0] != "in"
                else is_set_like(sides[-1]) or isinstance(sides[-1], Bracketed)
            )
        case Bracketed(opening=opening, closing=closing, items=items):
            mixed = (opening, closing) in (("[", ")"), ("(", "]"))
            return mixed or any(isinstance(item, Quantity) and is_infinite(item.expression) for item in items)
        case Listing(items=items):
            return all(isinstance(item, Relation) and is_set_like(item) for item in items)
    return False


def _set(value: Value) -> RealSet | None:
    match value:
        case Everything():
            return REALS
        case Braced(items=items):
            return _points(items)
        case Bracketed():
            return _interval(value)
        case Combined():
            return _combined(value)
        case Relation():
            return _chain(value)
        case Listing(items=items, joined=joined):
            return _listing(items, joined)
    return None


def _points(items: tuple[Value, ...]) -> RealSet | None:
    ends = [_end(item.expression) if isinstance(item, Quantity) else None for item in items]
    if any(not isinstance(end, End) for end in ends):
        return None
    points = tuple(end for end in ends if isinstance(end, End))
    return RealSet(points, lambda x: any(_compare(x, point) == 0 for point in points))


def _interval(value: Bracketed) -> RealSet | None:
    if len(value.items) != 2 or value.opening not in ("(", "[") or value.closing not in (")", "]"):
        return None
    ends = [_end(item.expression) if isinstance(item, Quantity) else None for item in value.items]
    low, high = ends
    if low is None or high is None or low == "oo" or high == "-oo":
        return None
    if (low == "-oo" and value.opening == "[") or (high == "oo" and value.closing == "]"):
        return None  # no interval ends with an infinity
    if isinstance(low, End) and isinstance(high, End) and _compare(low, high) >= 0:
        return None
    opened, closed = value.opening == "(", value.closing == ")"

    def has(x: End) -> bool:
        above = low == "-oo" or (isinstance(low, End) and _compare(x, low) > (0 if opened else -1))
        below = high == "oo" or (isinstance(high, End) and _compare(x, high) < (0 if closed else 1))
        return above and below

    return RealSet(tuple(end for end in ends if isinstance(end, End)), has)


def _combined(value: Combined) -> RealSet | None:
    sets = [_set(part) for part in value.parts]
    first, *others = sets
    result = first
    for operator, other in zip(value.operators, others, strict=True):
        if result is None or other is None:
            return None
        result = _merge(result, other, operator)
    return result


def _merge(a: RealSet, b: RealSet, operator: str) -> RealSet:
    tests: dict[str, Callable[[End], bool]] = {
        "cup": lambda x: a.has(x) or b.has(x),
        "cap": lambda x: a.has(x) and b.has(x),
        "setminus": lambda x: a.has(x) and not b.has(x),
    }
    return RealSet((*a.ends, *b.ends), tests[operator])


def _listing(items: tuple[Value, ...], joined: str) -> RealSet | None:
    """Inequalities: "or" unites them, "and" is both; a comma is both where both can be, else either."""
    if not all(isinstance(item, Relation | Bracketed | Braced) for item in items) or len(names_in(items)) > 1:
        return None
    sets = [_set(item) for item in items]
    both: RealSet | None = sets[0]
    either: RealSet | None = sets[0]
    for other in sets[1:]:
        if both is None or either is None or other is None:
            return None
        both, either = _merge(both, other, "cap"), _merge(either, other, "cup")
    if both is None or joined == "or" or not isinstance(items[0], Relation):
        return either
    return either if joined == "," and both.equals(EMPTY) else both


def names_in(items: tuple[Value, ...]) -> set[str]:
    """The variables of relations."""
    names: set[str] = set()
    for item in items:
        for side in item.sides if isinstance(item, Relation) else ():
            names |= symbols(side.expression) if isinstance(side, Quantity) else set()
    return names


def _chain(relation: Relation) -> RealSet | None:
    result = REALS
    for left, right, sign in zip(relation.sides, relation.sides[1:], relation.signs, strict=False):
        link = _set(right) if sign == "in" else _link(left, right, sign)
        if link is None:
            return None
        result = _merge(result, link, "cap")
    return result


def _link(left: Value, right: Value, sign: str) -> RealSet | None:
    """What one inequality of one variable says, if both sides are linear in it, or one is its absolute value."""
    if not isinstance(left, Quantity) or not isinstance(right, Quantity) or sign == "~":
        return None
    a, b = left.expression, right.expression
    if isinstance(a, Call) and a.name == "abs" and not symbols(b):
        return _absolute(a, b, sign)
    if isinstance(b, Call) and b.name == "abs" and not symbols(a):
        return _absolute(b, a, {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(sign, sign))
    for bound, other in ((b, a), (a, b)):
        if _is_variable(other) and is_infinite(bound):
            return REALS if sign in ("<", ">") else None
    names = symbols(a) | symbols(b)
    if len(names) != 1:
        return None
    name = names.pop()
    end, slope = _zero_of(a, b, name)
    return None if end is None else RealSet((end,), _test(end, sign, slope))


def _is_variable(expression: Expression) -> bool:
    """x, or f(x)."""
    return isinstance(expression, Symbol) or (isinstance(expression, Call) and expression.name.startswith("of "))


def _test(end: End, sign: str, slope: int) -> Callable[[End], bool]:
    tests: dict[str, Callable[[int], bool]] = {
        "<": lambda c: c < 0,
        ">": lambda c: c > 0,
        "<=": lambda c: c <= 0,
        ">=": lambda c: c >= 0,
        "!=": lambda c: c != 0,
        "=": lambda c: c == 0,
    }
    return lambda x: tests[sign](_compare(x, end) * slope)


def _zero_of(a: Expression, b: Expression, name: str) -> tuple[End | None, int]:
    """Where a = b, if a - b is linear, and the sign of its slope."""
    for variable, constant, slope in ((a, b, 1), (b, a, -1)):
        if _is_variable(variable) and not symbols(constant):
            end = _end(constant)
            return (end if isinstance(end, End) else None), slope
    at = [_difference(a, b, {name: Fraction(x)}) for x in (0, 1, 2, 3, -5)]
    if any(value is None for value in at):
        return None, 0
    zero, one, *rest = [value for value in at if value is not None]
    step = one - zero
    straight = all(
        abs(value - zero - step * x) <= _NEAR * (1 + abs(value)) for value, x in zip(rest, (2, 3, -5), strict=True)
    )
    if not straight or abs(step) <= _NEAR:
        return None, 0
    return End(-zero / step, certain=False), 1 if step > 0 else -1


def _difference(a: Expression, b: Expression, values: dict[str, Fraction]) -> Fraction | None:
    sides = [Meter(_DIGITS, values).value(side) for side in (a, b)]
    if any(getattr(side, "imag", 0) for side in sides):
        return None
    return Fraction(Decimal(str(sides[0].real))) - Fraction(Decimal(str(sides[1].real)))


def _absolute(call: Call, bound: Expression, sign: str) -> RealSet | None:
    end = _end(bound)
    if not isinstance(call.arguments[0], Symbol) or not isinstance(end, End) or end.value < 0:
        return None
    test = _test(end, sign, 1)
    return RealSet((end, End(-end.value, end.certain)), lambda x: test(End(abs(x.value), x.certain)))


def _end(expression: Expression) -> End | str | None:
    """A real number as an end of an interval; "oo" and "-oo" for the infinities."""
    if is_infinite(expression):
        return "oo" if isinstance(expression, Constant) else "-oo"
    if symbols(expression):
        return None
    value = exact(expression)
    if value is not None:
        return End(value)
    number = Meter(_DIGITS).value(expression)
    if getattr(number, "imag", 0):
        return None
    return End(Fraction(Decimal(str(number.real))), certain=False)


def _compare(a: End, b: End) -> int:
    difference = a.value - b.value
    if not (a.certain and b.certain) and abs(difference) <= _NEAR * (1 + abs(a.value)):
        return 0
    return (difference > 0) - (difference < 0)

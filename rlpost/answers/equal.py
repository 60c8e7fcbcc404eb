"""Whether two expressions are equal: exactly where they are rational, else to dozens of digits, at several points."""

from __future__ import annotations

import random
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from rlpost.answers.evaluate import (
    MOST_DIGITS,
    Meter,
    Unbounded,
    Undefined,
    exact,
    is_infinite,
    parts_of,
    symbols,
)
from rlpost.answers.tree import Call, Constant, Expression, Number, Power, Product, Quotient, Sum, Symbol

_DIGITS = 50
_GUARD = 12  # digits that rounding may cost
_MOST_SYMBOLS = 12


def equal(left: Expression, right: Expression) -> bool:
    """Whether two expressions have the same value for all values of their variables."""
    if left == right:
        return True
    try:
        a, b = exact(left), exact(right)
        if a is not None and b is not None:
            return a == b
        names = sorted(symbols(left) | symbols(right))
        return _same_number(left, right) if not names else _same_function(left, right, names)
    except Unbounded:
        return structure(left) == structure(right)
    except (Undefined, RecursionError):
        return False


def rounds_to(answer: Expression, decimal: Number, slack: int = 1) -> bool:
    """Whether an answer gives a decimal when it is rounded to the decimal's places; False on the edge between two.

    A `slack` of 2 takes decimals that were cut off instead, too.
    """
    half = Fraction(slack, 2 * 10 ** (decimal.places or 0))
    try:
        value = exact(answer)
        if value is None:
            if symbols(answer):
                return False
            number = Meter(_DIGITS).value(answer)
            if not _is_real(number):
                return False
            value = Fraction(Decimal(str(number.real)))
    except (Undefined, Unbounded, RecursionError, ArithmeticError, ValueError):
        return False
    return abs(value - decimal.value) < half


def is_defined(expression: Expression) -> bool:
    """Whether there is a value: no division by zero. Variables, infinities and huge numbers are fine."""
    if is_infinite(expression):
        return True
    try:
        if exact(expression) is None and not symbols(expression):
            Meter(_DIGITS).value(expression)
    except (Undefined, RecursionError):
        return False
    except Unbounded:
        return True
    return all(is_defined(part) for part in parts_of(expression)) if symbols(expression) else True


def has_decimal(expression: Expression) -> bool:
    """Whether a number in it was written with a decimal point."""
    if isinstance(expression, Number):
        return expression.places is not None
    return any(has_decimal(part) for part in parts_of(expression))


def structure(expression: Expression) -> str:
    """A text that is equal for expressions that differ only in the order of terms and factors."""
    match expression:
        case Number(value=value):
            return (
                str(value) if value.numerator.bit_length() < 10_000 else hex(value.numerator) + hex(value.denominator)
            )
        case Constant(name=name) | Symbol(name=name):
            return name
        case Sum(terms=parts) | Product(factors=parts):
            return f"{type(expression).__name__}({','.join(sorted(map(structure, parts)))})"
        case Quotient() | Power() | Call():
            name = expression.name if isinstance(expression, Call) else type(expression).__name__
            return f"{name}({','.join(structure(part) for part in parts_of(expression))})"


def _same_number(left: Expression, right: Expression) -> bool:
    """Two numbers without variables, with as many digits as the sizes of their parts ask for."""
    meter = Meter(_DIGITS)
    a, b = meter.value(left), meter.value(right)
    if meter.far(a, b):
        return False
    if meter.spread:
        meter = Meter(min(_DIGITS + 2 * meter.spread, MOST_DIGITS + 1))
        a, b = meter.value(left), meter.value(right)
    if _close(a, b, meter.ctx.dps):
        return True
    # What vanishes leaves noise that shrinks with more digits; a number that is truly small stays as it is.
    if abs(a - b) > meter.ctx.mpf(10) ** (_GUARD - meter.ctx.dps):
        return False
    digits = meter.ctx.dps
    finer = Meter(2 * digits)
    a, b = finer.value(left), finer.value(right)
    return bool(abs(a - b) <= finer.ctx.mpf(10) ** (2 * _GUARD - 2 * digits))


def _close(a: Any, b: Any, digits: int) -> bool:
    return bool(abs(a - b) <= max(abs(a), abs(b)) * type(abs(a))(10) ** (_GUARD - digits))


def _same_function(left: Expression, right: Expression, names: list[str]) -> bool:
    """Two expressions with variables: compared at points of both signs where both are real, or anywhere if they never are."""
    if len(names) > _MOST_SYMBOLS:
        return structure(left) == structure(right)
    compared = 0
    complex_pairs: list[bool] = []
    for point in _points(names):
        pair = _at(left, right, point)
        if pair is None:
            continue
        a, b, meter = pair
        digits = meter.ctx.dps
        near = _close(a, b, digits) or bool(max(abs(a), abs(b)) < meter.ctx.mpf(10) ** (2 * _GUARD - digits))
        if _is_real(a) and _is_real(b):
            if not near:
                return False
            compared += 1
        else:
            complex_pairs.append(near)
    return compared >= 4 or (compared == 0 and len(complex_pairs) >= 4 and all(complex_pairs))


def _at(left: Expression, right: Expression, point: Mapping[str, Fraction]) -> tuple[Any, Any, Meter] | None:
    try:
        meter = Meter(_DIGITS, point)
        a, b = meter.value(left), meter.value(right)
        if meter.spread > 20 and not meter.far(a, b):
            meter = Meter(min(_DIGITS + 2 * meter.spread, MOST_DIGITS + 1), point)
            a, b = meter.value(left), meter.value(right)
    except Undefined:
        return None
    return a, b, meter


def _points(names: list[str]) -> list[dict[str, Fraction]]:
    draw = random.Random(15)  # the same points every time: a verdict is never a matter of luck
    points = []
    for i in range(10):
        sign = [1, 1, 1, -1, -1, 0, 0, 1, -1, 0][i]
        scale = [40, 97, 400, 97, 40, 97, 97, 3000, 400, 40][i]
        point = {}
        for name in names:
            value = Fraction(draw.randint(3, 300), scale)
            point[name] = value * (sign or draw.choice((-1, 1)))
        points.append(point)
    return points


def _is_real(value: Any) -> bool:
    imaginary = getattr(value, "imag", 0)
    return bool(abs(imaginary) <= abs(value) * 1e-30)

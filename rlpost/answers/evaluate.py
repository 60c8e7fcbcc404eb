"""The value of an expression: exact where it is rational, else to many digits; always with a bounded amount of work."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from fractions import Fraction
from typing import Any

import mpmath

from rlpost.answers.tree import Call, Constant, Expression, Number, Power, Product, Quotient, Sum, Symbol

LARGEST_BITS = 1 << 18
"""Of numerators and denominators that are written out; larger ones are compared as they stand."""
LARGEST_FACTORIAL = 20_000
MOST_DIGITS = 1000
"""Of numerical values. Expressions whose parts differ more in size are compared as they stand."""
_LARGEST_POWER = 10**8
_MOST_GAMMA_DIGITS = 150  # the gamma function takes seconds for a thousand
_local = threading.local()


class Unbounded(Exception):
    """A value is too large, or its parts differ too much in size, for its digits to be written out."""


class Undefined(Exception):
    """There is no value: a division by zero, the root of nothing."""


def exact(expression: Expression) -> Fraction | None:
    """The value as a fraction; None if it is not rational, or not seen to be.

    Raises:
        Undefined: it has none.
        Unbounded: it is rational, but too large.
    """
    match expression:
        case Number(value=number):
            return number
        case Sum(terms=parts) | Product(factors=parts):
            values = [exact(part) for part in parts]
            if any(value is None for value in values):
                return None
            total = Fraction(0 if isinstance(expression, Sum) else 1)
            for value in (value for value in values if value is not None):
                total = _bounded(total + value if isinstance(expression, Sum) else total * value)
            return total
        case Quotient(above=above, below=below):
            a, b = exact(above), exact(below)
            if b == 0:
                raise Undefined("division by zero")
            return None if a is None or b is None else _bounded(a / b)
        case Power(base=base, exponent=exponent):
            b, e = exact(base), exact(exponent)
            return None if b is None or e is None else _exact_power(b, e)
        case Call():
            return _exact_call(expression)
    return None


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST_BITS:
        raise Unbounded
    return value


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        root = _exact_root(base, exponent.denominator)
        return None if root is None or base < 0 else _exact_power(root, Fraction(exponent.numerator))
    if base == 0 and exponent <= 0:
        raise Undefined("a power of zero")
    if abs(base) in (0, 1):
        return base ** int(exponent % 2) if base < 0 else base
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > LARGEST_BITS:
        raise Unbounded
    return base ** int(exponent)


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The real root, if it is rational: of a negative number for odd degrees."""
    if value < 0 and degree % 2 == 0:
        return None
    parts = [_whole_root(abs(value.numerator), degree), _whole_root(value.denominator, degree)]
    if parts[0] is None or parts[1] is None:
        return None
    return Fraction(parts[0], parts[1]) * (-1 if value < 0 else 1)


def _whole_root(value: int, degree: int) -> int | None:
    if value < 2:
        return value
    if degree > 64 or value.bit_length() > 4096:
        return None
    guess = math.isqrt(value) if degree == 2 else 1 << -(-value.bit_length() // degree)
    while degree > 2:  # Newton, from above
        better = ((degree - 1) * guess + value // guess ** (degree - 1)) // degree
        if better >= guess:
            break
        guess = better
    return guess if guess**degree == value else None


def _exact_call(call: Call) -> Fraction | None:
    if call.name not in ("factorial", "binom", "abs", "floor", "ceil", "root"):
        return None
    values = [exact(argument) for argument in call.arguments]
    if any(value is None for value in values):
        return None
    first, second = values[0], values[-1]
    assert first is not None and second is not None
    match call.name:
        case "abs":
            return abs(first)
        case "floor":
            return Fraction(math.floor(first))
        case "ceil":
            return Fraction(math.ceil(first))
        case "root":
            return _exact_root(first, int(second)) if second.denominator == 1 and second > 0 else None
        case "factorial":
            if first.denominator != 1 or first < 0:
                raise Undefined("factorial")
            if first > LARGEST_FACTORIAL:
                raise Unbounded
            return _bounded(Fraction(math.factorial(int(first))))
        case _:
            if first.denominator != 1 or second.denominator != 1 or not 0 <= second <= first:
                return None
            if first > LARGEST_FACTORIAL:
                raise Unbounded
            return _bounded(Fraction(math.comb(int(first), int(second))))


def symbols(expression: Expression) -> set[str]:
    """The names of its variables."""
    if isinstance(expression, Symbol):
        return {expression.name}
    return set().union(*(symbols(part) for part in parts_of(expression)))


def is_infinite(expression: Expression) -> bool:
    """Whether it is an infinity, with a sign or without."""
    return expression == Constant("oo") or (isinstance(expression, Product) and Constant("oo") in expression.factors)


def parts_of(expression: Expression) -> Iterator[Expression]:
    """The expressions that it is made of."""
    for field in fields(expression):
        value = getattr(expression, field.name)
        if isinstance(value, tuple):
            yield from value
        elif isinstance(value, Sum | Product | Quotient | Power | Call | Number | Constant | Symbol):
            yield value


def context(digits: int) -> Any:
    """This thread's mpmath context at a number of decimal digits."""
    if digits > MOST_DIGITS:
        raise Unbounded
    if not hasattr(_local, "context"):
        _local.context = mpmath.MPContext()
    _local.context.dps = digits
    return _local.context


class Meter:
    """Evaluates numerically, and remembers how much the sizes of the parts differ."""

    def __init__(self, digits: int, values: Mapping[str, Fraction] | None = None) -> None:
        self.ctx = context(digits)
        self.values = values or {}
        self.smallest, self.largest = 0, 0  # binary exponents

    def far(self, a: Any, b: Any) -> bool:
        """Whether two values differ by more than rounding can, so that more digits would not bring them together."""
        return bool(abs(a - b) > self.ctx.ldexp(self.ctx.mpf(10) ** (20 - self.ctx.dps), self.largest))

    @property
    def spread(self) -> int:
        """Decimal digits between the smallest and the largest part."""
        return int((self.largest - self.smallest) * 0.302)

    def value(self, expression: Expression) -> Any:
        """The value as mpmath's real or complex number.

        Raises:
            Undefined: there is none.
            Unbounded: it is out of reach.
        """
        try:
            result = self._value(expression)
        except (ZeroDivisionError, KeyError, ValueError, OverflowError, TypeError, mpmath.libmp.NoConvergence) as error:
            raise Undefined(str(error)) from error
        if not self.ctx.isfinite(result):
            raise Undefined("not a number")
        if result != 0:
            size = int(self.ctx.mag(result))
            if abs(size) > 4 * MOST_DIGITS:
                raise Unbounded
            self.smallest, self.largest = min(self.smallest, size), max(self.largest, size)
        return result

    def _value(self, expression: Expression) -> Any:
        ctx = self.ctx
        match expression:
            case Number(value=value):
                return ctx.mpf(value.numerator) / value.denominator
            case Constant(name=name):
                return {"pi": +ctx.pi, "e": +ctx.e, "i": ctx.mpc(0, 1)}[name]
            case Symbol(name=name):
                value = self.values[name]
                return ctx.mpf(value.numerator) / value.denominator
            case Sum(terms=terms):
                return ctx.fsum([self.value(term) for term in terms])
            case Product(factors=factors):
                return ctx.fprod([self.value(factor) for factor in factors])
            case Quotient(above=above, below=below):
                return self.value(above) / self.value(below)
            case Power(base=base, exponent=exponent):
                return self._power(self.value(base), self.value(exponent))
            case Call():
                return self._call(expression.name, [self.value(argument) for argument in expression.arguments])

    def _power(self, base: Any, exponent: Any) -> Any:
        if abs(exponent) > _LARGEST_POWER or (base != 0 and abs(exponent) * abs(self.ctx.mag(base)) > 4 * MOST_DIGITS):
            raise Unbounded
        if base == 0 and self.ctx.re(exponent) <= 0:
            raise Undefined("a power of zero")
        return self.ctx.power(base, exponent)

    def _call(self, name: str, at: list[Any]) -> Any:
        ctx = self.ctx
        if name.startswith("of "):
            return self._unknown(name, at)
        if any(abs(value) > _LARGEST_POWER for value in at) and name not in ("root", "ln", "lg", "log", "abs"):
            raise Unbounded
        if name == "root":
            return self._root(*at)
        if name == "log":
            # Without a base it may be the natural or the common logarithm: a base that is neither keeps the laws only.
            return ctx.log(at[0]) / ctx.log(at[1]) if len(at) == 2 else ctx.log(at[0]) / (ctx.sqrt(7) + ctx.euler)
        if name in ("factorial", "binom") and (
            any(abs(value) > LARGEST_FACTORIAL for value in at) or ctx.dps > _MOST_GAMMA_DIGITS
        ):
            raise Unbounded
        return _functions(ctx)[name](*at)

    def _root(self, radicand: Any, degree: Any) -> Any:
        if degree == 0:
            raise Undefined("root")
        odd = degree == int(ctx_real(degree)) and int(ctx_real(degree)) % 2 == 1
        if odd and self.ctx.im(radicand) == 0 and radicand < 0:
            return -self._power(-radicand, 1 / degree)
        return self._power(radicand, 1 / degree) if radicand != 0 else radicand

    def _unknown(self, name: str, at: list[Any]) -> Any:
        """A function that nothing is known of: equal at equal arguments, and nothing else."""
        seen = name + ",".join(self.ctx.nstr(value, 20) for value in at)
        return self.ctx.mpf(int.from_bytes(hashlib.sha256(seen.encode()).digest()[:12], "big")) / 2**95


def ctx_real(value: Any) -> float:
    """The real part as a float, at most a million."""
    return max(min(float(value.real), 1e6), -1e6)


def _functions(ctx: Any) -> dict[str, Callable[..., Any]]:
    return {
        **{n: getattr(ctx, n) for n in ("sin", "cos", "tan", "cot", "sec", "csc")},
        **{n: getattr(ctx, n) for n in ("sinh", "cosh", "tanh", "coth", "sech", "csch")},
        **{"arc" + n: getattr(ctx, "a" + n) for n in ("sin", "cos", "tan", "cot", "sec", "csc")},
        **{"ar" + n: getattr(ctx, "a" + n) for n in ("sinh", "cosh", "tanh")},
        "ln": ctx.log,
        "lg": lambda x: ctx.log(x) / ctx.log(10),
        "exp": lambda x: ctx.exp(x),
        "sgn": ctx.sign,
        "abs": abs,
        "floor": ctx.floor,
        "ceil": ctx.ceil,
        "factorial": ctx.factorial,
        "binom": ctx.binomial,
    }  # fmt: skip

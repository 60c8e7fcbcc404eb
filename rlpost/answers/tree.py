"""What an answer is once it has been read: expressions at the leaves, and what can be made of them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


class Unreadable(Exception):
    """A text is no answer that this reader knows. Never an error of the user's: callers turn it into a verdict."""


@dataclass(frozen=True, slots=True)
class Number:
    """An exact rational number. `places` is how many decimals it was written with; None if it was no decimal."""

    value: Fraction
    places: int | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """`pi`, `e`, `i` or `oo` (infinity)."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, with its subscripts, accents and primes as part of its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Sum:
    terms: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Product:
    factors: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Quotient:
    above: Expression
    below: Expression


@dataclass(frozen=True, slots=True)
class Power:
    base: Expression
    exponent: Expression


@dataclass(frozen=True, slots=True)
class Call:
    """A function at its arguments. `root` has the radicand and the degree, `log` the argument and perhaps the base."""

    name: str
    arguments: tuple[Expression, ...]


Expression = Number | Constant | Symbol | Sum | Product | Quotient | Power | Call


@dataclass(frozen=True, slots=True)
class Quantity:
    """An expression with the unit that stands behind it; no unit is the empty text."""

    expression: Expression
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Words:
    """A text, in a form in which equal texts are equal: lower case, single spaces, no punctuation at its end."""

    text: str


@dataclass(frozen=True, slots=True)
class Based:
    """An integer written in another base than ten: its digits, and the base."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Date:
    """A day; 0 stands for a year that is not given."""

    year: int
    month: int
    day: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """a : b : c, or a time of day such as 12:30. `clock` tells that it can be one; `half` is "am", "pm" or empty."""

    parts: tuple[Expression, ...]
    clock: bool = False
    half: str = ""


@dataclass(frozen=True, slots=True)
class Bracketed:
    """Values between round or square brackets: a point, a vector or an interval."""

    opening: str
    closing: str
    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Braced:
    """A finite set."""

    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """Values one after the other, joined by `,`, `;`, `and` or `or`: all of them together are the answer."""

    items: tuple[Value, ...]
    joined: str = ","


@dataclass(frozen=True, slots=True)
class Combined:
    r"""Sets joined by `cup`, `cap` or `setminus`, from left to right."""

    operators: tuple[str, ...]
    parts: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain such as 1 < x <= 2. `signs` stand between the `sides`."""

    sides: tuple[Value, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True, slots=True)
class Everything:
    """All real numbers."""


Value = (
    Quantity | Words | Based | Date | Ratio | Bracketed | Braced | Listing | Combined | Relation | Matrix | Everything
)

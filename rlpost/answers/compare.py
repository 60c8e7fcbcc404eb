"""Whether an answer is the right one, as mathematics. What is in doubt is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from rlpost.answers.equal import equal, has_decimal, rounds_to
from rlpost.answers.evaluate import Meter, Unbounded, Undefined, exact, parts_of, symbols
from rlpost.answers.realset import as_set, is_set_like, names_in
from rlpost.answers.tree import (
    Based,
    Braced,
    Bracketed,
    Call,
    Combined,
    Date,
    Expression,
    Listing,
    Matrix,
    Number,
    Product,
    Quantity,
    Quotient,
    Ratio,
    Relation,
    Sum,
    Symbol,
    Value,
    Words,
)

_ROUND = (("(", ")"), (r"\langle", r"\rangle"))
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def same(gold: Value, answer: Value) -> bool:
    """Whether an answer means what the gold answer means."""
    if gold == answer:
        return True
    if is_set_like(gold) or is_set_like(answer):
        verdict = _same_sets(gold, answer)
        if verdict is not None:
            return verdict
    gold, answer = _bare(gold, answer)
    match gold, answer:
        case Quantity(), Quantity():
            return _same_quantity(gold, answer)
        case Relation(), Relation():
            return _same_relation(gold, answer)
        case (Ratio(), Ratio() | Quantity()) | (Quantity(), Ratio()):
            return _same_ratio(gold, answer)
        case Matrix(), Matrix():
            return len(gold.rows) == len(answer.rows) and all(map(_in_order, gold.rows, answer.rows))
        case Combined(), Combined():
            return gold.operators == answer.operators and _in_order(gold.parts, answer.parts)
        case (Braced(items=(one,)), Quantity()):
            return same(one, answer)
        case (Quantity(), Braced(items=(one,))):
            return same(gold, one)
        case (Words() | Based() | Date(), _):
            return gold == answer
    return _same_items(gold, answer)


def _same_sets(gold: Value, answer: Value) -> bool | None:
    """The verdict on two sets of real numbers; None if they are not both sets without variables in their ends."""
    if isinstance(gold, Relation) and isinstance(answer, Relation) and names_in((gold,)) != names_in((answer,)):
        return None
    if any(isinstance(v, Bracketed) and v.opening == "[" and v.closing == "]" for v in (gold, answer)) and any(
        isinstance(v, Quantity) for v in (gold, answer)
    ):
        return None
    left, right = as_set(gold), as_set(answer)
    return None if left is None or right is None else left.equals(right)


def _bare(gold: Value, answer: Value) -> tuple[Value, Value]:
    """Without "x =" where only one of the two has it; "x in" goes always."""
    gold, answer = _without_in(gold), _without_in(answer)
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return gold, answer
    if isinstance(gold, Relation):
        gold = _right_side(gold, _is_simple_name) or gold
    if isinstance(answer, Relation):
        answer = _right_side(answer, _is_name) or answer
    return gold, answer


def _without_in(value: Value) -> Value:
    return value.sides[-1] if isinstance(value, Relation) and value.signs == ("in",) else value


def _right_side(relation: Relation, is_name: Callable[[Value], bool]) -> Value | None:
    """What an equation says that its name is; None if its first side is no name, or its sides are not all the same."""
    if any(sign not in ("=", "~") for sign in relation.signs):
        return None
    sides = list(relation.sides)
    signs = list(relation.signs)
    if not is_name(sides[0]) and is_name(sides[-1]) and len(sides) == 2:
        sides.reverse()
    if is_name(sides[0]):
        sides, signs = sides[1:], signs[1:]
    kept = [sides[0]]
    for sign, side in zip(signs, sides[1:], strict=True):
        if sign == "~":  # what follows is but an approximation
            if not _approximates(side, kept[-1]):
                return None
            break
        kept.append(side)
    if len(kept) > 1 and not all(is_name(side) or same(kept[-1], side) for side in kept[:-1]):
        return None
    return kept[-1]


def _approximates(rough: Value, value: Value) -> bool:
    """Whether a decimal is what a value rounds to; of anything else than a decimal nothing is asked."""
    if not isinstance(rough, Quantity) or not isinstance(value, Quantity) or not isinstance(rough.expression, Number):
        return True
    return equal(rough.expression, value.expression) or rounds_to(value.expression, rough.expression, slack=2)


def _is_name(value: Value) -> bool:
    """Whether a value holds nothing but variables, so that "x + y = 5" says what x + y is."""
    match value:
        case Quantity(expression=expression):
            return _only_variables(expression)
        case Words():
            return True
        case Bracketed(items=items) | Listing(items=items):
            return all(map(_is_name, items))
        case Ratio(parts=parts):
            return all(map(_only_variables, parts))
    return False


def _only_variables(expression: Expression) -> bool:
    match expression:
        case Symbol():
            return True
        case Call(name=name, arguments=arguments):
            return name.startswith("of ") or all(map(_only_variables, arguments))
        case Sum() | Product() | Quotient():
            return all(map(_only_variables, parts_of(expression)))
    return False


def _is_simple_name(value: Value) -> bool:
    """Whether a gold answer's left side is a mere name, so that the right side alone is the answer."""
    match value:
        case Quantity(expression=Quotient(above=above, below=below)):
            return _is_segment(above) and _is_segment(below)
        case Quantity(expression=expression):
            return _is_segment(expression)
        case Words():
            return True
        case Bracketed(items=items) | Listing(items=items):
            return all(map(_is_simple_name, items))
        case Ratio(parts=parts):
            return all(map(_is_segment, parts))
    return False


def _is_segment(expression: Expression) -> bool:
    """A variable, a function at something, or a segment such as AB."""
    match expression:
        case Symbol():
            return True
        case Call(name=name, arguments=arguments):
            return name.startswith("of ") or (name == "abs" and _is_segment(arguments[0]))
        case Product(factors=factors):
            return all(isinstance(factor, Symbol) and factor.name[0].isupper() for factor in factors)
    return False


def _same_quantity(gold: Quantity, answer: Quantity) -> bool:
    one, other = _generic(gold.unit), _generic(answer.unit)
    if "percent" in (one, other) and one != other:
        return {one, other} == {"percent", ""} and _same_percent(gold, answer)
    if one and other and one != other:
        return False
    return same_number(gold.expression, answer.expression)


def _generic(unit: str) -> str:
    """Units that say nothing: "units", "square units"."""
    return "" if unit.startswith("unit") else unit


def _same_percent(gold: Quantity, answer: Quantity) -> bool:
    """50% is 0.5, and also 50, but only where the bare number is above 1: 0.5 is never 0.5%."""
    percent, bare = (gold, answer) if gold.unit == "percent" else (answer, gold)
    hundredth = Quotient(percent.expression, Number(Fraction(100)))
    if equal(hundredth, bare.expression):
        return True
    try:
        value = exact(bare.expression)
        large = abs(value) > 1 if value is not None else bool(abs(Meter(20).value(bare.expression)) > 1)
    except (KeyError, Undefined, Unbounded):
        return False
    return large and same_number(gold.expression, answer.expression)


def same_number(gold: Expression, answer: Expression) -> bool:
    """Equal; or, where the gold answer is a decimal, rounded to it.

    A gold decimal with two places or more takes a fraction or a root that rounds to it; one with four significant digits or
    more takes a decimal with more places that rounds to it. Everything else must be equal exactly.
    """
    if equal(gold, answer):
        return True
    if not isinstance(gold, Number) or gold.places is None or gold.places < 2:
        return False
    if has_decimal(answer):
        digits = len(str(abs(gold.value.numerator * 10**gold.places // gold.value.denominator)))
        longer = isinstance(answer, Number) and (answer.places or 0) > gold.places
        if digits < 4 or not longer:
            return False
    return rounds_to(answer, gold)


def _same_relation(gold: Relation, answer: Relation) -> bool:
    """Equations and inequalities: side by side, or one a multiple of the other."""
    if len(gold.signs) == 1 and len(answer.signs) == 1:
        return _same_link(gold, answer)
    if gold.signs == answer.signs and _in_order(gold.sides, answer.sides):
        return True
    flipped = tuple(_FLIPPED.get(sign, sign) for sign in reversed(answer.signs))
    if flipped == gold.signs and _in_order(gold.sides, answer.sides[::-1]):
        return True
    if all(sign in ("=", "~") for sign in (*gold.signs, *answer.signs)):  # x = 2 + 3 = 5 is x = 5
        short = [_ends_of(relation) for relation in (gold, answer)]
        return short[0] is not None and short[1] is not None and _same_link(short[0], short[1])
    return False


def _ends_of(relation: Relation) -> Relation | None:
    last = _right_side(relation, _is_name)
    return None if last is None else Relation((relation.sides[0], last), ("=",))


def _same_link(gold: Relation, answer: Relation) -> bool:
    (a, b), (c, d) = gold.sides, answer.sides
    one, other = ("=" if sign == "~" else sign for sign in (gold.signs[0], answer.signs[0]))
    if one == other and same(a, c) and same(b, d):
        return True
    if _FLIPPED.get(other) == one and same(a, d) and same(b, c):
        return True
    if not all(isinstance(side, Quantity) for side in (a, b, c, d)) or one == "in" or other == "in":
        return False
    if one == "=" and (_is_solved(a, b) or _is_solved(c, d)):
        return False  # 2x = 10 has not said yet what x is
    left, right = ((x.expression, y.expression) for x, y in ((a, b), (c, d)))  # type: ignore[union-attr]
    ratio = _constant_ratio(left, right)
    if ratio == 0:
        return False
    return (one == other and (ratio > 0 or one in ("=", "!="))) or (ratio < 0 and _FLIPPED.get(other) == one)


def _is_solved(left: Value, right: Value) -> bool:
    """Whether an equation says of a variable that it is a number."""
    pair = [side.expression for side in (left, right) if isinstance(side, Quantity)]
    return len(pair) == 2 and any(isinstance(x, Symbol) and not symbols(y) for x, y in (pair, pair[::-1]))


def _constant_ratio(gold: tuple[Expression, Expression], answer: tuple[Expression, Expression]) -> int:
    """The sign of the constant by which one difference of sides is a multiple of the other; 0 if it is none."""
    names = sorted(set().union(*map(symbols, (*gold, *answer))))
    if not names or set().union(*map(symbols, gold)) != set().union(*map(symbols, answer)):
        return 0
    ratio = None
    for k in range(6):
        point = {name: Fraction((7 * k + 11 * i + 3) * (-1) ** (k * i), 13 + i) for i, name in enumerate(names)}
        try:
            meter = Meter(50, point)
            f = meter.value(gold[0]) - meter.value(gold[1])
            g = meter.value(answer[0]) - meter.value(answer[1])
        except (Undefined, Unbounded):
            continue
        if abs(f) < 1e-30 or abs(g) < 1e-30 or getattr(f / g, "imag", 0):
            return 0
        if ratio is not None and abs(f / g - ratio) > abs(ratio) * meter.ctx.mpf(10) ** -30:
            return 0
        ratio = f / g
    return 0 if ratio is None else 1 if ratio > 0 else -1


def _same_ratio(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        if (gold.clock and answer.clock) or gold.half or answer.half:
            halves = {gold.half, answer.half} - {""}
            return (
                len(halves) < 2 and len(gold.parts) == len(answer.parts) and all(map(equal, gold.parts, answer.parts))
            )
        if len(gold.parts) != len(answer.parts):
            return False
        first, last = Quotient(gold.parts[0], answer.parts[0]), gold.parts[1:]
        return all(equal(Quotient(g, a), first) for g, a in zip(last, answer.parts[1:], strict=True))
    ratio, number = (gold, answer) if isinstance(gold, Ratio) else (answer, gold)
    assert isinstance(ratio, Ratio)
    if len(ratio.parts) != 2 or ratio.clock or ratio.half or not isinstance(number, Quantity) or number.unit:
        return False
    return equal(Quotient(*ratio.parts), number.expression)


def _same_items(gold: Value, answer: Value) -> bool:
    """Points, lists, sets, column vectors."""
    left, right = _sequence(gold), _sequence(answer)
    if left is None or right is None:
        return False
    kinds = {type(gold), type(answer)}
    if kinds == {Bracketed}:
        return _same_brackets(gold, answer) and _in_order(left, right)
    if Matrix in kinds or Bracketed in kinds:
        lists = [value for value in (gold, answer) if isinstance(value, Listing)]
        if Braced in kinds or any(value.joined in ("or", "and") for value in lists):
            return False
        points = [value for value in (gold, answer) if isinstance(value, Bracketed)]
        if any(not _is_vector(point, Matrix in kinds) for point in points):
            return False
        return _in_order(_values(left), _values(right))
    named = [_are_named(left), _are_named(right)]
    if Braced in kinds:
        sets = [
            _distinct(items) if isinstance(value, Braced) else items for value, items in ((gold, left), (answer, right))
        ]
        return not any(named) and _in_any_order(*sets)
    if any(named) and not all(named) and not any(isinstance(i, Relation) for i in (right if named[0] else left)):
        return _in_order(_values(left), _values(right))
    return _in_any_order(left, right)


def _sequence(value: Value) -> tuple[Value, ...] | None:
    match value:
        case Bracketed(items=items) | Braced(items=items) | Listing(items=items):
            return items
        case Matrix(rows=rows) if len(rows[0]) == 1 or len(rows) == 1:
            return tuple(cell for row in rows for cell in row)
    return None


def _same_brackets(gold: Value, answer: Value) -> bool:
    """Whether brackets of two kinds can mean the same: (1, 2) is no [1, 2], but of three numbers it is the same vector."""
    assert isinstance(gold, Bracketed) and isinstance(answer, Bracketed)
    pairs = [(gold.opening, gold.closing), (answer.opening, answer.closing)]
    if pairs[0] == pairs[1] or all(pair in _ROUND for pair in pairs):
        return True
    return len(gold.items) > 2 and all(pair in (*_ROUND, ("[", "]")) for pair in pairs)


def _is_vector(value: Bracketed, beside_matrix: bool) -> bool:
    """Whether brackets are a point's or a vector's, as a plain list is; [1, 2] is an interval unless a matrix says no."""
    pair = (value.opening, value.closing)
    return pair in _ROUND or (pair == ("[", "]") and (len(value.items) > 2 or beside_matrix))


def _are_named(items: Sequence[Value]) -> bool:
    """Whether each item says of another name what it is: x = 1, y = 2."""
    if not all(isinstance(item, Relation) and set(item.signs) <= {"=", "~"} for item in items):
        return False
    names = [item.sides[0] for item in items if isinstance(item, Relation)]
    return len(items) > 1 and len(set(map(repr, names))) == len(names)


def _values(items: Sequence[Value]) -> tuple[Value, ...]:
    """What the names are, where all items are equations."""
    if not _are_named(items):
        return tuple(items)
    values = [_right_side(item, _is_name) for item in items if isinstance(item, Relation)]
    return tuple(items) if any(value is None for value in values) else tuple(v for v in values if v is not None)


def _in_order(left: Sequence[Value], right: Sequence[Value]) -> bool:
    return len(left) == len(right) and all(map(same, left, right))


def _in_any_order(left: Sequence[Value], right: Sequence[Value]) -> bool:
    if len(left) != len(right):
        return False
    rest = list(right)
    for item in left:
        at = next((i for i, other in enumerate(rest) if same(item, other)), None)
        if at is None:
            return False
        del rest[at]
    return True


def _distinct(items: Sequence[Value]) -> list[Value]:
    kept: list[Value] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return kept

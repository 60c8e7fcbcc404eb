"""Reads a whole answer: what kind of thing it is, and the expressions in it."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from rlpost.answers.clean import clean
from rlpost.answers.equal import is_defined
from rlpost.answers.scalar import read_expression
from rlpost.answers.tokens import FUNCTIONS, Token, Tokens, flat, match_of, split, tokenize
from rlpost.answers.tree import (
    Based,
    Braced,
    Bracketed,
    Combined,
    Everything,
    Listing,
    Matrix,
    Number,
    Quantity,
    Ratio,
    Relation,
    Unreadable,
    Value,
    Words,
)
from rlpost.answers.words import read_clock, read_date, small_number, unit_of, words_of

SIGNS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in", r"\approx": "~"}
_SET_SIGNS = (r"\cup", r"\cap", r"\setminus")
_MOST_ITEMS = 60
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_JOINING_TEXT = re.compile(r"\\text\s*\{\s*,?\s*(and|or|and/or)\s*,?\s*\}")
_BASED = re.compile(r"\(?\s*([0-9A-Fa-f]+)\s*\)?\s*_\s*\{?\s*(?:\\text\s*\{)?\s*(\d{1,2}|[a-z]+)\s*\}?\s*\}?")
_HEX = re.compile(r"0([xXbBoO])([0-9A-Fa-f]+)")
_HEX_BASES = {"x": 16, "b": 2, "o": 8}
_BASE_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
               "hex": 16, "sixteen": 16, "twelve": 12}  # fmt: skip
_SHORT = 3  # words of an item in a list of words
_SINGLE_WORDS = frozenset(["no", "on", "at", "up"])
_IN_UNITS = frozenset(("^", "/", "{", "}", "-", "(", ")", r"\cdot", r"\circ", "."))
_MATRICES = frozenset(
    [r"\begin{pmatrix}", r"\begin{bmatrix}", r"\begin{matrix}", r"\begin{Bmatrix}", r"\begin{smallmatrix}"]
)


@lru_cache(maxsize=4096)
def read(text: str) -> tuple[Value, ...]:
    """The readings of an answer: none if this reader knows no such answer, two where digits and commas mean two things."""
    readings: list[Value] = []
    plain = clean(text)
    for thousands in (True, False) if re.search(r"\d,\d{3}", plain) else (True,):
        try:
            value = _whole(plain, thousands)
        except (Unreadable, RecursionError):
            continue
        if value not in readings:
            readings.append(value)
    return tuple(readings)


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    r"""The text of an answer without what says nothing: equal for answers that differ in spaces, typefaces and \text alone."""
    plain = _TEXT.sub(r" \1 ", clean(text))
    try:
        return flat(tokenize(plain))
    except Unreadable:
        return " ".join(plain.split())


def _whole(plain: str, thousands: bool) -> Value:
    if not plain:
        raise Unreadable("empty")
    for special in (_based, _words, _clock_or_date):
        value = special(plain)
        if value is not None:
            return value
    plain = _JOINING_TEXT.sub(r" \1 ", plain).replace("&", " ") if "begin" not in plain else plain
    return _value(tokenize(plain, thousands))


def _based(plain: str) -> Value | None:
    match = _HEX.fullmatch(plain)
    digits, base = (match[2], _HEX_BASES[match[1].lower()]) if match else ("", 0)
    match = _BASED.fullmatch(plain)
    if match and (match[1][0].isdigit() or match[1].isupper()):
        base = int(match[2]) if match[2].isdigit() else _BASE_WORDS.get(match[2], 0)
        digits = match[1]
        if not base:
            return None
    if not digits:
        return None
    try:
        value = int(digits, base)
    except ValueError as error:
        raise Unreadable("digits of another base") from error
    return Quantity(Number(Fraction(value))) if base == 10 else Based(digits.lstrip("0").upper() or "0", base)


def _words(plain: str) -> Value | None:
    r"""An answer in words, with and without \text: None if there is anything else in it."""
    marked = _TEXT.sub(" ", plain)
    said = _TEXT.sub(r" \1 ", plain).strip()
    has_text = marked != plain
    if not re.fullmatch(r"[A-Za-z'’.,\-;:!?\s(){}\"]*", said) or not re.search("[A-Za-z]", said):
        return None
    bare = said.strip(" .(){}\"'")
    if len(bare) == 1:
        return None
    words = words_of(said)
    if words.text == "all reals":
        return Everything()
    if words.text == "no solution":
        return Braced(())
    if words.text in ("infinity", "negative infinity", "-infinity", "inf", "pi"):
        return None
    number = small_number(words.text)
    if number is not None:
        return Quantity(number)
    if re.search(r"[,;]|\b(?:and|or)\b", said) and re.fullmatch(
        r"[\s(){}]*(?:[A-Za-z](?:[\s(){},;]|\b(?:and|or)\b)*)+", said
    ):
        return None  # a list of letters
    if has_text and re.search(r"[,;]", said):
        return None if all(len(part.split()) <= 3 for part in re.split("[,;]", said)) else words
    letters = list(re.findall("[A-Za-z]+", said))
    if has_text and not re.search("[A-Za-z]", marked):
        return words
    if all(len(piece) == 1 for piece in letters) or (
        len(letters) == 1 and len(letters[0]) < 3 and letters[0].lower() not in _SINGLE_WORDS
    ):
        return None
    if len(letters) == 1 and letters[0] in ("sin", "cos", "ln", "log"):
        raise Unreadable("a function without an argument")
    return words


def _clock_or_date(plain: str) -> Value | None:
    said = " ".join(_TEXT.sub(r" \1 ", plain).split())
    return read_date(said) or read_clock(re.sub(r"\s*:\s*", ":", said))


def _value(tokens: Tokens) -> Value:
    tokens = _peeled(_trimmed(tokens))
    if not tokens:
        raise Unreadable("empty")
    tokens = _french(tokens)
    if len(tokens) > 1 and any(token.text in (r"\pm", r"\mp") for token in tokens):
        return _both_signs(tokens)
    for step in (_listing, _relation, _sets, _ratio, _matrix, _bracketed, _text_value, _figure):
        value = step(tokens)
        if value is not None:
            return value
    return _quantity(tokens)


def _trimmed(tokens: Tokens) -> Tokens:
    """Without punctuation at the ends, and without an empty text."""
    tokens = [token for token in tokens if token.kind != "text" or token.text.strip(" ,.")]
    while tokens and tokens[-1].kind == "mark" and tokens[-1].text in ",;.:?":
        tokens = tokens[:-1]
    while tokens and tokens[0].kind == "mark" and tokens[0].text in ",;.:":
        tokens = tokens[1:]
    return tokens


def _peeled(tokens: Tokens) -> Tokens:
    """Without TeX's braces around everything."""
    while len(tokens) > 1 and tokens[0].text == "{" and match_of(tokens, 0) == len(tokens) - 1:
        tokens = tokens[1:-1]
    return tokens


def _french(tokens: Tokens) -> Tokens:
    """Open intervals as the French write them: ]1, 2[ is (1, 2)."""
    first, last = tokens[0].text, tokens[-1].text
    if (first == "]" and last in ("[", "]", ")")) or (first in ("[", "(") and last == "["):
        begin = "(" if first == "]" else first
        return [Token("mark", begin), *tokens[1:-1], Token("mark", ")" if last == "[" else last)]
    return tokens


def _both_signs(tokens: Tokens) -> Value:
    swap = {r"\pm": ("+", "-"), r"\mp": ("-", "+")}
    versions = [
        [Token("mark", swap[token.text][i]) if token.text in swap else token for token in tokens] for i in (0, 1)
    ]
    parts, between = split(tokens, ",", ";", joints=True)
    if len(parts) > 1:
        return _join([_value(part) for part in parts if part], between)
    signs = [t for t in tokens if t.text in SIGNS]
    if len(signs) == 1 and signs[0].text in ("=", r"\in", r"\approx"):
        at = list(tokens).index(signs[0])
        head = list(tokens[: at + 1])
        return Listing(tuple(_value([*head, *v[at + 1 :]]) for v in versions))
    if tokens[0].text in (r"\{", "(", "[") and match_of(tokens, 0) == len(tokens) - 1:
        value = _bracketed(tokens)
        if value is not None:
            return value
    return Listing(tuple(_value(version) for version in versions))


def _join(items: list[Value], between: list[str]) -> Value:
    flattened: list[Value] = []
    for item in items:
        flattened += item.items if isinstance(item, Listing) and item.joined != "all" else [item]
    if len(flattened) > _MOST_ITEMS:
        raise Unreadable("too many items")
    words = [word for word in between if word in ("and", "or")]
    return Listing(tuple(flattened), words[-1] if words else ",")


def _listing(tokens: Tokens) -> Value | None:
    # "p = 5, q = 2; p = 7, q = 2" is two pairs: the stronger separators group what the commas join.
    for separators, joints in (((";",), True), ((",",), True)):
        parts, between = split(tokens, *separators, joints=joints)
        if len(parts) > 1 and (separators == (",",) or any(_commas(part) for part in parts)):
            if separators == (";",) and not all(_commas(part) and _has_signs(part) for part in parts if part):
                continue
            kept = [part for part in parts if _trimmed(part)]
            if separators == (";",):
                return Listing(tuple(_tuple_of(_value(part)) for part in kept), "or")
            parts, between = split(tokens, ",", ";", joints=True)
            kept = [part for part in parts if _trimmed(part)]
            if not kept:
                raise Unreadable("empty")
            return _value(kept[0]) if len(kept) == 1 else _join([_value(part) for part in kept], between)
    parts, between = split(tokens, ";")
    if len(parts) > 1:
        return _join([_value(part) for part in parts if _trimmed(part)], between)
    return None


def _commas(part: Tokens) -> bool:
    return len(split(part, ",")[0]) > 1


def _has_signs(part: Tokens) -> bool:
    return any(token.text == "=" for token in part)


def _tuple_of(value: Value) -> Value:
    return value if not isinstance(value, Listing) else replace(value, joined="all")


def _relation(tokens: Tokens) -> Value | None:
    sides, signs = split(tokens, *SIGNS)
    if len(sides) == 1:
        return None
    if not sides[-1] or (not sides[0] and signs[0] != "="):
        raise Unreadable("a side is missing")
    if not sides[0]:  # "= 5"
        sides, signs = sides[1:], signs[1:]
        if len(sides) == 1:
            return _value(sides[0])
    return Relation(tuple(_side(side) for side in sides), tuple(SIGNS[sign] for sign in signs))


def _side(tokens: Tokens) -> Value:
    """A side of a relation: a value, or a name in words, such as the left of "Area = 5"."""
    try:
        return _value(tokens)
    except Unreadable:
        kinds = {token.kind for token in tokens}
        if tokens and kinds <= {"text", "letter", "mark", "command"} and "number" not in kinds:
            return Words("name " + flat(tokens))
        raise


def _sets(tokens: Tokens) -> Value | None:
    parts, between = split(tokens, *_SET_SIGNS)
    if len(parts) > 1:
        return Combined(tuple(sign[1:] for sign in between), tuple(_value(part) for part in parts))
    if flat(tokens).replace(" ", "") in (r"\mathbb{R}", "R") and len(tokens) > 1:
        return Everything()
    if flat(tokens) == r"\emptyset":
        return Braced(())
    return None


def _ratio(tokens: Tokens) -> Value | None:
    parts, _ = split(tokens, ":")
    if len(parts) == 1:
        return None
    return Ratio(tuple(_quantity(_trimmed(part)).expression for part in parts))


def _matrix(tokens: Tokens) -> Value | None:
    first = tokens[0]
    if (
        first.text in ("(", "[")
        and len(tokens) > 2
        and tokens[1].kind == "env"
        and match_of(tokens, 0) == len(tokens) - 1
    ):
        return _matrix(tokens[1:-1])
    if first.kind != "env" or match_of(tokens, 0) != len(tokens) - 1:
        return None
    if first.text not in _MATRICES and not first.text.startswith(r"\begin{array}"):
        raise Unreadable("environment")
    rows = []
    for row in _rows(tokens[1:-1]):
        rows.append(tuple(_value(cell) for cell in split(row, "&")[0]))
    if not rows or len({len(row) for row in rows}) != 1:
        raise Unreadable("ragged matrix")
    return Matrix(tuple(rows))


def _rows(tokens: Tokens) -> list[Tokens]:
    return [row for row in split(tokens, "\\\\")[0] if row]


def _bracketed(tokens: Tokens) -> Value | None:
    opening = tokens[0].text
    if opening not in ("(", "[", r"\{", r"\langle") or match_of(tokens, 0) != len(tokens) - 1:
        return None
    inside, closing = tokens[1:-1], tokens[-1].text
    if opening == r"\{":
        if closing != r"\}":
            raise Unreadable("brackets")
        if any(token.text in ("|", r"\mid", ":") for token in inside):
            return _set_builder(inside)
        return Braced(tuple(_flattened(_items(inside))))
    items = _items(inside)
    if len(items) == 1 and opening in "([":
        if isinstance(items[0], Quantity) and not items[0].unit:
            return None if opening == "(" else items[0]
        if opening == "(" or not isinstance(items[0], Quantity):
            return items[0]
    if len(items) < 2:
        raise Unreadable("brackets")
    return Bracketed(opening, closing, tuple(items))


def _items(tokens: Tokens) -> list[Value]:
    parts = list(split(tokens, ",", ";", joints=True)[0])
    if len(parts) == 1 and not _trimmed(parts[0]):
        return []
    if len(parts) > _MOST_ITEMS:
        raise Unreadable("too many items")
    return [_value(part) for part in parts]


def _flattened(items: list[Value]) -> list[Value]:
    return [inner for item in items for inner in (item.items if isinstance(item, Listing) else (item,))]


def _set_builder(tokens: Tokens) -> Value:
    r"""\{x : x > 3\} is what its condition says, where that is about the same variable."""
    for mark in (r"\mid", "|", ":"):
        parts, _ = split(tokens, mark)
        if len(parts) == 2:
            condition = _value(parts[1])
            if isinstance(condition, Relation | Listing | Combined) and flat(parts[0])[:1] in flat(parts[1]):
                return condition
    raise Unreadable("set")


def _text_value(tokens: Tokens) -> Value | None:
    """Words, where nothing but words is left; a \\text that holds a number is read once more."""
    if any(token.kind not in ("text", "letter") and token.text not in ("'", "-", "(", ")", ".") for token in tokens):
        return None
    if not any(token.kind == "text" for token in tokens):
        return None
    said = " ".join(token.text for token in tokens)
    parts = [part for part in re.split("[,;]", said) if part.strip()]
    if len(parts) > 1 and len(tokens) == 1 and all(len(part.split()) <= _SHORT for part in parts):
        return Listing(tuple(words_of(part) for part in parts))
    if re.search(r"\d", said):
        if len(tokens) == 1 and not re.search(r"[\\{}]", said):
            return _whole(said, True)
        raise Unreadable("text")
    words = words_of(said)
    if len(words.text) == 1:
        return _quantity([Token("letter", said.strip(" ().*"))])
    return Braced(()) if words.text == "no solution" else Everything() if words.text == "all reals" else words


def _figure(tokens: Tokens) -> Value | None:
    """A triangle, an angle, a circle by its name."""
    named = len(tokens) > 3 and tokens[0].kind == "letter" and tokens[0].text.isupper() and tokens[1].text == "("
    if named and match_of(tokens, 1) == len(tokens) - 1 and _commas(tokens[2:-1]):
        return _value(tokens[1:])  # the point A(2, 3)
    return Words("name " + flat(tokens)) if tokens[0].text in (r"\triangle", r"\angle", r"\odot") else None


def _quantity(tokens: Tokens) -> Quantity:
    """An expression with a unit or a currency around it."""
    if not tokens:
        raise Unreadable("empty")
    tokens, ahead = _currency_ahead(tokens)
    end = _expression_end(tokens)
    unit = _unit(tokens[end:]) if end < len(tokens) else ""
    body = tokens[:end]
    if not body:
        raise Unreadable("no expression")
    body, sign = _sign_and_scale(body)
    expression = read_expression(body)
    if not is_defined(expression):
        raise Unreadable("no value")
    units = " ".join(part for part in (ahead, sign, unit) if part)
    if ahead and unit == ahead:
        units = ahead
    return Quantity(expression, units)


def _currency_ahead(tokens: Tokens) -> tuple[Tokens, str]:
    """A currency before the number, also behind its minus: -\\$5."""
    if tokens[0].kind == "text" and len(tokens) > 1:
        return tokens[1:], _unit(tokens[:1])
    if len(tokens) > 2 and tokens[0].text == "-" and tokens[1].kind == "text":
        return [tokens[0], *tokens[2:]], _unit(tokens[1:2])
    return tokens, ""


def _expression_end(tokens: Tokens) -> int:
    """Where a unit begins: at the first word, if there is nothing but words, their powers and strokes from there on."""
    for place, token in enumerate(tokens):
        if token.kind == "text":
            behind = tokens[place:]
            plain = all(t.kind in ("text", "letter", "number") or t.text in _IN_UNITS for t in behind)
            return place if plain else len(tokens)
    return len(tokens)


def _unit(tokens: Tokens) -> str:
    said = " ".join(token.text for token in tokens)
    if len(re.findall("[A-Za-z]+", said)) > 5:
        raise Unreadable("words behind a number")
    try:
        return unit_of(said)
    except ValueError as error:
        raise Unreadable("words behind a number") from error


def _sign_and_scale(tokens: Tokens) -> tuple[Tokens, str]:
    """A percent or degree sign at the end is a unit: 50% is 50 percent until it is compared."""
    if tokens[-1].text in ("%", r"\%"):
        return tokens[:-1], "percent"
    if any(token.text[1:] in FUNCTIONS for token in tokens):
        return tokens, ""  # sin 30^\circ is a number
    if tokens[-1].text == r"\circ" and len(tokens) > 2 and tokens[-2].text == "^":
        return tokens[:-2], "deg"
    if len(tokens) > 4 and tokens[-1].text == "}" and tokens[-2].text == r"\circ" and tokens[-4].text == "^":
        return tokens[:-4], "deg"
    return tokens, ""

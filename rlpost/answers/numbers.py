"""The numbers of a text in prose: what the reward `number` reads, and the last resort of `math`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rlpost.answers.clean import plain_signs
from rlpost.answers.scalar import number_from
from rlpost.answers.tree import Unreadable

LARGEST_EXPONENT = 2000
_GROUP = r"(?:,|\{,\}|\\[,;:! ]|,\\!\s?|[ \u00a0\u2009\u202f])"
# A minus is a sign only where no operand stands before it: the last number of "12-7" is 7.
_NUMBER = re.compile(
    rf"""(?P<other>0[xXbB][0-9A-Fa-f]+ | \d+(?:\.\d+){{2,}} | \w{{1,20}}_\{{?\d+\}}?
                 | [A-Za-z)\]}}]\s?\^\s?\{{?-?\d+\}}? | \d{{1,4}}/\d{{1,2}}/\d{{1,4}})
      | (?P<root>\\sqrt\s*(?:\[[^\[\]]*\])?\s*(?:\{{[^{{}}]*\}}|\d))
      | (?P<sign>(?:(?<![0-9)\]\}}\w.%])|(?<=\\\()|(?<=\\\[))[-+](?:\\?\$\s?)?)?
        (?:\\[dt]?frac\s*\{{\s*(?P<above>-?\d+)\s*\}}\s*\{{\s*(?P<below>\d+)\s*\}}
          |\\[dt]?frac\s*(?P<above1>\d)\s*(?P<below1>\d)
          |(?P<digits>\d{{1,3}}(?:{_GROUP}\d{{3}})+(?!\d)|\d+|(?=\.\d))
           (?P<places>(?<=\d)\.\d+|(?<![\d.\w])\.\d+)?
           (?P<exponent>[eE][-+]?\d+(?![\w.])|\s?(?:[x*]|\\times|\\cdot)\s?10\s?\^\s?(?:\{{\s*[-+]?\d+\s*\}}|[-+]?\d+))?
           (?P<power>\s?\^\s?(?:\{{\s*[-+]?\d+\s*\}}|[-+]?\d+)|\^\{{?[-+]?[A-Za-z]\w*\}}?)?
           (?P<over>/\d+(?![\d.]))?)""",
    re.VERBOSE,
)  # fmt: skip
_LONGEST = 5000


@dataclass(frozen=True, slots=True)
class Found:
    """A number in a text: where it is, and its exact value; None for what is written like a number and is none."""

    start: int
    end: int
    value: Fraction | None


def plain_text(text: str) -> str:
    """A text as numbers are looked for in it: one character for each sign."""
    text = plain_signs(text.replace("\\left", "").replace("\\right", ""))
    return re.sub(r"\\(?:times|cdot)\s*", lambda m: m[0].rstrip() + " ", text)


def find_numbers(text: str) -> list[Found]:
    r"""The numbers of a text (see `plain_text`), in order.

    1,234 and 1 234 are one number, as are .5, 1e3, 1.2 x 10^3, 10^3, 1/2 and \frac{1}{2}. What is written like a number but is
    none that can be told (0x1F, 101_2, 1.2.3, a root, a power with a letter) has no value.
    """
    return [Found(m.start(), m.end(), _value(m)) for m in _NUMBER.finditer(text)]


def last_number(text: str) -> Fraction | None:
    """The last number of a text; None if there is none, or the last one is none that can be told."""
    plain = plain_text(text)
    last = None
    for match in _NUMBER.finditer(plain):
        last = match
    return None if last is None else _value(last)


def only_number(text: str) -> Fraction | None:
    """The number that a text is; None if it is anything else."""
    plain = plain_text(text.strip())
    match = _NUMBER.fullmatch(plain)
    return None if match is None else _value(match)


def _value(match: re.Match[str]) -> Fraction | None:
    if match["other"] or match["root"] or match.end() - match.start() > 4 * _LONGEST:
        return None
    sign = -1 if (match["sign"] or "").startswith("-") else 1
    above, below = match["above"] or match["above1"], match["below"] or match["below1"]
    if above is not None:
        return _ratio(int(above), int(below), sign)
    digits = re.sub(r"[^\d]", "", match["digits"] or "0") + (match["places"] or "")
    if len(digits) > _LONGEST:
        return _long(digits, sign)
    try:
        value = number_from(digits).value
    except (Unreadable, ValueError):
        return None
    for raised, ten in ((match["exponent"], True), (match["power"], False)):
        if raised:
            scaled = _raised(value, raised, ten)
            if scaled is None:
                return None
            value = scaled
    if match["over"]:
        below = int(match["over"][1:]) if len(match["over"]) < 1000 else 0
        return None if below == 0 else sign * value / below
    return sign * value


def _long(digits: str, sign: int) -> Fraction:
    """Thousands of digits, which int() takes only in pieces."""
    whole, _, places = digits.partition(".")
    total = 0
    for start in range(0, len(whole + places), 4000):
        piece = (whole + places)[start : start + 4000]
        total = total * 10 ** len(piece) + int(piece)
    return Fraction(sign * total, 10 ** len(places))


def _ratio(above: int, below: int, sign: int) -> Fraction | None:
    return None if below == 0 else Fraction(sign * above, below)


def _raised(value: Fraction, raised: str, ten: bool) -> Fraction | None:
    written = re.search(r"([-+]?\w+)\s*\}?\Z", raised)
    exponent = written[1].lstrip("eE") if written else ""
    if not re.fullmatch(r"[-+]?\d{1,5}", exponent) or abs(int(exponent)) > LARGEST_EXPONENT:
        return None
    power = int(exponent)
    if ten:
        return value * Fraction(10) ** power
    if value == 0 and power <= 0:
        return None
    return value**power

"""Units, words, and what is said in words: no solution, all real numbers, days and times."""

from __future__ import annotations

import re
from fractions import Fraction

from rlpost.answers.tree import Date, Number, Ratio, Words

_UNIT_NAMES = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "mg": "milligram", "g": "gram", "kg": "kilogram", "lb": "pound lb", "oz": "ounce", "t": "ton tonne",
    "ml": "milliliter millilitre mL", "l": "liter litre L", "gal": "gallon", "s": "second sec", "ms": "millisecond",
    "min": "minute", "h": "hour hr", "day": "day", "week": "week", "month": "month", "year": "year yr",
    "mph": "mph", "kph": "kph kmh", "hz": "hertz Hz", "n": "newton N", "j": "joule J", "w": "watt W", "v": "volt V",
    "a": "ampere amp A", "k": "kelvin K", "pa": "pascal Pa", "mol": "mole mol", "deg": "degree deg",
    "rad": "radian rad", "percent": "percent percentage pct", "dollar": "dollar usd USD buck", "euro": "euro eur EUR",
    "cent": "cent", "unit": "unit", "yen": "yen", "yuan": "yuan", "rupee": "rupee rs Rs", "acre": "acre", "cc": "cc",
    "ev": "electronvolt eV", "cal": "calorie", "ohm": "ohm",
}  # fmt: skip
UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in (unit, *names.split())}
_SPEEDS = {"mi / h": "mph", "km / h": "kph"}
_BARE_UNITS = frozenset(
    name for name in UNITS if len(name) > 1 and name not in ("in", "ev", "pa", "cal", "usd", "mol", "rad", "rs")
)
_EMPTY_WORDS = frozenset(
    ["a", "an", "the", "of", "per", "each", "exactly", "about", "approximately", "only", "total", "in"]
)
_NO_UNIT = frozenset(
    [
        "not",
        "no",
        "wrong",
        "if",
        "when",
        "where",
        "for",
        "is",
        "are",
        "or",
        "and",
        "but",
        "nor",
        "than",
        "unless",
        "more",
        "less",
        "except",
    ]
)

NO_SOLUTION = "no solution"
_SAYINGS = {
    NO_SOLUTION: "no solution|no solutions|no real solution|no real solutions|there is no solution|there are no solutions|"
    "there is no real solution|there are no real solutions|no such solution|empty set|the empty set|no roots|no real roots",
    "all reals": "all real numbers|all reals|all real number|the set of all real numbers|the real numbers|real numbers|reals|"
    "all real values|any real number|every real number",
    "does not exist": "does not exist|dne|doesn't exist|the limit does not exist",
    "infinity": "infinity|infinite|positive infinity",
    "infinitely many": "infinitely many|infinitely many solutions|infinite solutions|infinite number of solutions",
}
_CANONICAL = {said: name for name, sayings in _SAYINGS.items() for said in sayings.split("|")}
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_MONTH = "(" + "|".join(f"{name[:3]}(?:{name[3:]})?" for name in _MONTHS) + r")\.?"
_DATES = (
    re.compile(rf"(?P<month>{_MONTH})\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:\s*,?\s+(?P<year>\d{{4}}))?", re.IGNORECASE),
    re.compile(
        rf"(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<month>{_MONTH})(?:\s*,?\s+(?P<year>\d{{4}}))?",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})"),
)  # fmt: skip
_CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(a|p)?\.?\s*(?:m\b\.?)?", re.IGNORECASE)
_SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def is_bare_unit(word: str) -> bool:
    """Whether letters without any \\text around them are a unit ("cm") rather than a product of variables."""
    return word in _BARE_UNITS or (word.endswith("s") and word[:-1] in _BARE_UNITS and len(word) > 3)


def words_of(text: str) -> Words:
    """A text in the form in which equal texts are equal."""
    said = re.sub(r"[\s_]+", " ", re.sub(r"[{}\"$\\]", " ", text)).strip(" .,;:!()*'").casefold()
    return Words(_CANONICAL.get(said, said))


def unit_of(text: str) -> str:
    r"""The unit that a phrase such as "square centimeters", "cm^2" or "km/h" is; empty for a phrase that means none.

    Raises:
        ValueError: the phrase is no unit ("if x", "or less").
    """
    flat = re.sub(r"[{}\\]|\bcirc\b", " ", text.replace("^\\circ", " deg "))
    powers = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cubed": "3", "cu": "3"}
    made: list[str] = []
    ahead = ""
    pieces = re.findall(r"[A-Za-z']+|\^\s*-?\s*\d+|/|\d+", flat)
    for at, word in enumerate(pieces):
        is_raised = ahead != "" or "^" in "".join(pieces[at + 1 : at + 2])  # then "in" is an inch
        if word[0] in "^0123456789":
            if not made:
                raise ValueError(text)
            made[-1] += re.sub(r"[\^\s]", "", word)
        elif word.lower() in powers:
            if word.lower() in ("squared", "cubed") and made:
                made[-1] += powers[word.lower()]
            else:
                ahead = powers[word.lower()]
        elif word == "/" or word.lower() == "per":
            made.append("/")
        elif word.lower() in _NO_UNIT:
            raise ValueError(text)
        elif word.lower() not in _EMPTY_WORDS or (word in UNITS and (len(pieces) == 1 or is_raised)):
            made.append(_unit_name(word) + ahead)
            ahead = ""
    if len(made) > 6:
        raise ValueError(text)
    return _SPEEDS.get(" ".join(made), " ".join(made))


def _unit_name(word: str) -> str:
    if word in UNITS:
        return UNITS[word]
    lower = word.lower()
    for name in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if len(name) > 1 and name in UNITS:
            return UNITS[name]
    return lower[:-3] + "y" if lower.endswith("ies") else lower.removesuffix("s")


def read_date(text: str) -> Date | None:
    """A day written out or in ISO form; None if the text is none."""
    for form in _DATES:
        match = form.fullmatch(text.strip())
        if match:
            month = match["month"].lower()
            number = int(month) if month.isdigit() else next(i for i, m in enumerate(_MONTHS, 1) if m[:3] == month[:3])
            return Date(int(match["year"] or 0), number, int(match["day"]))
    return None


def read_clock(text: str) -> Ratio | None:
    """A time of day, which can also be a ratio; None if the text is none."""
    match = _CLOCK.fullmatch(text.strip())
    if match is None:
        return None
    parts = tuple(Number(Fraction(part)) for part in match.group(1, 2, 3) if part)
    return Ratio(parts, clock=True, half=(match[4] or "").lower())


def small_number(word: str) -> Number | None:
    """The number that a word such as "seven" says."""
    return Number(Fraction(_SMALL.index(word))) if word in _SMALL else None

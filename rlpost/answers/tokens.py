"""Cuts cleaned LaTeX into tokens, and finds which brackets belong together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlpost.answers.tree import Unreadable
from rlpost.answers.words import is_bare_unit

LONGEST = 2000
"""Characters of an answer that are read; longer ones are no final answers."""
DEEPEST = 40
"""How deep brackets may be nested."""

_UNARY_NAMES = """
sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc
sinh cosh tanh coth sech csch ln lg exp arsinh arcosh artanh
asin acos atan sgn
"""
UNARY = frozenset(_UNARY_NAMES.split())
"""Functions of one number."""
FUNCTIONS = UNARY | {"Im", "Re", "arg", "deg", "det", "gcd", "lcm", "log", "max", "min", "sqrt"}
_WORDS = {
    "pi": r"\pi", "infinity": r"\infty", "inf": r"\infty", "oo": r"\infty", "and": "and", "or": "or", "in": r"\in",
    "theta": r"\theta", "alpha": r"\alpha", "beta": r"\beta", "union": r"\cup", "cup": r"\cup", "cap": r"\cap",
}  # fmt: skip
_TOKEN = re.compile(
    r"""\\text\s*\{(?P<text>[^{}]*)\}
      | (?P<number>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+\.\d*(?=\s*\\(?:overline|dot|bar)\b)
                  |\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|(?<![\d.])\.\d+(?:[eE][-+]?\d+)?)
      | (?P<env>\\(?:begin|end)\s*\{[a-zA-Z*]+\}(?:\s*\{[clr|\s]*\})?)
      | (?P<command>\\(?:[A-Za-z]+|[{}|%\\#&_]))
      | (?P<word>[A-Za-z]+)
      | (?P<mark>[-+*/^_(){}\[\]<>=|!,;:%'.?&"~@\#])
      | (?P<space>\s+)""",
    re.VERBOSE,
)
OPENING = {
    "(": ")",
    "[": "]",
    "{": "}",
    r"\{": r"\}",
    r"\langle": r"\rangle",
    r"\lfloor": r"\rfloor",
    r"\lceil": r"\rceil",
}
CLOSING = frozenset(OPENING.values())
_SEPARATES = frozenset({"(", "[", r"\{", r"\langle"})


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of an answer. `kind` is number, text, letter, command, mark or env; `spaced` tells of a space before it."""

    kind: str
    text: str
    spaced: bool = False

    def is_mark(self, *marks: str) -> bool:
        return self.text in marks and self.kind in ("mark", "command")


Tokens = Sequence[Token]


def tokenize(text: str, thousands: bool = True) -> list[Token]:
    """The tokens of a cleaned answer.

    Args:
        text: as `clean` makes it.
        thousands: whether "1,234" outside of brackets is one number; within brackets a comma always separates.

    Raises:
        Unreadable: it is too long, or has a character that no answer has.
    """
    if len(text) > LONGEST:
        raise Unreadable("too long")
    tokens: list[Token] = []
    place, spaced, depth = 0, False, 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise Unreadable(f"character {text[place]!r}")
        kind, place = match.lastgroup or "text", match.end()
        if kind == "space":
            spaced = True
            continue
        piece = match[kind]
        if kind == "number" and "," in piece and (depth > 0 or not thousands):
            piece = piece.partition(",")[0]
            place = match.start() + len(piece)
        if kind == "word":
            tokens += _letters(piece, spaced, text[place : place + 1])
        else:
            tokens.append(
                Token(
                    kind,
                    piece.replace(",", "")
                    if kind == "number"
                    else re.sub(r"\s", "", piece)
                    if kind == "env"
                    else piece,
                    spaced,
                )
            )
        depth += (piece in _SEPARATES) - (piece in CLOSING and piece != "}")
        spaced = False
    return tokens


def _letters(word: str, spaced: bool, behind: str) -> list[Token]:
    if word in FUNCTIONS and len(word) > 1 and word not in ("min", "deg", "in", "det", "arg", "max"):
        return [Token("command", "\\" + word, spaced)]
    if word.lower() in _WORDS and not (word == "in" and behind == "^"):
        made = _WORDS[word.lower()]
        return [Token("command" if made[0] == "\\" else "joint", made, spaced)]
    if is_bare_unit(word) or len(word) > 3:
        return [Token("text", word, spaced)]
    return [Token("letter", letter, spaced and i == 0) for i, letter in enumerate(word)]


def match_of(tokens: Tokens, start: int) -> int:
    """The place of the bracket that closes the one at `start`. Kinds may differ, as in [0, 1).

    Raises:
        Unreadable: nothing closes it.
    """
    depth = 0
    for place in range(start, len(tokens)):
        token = tokens[place]
        if token.kind == "env":
            depth += 1 if token.text.startswith(r"\begin") else -1
        elif token.kind in ("mark", "command"):
            depth += (token.text in OPENING) - (token.text in CLOSING)
        if depth > DEEPEST:
            raise Unreadable("too deep")
        if depth == 0:
            return place
    raise Unreadable("a bracket is not closed")


def split(tokens: Tokens, *separators: str, joints: bool = False) -> tuple[list[Tokens], list[str]]:
    """Splits at the separators that stand in no brackets. Returns the parts, and what stood between them.

    Args:
        tokens: what is split.
        separators: marks or commands.
        joints: whether the words "and" and "or" separate, too.
    """
    parts: list[Tokens] = []
    between: list[str] = []
    depth, begin = 0, 0
    for place, token in enumerate(tokens):
        if token.kind == "env":
            depth += 1 if token.text.startswith(r"\begin") else -1
        elif token.kind in ("mark", "command"):
            depth += (token.text in OPENING) - (token.text in CLOSING)
        if depth == 0 and (
            (token.text in separators and token.kind in ("mark", "command")) or (joints and token.kind == "joint")
        ):
            parts.append(tokens[begin:place])
            between.append(token.text)
            begin = place + 1
        if depth < 0 or depth > DEEPEST:
            raise Unreadable("brackets")
    if depth:
        raise Unreadable("brackets")
    return [*parts, tokens[begin:]], between


def flat(tokens: Tokens) -> str:
    """The tokens as one text: equal for answers that differ in spaces alone."""
    return " ".join(token.text.strip() for token in tokens)

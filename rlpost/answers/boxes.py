r"""The boxes of a text: \boxed{...} and \fbox{...}, found in one pass however they are nested or left open."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*(\{)|\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"\\(?:boxed|fbox)(?:\s+|(?=\d))(-?\d+(?:[.,/]\d+)*|[A-Za-z])(?![A-Za-z\d])")
_OPENED = re.compile(r"\\(?:boxed|fbox)\b")

# What may stand between two boxes that together are one answer.
_MARKUP = re.compile(
    r"\\(?:[()\[\],;:! ]|q?quad\b|left\b|right\b|\\)|[$*~]|\\(?:text|mbox|textrm|mathrm)\s*\{([^{}]*)\}"
)
_JOINT = re.compile(
    r"""\s*(?:[A-Za-z]+\s+){0,4}?           # what the first box counts: "papers", "for part (a)"
        (?:\(\w{1,4}\)\s*)?
        (?:[,;&]\s*(?:and|or)?|\band\b|\bor\b|\bas\s+well\s+as\b|\n)\s*
        (?:[-•]\s+)?                         # an item of a list
        (?:[A-Za-z]+\s+){0,3}?               # "the second is"
        (?:\(\w{1,4}\)\s*[:.]?|\d{1,2}[.)])?\s*
        (?:[A-Za-z]\w?(?:_\{?\w+\}?)?'*(?:\(\w\))?\s*&?\s*=)?\s*-?\s*""",
    re.VERBOSE,
)
_ITEM_ENDS = re.compile(r"\A\s*\.(?=\s*\n\s*(?:\(\w{1,4}\)|\d{1,2}[.)]|[-•])\s)")
_SECOND_THOUGHTS = re.compile(
    r"\b(?:no|not|wait|but|instead|rather|actually|correct\w*|wrong|mistake\w*|however|sorry|oops|hmm+|should|so|then|"
    r"therefore|thus|hence|gives?|becomes?|now|again|check\w*|final\w*|answer\w*|is|simplif\w+|step|since|because|"
    r"maybe|perhaps|possibly|either|alternatively|could|i)\b",
    re.IGNORECASE,
)
_BEHIND = re.compile(
    r"\s*(?:_\s*(?:\{\s*\w+\s*\}|\d)|\^\s*(?:\{[^{}]*\}|\d|\\circ)|!+|\\%|%|"
    r"(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*(?:\{[^{}]*\}|\d+))"
)
_SIGN = re.compile(r"(?:(?:=|[$(\[:{&]|\\\(|\\\[|\A|\n)\s*-\s*|(?:(?<=\s)|(?<=\*))-)(?:\$|\\\(|\*\*)?\s*\Z")
_OPERAND = re.compile(r"(?:[\d)\]}]|(?<![A-Za-z])[A-Za-z]|\\[A-Za-z]+)\s*-\s*\Z")


@dataclass(frozen=True, slots=True)
class Box:
    """A closed box: where it begins and ends in its text, and what is in it."""

    start: int
    end: int
    content: str


def find_boxes(text: str) -> list[Box]:
    """The closed boxes that lie in no other closed box, in order. Takes time in proportion to the text's length."""
    boxes: list[Box] = []
    open_braces: list[tuple[int, int] | None] = []  # of boxes: where they begin, and where their content does
    for match in _BRACES.finditer(text):
        if match[1]:
            open_braces.append((match.start(), match.end()))
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0] == "}" and open_braces:
            began = open_braces.pop()
            if began is not None:
                while boxes and boxes[-1].start > began[0]:
                    boxes.pop()
                boxes.append(Box(began[0], match.end(), text[began[1] : match.start()].strip()))
    if not boxes:
        boxes = [Box(m.start(), m.end(), m[1]) for m in _BARE.finditer(text)]
    return boxes


def has_open_box(text: str) -> bool:
    """Whether a box begins in the text, closed or not."""
    return _OPENED.search(text) is not None


def boxed_answers(text: str) -> list[str]:
    """What stands in the last box, and in those right before it that are joined to it: together they are the answer.

    A box that is joined to the next one by nothing but "and", "or", a comma or a line's end (and a label such as "y =")
    is part of the same answer; one that is followed by anything else has been replaced by the later one.
    """
    boxes = find_boxes(text)
    if not boxes:
        return []
    first = len(boxes) - 1
    while first > 0 and _joined(text[boxes[first - 1].end : boxes[first].start]):
        first -= 1
    answers: list[str] = []
    for box in boxes[first:]:
        whole = _with_surroundings(text, box)
        if whole not in answers:
            answers.append(whole)
    return answers


def _joined(between: str) -> bool:
    if len(between) > 80 or "\n\n\n" in between:
        return False
    plain = _MARKUP.sub(lambda m: f" {m[1]} " if m[1] else " ", between.replace(r"\\", "\n"))
    if not plain.strip():
        return True
    plain = _ITEM_ENDS.sub("", plain)
    if _SECOND_THOUGHTS.search(plain) or re.search(r"[.!?](?:\s|\Z)", re.sub(r"\d[.)]|[,;]\s*\.", "", plain)):
        return False
    return _JOINT.fullmatch(re.sub(r"\s*\n\s*", "\n", plain)) is not None


def _with_surroundings(text: str, box: Box) -> str:
    """The box's content, with a sign that stands before it and an exponent, a base or a percent sign behind it."""
    content = box.content
    behind = _BEHIND.match(text, box.end)
    if behind:
        tail = behind[0].strip()
        if tail[0] == "^" and "circ" not in tail and not re.fullmatch(r"\d+|[A-Za-z]", content):
            content = f"({content})"
        content += tail
    before = text[max(box.start - 30, 0) : box.start].replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")
    if _SIGN.search(before) and not _OPERAND.search(re.sub(r"(?:\$|\\\(|\*\*)\s*\Z", "", before)):
        content = f"-({content})" if re.search(r"[-+]", content) else f"-{content}"
    return content

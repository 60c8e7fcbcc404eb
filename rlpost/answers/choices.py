"""The letter that a text chooses from several, where it chooses one."""

from __future__ import annotations

import re

from rlpost.answers.boxes import boxed_answers
from rlpost.answers.final import tagged_answers

_TAGS_JOINED = re.compile(r"\s*(?:,|;|/|\band\b|\bor\b)?\s*", re.IGNORECASE)
_STATED = re.compile(
    r"\b(?:answer|(?:correct|right|best|final)\s+(?:option|choice))\s*(?:\s(?:is|would be|must be|should be)\b|:|=)\s*:?\s*"
    r"(?:(?:option|choice|letter|answer)\b\s*:?\s*)?(?=([^\n]{0,200}))",
    re.IGNORECASE,
)
_MARKUP = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox|boxed|fbox|textbf)\s*(?=\{)|\\[()\[\],;:! ]|[*_$`{}\"“”]"
)
_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])(?![A-Za-z'’0-9])\s*([)\]])?")
_BARE = re.compile(r"[(\[]*([A-Z])(?![A-Za-z'’0-9])(?:[)\].:]+[^\n]*)?")
# What may follow the letter in a sentence: its text behind a bracket or colon, a clause, or the sentence's end.
_CLAUSE = re.compile(
    r"\s*(?:\Z|[.,:;!?)\]—–-]|\(|\b(?:because|since|as|for|due|which|given|based|so|in this)\b)", re.IGNORECASE
)
_ARTICLES = frozenset("aAI")
_JOINT = re.compile(
    r"\s*[)\].]*\s*(?:(?:,|;|/|&|\+|\bor\b|\band\b|\bas well as\b|\balso\b)\s*)+"
    r"(?:(?:or|and|maybe|perhaps|possibly|also|option|choice|both|either)\s+)*([(\[]?)([A-Za-z])(?![A-Za-z'’0-9])([)\]]?)",
    re.IGNORECASE,
)  # fmt: skip
_SIDE_BY_SIDE = re.compile(r"(?:[(\[]?[A-Z](?![A-Za-z])[)\]]?\s*)+\.?")


def chosen(text: str, letters: str) -> str | None:
    r"""The letter chosen, in upper case; None where none is, or several are.

    Read in this order: the last <answer>...</answer>, the last box or boxes, the last "answer is ..." or "Answer: ...", or a
    text that is nothing but the letter, perhaps with the choice's text behind it.
    """
    tagged = tagged_answers(text)
    if tagged:
        if len(tagged) > 1 and _TAGS_JOINED.fullmatch(text[tagged[0][1] : tagged[1][0]][:50]):
            return _only_letter({_whole(content, letters) for _, _, content in tagged})
        return _in_tags(tagged[-1][2], letters)
    boxed = boxed_answers(text)
    if boxed:
        return _only_letter({_whole(box, letters) for box in boxed})
    for match in reversed(list(_STATED.finditer(text))):
        letter = _stated(match[1], letters)
        if letter is not None:
            return letter or None
    return _bare(text.strip(), letters)


def _only_letter(letters: set[str | None]) -> str | None:
    return letters.pop() if len(letters) == 1 else None


def _in_tags(text: str, letters: str) -> str | None:
    boxed = boxed_answers(text)
    if boxed:
        return _only_letter({_whole(box, letters) for box in boxed})
    stated = _STATED.search(text)
    return (_stated(stated[1], letters) or None) if stated else _whole(text, letters)


def _whole(text: str, letters: str) -> str | None:
    """The letter of a text that is nothing but a choice: "B", "(b)", "B) Paris", "option B"."""
    plain = re.sub(r"\A(?:option|choice|answer)\s*:?\s*", "", _plain(text), flags=re.IGNORECASE)
    match = _LETTER.match(plain)
    if match is None or match[1].upper() not in letters.upper():
        return None
    behind = plain[match.end() :]
    if _joined(behind, letters):
        return None
    return match[1].upper() if match[2] or re.match(r"\s*(?:\Z|[.:,)\]—–-])", behind) else None


def _stated(rest: str, letters: str) -> str | None:
    """The letter with which the rest of a statement begins; empty where several are chosen; None where none is."""
    plain = re.sub(r"\A(?:option|choice|letter)\s+", "", _plain(rest), flags=re.IGNORECASE)
    plain = re.sub(r"\A(?:both|either)\s+(?=[(\[]?[A-Za-z][)\]]?\s+(?:and|or)\b)", "", plain, flags=re.IGNORECASE)
    match = _LETTER.match(plain)
    if match is None or match[1].upper() not in letters.upper():
        return None
    behind = plain[match.end() :]
    if _joined(behind, letters) or (not match[2] and _SIDE_BY_SIDE.fullmatch(behind)):
        return ""
    if match[2] or _CLAUSE.match(behind):
        return match[1].upper()
    is_article = match[1] in _ARTICLES or match[1].islower()
    return None if is_article else match[1].upper()


def _joined(behind: str, letters: str) -> bool:
    """Whether another letter is chosen beside the first: "or C", ", C". An article or a negation is no choice."""
    match = _JOINT.match(behind)
    if match is None or match[2].upper() not in letters.upper():
        return False
    rest = behind[match.end() :]
    if (match[2].isupper() and match[2] not in _ARTICLES) or match[3]:
        return True
    return _CLAUSE.match(rest) is not None or _JOINT.match(rest) is not None


def _bare(text: str, letters: str) -> str | None:
    plain = _plain(text)
    match = _BARE.fullmatch(plain)
    if match is None or match[1] not in letters.upper():
        return None
    behind = plain[match.end(1) :]
    others = re.findall(r"(?:\bor\b|\band\b|[,;/])\s*[(\[]?([A-Z])(?=[)\].:]|\s*\Z)", behind)
    return None if any(other in letters.upper() for other in others) or _joined(behind, letters) else match[1]


def _plain(text: str) -> str:
    return " ".join(_MARKUP.sub(" ", text).split())

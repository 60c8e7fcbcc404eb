r"""The final answer of a text: its last box or boxes, or else its last formula or number."""

from __future__ import annotations

import re

from rlpost.answers.boxes import boxed_answers, has_open_box
from rlpost.answers.clean import MINUS_SIGNS, plain_signs

_FORMULA = re.compile(
    r"""(?<!\\)\$\$(?P<a>.{1,1000}?)(?<!\\)\$\$
      | \\\[(?P<b>.{1,1000}?)\\\]
      | \\\((?P<c>.{1,1000}?)\\\)
      | (?<!\\)\$(?!\s?\d[\d.,]*\s+[A-Za-z]{2})(?P<d>[^$\n]{1,1000}?)(?<!\\)\$""",
    re.DOTALL | re.VERBOSE,
)
_STATEMENT = re.compile(r"\banswer(?:\s+is|\s*:)\s*:?\s*([^\n]{1,200})", re.IGNORECASE)
_LONGEST = 8_000  # characters at the end of a text that are searched for an answer without a box

# What a formula in prose is made of. A single letter counts only beside a sign, so that "a" and "I" are words.
_PIECE = r"""
    \\text\s*\{[^{}]*\} | \\[A-Za-z]+ | \\[,;:!{}%$ ] | \d+(?:[.,]\d+)*(?:[eE][-+]?\d+)? | \.\d+
  | [-+*/^_=<>!|%°(){}\[\]√π∞≤≥≠∪±×÷·:;,.'] | [½¼¾⅓⅔²³]
  | (?<![A-Za-z])[A-Za-z](?![A-Za-z'])(?=\s?[=+*/^<>_≤≥\-(])
  | (?<=[\d)}\]=+*/^<>(\-])[A-Za-z](?![A-Za-z]) | (?<=[=+*/<>\-]\s)[A-Za-z](?![A-Za-z'])
  | (?<![A-Za-z])(?:sqrt|pi|sin|cos|tan|ln|log)(?![A-Za-z])
"""
_RUN = re.compile(rf"(?:{_PIECE})(?:\s?(?:{_PIECE}))*", re.VERBOSE)
_PUNCTUATION = " \t\r\n,.;:!?'*"
_BEGINS = re.compile(r"\A(?:[\s,.;:!?'*)\]}]+(?!\d)|-\s+|[\s,;:!?'*)\]}]+)")
_HAS_VALUE = re.compile(r"\d|\\(?:pi|infty|sqrt|frac|emptyset)|[π∞√]|[½¼¾⅓⅔]")
_DENIED = re.compile(r"(?:\bnot|\brather than|\binstead of)\s+\Z", re.IGNORECASE)  # "7, not 8"
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def final_answers(text: str) -> list[str]:
    """The final answer of a text behind its thinking, as one text or, where several boxes are the answer, as several."""
    tagged = tagged_answers(text)
    inside = _within(tagged[-1][2].strip(), whole=True) if tagged else []
    if inside:
        return inside
    return _within(text, whole=False)


def tagged_answers(text: str) -> list[tuple[int, int, str]]:
    """The last two <answer>...</answer> of a text: where each begins and ends, and what stands in it."""
    answers: list[tuple[int, int, str]] = []
    lower, end = text.lower(), len(text)
    while len(answers) < 2:
        closing = lower.rfind("</answer>", 0, end)
        opening = lower.rfind("<answer>", 0, max(closing, 0))
        if opening < 0:
            break
        answers.insert(0, (opening, closing + len("</answer>"), text[opening + len("<answer>") : closing]))
        end = opening
    return answers


def said_answer(text: str) -> str | None:
    """What stands behind the last "the answer is" up to the end of its line; None without one, or where a box says it."""
    if has_open_box(text):
        return None
    statement = None
    for statement in _STATEMENT.finditer(text[-_LONGEST:]):  # noqa: B007
        pass
    return statement[1].strip() if statement else None


def _within(text: str, whole: bool) -> list[str]:
    boxed = boxed_answers(text)
    if boxed:
        return boxed
    if has_open_box(text):
        return []  # a box that is not closed: the answer has been cut off
    if whole and text:
        return [text]
    last = last_formula(text)
    return [] if last is None else [last]


def last_formula(text: str) -> str | None:
    """The last formula or number of a text, taken as a whole; None without one."""
    text = text[-_LONGEST:]
    formula, end = None, 0
    for match in _FORMULA.finditer(text):
        end = match.end()
        if not _DENIED.search(text, max(match.start() - 30, 0), match.start()):
            formula = match
    behind = text[end:]
    run = _last_run(behind)
    if run is not None:
        return run
    if formula is None:
        return None
    content = next(group for group in formula.groups() if group)
    before = text[: formula.start()].rstrip()
    sign = "-" if before.endswith(("-", "−")) and not re.search(r"[\w)\]}]\s*[-−]\Z", before) else ""
    return sign + content.strip()


def _last_run(text: str) -> str | None:
    """The last piece of prose that is a formula with a value in it."""
    text = text.translate(MINUS_SIGNS).replace("**", " ").replace("`", " ").replace("$", " ")
    text = re.sub(r"[-+](?=\s*\n)", " ", text)
    last = None
    for line in reversed(text.split("\n")):
        for match in _RUN.finditer(line):
            before = line[: match.start()]
            run = _trimmed(match[0], glued=match[0].startswith("-") and bool(re.search(r"[\w)]\Z", before)))
            attached = (
                run is not None
                and re.search(r"[A-Za-z]\Z", before)
                and match[0].startswith(run[:1])
                and run[0].isdigit()
            )
            if run and _HAS_VALUE.search(run) and not attached and not _DENIED.search(before):
                last = run
        if last is not None:
            return last
    return None


def _trimmed(run: str, glued: bool) -> str | None:
    run = plain_signs(run)
    for _ in range(8):
        shorter = _BEGINS.sub("", run.rstrip(_PUNCTUATION)).strip()
        shorter = re.sub(r"\A[=<>+]\s*", "", shorter) if re.match(r"[=+]", shorter) else shorter
        shorter = re.sub(r"[-+*/=<>^_]\s*\Z", "", shorter)
        shorter = _balanced(shorter)
        if shorter == run:
            break
        run = shorter
    if glued and run.startswith("-"):
        run = run[1:].strip()
    return run or None


def _balanced(run: str) -> str:
    """Without an opening bracket that is not closed at the end, and a closing one that was not opened at the beginning."""
    stack: list[tuple[str, int]] = []
    for at, character in enumerate(run):
        if character in _PAIRS:
            stack.append((character, at))
        elif character in _PAIRS.values():
            if not stack:
                return (
                    run[:at].strip()
                    if _HAS_VALUE.search(run[:at]) and not _HAS_VALUE.search(run[at:])
                    else run[at + 1 :].strip()
                )
            stack.pop()
    if stack:
        opened = stack[0][1]
        head, tail = run[:opened].strip(), run[opened + 1 :].strip()
        return tail if _HAS_VALUE.search(tail) else head
    return run

"""The source `arithmetic`: sums and differences of small numbers, each with a worked solution."""

from __future__ import annotations

import math
import random
import sys
from itertools import cycle, islice, zip_longest

from rlpost.data.rows import Row
from rlpost.errors import DataError
from rlpost.experience import Demonstration
from rlpost.recipe.sections.data import ArithmeticSource

Question = tuple[int, str, int]


def arithmetic_rows(source: ArithmeticSource, where: str = "data.train") -> list[Row]:
    """`source.size` questions, determined by the source's seed alone.

    The operations take turns. Questions are distinct until the range is exhausted, and then repeat in the same order.
    Columns: `answer` (text), `a`, `b` (numbers), `op`.
    """
    if source.high < source.low:
        raise DataError(f"{where}.high ({source.high}) is below {where}.low ({source.low}): no number is in between.")
    if not source.operations:
        raise DataError(f"{where}.operations is empty: name at least one of `+` and `-`.")
    operations = tuple(dict.fromkeys(source.operations))
    turns = zip_longest(*(_draw(source, op) for op in operations))
    distinct = [question for turn in turns for question in turn if question is not None][: source.size]
    name = f"arithmetic:{source.seed}"
    return [_row(f"{name}/{i}", q, source, where) for i, q in enumerate(islice(cycle(distinct), source.size))]


def worked_solution(a: int, op: str, b: int) -> str:
    """The calculation of `a op b` with b split into tens and ones (and so on), ending in "The answer is ...".

    >>> worked_solution(52, "-", 38)
    '38 = 30 + 8. 52 - 30 = 22. 22 - 8 = 14. The answer is 14.'
    """
    if b < 0:  # adding a negative number is taking it away
        op, b = ("-" if op == "+" else "+"), -b
    digits = str(b)
    parts = [int(digit) * 10 ** (len(digits) - 1 - i) for i, digit in enumerate(digits) if digit != "0"] or [0]
    steps = [f"{b} = {' + '.join(map(str, parts))}."] if len(parts) > 1 else []
    total = a
    for part in parts:
        after = total + part if op == "+" else total - part
        steps.append(f"{total} {op} {part} = {after}.")
        total = after
    return " ".join([*steps, f"The answer is {total}."])


def _draw(source: ArithmeticSource, op: str) -> list[Question]:
    """Distinct questions with one operation in random order: all there are, or as many as the source's size."""
    span = source.high - source.low + 1
    # Every question has a number, so that a range of any size is drawn from without listing it.
    space = span * span if op == "+" else span * (span + 1) // 2
    numbers = _distinct(random.Random(f"{source.seed}/{op}"), space, min(source.size, space))
    pairs = (divmod(number, span) if op == "+" else _ordered_pair(number) for number in numbers)
    return [(source.low + x, op, source.low + y) for x, y in pairs]


def _distinct(rng: random.Random, space: int, count: int) -> list[int]:
    """`count` distinct numbers below `space` in random order."""
    if space <= sys.maxsize:
        return rng.sample(range(space), count)
    numbers: dict[int, None] = {}  # such a range has no length in CPython, and next to no collisions
    while len(numbers) < count:
        numbers[rng.randrange(space)] = None
    return list(numbers)


def _ordered_pair(number: int) -> tuple[int, int]:
    """The pair (x, y) with 0 <= y <= x that has this number: (0,0), (1,0), (1,1), (2,0), ..."""
    x = (math.isqrt(8 * number + 1) - 1) // 2
    return x, number - x * (x + 1) // 2


def _row(row_id: str, question: Question, source: ArithmeticSource, where: str) -> Row:
    a, op, b = question
    try:
        text = source.template.format(a=a, op=op, b=b)
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"{where}.template ({source.template!r}) cannot be filled in: {error!r}. It may name {{a}}, {{op}} and "
            "{b} only; write a literal brace twice."
        ) from error
    answer = a + b if op == "+" else a - b
    columns = {"answer": str(answer), "a": a, "b": b, "op": op}
    return Row(row_id, text, columns, Demonstration(worked_solution(a, op, b)))

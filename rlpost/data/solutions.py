"""Worked solutions of some reasoning-gym tasks: the steps that a person would write down, ending in <answer>...</answer>.

A new task is one function from the entry's metadata to (steps, answer) in `SOLVERS`.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

Worked = tuple[list[str], str]
_FRACTIONS = {"plain": "A/B", "latex_inline": "$A/B$", "latex_frac": r"$\frac{A}{B}$", "latex_dfrac": r"$\dfrac{A}{B}$"}
_OPERATORS: dict[type[ast.operator], tuple[str, Callable[[int, int], int]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
}


def worked_solution(task: str, entry: Mapping[str, Any]) -> str | None:
    """The worked solution of an entry; None for tasks without a solver, and for entries that one cannot deal with."""
    solver = SOLVERS.get(task)
    worked = solver(entry["metadata"]) if solver is not None else None
    if worked is None or worked[1] != str(entry["answer"]):  # never teach another answer than the verifier's
        return None
    steps, answer = worked
    return "\n".join([*steps, f"<answer>{answer}</answer>"])


def _expression(meta: Mapping[str, Any]) -> Worked | None:
    """One operation after the other, inner brackets first; whole numbers, exact divisions only."""
    try:
        tree: ast.AST = ast.parse(meta["expression"], mode="eval").body
    except SyntaxError:
        return None
    steps: list[str] = []
    value = _evaluate(tree, steps)
    return None if value is None else (steps or [f"The number is {value}."], str(value))


def _evaluate(node: ast.AST, steps: list[str]) -> int | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _evaluate(node.operand, steps)
        return None if value is None else -value
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _evaluate(node.left, steps), _evaluate(node.right, steps)
    if left is None or right is None:
        return None
    if isinstance(node.op, ast.Div):
        if right == 0 or left % right:
            return None
        sign, result = "/", left // right
    elif type(node.op) in _OPERATORS:
        sign, apply = _OPERATORS[type(node.op)]
        result = apply(left, right)
    else:
        return None
    steps.append(f"{left} {sign} {right} = {result}.")
    return result


def _euclid(a: int, b: int) -> tuple[list[str], int]:
    steps = []
    while b:
        steps.append(f"{a} = {a // b} * {b} + {a % b}.")
        a, b = b, a % b
    return steps, a


def _gcd(meta: Mapping[str, Any]) -> Worked:
    steps, (result, *rest) = [], meta["numbers"]
    for number in rest:
        more, common = _euclid(max(result, number), min(result, number))
        steps += [*more, f"The greatest common divisor of {result} and {number} is {common}."]
        result = common
    return steps, str(result)


def _lcm(meta: Mapping[str, Any]) -> Worked:
    steps, (result, *rest) = [], meta["numbers"]
    for number in rest:
        more, common = _euclid(max(result, number), min(result, number))
        multiple = math.lcm(result, number)
        steps += [*more, f"The common divisor is {common}, so {result} * {number} / {common} = {multiple}."]
        result = multiple
    return steps, str(result)


def _fraction(meta: Mapping[str, Any]) -> Worked | None:
    style = _FRACTIONS.get(meta["style"])
    if style is None:
        return None
    a, b = meta["numerator"], meta["denominator"]
    steps, common = _euclid(max(a, b), min(a, b))
    steps += [f"Divide both by {common}: {a} / {common} = {a // common}, {b} / {common} = {b // common}."]
    return steps, style.replace("A", str(a // common)).replace("B", str(b // common))


def _factors(meta: Mapping[str, Any]) -> Worked:
    steps: list[str] = []
    factors: list[str] = []
    left = meta["number"]
    for factor in meta["factors"]:
        steps.append(f"{left} = {factor} * {left // factor}.")
        left, factors = left // factor, [*factors, str(factor)]
    return steps, " × ".join(factors)


def _backward(meta: Mapping[str, Any]) -> Worked:
    word = meta["word"]
    return [f"The letters are {' '.join(word)}.", f"From the last to the first: {' '.join(word[::-1])}."], word[::-1]


def _letters(meta: Mapping[str, Any]) -> Worked:
    letter, total, steps = meta["target_letter"], 0, []
    for word in meta["span"]:
        count = word.lower().count(letter)
        total += count
        steps.append(f"{word}: {count}, together {total}.")
    return steps, str(total)


def _equation(meta: Mapping[str, Any]) -> Worked | None:
    """A linear equation of one unknown that stands on the left: a x + b = c in whole numbers."""
    name, equation = meta["variable"], meta["equation"]
    left, _, right = equation.partition(" = ")
    values = [_evaluate(ast.parse(left.replace(name, f"({x})"), mode="eval").body, []) for x in (0, 1)]
    if values[0] is None or values[1] is None or not right.lstrip("-").isdigit():
        return None
    a, b, c = values[1] - values[0], values[0], int(right)
    if a == 0 or (c - b) % a:
        return None
    steps = [f"{equation}."]
    steps += [f"{a}*{name} = {c} {'-' if b > 0 else '+'} {abs(b)} = {c - b}."] if b else []
    return [*steps, f"{name} = {c - b} / {a} = {(c - b) // a}."], str((c - b) // a)


SOLVERS: dict[str, Callable[[Mapping[str, Any]], Worked | None]] = {
    "basic_arithmetic": _expression,
    "chain_sum": _expression,
    "products": _expression,
    "gcd": _gcd,
    "lcm": _lcm,
    "fraction_simplification": _fraction,
    "prime_factorization": _factors,
    "spell_backward": _backward,
    "letter_counting": _letters,
    "simple_equations": _equation,
}

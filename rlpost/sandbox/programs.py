"""Test cases for programs that a model wrote: what they are in public data sets, and how a program is held against them.

The right outputs never enter the sandbox where that can be had: of a case with standard input, and of one that compares a call
with a literal, only the input goes in, and what comes out is compared here. So a program cannot read, change or forge what it
is measured by. Other assertions run beside the program, which could then make them pass without solving anything (by an object
that equals everything, say): `Assertion` is for these.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from rlpost.sandbox.bubblewrap import Limits, run

_BEYOND_TESTS_S = 5.0  # for the sandbox, and for what starts the program in it


@dataclass(frozen=True, slots=True)
class Stream:
    """A whole program: what it reads, and what it must write."""

    stdin: str
    stdout: str


@dataclass(frozen=True, slots=True)
class Call:
    """An expression over what the program defines, and the value that it must have: a literal of Python, or JSON's."""

    expression: str
    value: Any
    loose: bool = False  # tuples and lists are the same, as where values come from JSON


@dataclass(frozen=True, slots=True)
class Assertion:
    """Statements that run behind the program and must not raise."""

    statements: str


Case = Stream | Call | Assertion


def passed(program: str, cases: Sequence[Case], *, seconds: float, limits: Limits | None = None) -> list[bool]:
    """By case: whether the program passes it within `seconds`. All run in one sandbox, each in a process of its own. Raises
    Unavailable where there is none."""
    base = limits or Limits()
    whole = Limits(
        seconds=seconds * len(cases) + _BEYOND_TESTS_S,
        cpu_seconds=math.ceil(seconds) + 1,
        memory_mib=base.memory_mib,
        processes=base.processes,
        files_mib=base.files_mib,
        output_kib=base.output_kib * max(1, len(cases)),
    )
    asked = [_asked(case) for case in cases]
    task = json.dumps({"cases": asked, "seconds": seconds, "limit": base.output_kib * 1024})
    driver = files("rlpost.sandbox").joinpath("inside.py").read_text(encoding="utf-8")
    result = run({"main.py": program, ".inside.py": driver}, ["python3", ".inside.py"], whole, stdin=task)
    told: list[Any] = []
    for line in result.stdout.splitlines():
        try:
            told.append(json.loads(line))
        except ValueError:
            break  # whoever wrote that, it was not asked for
    told += [None] * (len(cases) - len(told))
    return [isinstance(one, dict) and _right(case, one) for case, one in zip(cases, told, strict=False)]


def _asked(case: Case) -> dict[str, Any]:
    """What the sandbox is told of a case: never what is right."""
    match case:
        case Stream():
            return {"stdin": case.stdin}
        case Call():
            return {"expression": case.expression}
        case Assertion():
            return asdict(case)


def _right(case: Case, told: Mapping[str, Any]) -> bool:
    match case:
        case Stream():
            return told.get("code") == 0 and same_text(str(told.get("stdout", "")), case.stdout)
        case Call():
            return _same_value(told.get("value"), case)
        case Assertion():
            return told.get("held") is True


def same_text(got: str, wanted: str) -> bool:
    """Line by line without the space at their ends, and without empty lines at the end; numbers may be written otherwise."""
    mine, theirs = _lines(got), _lines(wanted)
    if mine == theirs:
        return True
    if len(mine) != len(theirs):
        return False
    return all(_same_line(a.split(), b.split()) for a, b in zip(mine, theirs, strict=True))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same_line(mine: list[str], theirs: list[str]) -> bool:
    return len(mine) == len(theirs) and all(a == b or _close(a, b) for a, b in zip(mine, theirs, strict=True))


def _close(a: str, b: str) -> bool:
    """Whether both are numbers of which one has a fraction, and nearly the same."""
    if "." not in a + b or len(a) > 40 or len(b) > 40:
        return False
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-6, abs_tol=1e-9)
    except ValueError:
        return False


def _same_value(text: Any, case: Call) -> bool:
    if not isinstance(text, str):
        return False
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return False
    try:
        return bool(_plain(value) == _plain(case.value)) if case.loose else bool(value == case.value)
    except (TypeError, RecursionError):
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return value


def cases_of_assertions(tests: Sequence[str], setup: str = "") -> list[Case]:
    """Of lines such as `assert f(2) == 4` (MBPP's `test_list`): calls where the right side is a literal."""
    return [_call_of(test, setup) or Assertion(f"{setup}\n{test}") for test in tests]


def cases_of_check(test: str, entry_point: str) -> list[Case]:
    """Of a function `check(candidate)` (HumanEval's `test`): its assertions one by one, where it has nothing else."""
    whole: list[Case] = [Assertion(f"{test}\ncheck({entry_point})")]
    try:
        [check] = [n for n in ast.parse(test).body if isinstance(n, ast.FunctionDef) and n.name == "check"]
    except (SyntaxError, ValueError):
        return whole
    body = [n for n in check.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    if len(check.args.args) != 1 or not body or not all(isinstance(n, ast.Assert) for n in body):
        return whole
    named = check.args.args[0].arg
    calls = []
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id == named:
                node.id = entry_point
        calls.append(_call_of(ast.unparse(statement), ""))
    return [call for call in calls if call is not None] if all(calls) else whole


def _call_of(test: str, setup: str) -> Call | None:
    """`assert EXPRESSION == LITERAL` as a call; None for anything else."""
    if setup.strip():
        return None
    try:
        [statement] = ast.parse(test.strip()).body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(statement, ast.Assert) or not isinstance(statement.test, ast.Compare):
        return None
    compared = statement.test
    if len(compared.ops) != 1 or not isinstance(compared.ops[0], ast.Eq):
        return None
    for one, other in ((compared.left, compared.comparators[0]), (compared.comparators[0], compared.left)):
        try:
            return Call(ast.unparse(one), ast.literal_eval(other))
        except (ValueError, TypeError, SyntaxError, RecursionError):
            continue
    return None


def cases_of_streams(inputs: Sequence[Any], outputs: Sequence[Any], function: str | None = None) -> list[Case]:
    """Of lists of inputs and outputs (APPS, TACO, CodeContests): of a program, or of a function's arguments and value."""
    if function is None:
        return [Stream(_text(i), _text(o)) for i, o in zip(inputs, outputs, strict=True)]
    made: list[Case] = []
    for arguments, value in zip(inputs, outputs, strict=True):
        given = arguments if isinstance(arguments, list) else [arguments]
        made.append(Call(f"{function}({', '.join(map(repr, given))})", value, loose=True))
    return made


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)

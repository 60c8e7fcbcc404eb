"""Code: 1 if the program passes all of its tests, else 0; with `partial` the share that it passes.

The program is the last fenced block of the answer (```python ... ```), or the whole answer where there is none. It runs in a
sandbox (bubblewrap: no network, no files but its own, limits on time, memory and processes): `rlpost doctor` says whether this
machine has one, and without it nothing is run.

Columns, of which a row needs one kind:
    test_list, test_setup_code     MBPP: lines such as "assert f(2) == 4"
    test, entry_point              HumanEval: a function check(candidate)
    input_output                   APPS, TACO: JSON text or a mapping with "inputs", "outputs" and perhaps "fn_name"
    public_tests, private_tests    CodeContests: mappings with "input" and "output"
    tests                          a list of any of: "assert ...", {"input": ..., "output": ...}
Arguments: partial    the share of the tests that pass, in place of all or nothing; false if not given.
           seconds    for each test; 4 if not given.
           most       tests at the most, the first ones; 16 if not given.
           memory_mib of the program's processes together; 512 if not given.
           opened     true: the chat template has already written "<think>" into the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rlpost.answers import final_text
from rlpost.sandbox import Limits, Unavailable, problem
from rlpost.sandbox.programs import Case, cases_of_assertions, cases_of_check, cases_of_streams, passed
from rlpost.scoring import Unparsable

if (why := problem()) is not None:  # said when the reward is loaded, before any model is
    raise Unavailable(f"programs cannot be run on this machine: {why}. Nothing is run without a sandbox")

FENCED = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)
KINDS = ("tests", "test_list", "test", "input_output", "public_tests", "private_tests")


def reward(
    completions: list[Any],
    partial: bool = False,
    seconds: float = 4.0,
    most: int = 16,
    memory_mib: int = 512,
    opened: bool = False,
    **columns: list[Any],
) -> list[float]:
    verdicts = []
    for i, completion in enumerate(completions):
        row = {name: values[i] for name, values in columns.items() if isinstance(values, list) and len(values) > i}
        cases = cases_of(row)[:most]
        program = program_of(final_text(completion, opened))
        held = passed(program, cases, seconds=seconds, limits=Limits(memory_mib=memory_mib)) if program else [False]
        verdicts.append(sum(held) / len(held) if partial else float(all(held)))
    return verdicts


def program_of(text: str) -> str:
    """The last block that is fenced as Python, else the last fenced one, else the text itself."""
    blocks = FENCED.findall(text)
    named = [code for language, code in blocks if language.lower() in ("python", "py", "python3")]
    return (named or [code for _, code in blocks] or [text])[-1].strip()


def cases_of(row: Mapping[str, Any]) -> list[Case]:
    """The test cases of a row of data. Raises Unparsable where there are none."""
    cases: list[Case] = []
    try:
        if row.get("tests"):
            cases += [case for test in _loaded(row["tests"]) for case in _one(test)]
        if row.get("test_list"):
            cases += cases_of_assertions(_loaded(row["test_list"]), row.get("test_setup_code") or "")
        if row.get("test") and row.get("entry_point"):
            cases += cases_of_check(row["test"], row["entry_point"])
        if row.get("input_output"):
            both = _loaded(row["input_output"])
            cases += cases_of_streams(both["inputs"], both["outputs"], both.get("fn_name"))
        for name in ("public_tests", "private_tests"):
            if row.get(name):
                both = _loaded(row[name])
                cases += cases_of_streams(both["input"], both["output"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unparsable(f"the row's tests cannot be read ({type(error).__name__}: {error})") from error
    if not cases:
        raise Unparsable(f"the row has no tests: none of the columns {', '.join(KINDS)} holds any")
    return cases


def _loaded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _one(test: Any) -> list[Case]:
    if isinstance(test, str):
        return cases_of_assertions([test])
    return cases_of_streams([test["input"]], [test["output"]], test.get("fn_name"))

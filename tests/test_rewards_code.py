"""`rewards/code.py`: test cases of public data sets, and programs that want the reward without solving anything."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from conftest import REPOSITORY

from rlpost.sandbox import problem
from rlpost.sandbox.programs import Assertion, Call, Stream, cases_of_check, passed, same_text
from rlpost.scoring import Unparsable

pytestmark = pytest.mark.thorough

code = runpy.run_path(str(REPOSITORY / "rewards" / "code.py"))
reward, cases_of, program_of = code["reward"], code["cases_of"], code["program_of"]
needs_sandbox = pytest.mark.skipif(problem() is not None, reason=f"no sandbox on this machine: {problem()}")

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
MBPP = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add([1], [2]) == [1, 2]"]
CHECK = "METADATA = {}\n\ndef check(candidate):\n    'docs'\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4\n"
SUMS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
READS = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"


def rewarded(text: str, partial: bool = False, seconds: float = 4.0, **columns) -> float:
    [value] = reward(
        [[{"role": "assistant", "content": text}]],
        partial=partial,
        seconds=seconds,
        **{name: [value] for name, value in columns.items()},
    )
    return value


@needs_sandbox
@pytest.mark.parametrize(
    ("text", "columns"),
    [
        (ADD, {"test_list": MBPP}),
        (ADD, {"test_list": json.dumps(MBPP), "test_setup_code": "import math"}),
        (ADD, {"test": CHECK, "entry_point": "add"}),
        (ADD, {"input_output": json.dumps({"inputs": [[1, 2], [[1], [2]]], "outputs": [3, [1, 2]], "fn_name": "add"})}),
        (READS, {"input_output": SUMS}),
        (
            READS,
            {
                "public_tests": {"input": ["1 2"], "output": ["3"]},
                "private_tests": {"input": ["5 5"], "output": ["10"]},
            },
        ),
        (READS, {"tests": [{"input": "1 2\n", "output": "3\n"}]}),
        (ADD, {"tests": ["assert add(1, 2) == 3", "assert abs(add(0.1, 0.2) - 0.3) < 1e-9"]}),
        (
            f"<think>```python\n1/0\n```</think>\nFirst:\n{READS}\nSo:\n{ADD}\nIn C:\n```c\nint x;\n```",
            {"test_list": MBPP},
        ),
        ("def add(a, b): return a + b", {"test_list": MBPP}),
        ("```\ndef add(a, b): return a + b\n```", {"test_list": MBPP}),
    ],
)
def test_a_right_program_passes_the_cases_of_each_data_set(text, columns):
    assert rewarded(text, **columns) == 1.0


@needs_sandbox
def test_a_wrong_one_fails_and_may_earn_its_share():
    wrong = "```python\ndef add(a, b):\n    return 3\n```"
    assert rewarded(wrong, test_list=MBPP) == 0.0
    assert rewarded(wrong, partial=True, test_list=MBPP) == pytest.approx(1 / 3)
    assert rewarded("I do not know.", test_list=MBPP) == 0.0
    assert rewarded("", test_list=MBPP) == 0.0
    assert rewarded("```python\ndef add(a, b:\n```", partial=True, test_list=MBPP) == 0.0
    hangs = "```python\ndef add(a, b):\n    while (a, b) == (-1, 1): pass\n    return a + b\n```"
    assert rewarded(hangs, partial=True, seconds=1.0, test_list=MBPP) == pytest.approx(2 / 3)


EQUAL = "class Any:\n    def __eq__(self, other): return True\n    def __repr__(self): return '3'\n"
CHEATS = {
    "an object that equals everything": EQUAL + "def add(a, b): return Any()",
    "ends with success": "import os\ndef add(a, b): os._exit(0)",
    "ends before the tests": "import sys\nsys.exit(0)",
    "writes what the driver would": (
        "import os, json\nos.write(1, json.dumps({'value': '3', 'held': True}).encode())\nos._exit(0)"
    ),
    "writes to the driver's output": (
        "import os, json\nfor p in os.listdir('/proc'):\n  if p.isdigit():\n    try:\n"
        "      open(f'/proc/{p}/fd/1', 'w').write((json.dumps({'value': 'None', 'held': True}) + '\\n') * 9)\n"
        "    except OSError: pass\ndef add(a, b): return None"
    ),
    "reads the tests": "def add(a, b): return int(open('/sandbox/.inside.py').read().split('==')[1])",
    "kills the driver": "import os\nos.kill(os.getppid(), 9)\ndef add(a, b): return 3",
    "changes what compares": "import builtins\nbuiltins.repr = lambda x: '3'\ndef add(a, b): return 9",
}


@needs_sandbox
@pytest.mark.parametrize("name", CHEATS)
def test_who_does_not_solve_it_is_not_rewarded(name):
    """The right values are not where the program is. One constant can be right by luck, so all three must be."""
    text = f"```python\n{CHEATS[name]}\n```"
    assert rewarded(text, test_list=MBPP) == 0.0
    assert rewarded(text, test=CHECK, entry_point="add") == 0.0
    assert rewarded(text.replace("def add", "def other"), input_output=SUMS) == 0.0


def test_what_becomes_of_tests():
    assert cases_of({"test_list": MBPP})[0] == Call("add(1, 2)", 3)
    assert cases_of({"test_list": ["assert f(1) == (1, 2)"]}) == [Call("f(1)", (1, 2))]
    assert cases_of({"test_list": ["assert 4 == f(2)"]}) == [Call("f(2)", 4)]
    assert cases_of({"test_list": ["assert f(2) == g(2)"]}) == [Assertion("\nassert f(2) == g(2)")]
    assert cases_of({"test_list": ["assert f(2) == 4"], "test_setup_code": "x = 1"}) == [
        Assertion("x = 1\nassert f(2) == 4")
    ]
    assert cases_of({"input_output": SUMS}) == [Stream("1 2\n", "3\n"), Stream("3 4\n", "7\n")]
    assert cases_of_check(CHECK, "add") == [Call("add(1, 2)", 3), Call("add(2, 2)", 4)]
    looped = "def check(candidate):\n    for i in range(3):\n        assert candidate(i) == i\n"
    assert cases_of_check(looped, "f") == [Assertion(f"{looped}\ncheck(f)")]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"answer": "4"},
        {"test_list": []},
        {"input_output": "not JSON"},
        {"input_output": {"inputs": ["1"], "outputs": []}},
        {"tests": [3]},
        {"test": CHECK},
    ],
)
def test_a_row_without_tests_that_can_be_read_is_unparsable(row):
    with pytest.raises(Unparsable):
        cases_of(row)


@pytest.mark.parametrize(
    ("got", "wanted", "same"),
    [
        ("3\n", "3", True),
        ("3 \n\n", "3\n", True),
        ("1 2\n3", "1 2\n3\n", True),
        ("1  2", "1 2", True),
        ("0.3333333", "0.33333333333", True),
        ("1.0", "1", True),
        ("3", "4", False),
        ("3\n4", "3", False),
        ("100000001", "100000002", False),
        ("1e400.", "inf", False),
        ("yes", "YES", False),
        ("", "3", False),
    ],
)
def test_when_two_outputs_are_the_same(got, wanted, same):
    assert same_text(got, wanted) is same


@needs_sandbox
@pytest.mark.thorough
def test_a_run_learns_by_execution(write_recipe, tmp_path):
    """The recipe of the documentation, on a tiny model: all of its programs fail, and the run says so in numbers."""
    from rlpost.recipe.load import load_recipe
    from rlpost.run.loop import train

    data = tmp_path / "tasks.jsonl"
    lines = [{"prompt": f"Write a function f{i}.", "test_list": [f"assert f{i}(1) == {i}"]} for i in range(12)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {
        "data": {"train": {"type": "dataset", "path": str(data)}, "held_out": 4, "max_prompt_tokens": 64},
        "rewards": [{"function": str(Path(REPOSITORY) / "rewards" / "code.py"), "arguments": {"partial": True}}],
        "learner.rollouts": 1,
    }
    train(load_recipe(write_recipe(tmp_path, changes)))
    [row] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open() if '"train"' in line]
    assert row["rewards/code/mean"] == 0.0 and row["scores/code/scored"] == 8


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("import sys\nsys.stdout = open(1, 'w')\nprint(6)", True),
        ("out = open(1, 'w')\nout.write('6')", True),  # written when the interpreter lets go of it
        ("import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print(6))).start()", True),
        ("import atexit\natexit.register(lambda: print(6))", True),
        ("print(6)\nraise SystemExit", True),
        ("print(6)\nraise SystemExit(3)", False),
        ("print(6)\n1 / 0", False),
        ("print(6)\nimport os\nos._exit(0)", False),  # what is held is not written
        ("if __name__ == '__main__':\n    print(6)", True),
        (
            "import pickle\nclass A:\n    x = 6\nprint(pickle.loads(pickle.dumps(A())).x)",
            True,
        ),
        ("def f(n):\n    return 6 if n == 0 else f(n - 1)\nprint(f(990))", True),
        (
            "import os\nif os.fork() == 0:\n    os.execv('/bin/sleep', ['sleep', '100'])\nprint(6)",
            False,
        ),  # nobody may write any more
        ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nprint(6)", False),
    ],
)
def test_a_program_ends_as_the_interpreter_ends_it(program, right):
    """Although it is forked from one that runs already."""
    cases = [Stream("", "6"), Stream("", "7"), Stream("", "6")]
    assert passed(program, cases, seconds=3.0) == [right, False, right]

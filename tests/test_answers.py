"""The one reader for answers, through the rewards that use it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.answers import completion_text, final_text, is_readable, is_right
from rlpost.answers.boxes import find_boxes
from rlpost.answers.read import read
from rlpost.scoring import load_reward

PAIRS = [json.loads(line) for line in Path(__file__).with_name("answer_pairs.jsonl").read_text().splitlines()]
MATH, NUMBER, CHOICE = (load_reward(name).function for name in ("math", "number", "choice"))


def score(function, text, answer, **keywords):
    [value] = function(completions=[[{"role": "assistant", "content": text}]], answer=[answer], **keywords)
    return value


def verdict(gold, completion):
    return float(is_right(final_text(completion), gold)) if is_readable(gold) else "unknown"


@pytest.mark.parametrize("kind", sorted({pair["kind"] for pair in PAIRS}))
def test_pairs(kind):
    """Every pair of the table has its verdict."""
    wrong = [p for p in PAIRS if p["kind"] == kind and verdict(p["gold"], p["completion"]) != p["want"]]
    assert not wrong


def test_the_table_is_large_and_hard():
    wants = Counter(pair["want"] for pair in PAIRS)
    assert len(PAIRS) >= 300 and wants[0] >= 0.4 * len(PAIRS)


ONE_BOX = [
    pair
    for pair in PAIRS
    if pair["want"] == 1 and pair["completion"].startswith("\\boxed{") and pair["completion"].count("box") == 1
]


@pytest.mark.parametrize("change", [lambda n: str((n + 1) % 10), lambda n: f"1{n}"])
def test_another_digit_is_another_answer(change):
    """No right box stays right when one of its digits changes (a decimal that is rounded and an approximation apart)."""
    for pair in ONE_BOX:
        text = pair["completion"]
        if "approx" in text or "16386" in text:
            continue
        for at, digit in enumerate(text):
            if digit.isdigit() and "\\" not in text[max(at - 1, 0) : at]:
                other = text[:at] + change(int(digit)) + text[at + 1 :]
                assert verdict(pair["gold"], other) == 0, (pair["gold"], other)


@settings(deadline=None, max_examples=200)
@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6), st.integers(1, 50))
def test_forms_of_a_rational_number(p, q, k):
    gold = rf"\frac{{{p}}}{{{q}}}"
    assert verdict(gold, rf"\boxed{{\dfrac{{{p * k}}}{{{q * k}}}}}") == 1
    assert verdict(gold, rf"\boxed{{{p}/{q}}}") == 1
    assert verdict(gold, rf"\boxed{{\frac{{{p * k + 1}}}{{{q * k}}}}}") == 0
    assert verdict(str(p), rf"\boxed{{{p:,}}}") == 1
    assert verdict(str(p), rf"\boxed{{{p:,}.5}}") == 0


REPEATED = [
    r"\boxed{",
    r"\boxed{1}, ",
    r"\frac{",
    "(",
    "{",
    "$",
    r"\(",
    "1,",
    "9^",
    "!",
    "|",
    "1 ",
    "=",
    r"\text{",
    ":",
    "<answer>",
    "A or ",
]


@pytest.mark.parametrize("piece", REPEATED)
@pytest.mark.parametrize("form", ["{}", r"\boxed{{{}}}", "The answer is {}", "<answer>{}</answer>"])
def test_a_text_that_repeats_to_the_token_limit_is_wrong(piece, form):
    text = form.format(piece * (50_000 // len(piece)))
    assert score(MATH, text, "7") == 0
    assert score(NUMBER, text, "7") == 0
    assert score(CHOICE, text, "B") == 0


HUGE = [
    "9^{9^{9}}",
    "9^{9^{9^{9}}}",
    "1000000!",
    r"(10^{10})!",
    r"\binom{10^9}{10^8}",
    "10^{-10^{10}}",
    "e^{e^{e^{10}}}",
    "x^{9^{9^9}}",
    "1e999999",
]


@pytest.mark.parametrize("answer", HUGE)
@pytest.mark.parametrize("gold", ["7", r"\sqrt{2}", "x+1", r"(3, \infty)"])
def test_huge_values_are_no_work(answer, gold):
    assert score(MATH, rf"\boxed{{{answer}}}", gold) == 0
    assert score(MATH, rf"\boxed{{x > {answer}}}", gold) == 0


def test_boxes_are_found_whatever_surrounds_them():
    assert [b.content for b in find_boxes(r"{ \boxed{a{b}\}c} } \fbox {2} \boxed{3")] == [r"a{b}\}c", "2"]
    assert [b.content for b in find_boxes(r"\boxed{\boxed{1} \boxed{2}}")] == [r"\boxed{1} \boxed{2}"]
    assert [b.content for b in find_boxes(r"\boxed{\boxed{1}")] == ["1"]


def test_thinking_does_not_count():
    assert final_text("<think>1</think>2") == "2"
    assert final_text("<think>1") == final_text("1", opened=True) == ""
    assert final_text("1</think>2", opened=True) == "2"
    assert final_text("1</think>2<think>3") == "2"
    assert final_text([{"role": "assistant", "content": "<think>1</think>2"}]) == "2"
    for name, gold in (("math", "7"), ("number", 7), ("choice", "B")):
        function = load_reward(name).function
        text = "B" if name == "choice" else "7"
        assert score(function, f"<think>{text}", gold) == 0
        assert score(function, text, gold, opened=True) == 0
        assert score(function, f"hm</think>{text}", gold, opened=True) == 1


@pytest.mark.parametrize(
    ("name", "text", "gold"), [("math", r"\boxed{7}", 7), ("number", "7", 7), ("choice", "B", "B")]
)
def test_completions_may_be_strings(name, text, gold):
    assert load_reward(name).function(completions=[text], answer=[gold]) == [1.0]
    assert completion_text(text) == completion_text([{"role": "assistant", "content": text}]) == text


def test_a_comma_between_thousands_has_two_readings():
    assert len(read("1,234")) == 2 and len(read("12,34")) == 1
    assert verdict("1234", r"\boxed{(1,234)}") == 0


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("The answer is .5", 0.5, 1),
        ("The answer is .5", 5, 0),
        ("It is 1e3", 1000, 1),
        ("It is 1e3", 3, 0),
        ("1.2E-5", "0.000012", 1),
    ]
    + [
        ("3 x 10^8", 300000000, 1),
        ("3 × 10⁸", 300000000, 1),
        (r"3 \times 10^{8}", 8, 0),
        ("2^10", 1024, 1),
        ("2^10", 10, 0),
    ]
    + [
        ("x^2", 2, 0),
        ("10³", 1000, 1),
        ("1/2", 2, 0),
        ("1/2", 0.5, 1),
        (r"\frac{3}{4}", 4, 0),
        (r"\frac{3}{4}", 0.75, 1),
    ]
    + [
        (r"\sqrt{2}", 2, 0),
        ("1 234", 1234, 1),
        ("1\u202f234", 1234, 1),
        (r"1\,234", 1234, 1),
        ("1{,}234", 1234, 1),
        ("1 234", 234, 0),
    ]
    + [
        ("–5", -5, 1),
        ("−5", 5, 0),
        ("3–5", 5, 1),
        ("$18.90", 18.9, 1),
        ("-$5", -5, 1),
        ("-.5", -0.5, 1),
        ("50%", 50, 1),
    ]
    + [
        ("0x1F", 31, 0),
        ("0x10", 10, 0),
        ("101_2", 2, 0),
        ("101_2", 101, 0),
        ("1.2.3", 3, 0),
        ("12/05/2020", 2020, 0),
        ("x-5", 5, 1),
    ]
    + [
        ("5", "$5", 1),
        ("5", "€5", 1),
        ("1,234", "$1,234", 1),
        ("50", "50%", 1),
        ("7", "7.0", 1),
        ("(-3)", -3, 1),
        ("12/4=3", 3, 1),
        ("1/0", 0, 0),
    ]
    + [
        ("1e99999", 0, 0),
        ("9" * 20000, 9, 0),
        ("**-7**", -7, 1),
        ("5cm", 5, 1),
        ("v.5", 5, 1),
        ("12,345.67", "12345.67", 1),
    ],
)
def test_number(text, answer, value):
    assert score(NUMBER, text, answer) == value


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("The answer is a number between 3 and 4", "A", 0),
        ("The answer is A number", "A", 0),
        ("the answer is a", "A", 1),
    ]
    + [("<answer>A, B</answer>", "A", 0), ("<answer>A and B</answer>", "A", 0), ("The answer is A or B", "A", 0)]
    + [
        ("The answer is A or B", "B", 0),
        ("answer: A, B, C, D", "A", 0),
        ("Answer: A/B", "A", 0),
        ("Answer: (A) or (C)", "A", 0),
    ]
    + [
        ("The answer is both A and C", "A", 0),
        ("The answer is either B or C.", "B", 0),
        (r"\boxed{A, B}", "A", 0),
        ("Answer: AB", "A", 0),
    ]
    + [
        (r"\boxed{A} or \boxed{B}", "B", 0),
        ("<answer>A</answer> or <answer>B</answer>", "B", 0),
        ("(A) or (B)", "A", 0),
    ]
    + [
        (r"\boxed{\text{(C)}}", "C", 1),
        (r"\boxed{\textbf{C}}", "C", 1),
        (r"$\boxed{C}$", "C", 1),
        ("**Answer:** C", "C", 1),
    ]
    + [
        ("The answer is **(C)**.", "C", 1),
        ("The correct option is C", "C", 1),
        ("The answer is option C.", "C", 1),
        ("Answer: $C$", "C", 1),
    ]
    + [
        ("The answer is C because B is wrong", "C", 1),
        ("The answer is C, not B", "C", 1),
        ("The answer is C, a city", "C", 1),
    ]
    + [
        ("The answer is C) Paris and Rome", "C", 1),
        ("The answer is not C", "C", 0),
        ("The answer is Cairo", "C", 0),
        ("C, D", "C", 0),
    ]
    + [
        ("<answer>C) a, b and c</answer>", "C", 1),
        ("<answer>(c)</answer>", "C", 1),
        ("<answer>Cats</answer>", "C", 0),
        ("C", "C", 1),
    ]
    + [
        ("The answer is A. No, the answer is B", "B", 1),
        ("The answer is A. No, the answer is B", "A", 0),
        ("<answer>C", "C", 0),
    ]
    + [
        ("(C) Paris", "C", 1),
        ("(C) Paris or (D) Rome", "C", 0),
        ("The answer is E", "C", 0),
        ("I choose a good one", "A", 0),
        ("Answer: C D", "C", 0),
        ("The answer is C DNA", "C", 1),
    ],
)
def test_choice(text, answer, value):
    assert score(CHOICE, text, answer) == value


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (r"x = \boxed{1} \\ y = \boxed{2}", "1, 2", 1),
        (r"x = \boxed{1} \\ y = \boxed{2}", "2", 0),
        ("x &= \\boxed{1} \\\\\ny &= \\boxed{2}", "2", 0),
        ("- $x = \\boxed{3}$\n- $y = \\boxed{4}$", "3, 4", 1),
        ("* $\\boxed{3}$\n* $\\boxed{4}$", "4", 0),
        ("(a) $\\boxed{3}$.\n(b) $\\boxed{4}$.", "3, 4", 1),
        (r"$\boxed{3}$ as well as $\boxed{4}$", "3, 4", 1),
        ("The first try gave $\\boxed{3}$.\n\n$\\boxed{4}$.", "4", 1),
    ]
    + [
        (r"\boxed{864\text{ in}^2}", r"864 \mbox{ inches}^2", 1),
        (r"\boxed{864\text{ sq in}}", r"864 \mbox{ inches}^2", 1),
        (r"\boxed{864\text{ in}}", r"864 \mbox{ inches}^2", 0),
        (r"\boxed{13\text{ miles per hour}}", r"13\text{ mph}", 1),
        (r"\boxed{13\text{ km/h}}", r"13\text{ mph}", 0),
    ]
    + [
        (r"\boxed{C}", r"\textbf{(C)}\ 3", 1),
        (r"\boxed{D}", r"\textbf{(C)}\ 3", 0),
        (r"\boxed{3}", r"\textbf{(C)}\ 3", 1),
        (r"\boxed{4}", r"\textbf{(C)}\ 3", 0),
        (r"\boxed{\textbf{(B)}\ 3}", r"\textbf{(C)}\ 3", 0),
        (r"\boxed{\textbf{(C)}\ 3}", "C", 1),
        (r"\boxed{\textbf{(C)}\ 3}", "D", 0),
        (r"\boxed{\textbf{(C)}\ 3}", "3", 1),
        ("The answer is (C).", r"\textbf{(C)}\ 3", 1),
        ("The answer is (C).", "C", 1),
        ("The answer is C", "D", 0),
        ("", r"\textbf{(C)}\ 3", 0),
    ]
    + [
        ("The answer is 7, not 8.", "8", 0),
        ("The answer is 7, not 8.", "7", 1),
        ("It is $7$ rather than $8$.", "8", 0),
        ("It is $7$ rather than $8$.", "7", 1),
        ("It is not 8", "8", 0),
    ],
)
def test_math(text, answer, value):
    assert score(MATH, text, answer) == value


def test_format_and_reasoning_gym_read_behind_the_thinking():
    import reasoning_gym

    entry = reasoning_gym.create_dataset("basic_arithmetic", size=1, seed=1)[0]
    function = load_reward("reasoning_gym").function
    columns = {"task": ["basic_arithmetic"], "entry": [json.dumps(entry)]}
    answer = f"<answer>{entry['answer']}</answer>"
    assert function(completions=[answer], **columns) == [1.0]
    assert function(completions=[f"<think>{answer}</think>none"], **columns)[0] < 1
    assert function(completions=[f"<think>{answer}"], **columns)[0] < 1
    assert load_reward("format").function(completions=["<think></think><answer></answer>"]) == [1.0]

"""The ready-made rewards, called as plain functions."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.scoring import Unparsable, load_reward

INTEGERS = st.integers(min_value=-(10**15), max_value=10**15)
PROSE = st.text(st.characters(blacklist_categories=("Nd", "No", "Nl", "Cs")), max_size=30)


def one(spec: str, text: str, *, ids=(), **keywords) -> float:
    reward = load_reward(spec)
    if reward.wants("completion_ids"):
        keywords["completion_ids"] = [list(ids)]
    [value] = reward.function(completions=[[{"role": "assistant", "content": text}]], **keywords)
    return value


def number(text: str, answer, **keywords) -> float:
    return one("number", text, answer=[answer], **keywords)


def math(text: str, answer) -> float:
    return one("math", text, answer=[answer])


@settings(deadline=None)
@given(INTEGERS, INTEGERS, PROSE)
def test_number_is_the_last_one(n, other, prose):
    assert number(f"{other} or rather {n} {prose}", n) == 1.0
    assert number(f"{n} or rather {other} {prose}", n) == float(n == other)
    assert number(f"{n:,}", str(n)) == 1.0
    assert number(f" {n}\n", n, only=True) == 1.0
    assert number(f"it is {n}", n, only=True) == 0.0


@given(st.integers(0, 999), st.integers(0, 999))
def test_number_reads_a_difference(a, b):
    assert number(f"{a}-{b}={a - b}", a - b) == 1.0
    assert number(f"{a} - {b}", b) == 1.0  # an operator, not a sign


@given(st.text(max_size=60), INTEGERS)
def test_number_never_raises_on_completions(text, n):
    assert number(text, n) in (0.0, 1.0)
    assert number(text, n, only=True) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("", 0, 0),
        ("2.5", 5, 0),
        ("5.0", 5, 1),
        ("5.", 5, 1),
        ("\\boxed{-7}", -7, 1),
        ("**-7**", -7, 1),
        ("1,234,567", 1234567, 1),
    ]
    + [("\N{MINUS SIGN}3", -3, 1), ("9" * 6000, 9, 0), ("7 8", 7, 0), ("1,23", 23, 1)],
)
def test_number_cases(text, answer, value):
    assert number(text, answer) == value


@pytest.mark.parametrize("gold", ["seven", "", None, True, "1 2", float("nan")])
def test_number_with_an_unreadable_gold(gold):
    with pytest.raises(Unparsable):
        number("7", gold)


@settings(deadline=None, max_examples=60)
@given(st.integers(-999, 999), st.integers(1, 99), st.integers(1, 9))
def test_math_equals_as_mathematics(p, q, k):
    gold = rf"\frac{{{p}}}{{{q}}}"
    assert math(rf"so \boxed{{\frac{{{p * k}}}{{{q * k}}}}}", gold) == 1.0
    assert math(f"first 17, then {p * k}/{q * k}", gold) == 1.0
    assert math(rf"\boxed{{\frac{{{p + q}}}{{{q}}}}}", gold) == 0.0
    assert math(rf"\boxed{{{Decimal(p) / 4}}}", rf"\frac{{{p}}}{{4}}") == 1.0


@settings(deadline=None, max_examples=150)
@given(st.text(st.sampled_from("\\{}$%^_ 0123456789.,-+*/=()abexfrcqtob"), max_size=25), INTEGERS)
def test_math_never_rewards_what_it_cannot_read(text, n):
    try:
        value = math(text, text)
    except Unparsable:
        value = 0.0
    assert value in (0.0, 1.0)
    assert math(f"\\boxed{{{n}}} {text[:0]}", str(n)) == 1.0


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("\\boxed{1} no, \\boxed{2}", "2", 1),
        ("\\boxed{2} no, \\boxed{1}", "2", 0),
        ("\\boxed{2} and then \\boxed{1", "2", 1),  # not closed
        ("<think>\\boxed{3}</think> 2", "2", 1),
        ("<think>2</think> I do not know", "2", 0),
        ("the answer is 1,234.", "#### 1,234", 1),
        ("\\boxed{x=3}", "3", 1),
        ("\\boxed{2, 1}", "1, 2", 1),
        ("\\boxed{1, 2, 3}", "3", 0),
        ("\\boxed{7$ $8}", "8", 0),
        ("\\boxed{\\text{Tuesday}}", "\\text{Tuesday}", 1),
        ("\\boxed{}", "1", 0),
        ("\\boxed{\\frac{1}{0}}", "1", 0),
        ("nothing", "1", 0),
        ("5", 5, 1),
        ("it is 12-7=5", 5, 1),
    ],
)
def test_math_cases(text, gold, value):
    assert math(text, gold) == value


@pytest.mark.parametrize(
    "gold", ["", "the colour of the sky", "The answer is three", "\\frac{1}{0}", "{{", None, "None"]
)
def test_math_with_an_unreadable_gold(gold):
    with pytest.raises(Unparsable):
        math(f"\\boxed{{{gold}}}", gold)


def test_math_reads_worked_solutions():
    assert one("math", "\\boxed{6}", solution=["3 + 3 is \\boxed{6}."]) == 1.0


def test_math_works_outside_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(math, "\\boxed{0.5}", "1/2").result() == 1.0


@pytest.mark.parametrize(
    ("text", "keywords", "value"),
    [
        ("<think>a\nb</think>\n<answer>4</answer>", {}, 1),
        (" <think></think><answer></answer> ", {}, 1),
        ("<think>a</think><answer>4</answer> and more", {}, 0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", {}, 0),
        ("<think>a<think>b</think><answer>4</answer>", {}, 0),
        ("a</think><answer>4</answer>", {}, 0),
        ("a</think><answer>4</answer>", {"opened": True}, 1),
        ("Answer: 4", {"pattern": r"Answer: \d+"}, 1),
        ("Answer: 4.", {"pattern": r"Answer: \d+"}, 0),
    ],
)
def test_format(text, keywords, value):
    assert one("format", text, **keywords) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("B", 1), ("(B)", 1), ("B.", 1), ("B) Paris", 1), ("**B**", 1), ("b", 0), ("Because", 0), ("A good question", 0)]
    + [("The answer is (B).", 1), ("answer: B", 1), ("The answer is A. No, the answer is B", 1), ("A or B", 0), ("", 0)]
    + [("\\boxed{B}", 1), ("\\boxed{\\text{B}}", 1), ("<answer>B</answer>", 1), ("<answer>A</answer> B", 0)]
    + [("<think>answer is A</think>B", 1), ("The answer is Boston", 0), ("\\boxed{C}", 0)],
)
def test_choice(text, value):
    assert one("choice", text, answer=["B"]) == value


@pytest.mark.parametrize("gold", ["E", "", "AB", None, 1])
def test_choice_with_an_unreadable_gold(gold):
    with pytest.raises(Unparsable):
        one("choice", "B", answer=[gold])


@pytest.mark.parametrize(("tokens", "value"), [(0, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (500, -1.0)])
def test_length_is_dapos_equation_13(tokens, value):
    assert one("length", "", ids=range(tokens), max_tokens=100, buffer=20) == pytest.approx(value)


def test_length_linear_and_bad_arguments():
    assert one("length:linear", "", ids=range(50), cost=0.01) == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="buffer=0"):
        one("length", "", ids=(), max_tokens=100, buffer=0)


def test_reasoning_gym():
    import reasoning_gym

    entry = reasoning_gym.create_dataset("basic_arithmetic", size=1, seed=1)[0]
    columns = {"task": ["basic_arithmetic"], "entry": [json.dumps(entry)]}
    assert one("reasoning_gym", f"<think>1</think> <answer>{entry['answer']}</answer>", **columns) == 1.0
    assert one("reasoning_gym", f"<think>1</think>\n{entry['answer']}", **columns) == 1.0
    assert one("reasoning_gym", "<answer>nonsense</answer>", **columns) < 1.0
    with pytest.raises(Unparsable):
        one("reasoning_gym", "1", task=["basic_arithmetic"], entry=["{"])
    with pytest.raises(Unparsable):
        one("reasoning_gym", "1", task=["no_such_task"], entry=["{}"])

"""Hints: where they are cut, how they look in a prompt, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlpost.data.hints import Hinter, cut_hint, safe_end, with_hint
from rlpost.data.solutions import SOLVERS, worked_solution
from rlpost.experience import Demonstration, Prompt
from rlpost.recipe.sections.guidance import HintGuidance

LATEX = r"We have $\frac{1}{2} + \sqrt[3]{x^{2}} = 3.14159$. Then 1{,}234 apples cost 50\%. So \boxed{\frac{3}{4}}."


def test_the_exact_share_of_characters_is_the_released_rule() -> None:
    assert cut_hint("abcdefgh", 0.25, snap=False) == "ab"
    for ratio in (0.25, 0.5, 0.75):
        assert cut_hint(LATEX, ratio, snap=False) == LATEX[: round(len(LATEX) * ratio)]


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"x = \frac{1}{2} y", r"\frac{1}{2}"),
        (r"a \sqrt[3]{x^{2}} b", r"\sqrt[3]{x^{2}}"),
        (r"a \sum_{i=1}^{n} b", r"\sum_{i=1}^{n}"),
        ("is 3.14159 so", "3.14159"),
        ("is 1,234,567 so", "1,234,567"),
        (r"is 1{,}234 so", "1{,}234"),
        ("is 3/4 so", "3/4"),
        ("is 1.5e-10 so", "1.5e-10"),
        ("is -17 so", "-17"),
        (r"is 50\% so", r"50\%"),
        ("the triangle's side", "triangle's"),
        ("die Größe ist", "Größe"),
        (r"\{ 1 \}", r"\{"),
        ("is .5 so", ".5"),
        ("is -.25 so", "-.25"),
        (r"a \frac12 b", r"\frac12"),
        (r"a \frac 1 2 b", r"\frac 1 2"),
        (r"a \frac\pi2 b", r"\frac\pi2"),
        (r"a \sqrt2 b", r"\sqrt2"),
        (r"a \sqrt[3] 2 b", r"\sqrt[3] 2"),
        (r"a \frac{1} {2} b", r"\frac{1} {2}"),
        (r"a 10^{23} b", r"10^{23}"),
        (r"a 10^-3 b", r"10^-3"),
        (r"a x_{i}^2 b", r"x_{i}^2"),
        (r"a \sum_1^n b", r"\sum_1^n"),
        (r"a \int_0^\frac12 b", r"\int_0^\frac12"),
        (r"a \log_{2}{8} b", r"\log_{2}{8}"),
        (r"(x + 1)^{2} b", r"^{2}"),
        (r"is 1\!,\!000 so", r"1\!,\!000"),
        (r"is 1{,}234\,567 so", r"1{,}234\,567"),
    ],
)
def test_nothing_is_cut_inside(text: str, inside: str) -> None:
    start = text.index(inside)
    for end in range(start + 1, start + len(inside)):
        assert safe_end(text, end) == start, text[:end]
    assert safe_end(text, start) == start and safe_end(text, start + len(inside)) == start + len(inside)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab 1.\\{}[]frac^_\n$%/", max_size=60), st.floats(0.01, 0.99))
def test_a_hint_is_always_a_beginning_and_never_longer_than_its_share(text: str, ratio: float) -> None:
    for unit in ("characters", "lines", "steps"):
        hint = cut_hint(text, ratio, unit)
        assert text.startswith(hint) and (len(hint) < len(text) or not text)
    assert len(cut_hint(text, ratio)) <= round(len(text) * ratio)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (r"\frac{1}{2} and", len(r"\frac{1}{2}")),  # what a command has no argument for may be cut off
        (r"\frac{1}{2} {x}", len(r"\frac{1}{2}")),
        (r"\frac123", len(r"\frac12")),  # LaTeX: one half, then 3
        ("It ends. .5 follows", len("It ends.")),
        (r"\alpha 2", len(r"\alpha")),
        (r"\sqrt{2} x", len(r"\sqrt{2}")),
    ],
)
def test_cuts_that_hurt_nothing_are_allowed(text: str, place: int) -> None:
    assert safe_end(text, place) == place


def test_lines_and_steps() -> None:
    text = "Add 2.5 and 3. That is 5.5.\nTake 1 away. The rest is 4.5.\n\nDone."
    assert cut_hint(text, 0.34, "lines") == "Add 2.5 and 3. That is 5.5."
    assert cut_hint(text, 0.7, "lines") == "Add 2.5 and 3. That is 5.5.\nTake 1 away. The rest is 4.5."
    steps = [cut_hint(text, share, "steps") for share in (0.2, 0.4, 0.6, 0.8)]
    assert steps == [
        "Add 2.5 and 3.",
        "Add 2.5 and 3. That is 5.5.",
        "Add 2.5 and 3. That is 5.5.\nTake 1 away.",
        "Add 2.5 and 3. That is 5.5.\nTake 1 away. The rest is 4.5.",
    ]


def test_a_single_step_is_never_shown_whole_but_a_share_of_one_is() -> None:
    assert cut_hint("The answer is 4.", 0.75, "steps") == ""
    assert cut_hint("The answer is 4.", 1.0, "steps") == "The answer is 4."


def test_an_unclosed_bracket_does_not_swallow_the_text() -> None:
    assert cut_hint(r"\left( x \frac{1 and so on to the end", 0.9).endswith("so on to the")


def test_tokens_need_their_places() -> None:
    assert cut_hint("ab cd ef gh", 0.5, "tokens", token_ends=[2, 5, 8, 11]) == "ab cd"
    with pytest.raises(ValueError, match="token_ends"):
        cut_hint("ab", 0.5, "tokens")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def prompt_of(
    tokenizer, question: str = "What is 2 + 3?", solution: str | None = "First 2. Then 3 more. So 5."
) -> Prompt:
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": question})
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Prompt("q", messages, text, ids, {"answer": "5"}, None if solution is None else Demonstration(solution))


def test_a_hint_to_the_user(tokenizer) -> None:
    prompt = prompt_of(tokenizer)
    (hinted,) = Hinter(HintGuidance(unit="steps", wording="\nHint: {hint}"), tokenizer, 200)([prompt], 0.6)
    assert hinted.hint == "First 2. Then 3 more." and hinted.origin is hinted.bare is prompt and prompt.bare is prompt
    assert hinted.messages[-1]["content"] == "What is 2 + 3?\nHint: First 2. Then 3 more."
    assert hinted.messages[0] == prompt.messages[0] and hinted.columns == prompt.columns and hinted.id == prompt.id
    assert hinted.text == "s:Be brief.\nu:What is 2 + 3?\nHint: First 2. Then 3 more.\na:"
    assert tokenizer.decode(hinted.token_ids) == hinted.text


def test_a_hint_begins_the_assistants_turn(tokenizer) -> None:
    prompt = prompt_of(tokenizer)
    (hinted,) = Hinter(HintGuidance(unit="tokens", place="assistant"), tokenizer, 200)([prompt], 0.35)
    assert hinted.text == prompt.text + hinted.hint and hinted.hint == "First 2."
    assert hinted.token_ids[: len(prompt.token_ids)] == prompt.token_ids and hinted.messages == prompt.messages
    assert tokenizer.decode(hinted.token_ids) == hinted.text


def test_no_hint_without_a_solution_without_room_or_without_a_share(tokenizer) -> None:
    with_, without = prompt_of(tokenizer), prompt_of(tokenizer, solution=None)
    section = HintGuidance(unit="steps", wording="{hint}")
    found = Hinter(section, tokenizer, 200)([without, with_, without], 0.5)
    assert [p is None for p in found] == [True, False, True]
    assert Hinter(section, tokenizer, len(with_.token_ids))([with_], 0.5) == [None]
    assert Hinter(section, tokenizer, 200)([with_], 0.0) == [None]
    assert Hinter(section, tokenizer, 200)([], 0.5) == []


def test_braces_in_solutions_are_only_text(tokenizer) -> None:
    prompt = prompt_of(tokenizer, solution=r"Use \frac{a}{b} {0} {hint} and more words here")
    (hinted,) = Hinter(HintGuidance(), tokenizer, 300)([prompt], 0.7)
    assert r"\frac{a}{b} {0} {hint}" in hinted.messages[-1]["content"]


def test_the_last_user_message_gets_the_hint() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert [m["content"] for m in with_hint(chat, "!")] == ["a", "b", "c!"]
    assert with_hint([{"role": "tool", "content": "x"}], "!")[0]["content"] == "x!"


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ({"ratios": []}, "ratios"),
        ({"ratios": [0.5, 0.25]}, "rise"),
        ({"ratios": [0.5, 0.5]}, "rise"),
        ({"ratios": [1.5]}, "ratios"),
        ({"wording": "a hint"}, "{hint}"),
        ({"judge": "turn"}, "assistant"),
    ],
)
def test_impossible_hints_are_refused(slots: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        HintGuidance.model_validate(slots)


@pytest.mark.parametrize("task", SOLVERS)
def test_worked_solutions_of_reasoning_gym_are_right_by_its_verifiers(task) -> None:
    import reasoning_gym

    found = 0
    for entry in reasoning_gym.create_dataset(task, size=25, seed=7):
        text = worked_solution(task, entry)
        if text is None:
            continue
        found += 1
        answer = reasoning_gym.utils.extract_answer(text)
        assert reasoning_gym.get_score_answer_fn(task)(answer=answer, entry=entry) == 1.0, text
        assert text.count("\n") >= 1, "an answer is no solution"
    assert found >= 18


def test_no_solution_where_there_is_no_solver() -> None:
    assert worked_solution("countdown", {"answer": "1", "metadata": {}}) is None
    assert worked_solution("chain_sum", {"answer": "7", "metadata": {"expression": "1 + 5"}}) is None, "not the answer"
    assert worked_solution("chain_sum", {"answer": "6", "metadata": {"expression": "1 + 5"}}) == (
        "1 + 5 = 6.\n<answer>6</answer>"
    )


def test_solutions_and_answers_from_the_shape_of_luffys_data(tmp_path) -> None:
    import json

    from rlpost.data.sources import load_rows
    from rlpost.errors import DataError
    from rlpost.recipe.sections.data import DatasetSource

    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1?"}]
    row = {
        "prompt": chat,
        "target": [{"role": "assistant", "content": "It is 2."}],
        "reward_model": {"ground_truth": "2"},
    }
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    slots = {"path": str(path), "demonstration": "target", "columns": {"answer": "reward_model.ground_truth"}}
    (found,) = load_rows(DatasetSource(**slots, system="drop"))
    assert found.question == ({"role": "user", "content": "1 + 1?"},)
    assert found.demonstration == Demonstration("It is 2.") and found.columns["answer"] == "2"
    assert len(load_rows(DatasetSource(**slots))[0].question) == 2
    slots["columns"] = {"answer": "reward_model.ground"}
    with pytest.raises(DataError, match=r"data.train.columns.answer.*ground_truth"):
        load_rows(DatasetSource(**slots))

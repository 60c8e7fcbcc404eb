"""Data sources: what rows they yield, and what they say when something is wrong."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.data.arithmetic import worked_solution
from rlpost.data.sources import Row, load_rows
from rlpost.errors import DataError
from rlpost.recipe.sections.base import Section
from rlpost.recipe.sections.data import ArithmeticSource, DatasetSource, ReasoningGymSource

GSM = [
    {"question": "2 apples and 3 apples?", "answer": "5", "solution": "2 + 3 = 5", "level": 1},
    {"question": "7 take away 4?", "answer": "3", "solution": None, "level": 2},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def test_jsonl_rows_keep_order_ids_columns_and_demonstrations(tmp_path):
    path = write_jsonl(tmp_path / "gsm.jsonl", GSM)
    rows = load_rows(DatasetSource(path=path, prompt="question", demonstration="solution"))
    assert [row.id for row in rows] == [f"{path}/0", f"{path}/1"]
    assert [row.question for row in rows] == [row["question"] for row in GSM]
    assert rows[0].columns == {"answer": "5", "solution": "2 + 3 = 5", "level": 1}
    assert rows[0].demonstration.text == "2 + 3 = 5"
    assert rows[1].demonstration is None  # null: no worked solution for this row


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_other_local_formats(tmp_path, ending):
    from datasets import Dataset

    path = tmp_path / f"gsm.{ending}"
    if ending == "json":
        path.write_text(json.dumps(GSM))
    else:
        getattr(Dataset.from_list(GSM), f"to_{ending}")(str(path))
    rows = load_rows(DatasetSource(path=str(path), prompt="question"))
    assert [row.question for row in rows] == [row["question"] for row in GSM]
    assert [row.columns["level"] for row in rows] == (["1", "2"] if ending == "csv" else [1, 2])  # CSV knows texts only


def test_glob_reads_files_in_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}"} for i in range(2)])
    rows = load_rows(DatasetSource(path=str(tmp_path / "*.jsonl")))
    assert [row.question for row in rows] == ["a0", "a1", "b0", "b1"]
    assert len({row.id for row in rows}) == 4


def test_limit(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": str(i)} for i in range(5)])
    assert [row.question for row in load_rows(DatasetSource(path=path, limit=2))] == ["0", "1"]
    assert len(load_rows(DatasetSource(path=path, limit=9))) == 5


def test_chat_messages(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": chat}])
    assert load_rows(DatasetSource(path=path))[0].question == tuple(chat)


def test_messages_that_end_with_the_answer_are_refused(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": chat}])
    with pytest.raises(
        DataError, match=r"data\.train\.prompt: the messages of row .*chat\.jsonl/0 end with the assistant"
    ):
        load_rows(DatasetSource(path=path))


@pytest.mark.parametrize("prompt", ["", "  ", None, 3, [], [{"role": "user"}]])
def test_unusable_prompts_are_refused_by_row(tmp_path, prompt):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": prompt, "x": 1}])
    with pytest.raises(DataError, match=r"bad\.jsonl/0 holds"):
        load_rows(DatasetSource(path=path))


def test_missing_column_names_the_available_the_nearest_and_the_key(tmp_path):
    path = write_jsonl(tmp_path / "gsm.jsonl", GSM)
    with pytest.raises(DataError) as caught:
        load_rows(DatasetSource(path=path, prompt="questoin"), "data.eval")
    message = str(caught.value)
    assert "no column `questoin`" in message
    assert "`question`, `answer`, `solution`, `level`" in message
    assert "nearest names are `question`, `solution`" in message
    assert "Set data.eval.prompt" in message
    with pytest.raises(DataError, match=r"data\.train\.demonstration: .*nearest names are `solution`"):
        load_rows(DatasetSource(path=path, prompt="question", demonstration="solutions"))


def test_missing_file_names_the_nearest(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", GSM)
    with pytest.raises(DataError, match=r"no file matches .*trian\.jsonl.*nearest name is `train\.jsonl`"):
        load_rows(DatasetSource(path=str(tmp_path / "trian.jsonl")))
    with pytest.raises(DataError, match="folder .*nowhere does not exist"):
        load_rows(DatasetSource(path=str(tmp_path / "nowhere" / "train.jsonl")))
    with pytest.raises(DataError, match="no file matches"):
        load_rows(DatasetSource(path=str(tmp_path / "*.parquet")))


def test_empty_and_broken_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        load_rows(DatasetSource(path=str(tmp_path / "empty.jsonl")))
    (tmp_path / "head.csv").write_text("prompt,answer\n")
    with pytest.raises(DataError, match=r"head\.csv` cannot be loaded: .*at least one row"):
        load_rows(DatasetSource(path=str(tmp_path / "head.csv")))
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    with pytest.raises(DataError, match=r"broken\.jsonl` cannot be loaded: .*must be one JSON object"):
        load_rows(DatasetSource(path=str(tmp_path / "broken.jsonl")))


def test_local_files_have_no_split_and_no_configuration(tmp_path):
    path = write_jsonl(tmp_path / "gsm.jsonl", GSM)
    with pytest.raises(DataError, match=r"Leave out data\.train\.split"):
        load_rows(DatasetSource(path=path, split="test", prompt="question"))
    with pytest.raises(DataError, match=r"Leave out data\.train\.name"):
        load_rows(DatasetSource(path=path, name="main", prompt="question"))


def test_hub_name_without_a_hub_says_what_to_do(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        load_rows(DatasetSource(path="openai/gsm8k", name="main", prompt="question"))
    message = str(caught.value)
    assert message.startswith("data.train.path: `openai/gsm8k` cannot be loaded")
    assert "HF_HUB_OFFLINE" in message and ".parquet" in message


def test_hub_ids_name_configuration_and_split(monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, name, data_files, split):
        calls.append((path, name, data_files, split))
        return datasets.Dataset.from_list(GSM)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows(DatasetSource(path="openai/gsm8k", name="main", split="test", prompt="question"))
    assert calls == [("openai/gsm8k", "main", None, "test")]
    assert rows[1].id == "openai/gsm8k:main:test/1"


def test_a_wrong_split_names_the_key(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ValueError("Unknown split \"tset\". Should be one of ['train', 'test'].")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"Unknown split .*data\.train\.split"):
        load_rows(DatasetSource(path="openai/gsm8k", split="tset"))


def test_reasoning_gym_rows_carry_the_entry():
    from reasoning_gym import get_score_answer_fn

    source = ReasoningGymSource(
        task="basic_arithmetic", size=5, seed=3, options={"min_digits": 1, "max_digits": 1}, suffix=" Number only."
    )
    rows = load_rows(source)
    assert rows == load_rows(source)
    assert [row.id for row in rows] == [f"reasoning_gym:basic_arithmetic:3/{i}" for i in range(5)]
    assert all(row.question.endswith(" Number only.") for row in rows)
    verify = get_score_answer_fn(rows[0].columns["task"])
    for row in rows:
        assert verify(row.columns["answer"], json.loads(row.columns["entry"])) == 1.0
    assert load_rows(source.model_copy(update={"seed": 4}))[0].question != rows[0].question


def test_reasoning_gym_errors():
    with pytest.raises(DataError, match=r"no task `countdwn`.*`countdown`"):
        load_rows(ReasoningGymSource(task="countdwn"))
    with pytest.raises(DataError, match=r"data\.train\.options: .*refuses .*CountdownConfig"):
        load_rows(ReasoningGymSource(task="countdown", options={"digits": 3}))
    with pytest.raises(DataError, match="refuses"):
        load_rows(ReasoningGymSource(task="countdown", options={"min_numbers": -1}))


def test_reasoning_gym_task_whose_verifier_breaks_on_json_is_refused():
    with pytest.raises(DataError, match="`arc_agi` does not recognise its own answer"):
        load_rows(ReasoningGymSource(task="arc_agi", size=1))


def test_arithmetic_is_deterministic_and_distinct():
    source = ArithmeticSource(size=3000)
    rows = load_rows(source)
    assert rows == load_rows(source)
    assert len({row.question for row in rows}) == 3000
    assert rows[0].id == "arithmetic:0/0" and rows[-1].id == "arithmetic:0/2999"
    assert load_rows(ArithmeticSource(size=3000, seed=1)) != rows
    assert sum(row.columns["op"] == "+" for row in rows) == 1500


def test_arithmetic_covers_a_small_range_and_then_repeats():
    rows = load_rows(ArithmeticSource(size=50, low=0, high=3))
    every = {f"What is {a} + {b}?" for a in range(4) for b in range(4)}
    every |= {f"What is {a} - {b}?" for a in range(4) for b in range(a + 1)}
    assert {row.question for row in rows} == every
    assert len({row.question for row in rows[:26]}) == 26
    assert len({row.id for row in rows}) == 50


@given(
    low=st.integers(-50, 200), span=st.integers(0, 10**12), size=st.integers(1, 40), seed=st.integers(0, 2**31),
    operations=st.sampled_from([("+",), ("-",), ("+", "-"), ("-", "+")]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_arithmetic_answers_and_demonstrations_are_right(low, span, size, seed, operations):
    source = ArithmeticSource(low=low, high=low + span, size=size, seed=seed, operations=operations)
    for row in load_rows(source):
        a, b, op = row.columns["a"], row.columns["b"], row.columns["op"]
        assert low <= a <= low + span and low <= b <= low + span and op in operations
        answer = a + b if op == "+" else a - b
        assert op == "+" or answer >= 0
        assert row.columns["answer"] == str(answer)
        assert row.question == f"What is {a} {op} {b}?"
        check_steps(row.demonstration.text, answer)


def check_steps(text, answer):
    """Every `x + y = z` in a worked solution holds, and it ends with the answer."""
    for left, right in re.findall(r"([-\d +]*\d) = ([-\d +]*\d)\.", text):
        assert eval(left) == eval(right), text
    assert text.endswith(f"The answer is {answer}.")


def test_worked_solutions():
    assert worked_solution(52, "-", 38) == "38 = 30 + 8. 52 - 30 = 22. 22 - 8 = 14. The answer is 14."
    assert worked_solution(47, "+", 5) == "47 + 5 = 52. The answer is 52."
    assert worked_solution(9, "+", 0) == "9 + 0 = 9. The answer is 9."
    assert worked_solution(9, "+", -12) == "12 = 10 + 2. 9 - 10 = -1. -1 - 2 = -3. The answer is -3."


def test_arithmetic_errors():
    with pytest.raises(DataError, match=r"data\.train\.high \(1\) is below"):
        load_rows(ArithmeticSource(low=5, high=1))
    with pytest.raises(DataError, match="operations is empty"):
        load_rows(ArithmeticSource(operations=()))
    for template in ("{x}", "{}", "{a"):
        with pytest.raises(DataError, match=r"template .* cannot be filled in.*\{a\}, \{op\} and \{b\}"):
            load_rows(ArithmeticSource(template=template))


def test_a_source_is_one_class_and_one_function():
    class Letters(Section):
        count: int

    with pytest.raises(DataError, match=r"no loader for a source of type Letters.*register\(Letters"):
        load_rows(Letters(count=2))
    load_rows.register(Letters, lambda source, where: [Row(f"letters/{i}", "abc"[i]) for i in range(source.count)])
    assert [row.question for row in load_rows(Letters(count=2), "data.train")] == ["a", "b"]

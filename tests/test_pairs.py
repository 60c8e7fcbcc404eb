"""Preference data: every format, every problem a clear error or a counted drop, tokens, and pairs that stay whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.data.pairs import Pair, build_pairs
from rlpost.data.preferences import load_preferences, read_row
from rlpost.data.tokenizer import load_tokenizer
from rlpost.errors import DataError
from rlpost.learner.pair_rows import pair_batches, tree_length
from rlpost.methods.dpo import best_and_worst
from rlpost.policy.rows import RowGroup
from rlpost.recipe.sections.data import DataSection
from rlpost.recipe.sections.model import ModelSection
from rlpost.recipe.sections.preference import PreferenceSource

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))
SYSTEM = {"role": "system", "content": "Be brief."}


def source(path: str = "x.jsonl", **slots) -> PreferenceSource:
    return PreferenceSource.model_validate({"path": path, **slots})


def row(values: dict, **slots):
    return read_row("x/0", values, source(**slots))


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "2+2?"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ({"role": "user", "content": "2+2?"},)),
        ({"prompt": [USER], "chosen": "4", "rejected": "5"}, (USER,)),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (USER,)),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, (USER,)),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, (SYSTEM, USER)),
        (
            {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            (USER,),
        ),  # HuggingFaceH4/ultrafeedback_binarized
        ({"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]}, (USER,)),
    ],
)
def test_formats(values, prompt):
    found = row(values)
    assert (found.prompt, found.chosen, found.rejected) == (prompt, "4", "5")


def test_an_implicit_prompt_of_texts_is_used_as_it_is():
    values = {"chosen": "Q: 2+2? A: 4", "rejected": "Q: 2+2? A: 5"}
    assert "data.train.plain=true" in row(values, prompt=None).detail
    assert "data.eval.plain=true" in read_row("x/0", values, source(prompt=None), "data.eval").detail
    found = row(values, prompt=None, plain=True)
    assert (found.prompt, found.chosen, found.rejected) == ("Q: 2+2? A:", " 4", " 5")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "missing"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "malformed"),
        ({"prompt": "q", "chosen": [{"role": "assistant", "content": None}], "rejected": [BAD]}, "malformed"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty"),
        ({"prompt": "q", "chosen": "a", "rejected": " \n"}, "empty"),
        ({"prompt": "q", "chosen": [], "rejected": [BAD]}, "empty"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant", "content": ""}]}, "empty"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "identical"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "identical"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "3+3?"}, BAD]}, "mismatch"),
        ({"prompt": "3+3?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "mismatch"),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "mismatch"),
        ({"prompt": "q", "chosen": "a", "rejected": [BAD]}, "mismatch"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "mismatch"),
        ({"prompt": None, "chosen": "q: a", "rejected": "q: b"}, "mismatch"),
        ({"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "mismatch"),
        ({"prompt": "", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "mismatch"),
        ({"prompt": 5, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "mismatch"),
        ({"prompt": [], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "mismatch"),
        ({"prompt": [{"role": "user", "content": " "}], "chosen": [GOOD], "rejected": [BAD]}, "mismatch"),
        ({"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "mismatch"),
        ({"prompt": [USER, GOOD], "chosen": "a", "rejected": "b"}, "mismatch"),
        ({"chosen": [USER, GOOD, GOOD], "rejected": [USER, GOOD, BAD]}, "mismatch"),
        ({"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]}, "mismatch"),
    ],
)
def test_problems_have_a_name(values, reason):
    assert row(values).reason == reason


@pytest.mark.parametrize("plain", [False, True])
def test_a_null_prompt_is_no_implicit_one(plain):
    """Under `plain` it once became the part that the responses have in common."""
    found = row({"prompt": None, "chosen": "Yes, 4.", "rejected": "Yes, 5."}, plain=plain)
    assert (found.reason, found.detail) == ("mismatch", "`prompt` is null")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            [{"role": "assistant", "content": [{"type": "text", "text": "4"}]}],
            "`content` is of type list.*content parts",
        ),
        ([{"role": "assistant", "content": None}], "message 0 whose `content` is null"),
        ([{"from": "gpt", "value": "4"}], "`from` and `value`"),
        ([{"content": "4"}], "`role` is null"),
        (["4"], "a list of str"),
        ({"text": "4"}, "of type dict"),
        ([GOOD | {"tool_calls": [{"name": "f"}]}], "tool calls in message 0"),
    ],
)
def test_what_was_found_in_place_of_a_response_is_named(tmp_path, value, words):
    path = write(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": value, "rejected": [BAD]}])
    with pytest.raises(
        DataError, match=rf"1 of 1 rows have a response that cannot be an answer.*`chosen` .*{words}.*missing=drop"
    ):
        load_preferences(source(path))


def write(path: Path, lines: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


PROBLEMS = [
    {"prompt": "a", "chosen": "x", "rejected": "y"},
    {"prompt": "b", "chosen": None, "rejected": "y"},
    {"prompt": "c", "chosen": "", "rejected": "y"},
    {"prompt": "d", "chosen": "y", "rejected": "y"},
    {"prompt": "", "chosen": "x", "rejected": "y"},
]


@pytest.mark.parametrize("reason", ["missing", "empty", "identical", "mismatch"])
def test_a_refused_problem_names_count_row_and_way_out(tmp_path, reason):
    choice = dict.fromkeys(("missing", "empty", "identical", "mismatch"), "drop") | {reason: "refuse"}
    with pytest.raises(DataError, match=rf"1 of 5 rows .*{reason}=drop"):
        load_preferences(source(write(tmp_path / "p.jsonl", PROBLEMS), **choice))


def test_dropped_problems_are_counted(tmp_path):
    choice = dict.fromkeys(("missing", "empty", "identical", "mismatch"), "drop")
    found, dropped = load_preferences(source(write(tmp_path / "p.jsonl", PROBLEMS), **choice))
    assert [one.prompt for one in found] == ["a"]
    assert dropped == {"missing": 1, "empty": 1, "identical": 1, "mismatch": 1}


def test_a_missing_column_is_named(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "chose": "x", "rejected": "y"}])
    with pytest.raises(DataError, match=r"no column `chosen`.*`chose`"):
        load_preferences(source(path))


@pytest.mark.parametrize("where", ["data.train", "data.eval"])
@pytest.mark.parametrize("slots", [{}, {"plain": True}, {"prompt": "instructions"}])
def test_a_missing_prompt_column_is_no_implicit_prompt(tmp_path, where, slots):
    path = write(tmp_path / "p.jsonl", [{"instruction": "2+2?", "chosen": "It is 4", "rejected": "It is 5"}])
    column = slots.get("prompt", "prompt")
    listed = "It has `instruction`, `chosen`, `rejected`"
    with pytest.raises(
        DataError, match=rf"{where}.prompt: .*no column `{column}`. {listed}.*{where}.prompt to null"
    ) as found:
        load_preferences(source(path, **slots), where)
    assert "plain" not in str(found.value)
    if slots.get("prompt"):
        assert "nearest name is `instruction`" in str(found.value)


def test_chats_may_do_without_a_prompt_column_unless_it_is_named(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}])
    assert load_preferences(source(path))[0][0].prompt == (USER,)
    with pytest.raises(DataError, match="no column `question`"):
        load_preferences(source(path, prompt="question"))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelSection(path=tiny_model))


def build(tmp_path, tokenizer, lines, *, limit=64, context=256, seed=0, data=None, **slots):
    section = {"train": {"type": "preference", "path": write(tmp_path / "p.jsonl", lines), **slots}, "held_out": 0}
    section = DataSection.model_validate({**section, "max_prompt_tokens": 32, **(data or {})})
    return build_pairs(section, tokenizer, max_context=context, seed=seed, max_completion_tokens=limit)


LINES = [{"prompt": f"p{i}", "chosen": "good", "rejected": "worse"} for i in range(6)]


def test_tokens_of_chat_pairs(tmp_path, tokenizer):
    pair = build(tmp_path, tokenizer, LINES).train[0]
    assert isinstance(pair, Pair)
    assert tokenizer.decode(pair.token_ids) == "u:p0\na:"
    assert tokenizer.decode(pair.chosen.token_ids) == "good<eos>"
    assert tokenizer.decode(pair.rejected.token_ids) == "worse<eos>"


def test_a_template_with_an_end_mark_ends_there(tmp_path, tokenizer, tiny_model):
    own = load_tokenizer(ModelSection(path=tiny_model))
    own.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    pair = build(tmp_path, own, [{"prompt": "q", "chosen": "s", "rejected": "t"}]).train[0]
    assert own.decode(pair.chosen.token_ids) == "s</s>"


def test_plain_texts_have_no_template(tmp_path, tokenizer):
    pair = build(tmp_path, tokenizer, LINES, plain=True).train[0]
    assert tokenizer.decode(pair.token_ids) == "p0"
    assert tokenizer.decode(pair.chosen.token_ids) == "good<eos>"
    with pytest.raises(DataError, match="plain"):
        build(tmp_path, tokenizer, [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}], plain=True)


LONG = [*LINES, {"prompt": "long", "chosen": "x" * 70, "rejected": "y"}]


def test_over_long_responses(tmp_path, tokenizer):
    sets = build(tmp_path, tokenizer, LONG)
    assert len(sets.train) == 6
    assert sets.dropped["too_long"] == 1 and "1 have a response that is too long" in sets.note()
    cut = build(tmp_path, tokenizer, LONG, too_long="cut")
    assert len(cut.train[-1].chosen.token_ids) == 64 and cut.train[-1].chosen.finish == "length" and cut.cut == 1
    with pytest.raises(DataError, match=r"1 of 7 rows .*71 tokens.*too_long=drop"):
        build(tmp_path, tokenizer, LONG, too_long="refuse")
    with pytest.raises(DataError, match="No training pair is left"):
        build(tmp_path, tokenizer, LONG[-1:])


ALIKE = [*LINES, {"prompt": "q", "chosen": "4", "rejected": "4 "}]


def test_responses_that_are_the_same_tokens_are_identical(tmp_path, tokenizer, tiny_model):
    stripping = load_tokenizer(ModelSection(path=tiny_model))
    stripping.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content.strip() }}{{ '<eos>' if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    sets = build(tmp_path, stripping, ALIKE)
    assert len(sets.train) == 6 and sets.dropped["identical"] == 1
    with pytest.raises(
        DataError, match=r"1 of 7 rows have two identical.*/6: both are the same 2 tokens.*identical=drop"
    ):
        build(tmp_path, stripping, ALIKE, identical="refuse")
    assert len(build(tmp_path, tokenizer, ALIKE, plain=True).train) == 7  # as texts they differ


def test_responses_that_differ_behind_the_cut_are_identical(tmp_path, tokenizer):
    lines = [*LINES, {"prompt": "q", "chosen": "x" * 70, "rejected": "x" * 80}]
    sets = build(tmp_path, tokenizer, lines, too_long="cut")
    assert len(sets.train) == 6 and sets.dropped["identical"] == 1 and sets.cut == 2
    with pytest.raises(DataError, match="both are the same 64 tokens"):
        build(tmp_path, tokenizer, lines, too_long="cut", identical="refuse")


def test_when_nothing_is_left_the_reasons_are_given(tmp_path, tokenizer):
    same = [{"prompt": f"p{i}", "chosen": "x", "rejected": "x"} for i in range(3)]
    for held_out in (0, 2):
        with pytest.raises(DataError, match=r"3 have two identical responses.*data.train.identical=refuse") as found:
            build(tmp_path, tokenizer, same, data={"held_out": held_out})
        assert "max_prompt_tokens" not in str(found.value) and "held_out" not in str(found.value)
    null = [{"prompt": None, "chosen": "x", "rejected": "y"}, {"prompt": "p", "chosen": "x", "rejected": "y" * 99}]
    with pytest.raises(DataError, match=r"1 have responses that do not.*too_long=cut; look at .*mismatch=refuse"):
        build(tmp_path, tokenizer, null, mismatch="drop")


TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_template_keywords_of_a_row_reach_the_template(tmp_path, tiny_model, as_text):
    """As TRL's DPOTrainer does with the columns `tools` and `chat_template_kwargs`."""
    own = load_tokenizer(ModelSection(path=tiny_model))
    own.chat_template = (
        "{% if tools %}[{{ tools[0].function.name }}]{% endif %}{{ mood | default('none') }}|"
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    keywords = {"mood": "calm"}
    if as_text:
        row = {"tools": json.dumps(TOOLS), "chat_template_kwargs": json.dumps(keywords)}
    else:
        row = {"tools": TOOLS, "chat_template_kwargs": keywords}
    lines = [LINES[0] | row, LINES[1] | dict.fromkeys(row)]
    first, second = build(tmp_path, own, lines, data={"template_options": {"mood": "grim"}}).train
    assert own.decode(first.token_ids) == "[add]calm|u:p0\na:"
    assert own.decode(second.token_ids) == "grim|u:p1\na:"
    assert own.decode(first.chosen.token_ids) == "good<eos>"
    for broken, words in (({"tools": "no json"}, "tools"), ({"chat_template_kwargs": "[1]"}, "needs keywords")):
        with pytest.raises(DataError, match=words):
            build(tmp_path, own, [LINES[0] | broken])


def test_over_long_prompts(tmp_path, tokenizer):
    lines = [*LINES, {"prompt": "p" * 40, "chosen": "x", "rejected": "y"}]
    assert build(tmp_path, tokenizer, lines).dropped["prompt"] == 1
    with pytest.raises(DataError, match="max_prompt_tokens"):
        build(tmp_path, tokenizer, lines, data={"too_long": "refuse"})
    with pytest.raises(DataError, match="context of 64"):
        build(tmp_path, tokenizer, lines, context=64)


def test_no_prompt_is_trained_on_and_held_out(tmp_path, tokenizer):
    lines = [*LINES, {"prompt": "p0", "chosen": "another", "rejected": "worse"}]
    for seed in range(8):
        sets = build(tmp_path, tokenizer, lines, seed=seed, data={"held_out": 3})
        held = {pair.text for pair in sets.held_out}
        assert len(held) == 3 and not held & {pair.text for pair in sets.train}
        assert len(sets.train) + len(sets.held_out) + sets.dropped["held_out"] == 7
    with pytest.raises(DataError, match="held_out"):
        build(tmp_path, tokenizer, lines, data={"held_out": 6})


def test_fingerprint_follows_the_tokens(tmp_path, tokenizer):
    one = build(tmp_path, tokenizer, LINES).fingerprint
    assert one == build(tmp_path, tokenizer, LINES).fingerprint
    assert one != build(tmp_path, tokenizer, [*LINES[:-1], {**LINES[-1], "rejected": "worst"}]).fingerprint


def test_responses_of_the_initial_model(tmp_path, tokenizer):
    lines = [{**line, "first": f"own {i}"} for i, line in enumerate(LINES)]
    pair = build(tmp_path, tokenizer, lines, baseline="first").train[1]
    assert tokenizer.decode(pair.baseline) == "own 1<eos>"
    with pytest.raises(
        DataError, match=r"1 of 1 rows have no response of the initial model.*`first` is empty.*missing=drop"
    ):
        build(tmp_path, tokenizer, [{**LINES[0], "first": ""}], baseline="first")
    dropped = build(tmp_path, tokenizer, [*lines, {**LINES[0], "first": None}], baseline="first", missing="drop")
    assert "1 have no response of the initial model" in dropped.note()


groups = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(1, 40), min_size=2, max_size=3)), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(groups, st.sampled_from(["tree", "sorted", "padded"]), st.integers(30, 400), st.sampled_from([50, 4096]))
def test_a_pair_is_never_split(shapes, layout, budget, cap):
    made, sequence, start = [], 0, 0
    for prompt, lengths in shapes:
        entries = []
        for n in lengths:
            entries.append((sequence, start, tuple(range(2, 2 + n))))
            sequence, start = sequence + 1, start + n
        made.append(RowGroup((1,) * prompt, tuple(entries)))
    batches = pair_batches(made, layout=layout, micro_batch_tokens=budget, pad_id=0, row_cap=cap)
    seen = [set(rows.sequence.tolist()) for rows in batches]
    assert sorted(one for part in seen for one in part) == list(range(sequence))
    for group in made:
        own = {entry[0] for entry in group.completions}
        assert any(own <= part for part in seen)
    assert torch.equal(torch.cat([rows.token_index for rows in batches]).sort().values, torch.arange(start))
    for rows, part in zip(batches, seen, strict=True):
        several = sum(bool({e[0] for e in g.completions} & part) for g in made) > 1
        assert rows.input_ids.numel() <= budget or not several
    if layout == "tree":
        for group in made:
            whole = tree_length(group) <= min(budget, cap)
            place = next(rows for rows, part in zip(batches, seen, strict=True) if group.completions[0][0] in part)
            used = {
                int(r)
                for r, s in zip(place.predict_row, place.sequence, strict=True)
                if int(s) in {e[0] for e in group.completions}
            }
            assert len(used) == (1 if whole else len(group.completions))


@pytest.mark.parametrize(
    ("rewards", "found"),
    [
        ([0.0, 1.0, 0.5], (1, 0)),
        ([1.0, 1.0], None),
        ([float("nan"), 1.0], None),
        ([float("nan"), 1.0, 0.0], (1, 2)),
        ([], None),
        ([0.0, 1.0, 1.0, 0.0], (1, 0)),
    ],
)
def test_best_against_worst(rewards, found):
    assert best_and_worst(rewards, [(i,) for i in range(len(rewards))]) == found


def test_a_small_gap_or_the_same_text_is_no_preference():
    assert best_and_worst([0.0, 0.1], [(1,), (2,)], min_gap=0.1) is None
    assert best_and_worst([0.0, 1.0], [(1,), (1,)]) is None

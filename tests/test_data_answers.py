"""One place knows how a template opens and ends an answer; prompts, pairs, demonstrations, hints and sampling ask it."""

from __future__ import annotations

import json

import pytest
from chat_templates import CHATML, DEEPSEEK_R1, GEMMA, LLAMA3, MISTRAL, PHI, QWEN3, byte_tokenizer

from rlpost.data.answers import end_ids
from rlpost.data.demonstrations import DemonstrationReader
from rlpost.data.hints import Hinter
from rlpost.data.pairs import build_pairs
from rlpost.data.prompts import build_prompts
from rlpost.errors import DataError, RecipeError
from rlpost.recipe.sections.data import DataSection
from rlpost.recipe.sections.guidance import HintGuidance

R1_END = "<｜end▁of▁sentence｜>"
# name: template, the tokenizer's end token, the template's end of an answer, what stands in front of a plain answer
STYLES = {
    "chatml": (CHATML, "<|im_end|>", "<|im_end|>", ""),
    "chatml with another eos": (CHATML, "<eos>", "<|im_end|>", ""),
    "llama 3": (LLAMA3, "<|eot_id|>", "<|eot_id|>", ""),
    "gemma": (GEMMA, "<eos>", "<end_of_turn>", ""),
    "phi": (PHI, "<eos>", "<|end|>", ""),
    "deepseek r1": (DEEPSEEK_R1, R1_END, R1_END, ""),
    "mistral": (MISTRAL, "</s>", "</s>", " "),
    "qwen 3": (QWEN3, "<|im_end|>", "<|im_end|>", "<think>\n\n</think>\n\n"),
    "no mark at all": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                       "{% if add_generation_prompt %}assistant: {% endif %}", "<eos>", "<eos>", ""),
    "always opens": ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>", "<eos>", "<eos>", ""),
}  # fmt: skip


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def learned(tmp_path, tokenizer, answer, **data):
    """The same text as a preferred response and as a demonstration: (prompt, response, demonstration) decoded."""
    row = {"prompt": "q?", "chosen": answer, "rejected": "no", "solution": answer}
    path = write(tmp_path / "d.jsonl", row)
    section = {"train": {"type": "preference", "path": path}, "held_out": 0, **data}
    pair = build_pairs(
        DataSection.model_validate(section), tokenizer, max_context=None, seed=0, max_completion_tokens=300
    ).train[0]
    section["train"] = {"type": "dataset", "path": path, "demonstration": "solution"}
    section = DataSection.model_validate(section)
    prompt = build_prompts(section, tokenizer, max_context=None).train[0]
    (ids,) = DemonstrationReader(tokenizer, 300, None, section.template_options)([prompt])
    assert pair.token_ids == prompt.token_ids and pair.text == prompt.text
    return tuple(map(tokenizer.decode, (pair.token_ids, pair.chosen.token_ids, ids)))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("brings", ["", "{end}", "{eos}", "{end}\n", "{end}\n{eos}", "{end}{end}"])
def test_an_answer_ends_once_as_the_template_ends_it(tmp_path, style, brings):
    template, eos, end, before = STYLES[style]
    tokenizer = byte_tokenizer(template, eos=eos)
    text = "4" + brings.format(end=end, eos=eos)
    _, response, demonstration = learned(tmp_path, tokenizer, text)
    assert response == demonstration == before + "4" + end


@pytest.mark.parametrize("style", ["chatml", "gemma", "phi", "deepseek r1", "qwen 3"])
def test_nothing_can_stand_behind_an_end(tmp_path, style):
    template, eos, end, _ = STYLES[style]
    tokenizer = byte_tokenizer(template, eos=eos)
    with pytest.raises(DataError, match=r"1 of 1 rows have a response .*before its own end.*missing=drop"):
        learned(tmp_path, tokenizer, f"4{end}\nuser again")
    section = DataSection.model_validate(
        {"train": {"type": "dataset", "path": str(tmp_path / "d.jsonl"), "demonstration": "solution"}, "held_out": 0}
    )
    prompts = build_prompts(section, tokenizer, max_context=None).train
    with pytest.raises(DataError, match=r"data\.train\.demonstration: .*d\.jsonl/0 has the end of an answer"):
        DemonstrationReader(tokenizer, 99)(prompts)


OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
THINKING = "<think>\nhm\n</think>\n\n4"


@pytest.mark.parametrize("template", [OPENS, DEEPSEEK_R1, QWEN3, CHATML])
@pytest.mark.parametrize("answer", [THINKING, "hm\n</think>\n\n4", "<think>hm\n</think>\n\n4", "\n" + THINKING])
def test_thinking_begins_once(tmp_path, template, answer):
    tokenizer = byte_tokenizer(template, eos="<|im_end|>")
    prompt, response, demonstration = learned(tmp_path, tokenizer, answer)
    whole = prompt + response
    assert response == demonstration and "hm\n</think>\n\n4" in whole
    assert whole.count("<think>") == (0 if template == CHATML and "<think>" not in answer else 1)


def test_empty_thinking_stands_once(tmp_path):
    off = {"template_options": {"enable_thinking": False}}
    tokenizer = byte_tokenizer(QWEN3, eos="<|im_end|>")
    for answer in ("4", "<think>\n\n</think>\n\n4", "<think></think>4"):
        prompt, response, demonstration = learned(tmp_path, tokenizer, answer, **off)
        assert prompt.endswith("<think>\n\n</think>\n\n") and response == demonstration == "4<|im_end|>"
    with pytest.raises(DataError, match=r"the template has written .* already, which closes the thinking"):
        learned(tmp_path, tokenizer, THINKING, **off)


def test_thinking_that_is_closed_without_having_been_opened_is_not_opened_by_the_answer(tmp_path):
    template = (
        "{% for m in messages %}<｜{{ m.role }}｜>{% if m.role == 'assistant' %}</think>{% endif %}{{ m.content }}"
        "{% if m.role == 'assistant' %}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜assistant｜></think>{% endif %}"
    )  # the form of DeepSeek V3.1 without thinking
    tokenizer = byte_tokenizer(template, eos=R1_END)
    for answer in ("4", "<think></think>4", "<think>\n\n</think>\n\n4"):
        prompt, response, demonstration = learned(tmp_path, tokenizer, answer)
        assert prompt.endswith("</think>") and response == demonstration == "4" + R1_END
    with pytest.raises(
        DataError, match=r"cannot be an answer.*begins with <think>, but the template has written '</think>'"
    ):
        learned(tmp_path, tokenizer, THINKING)


def test_answers_that_never_close_their_thinking_are_counted(tmp_path):
    tokenizer = byte_tokenizer(OPENS, eos="<|im_end|>")
    path = write(tmp_path / "d.jsonl", {"prompt": "q", "chosen": "4", "rejected": THINKING})
    section = DataSection.model_validate({"train": {"type": "preference", "path": path}, "held_out": 0})
    sets = build_pairs(section, tokenizer, max_context=None, seed=0, max_completion_tokens=99)
    assert "1 answers never close the thinking" in sets.note()


def test_what_the_template_strips_is_stripped_and_what_it_keeps_is_kept(tmp_path):
    assert learned(tmp_path, byte_tokenizer(LLAMA3), " 4 \n")[1:] == ("4<|eot_id|>",) * 2
    assert learned(tmp_path, byte_tokenizer(CHATML), " 4 \n")[1:] == (" 4 \n<|im_end|>",) * 2


def test_a_template_that_ignores_the_opening_is_refused(tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(RecipeError, match=r"model\.chat_template: the template ignores `add_generation_prompt`"):
        learned(tmp_path, byte_tokenizer(template), "4")
    path = write(tmp_path / "d.jsonl", {"prompt": "q"})
    section = DataSection.model_validate({"train": {"type": "dataset", "path": path}, "held_out": 0})
    with pytest.raises(RecipeError, match=r"<\|im_start\|>assistant"):
        build_prompts(section, byte_tokenizer(template), max_context=None)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}", "is not valid Jinja"),
        ("{{ raise_exception('Only users') }}", "Only users"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content.nope.more }}", "nope"),
        ({"rag": "x", "tool_use": "y"}, "several chat templates"),
        (None, "no chat template"),
        ("", "no chat template"),
    ],
)
def test_whatever_a_template_raises_names_the_row_and_the_key(tmp_path, template, said):
    for row in ({"prompt": "q"}, {"prompt": "q", "chosen": "a", "rejected": "b"}):
        path = write(tmp_path / "d.jsonl", row)
        source = {"type": "preference" if "chosen" in row else "dataset", "path": path}
        section = DataSection.model_validate({"train": source, "held_out": 0})
        with pytest.raises(DataError, match=said) as caught:
            if "chosen" in row:
                build_pairs(section, byte_tokenizer(template), max_context=None, seed=0, max_completion_tokens=9)
            else:
                build_prompts(section, byte_tokenizer(template), max_context=None)
        assert "model.chat_template" in str(caught.value)


def test_keywords_that_are_no_templates_are_refused(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "q", "chat_template_kwargs": {"tokenize": True}})
    section = {"train": {"type": "dataset", "path": path}, "held_out": 0}
    with pytest.raises(DataError, match=r"d\.jsonl/0 has the keyword `tokenize`"):
        build_prompts(DataSection.model_validate(section), byte_tokenizer(CHATML), max_context=None)
    section["template_options"] = {"chat_template": "x"}
    with pytest.raises(RecipeError, match=r"data\.template_options\.chat_template"):
        build_prompts(DataSection.model_validate(section), byte_tokenizer(CHATML), max_context=None)


def test_what_the_template_does_not_show_is_said(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    chat = [{"role": "user", "content": "q", "name": "Ann"}]
    path = write(tmp_path / "d.jsonl", {"prompt": chat, "tools": tools})
    section = DataSection.model_validate({"train": {"type": "dataset", "path": path}, "held_out": 0})
    note = build_prompts(section, byte_tokenizer(CHATML), max_context=None).note()
    assert "shows nothing of `name` (row" in note and "shows nothing of `tools` (row" in note
    shown = "{{ tools | tojson }}{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}"
    assert "shows nothing" not in build_prompts(section, byte_tokenizer(shown), max_context=None).note()
    dated = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert "today's date" in build_prompts(section, byte_tokenizer(dated), max_context=None).note()


def test_a_keyword_of_the_recipe_that_the_template_does_not_have_is_said(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "q"})
    source = {"train": {"type": "dataset", "path": path}, "held_out": 0}
    for name, said in (("enable_thinking", False), ("enable_thinkin_g", True)):
        section = DataSection.model_validate({**source, "template_options": {name: True}})
        note = build_prompts(section, byte_tokenizer(QWEN3), max_context=None).note()
        assert (f"no keyword `{name}`, so data.template_options.{name} changes nothing" in note) is said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("content", [{"type": "text", "text": "q"}], "content parts"),
        ("content", None, "`content` is null"),
        ("role", 3, "`role` is of type int"),
        ("from", "human", None),
    ],
)
def test_messages_that_are_not_understood_are_refused(tmp_path, key, value, said):
    message = {"role": "user", "content": "q", key: value}
    path = write(tmp_path / "d.jsonl", {"prompt": [message]})
    section = DataSection.model_validate({"train": {"type": "dataset", "path": path}, "held_out": 0})
    if said is None:
        assert build_prompts(section, byte_tokenizer(CHATML), max_context=None).train[0].messages == (message,)
        return
    with pytest.raises(DataError, match=rf"data\.train\.prompt: row .*d\.jsonl/0 holds .*{said}"):
        build_prompts(section, byte_tokenizer(CHATML), max_context=None)


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "thinking"])
def test_what_an_answer_has_beside_its_text_is_refused(tmp_path, key):
    answer = [{"role": "assistant", "content": "4", key: ["x"]}]
    row = {"prompt": "q", "solution": answer, "chosen": answer, "rejected": [{"role": "assistant", "content": "5"}]}
    path = write(tmp_path / "d.jsonl", row)
    words = "tool calls in message 0" if key == "tool_calls" else f"`{key}` in message 0"
    sources = ({"type": "dataset", "demonstration": "solution"}, {"type": "preference"})
    for source, build in zip(sources, (build_prompts, build_pairs), strict=True):
        section = DataSection.model_validate({"train": {"path": path, **source}, "held_out": 0})
        with pytest.raises(DataError, match=words):
            build(section, byte_tokenizer(CHATML), max_context=None, seed=0, max_completion_tokens=99)


def test_preference_prompts_keep_their_keys(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    chat.append({"role": "tool", "content": "7"})
    shows = (
        "{% for m in messages %}{{ m.role }}:{{ m.content or m.tool_calls | tojson }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    path = write(tmp_path / "d.jsonl", {"prompt": chat, "chosen": "4", "rejected": "5"})
    section = DataSection.model_validate({"train": {"type": "preference", "path": path}, "held_out": 0})
    pair = build_pairs(section, byte_tokenizer(shows), max_context=None, seed=0, max_completion_tokens=99).train[0]
    assert pair.text == f"user:q;assistant:{json.dumps([call])};tool:7;assistant:" and pair.messages == tuple(chat)


@pytest.mark.parametrize("place", ["user", "assistant"])
def test_hints_bring_no_end_and_no_second_thinking(tmp_path, place):
    tokenizer = byte_tokenizer(OPENS, eos="<|im_end|>")
    path = write(tmp_path / "d.jsonl", {"prompt": "q?", "solution": THINKING + "<|im_end|>", "tools": [{"name": "f"}]})
    source = {"type": "dataset", "path": path, "demonstration": "solution"}
    prompt = build_prompts(
        DataSection.model_validate({"train": source, "held_out": 0}), tokenizer, max_context=None
    ).train[0]
    (hinted,) = Hinter(HintGuidance(ratios=(1.0,), place=place), tokenizer, 300)([prompt], 1.0)
    assert hinted.hint == THINKING and hinted.options == {"tools": [{"name": "f"}]}
    assert tokenizer.decode(hinted.token_ids) == hinted.text
    if place == "assistant":
        assert hinted.text == prompt.text + "hm\n</think>\n\n4"
    else:
        assert hinted.text.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_plain_prompts_get_what_stands_in_front_of_a_text_once(tmp_path):
    rows = [{"prompt": p, "chosen": "4", "rejected": "5<eos>"} for p in ("2+2?", "<bos>2+2?")]
    section = {
        "train": {"type": "preference", "path": write(tmp_path / "d.jsonl", *rows), "plain": True},
        "held_out": 0,
    }
    for around, front in ((True, "<bos>"), (False, "")):
        tokenizer = byte_tokenizer(around=around)
        sets = build_pairs(
            DataSection.model_validate(section), tokenizer, max_context=None, seed=0, max_completion_tokens=99
        )
        first, second = sets.train
        assert tokenizer.decode(first.token_ids) == front + "2+2?" and tokenizer.decode(second.token_ids) == "<bos>2+2?"
        assert [tokenizer.decode(one) for one in first.responses] == ["4<eos>", "5<eos>"] == [
            tokenizer.decode(one) for one in second.responses
        ]  # fmt: skip


def test_sampling_knows_the_templates_end():
    for template, eos, end, _ in STYLES.values():
        tokenizer = byte_tokenizer(template, eos=eos)
        assert list(end_ids(tokenizer)) == ([] if end == eos else [tokenizer.convert_tokens_to_ids(end)])
    assert end_ids(byte_tokenizer("{% broken")) == () == end_ids(byte_tokenizer(None))

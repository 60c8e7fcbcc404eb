"""TRL's two formats: texts where the data's prompts are texts, chats where they are chats; neither is taken for the other."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_scoring import group

from rlpost.errors import RewardError
from rlpost.experience import Outcome
from rlpost.recipe.sections.reward import RewardSection, ScoringSection
from rlpost.scoring import Scorer, load_reward
from rlpost.scoring.formats import Chat, Text, misread
from rlpost.scoring.tryout import run_tryout, try_reward

# The examples of TRL's documentation ("Using a custom reward function"), unchanged, with its own example inputs.
TRL = r'''
import asyncio
import re

def longest_ids(completion_ids, **kwargs):
    """Reward function that assigns higher scores to longer completions (in terms of token count)."""
    return [float(len(ids)) for ids in completion_ids]

def longest(completions, **kwargs):
    """Reward function that gives higher scores to longer completions."""
    return [float(len(completion)) for completion in completions]

def format_reward_func(completions, **kwargs):
    """Reward function that checks if the completion has a specific format."""
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    completion_contents = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, content) for content in completion_contents]
    return [1.0 if match else 0.0 for match in matches]

def boxed(completions, ground_truth, **kwargs):
    # Regular expression to capture content inside \boxed{}
    matches = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    contents = [match.group(1) if match else "" for match in matches]
    # Reward 1 if the content is the same as the ground truth, 0 otherwise
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]

async def soon(prompts, completions, **kwargs):
    """Simulates calling an external API or performing I/O-bound work."""
    await asyncio.sleep(0.01)
    return [1.0 if len(completion) > len(prompt) else 0.0 for prompt, completion in zip(prompts, completions)]
'''

MISUSES = """
import re
def length(completions, **columns):
    return [float(len(c)) for c in completions]
def contains(completions, **columns):
    return [float("a" in c) for c in completions]
def equals(completions, **columns):
    return [float(c == "a") for c in completions]
def expression(completions, **columns):
    return [float(bool(re.search("a", c))) for c in completions]
def method(completions, **columns):
    return [float(c.strip() == "a") for c in completions]
def number(completions, **columns):
    return [float(c) for c in completions]
async def later(completions, **columns):
    return [float(len(c)) for c in completions]
"""

SEEN = """
def seen(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
    log_metric("count", len(completions))
    log_extra("answer", answer)
    given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, "answer": answer, **kwargs}
    SEEN.append(given)
    print("SEEN", repr(given))
    return [trainer_state.global_step] * len(completions)
SEEN = []
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    for name, text in (("trl_examples", TRL), ("misuses", MISUSES), ("seen", SEEN)):
        (folder / f"{name}.py").write_text(text)
    return folder


def of_text(*texts, **columns):
    made = group(*texts, **columns)
    return replace(made, prompt=replace(made.prompt, is_text=True))


def values(spec, made, **section):
    settings = ScoringSection(workers=1, max_failed_share=1.0)
    with Scorer([RewardSection(function=spec, **{"call": "batch", **section})], settings) as s:
        return [row[0].value if row[0].detail == "" else row[0].detail for row in s.score([made])[0].scores]


@pytest.mark.engine
@pytest.mark.parametrize("call", ["sample", "batch"])
def test_trls_own_examples_score_here_what_they_score_there(files, call):
    trl = f"{files}/trl_examples.py"
    cat = of_text("The cat sat on the mat", "a", ground_truth="4")
    assert values(f"{trl}:longest", cat, call=call) == [22.0, 1.0]
    assert values(f"{trl}:longest_ids", cat, call=call) == [3.0, 3.0]
    assert values(f"{trl}:soon", cat, call=call) == [1.0, 0.0]  # the prompt is "question"
    answers = of_text(r"The answer is \boxed{4}", r"\boxed{5}", ground_truth="4")
    assert values(f"{trl}:boxed", answers, call=call) == [1.0, 0.0]
    chat = group("<think>a</think><answer>b</answer>", "<answer>b</answer>")
    assert values(f"{trl}:format_reward_func", chat, call=call) == [1.0, 0.0]
    # Beyond TRL: what is written for chats reads texts, too.
    assert values(f"{trl}:format_reward_func", replace(chat, prompt=cat.prompt), call=call) == [1.0, 0.0]


@pytest.mark.engine
def test_a_chat_cannot_be_taken_for_a_text(files):
    for function in ("length", "later"):
        with pytest.raises(RewardError, match=r"took len\(\) of completions that are chats.*`completions: text`"):
            values(f"{files}/misuses.py:{function}", group("a", "bc"))
    for function in ("contains", "equals", "expression", "method", "number"):
        found = values(f"{files}/misuses.py:{function}", group("a", "bc"))
        assert len(found) == 2 and all("`completions: text`" in detail for detail in found)
    assert values(f"{files}/misuses.py:length", group("a", "bc"), completions="text") == [1.0, 2.0]
    assert values(f"{files}/misuses.py:length", group("a", "bc"), completions="messages") == [
        1.0,
        1.0,
    ]  # so it was meant
    assert values(f"{files}/misuses.py:contains", group("a", "bc"), completions="text") == [1.0, 0.0]


def test_a_text_is_a_str_that_can_be_read_as_a_chat():
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two"})
    text = Text("one two", messages)
    assert text == "one two" and isinstance(text, str) and text[0] == "o" and text[-1] == "o" and text[1:3] == "ne"
    assert len(text) == 7 and "two" in text and re.findall("t.*", text) == ["two"] and list(text) == list("one two")
    assert text[-1]["content"] == "one two" and text[0]["role"] == "system" and text[-1].get("name") is None
    assert json.loads(json.dumps(text)) == "one two" and {text: 1}["one two"] == 1
    assert Text("", [{"role": "assistant", "content": ""}])[-1]["content"] == ""
    again = pickle.loads(pickle.dumps(text))
    assert again == text and again[-1]["content"] == "one two"
    with pytest.raises(IndexError):
        text[7]
    with pytest.raises(KeyError):
        text[-1]["contents"]


def test_a_chat_is_a_list_of_messages():
    plain = [{"role": "assistant", "content": "a b"}]
    chat = Chat(plain)
    assert chat == plain and isinstance(chat, list) and len(chat) == 1 and chat[-1]["content"] == "a b"
    assert [m["content"] for m in chat] == ["a b"] and plain[0] in chat and bool(chat) and [*chat, *plain] == plain * 2
    assert (
        json.loads(json.dumps(chat)) == plain
        and type(pickle.loads(pickle.dumps(chat))) is list
        and str(chat) == str(plain)
    )
    for misuse in (
        lambda: "a" in chat,
        lambda: chat == "a",
        lambda: chat.split(),
        lambda: chat + "a",
        lambda: chat["content"],
    ):
        with pytest.raises((TypeError, AttributeError)):
            misuse()


@pytest.mark.parametrize("look", [str, lambda c: c[0], list, lambda c: c == [], json.dumps, bool])
def test_only_a_length_by_itself_is_a_misreading(look):
    chats = [Chat([{"role": "assistant", "content": "a"}]) for _ in range(2)]
    assert misread(chats) == ""  # a reward may look at nothing, or at tokens alone
    len(chats[0])
    assert misread(chats)
    look(chats[1])
    assert (misread(chats) == "") == (look is not bool)
    assert misread([Text("a")]) == "" and misread(None) == ""


@pytest.mark.engine
@pytest.mark.parametrize("written", ["text", "chat"])
def test_rewards_try_behaves_as_a_run(files, tmp_path, written, capsys):
    prompt = "question" if written == "text" else [{"role": "user", "content": "question"}]
    lines = [{"prompt": prompt, "completion": text, "ground_truth": "4"} for text in (r"\boxed{4}", r"\boxed{5}")]
    lines[1]["completion"] = (
        [{"role": "assistant", "content": lines[1]["completion"]}] if written == "chat" else r"\boxed{5}"
    )
    samples = tmp_path / "samples.jsonl"
    samples.write_text("\n".join(map(json.dumps, lines)))
    made = (of_text if written == "text" else group)(r"\boxed{4}", r"\boxed{5}", ground_truth="4")
    spec = f"{files}/trl_examples.py:boxed"
    for form in ("auto", "text", "messages"):
        rows = try_reward(spec, samples, completions=form)
        found = [row.score.value if row.score.detail == "" else row.score.detail for row in rows]
        assert found == values(spec, made, completions=form)
        assert found == [1.0, 0.0] or form == "messages" or (form, written) == ("auto", "chat")


@pytest.mark.engine
def test_rewards_try_warns_of_a_reward_that_says_nothing(files, tmp_path, capsys):
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"prompt": "q", "completion": "xy"}\n{"prompt": "q", "completion": "uv"}\n')
    assert run_tryout(f"{files}/misuses.py:length", samples, 5.0, {}) == 0
    assert "Warning: all samples score alike (2)" in capsys.readouterr().out
    samples.write_text('{"prompt": "q", "completion": "xy"}\n{"prompt": "q", "completion": ""}\n')
    (tmp_path / "once.py").write_text(
        "def reward(completions, **columns):\n    return [len(completions[0]) / len(completions[0])]\n"
    )
    assert run_tryout(f"{tmp_path}/once.py", samples, 5.0, {}) == 1
    assert "1 crashed" in (printed := capsys.readouterr().out) and "alike" not in printed
    (tmp_path / "silent.py").write_text("def reward(completions, **columns):\n    return [None] * len(completions)\n")
    assert run_tryout(f"{tmp_path}/silent.py", samples, 5.0, {}) == 0
    assert "Warning: the function returned None for every sample" in capsys.readouterr().out
    assert [row.score.outcome for row in try_reward(f"{tmp_path}/silent.py", samples)] == [Outcome.NOT_APPLICABLE] * 2


def test_prompts_know_whether_they_were_texts(tiny_model):
    from transformers import AutoTokenizer

    from rlpost.data.prompts import _tokenised
    from rlpost.data.rows import Row
    from rlpost.data.template import ChatTemplate
    from rlpost.recipe.sections.data import ArithmeticSource, DataSection

    rows = [Row("a/0", "one"), Row("a/1", ({"role": "user", "content": "one"},))]
    section = DataSection(train=ArithmeticSource(), system_prompt="Be brief.")
    text, chat = _tokenised(rows, ChatTemplate(AutoTokenizer.from_pretrained(tiny_model)), section)
    assert (text.is_text, chat.is_text) == (True, False) and text.messages[0]["role"] == "system"


@pytest.mark.engine
@pytest.mark.thorough
@pytest.mark.parametrize("written", ["text", "chat"])
def test_functions_are_given_what_trls_trainer_gives_them(files, written, capfd):
    """The same keywords with equal values, for both formats, as `GRPOTrainer` itself hands them over."""
    import torch
    from transformers.trainer_callback import TrainerState
    from trl import GRPOTrainer

    prompt = "question" if written == "text" else [{"role": "user", "content": "question"}]
    texts = ["a b", "c"]
    completions = texts if written == "text" else [[{"role": "assistant", "content": text}] for text in texts]
    inputs = [{"prompt": prompt, "answer": 4, "extra": [1, None]}] * 2
    function = load_reward(f"{files}/seen.py:seen").function
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True),
        args=SimpleNamespace(report_to=[]),
        state=TrainerState(global_step=7),
        reward_funcs=[function],
        reward_processing_classes=[None],
        reward_func_names=["seen"],
        environments=None,
        _log_completion_extra=lambda column, values: None,
        _log_metric=lambda name, value: None,
    )
    calculate = GRPOTrainer._calculate_rewards.__wrapped__
    rewards = calculate(trainer, inputs, [prompt] * 2, completions, [[5, 6, 7]] * 2)
    there = function.__globals__["SEEN"].pop()
    assert torch.equal(rewards, torch.full((2, 1), 7.0))
    made = (of_text if written == "text" else group)(*texts, answer=4, extra=[1, None])
    with Scorer([RewardSection(function=f"{files}/seen.py:seen", call="batch")], ScoringSection(workers=1)) as s:
        [scored] = s.score([made], step=7)
        assert s.logged == {"count": 2.0}
    assert [row[0].value for row in scored.scores] == [7.0, 7.0]
    [said] = re.findall("SEEN (.*)", capfd.readouterr().out)[-1:]
    assert eval(said) == there


def _readme_reward():
    text = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def reward(" in block]
    names: dict = {}
    exec(code, names)
    return names["reward"]


@pytest.mark.parametrize("form", [lambda m: Text(m[0]["content"], m), Chat, list])
def test_readmes_and_the_ready_rewards_take_both_forms(form):
    right, wrong = (
        form([{"role": "assistant", "content": text}]) for text in ("It is \\boxed{42}.", "It is \\boxed{41}.")
    )
    for reward in (_readme_reward(), load_reward("number").function, load_reward("math").function):
        assert list(reward(completions=[right, wrong], answer=["42", "42"])) == [1.0, 0.0]
    letter = form([{"role": "assistant", "content": "The answer is (B)."}])
    assert load_reward("choice").function(completions=[letter], answer=["B"]) == [1.0]
    tagged = form([{"role": "assistant", "content": "<think>a</think><answer>b</answer>"}])
    assert load_reward("format").function(completions=[tagged]) == [1.0]
    assert load_reward("trl.rewards:think_format_reward").function([tagged]) == [1.0]

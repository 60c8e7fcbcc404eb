"""Checks of the cases about data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, byte_tokenizer

from rlpost.data.demonstrations import DemonstrationReader
from rlpost.data.pairs import Pair, build_pairs
from rlpost.data.prompts import PromptSets, build_prompts
from rlpost.data.sources import load_rows
from rlpost.errors import DataError
from rlpost.recipe.sections.data import DataSection, DatasetSource

SHOWS_KEYS = (
    "{% if tools %}tools:{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}"
    "{% if m.name %}({{ m.name }}){% endif %}:{% if m.reasoning_content %}<{{ m.reasoning_content }}>{% endif %}"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def _columns(file: str, prompt: str = "prompt") -> list[dict[str, Any]]:
    return [dict(row.columns) for row in load_rows(DatasetSource(path=file, prompt=prompt), "data.train")]


def _in_file(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _prompts(tokenizer: Any, file: str = "rows.jsonl", **source: Any) -> PromptSets:
    section = DataSection(train=DatasetSource(path=file, **source), held_out=0, max_prompt_tokens=2000)
    return build_prompts(section, tokenizer, max_context=None)


def _pair(tokenizer: Any, **source: Any) -> Pair:
    section = {"train": {"type": "preference", "path": "pairs.jsonl", **source}, "held_out": 0}
    sets = build_pairs(
        DataSection.model_validate(section), tokenizer, max_context=None, seed=0, max_completion_tokens=200
    )
    return sets.train[0]


def dates(folder: Path) -> None:
    assert [row["answer"] for row in _columns("rows.jsonl", "question")] == [f"2024-01-0{i}" for i in (1, 2, 3, 4)]


def numbers(folder: Path) -> None:
    for file in ("rows.jsonl", "big.jsonl", "times.jsonl"):
        found = [row["answer"] for row in _columns(file)]
        right = [row["answer"] for row in _in_file(folder / file)]
        assert [(type(one), one) for one in found] == [(type(one), one) for one in right]


def latin1(folder: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1, is not UTF-8 .*0xe9"):
        _columns("rows.jsonl")


def odd_name(folder: Path) -> None:
    assert [row["answer"] for row in _columns("data [v2].jsonl")] == [0, 1, 2, 3]


def demonstration(folder: Path) -> None:
    tokenizer = byte_tokenizer((folder / "turns.jinja").read_text())
    sets = _prompts(tokenizer, demonstration="solution")
    (ids,) = DemonstrationReader(tokenizer, 50)(sets.train[:1])
    assert tokenizer.decode(ids) == "4<end_of_turn>"


def end_twice(folder: Path) -> None:
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    pair = _pair(tokenizer)
    assert tokenizer.decode(pair.chosen.token_ids) == "4<|im_end|>"
    assert tokenizer.decode(pair.rejected.token_ids) == "5<|im_end|>"


def plain_eos(folder: Path) -> None:
    tokenizer = byte_tokenizer(around=True)
    pair = _pair(tokenizer, plain=True)
    assert tokenizer.decode(pair.token_ids) == "<bos>2+2?"
    assert tokenizer.decode(pair.chosen.token_ids) == "4<eos>"


def tail_behind_end(folder: Path) -> None:
    tokenizer = byte_tokenizer((folder / "tail.jinja").read_text())
    pair = _pair(tokenizer)
    assert tokenizer.decode(pair.chosen.token_ids) == "4<|end|>"


def think_twice(folder: Path) -> None:
    tokenizer = byte_tokenizer((folder / "think.jinja").read_text(), eos="<|im_end|>")
    pair = _pair(tokenizer)
    whole = tokenizer.decode((*pair.token_ids, *pair.chosen.token_ids))
    assert whole == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\ntwo and two\n</think>\n\n4<|im_end|>"
    )


def keys(folder: Path) -> None:
    first = _prompts(byte_tokenizer(SHOWS_KEYS)).train[0]
    assert first.text == (
        'tools:[{"type": "function", "function": {"name": "f"}}]\nuser:hi\nassistant:<hmm>yo\nuser:q0\nassistant:'
    )
    assert first.messages == tuple(_in_file(folder / "rows.jsonl")[0]["prompt"])


def tool_calls(folder: Path) -> None:
    first, second, *_ = _prompts(byte_tokenizer(SHOWS_KEYS)).train
    assert first.text == (
        'user:Weather in X?\nassistant:[{"type": "function", "function": {"name": "weather", "arguments": {"place": "X"}}}]\n'
        "tool(weather):sunny\nuser:So?\nassistant:"
    )
    assert second.text == "user:q0\nassistant:"


def several_templates(folder: Path) -> None:
    tokenizer = byte_tokenizer(json.loads((folder / "templates.json").read_text()))
    (folder / "rows.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(DataError, match=r"`tool_use`, `rag`.*none is `default`.*model\.chat_template"):
        _prompts(tokenizer)
    with pytest.raises(DataError, match=r"model\.chat_template"):
        _prompts(byte_tokenizer("{% for m in messages %}"))


CHECKS: dict[str, Callable[[Path], None]] = {
    "dates-stay-texts": dates,
    "demonstration-end-of-turn": demonstration,
    "latin1-file": latin1,
    "numbers-stay-exact": numbers,
    "odd-file-name": odd_name,
    "pairs-end-twice": end_twice,
    "pairs-plain-eos": plain_eos,
    "pairs-tail-behind-end": tail_behind_end,
    "pairs-think-twice": think_twice,
    "prompt-keys-2": keys,
    "prompt-tool-calls": tool_calls,
    "template-errors": several_templates,
}

"""What must not grow with the data or with the length of a run: memory, work that is done twice, the points of a picture."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from test_data_prompts import TEMPLATE, word_tokenizer

from rlpost.data import dataset, prompts
from rlpost.data.dataset import RowStream, dataset_rows
from rlpost.data.prompts import build_prompts
from rlpost.data.sampler import PromptSampler
from rlpost.data.table import PromptTable
from rlpost.errors import DataError
from rlpost.recipe.sections.data import DataSection, DatasetSource
from rlpost.tracking import metrics as metrics_module
from rlpost.tracking.columns import DRAWN, Columns, highest, thinned
from rlpost.tracking.metrics import MetricsWriter, drop_partial_line, iter_metrics, keep_rows, read_metrics, step_of

pytestmark = pytest.mark.thorough


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLPOST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def tokenizer():
    return word_tokenizer(TEMPLATE)


def rows(tmp_path, number, name="rows.jsonl"):
    """Questions of which some are alike, with values of every kind, columns that some rows lack, and chats."""
    draw, path = random.Random(0), tmp_path / name
    with path.open("w") as file:
        for i in range(number):
            row = {
                "prompt": f"What is {draw.randrange(20)} + {draw.randrange(20)} ?",
                "answer": [10**30 + i, 0.1, None],
            }
            if i % 3 == 0:
                row["solution"] = f"It is {i}."
            if i % 7 == 0:
                row["prompt"] = [{"role": "user", "content": row["prompt"], "name": "x"}]
            if i % 1500 == 1499:
                row["late"] = {"deep": {"er": True, "text": "ü\u2028"}}
            file.write(json.dumps(row) + "\n")
    return path


def section(path, **more):
    source = DatasetSource(path=str(path), demonstration="solution", columns={"copy": "answer"})
    return DataSection(train=source, **more)


def held(monkeypatch):
    monkeypatch.setattr(dataset, "LARGE_BYTES", 2**60)


def on_disk(monkeypatch):
    monkeypatch.setattr(dataset, "LARGE_BYTES", 0)


@pytest.mark.parametrize("more", [{}, {"max_prompt_tokens": 8, "held_out": 100}, {"system_prompt": "What"}])
def test_prompts_on_disk_are_those_in_memory(tmp_path, monkeypatch, tokenizer, more):
    data = section(rows(tmp_path, 3300), **more)
    held(monkeypatch)
    plain = build_prompts(data, tokenizer, max_context=None, seed=3)
    on_disk(monkeypatch)
    for _ in range(2):  # made, then read
        kept = build_prompts(data, tokenizer, max_context=None, seed=3)
        assert isinstance(kept.train, PromptTable) and not isinstance(plain.train, PromptTable)
        assert list(kept.train) == list(plain.train) and list(kept.held_out) == list(plain.held_out)
        assert [type(p.columns["answer"][0]) for p in kept.train[:3]] == [int] * 3
        assert (kept.fingerprint, kept.longest, kept.note()) == (plain.fingerprint, plain.longest, plain.note())
        assert kept.train[-1] == plain.train[-1] and list(kept.train[5:9]) == list(plain.train[5:9])
    other = build_prompts(data, tokenizer, max_context=None, seed=4)
    assert [p.id for p in other.held_out] != [p.id for p in kept.held_out]  # the split is no part of what is kept


def test_a_second_start_and_other_processes_tokenise_nothing(tmp_path, monkeypatch, tokenizer, cache):
    on_disk(monkeypatch)
    data, calls = section(rows(tmp_path, 2500)), []
    real = prompts._tokenised
    monkeypatch.setattr(prompts, "_tokenised", lambda stream, *a, **k: calls.append(1) or real(stream, *a, **k))
    for limit in (512, 8, 600):  # a limit of the length is applied to what is there
        build_prompts(data.model_copy(update={"max_prompt_tokens": limit}), tokenizer, max_context=None)
    assert calls == [1] and len([p for p in cache.iterdir() if p.is_dir()]) == 1


def test_what_decides_of_a_prompt_makes_another_table(tmp_path, monkeypatch, tokenizer, cache):
    on_disk(monkeypatch)
    path = rows(tmp_path, 1200)

    def tables(data, words=tokenizer):
        build_prompts(data, words, max_context=None)
        return len([p for p in cache.iterdir() if p.is_dir()])

    assert tables(section(path)) == 1
    assert tables(section(path, system_prompt="What")) == 2
    assert tables(section(path, template_options={"shout": True})) == 3
    assert tables(section(path), word_tokenizer(TEMPLATE.replace("<assistant>", "<answer>"))) == 4
    assert tables(section(path), word_tokenizer(TEMPLATE)) == 4  # the same tokenizer again
    look = path.stat()
    path.write_text(path.read_text().replace("It is 3.", "It is 4."))
    os.utime(path, ns=(look.st_atime_ns, look.st_mtime_ns))  # of the same size and time
    assert tables(section(path)) == 5
    found = build_prompts(section(path, held_out=0), tokenizer, max_context=None)
    assert any(p.demonstration and p.demonstration.text == "It is 4." for p in found.train)


def test_a_table_that_was_left_half_made_or_damaged_is_made_anew(tmp_path, monkeypatch, tokenizer, cache):
    on_disk(monkeypatch)
    data = section(rows(tmp_path, 1200))
    before = build_prompts(data, tokenizer, max_context=None).fingerprint
    (table,) = (p for p in cache.iterdir() if p.is_dir())
    (table / "about.json").write_text("{")
    (cache / f".making_{table.name}").mkdir()
    assert build_prompts(data, tokenizer, max_context=None).fingerprint == before
    assert not (cache / f".making_{table.name}").exists() and json.loads((table / "about.json").read_text())


def test_values_that_json_does_not_know_and_a_cache_that_cannot_be_written_leave_prompts_in_memory(
    tmp_path, monkeypatch, tokenizer, cache
):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet

    on_disk(monkeypatch)
    path = tmp_path / "dates.parquet"
    table = pa.table(
        {"prompt": [f"What is {i % 90} ?" for i in range(1100)], "day": [datetime.date(2020, 1, 1)] * 1100}
    )
    pyarrow.parquet.write_table(table, path)
    sets = build_prompts(DataSection(train=DatasetSource(path=str(path))), tokenizer, max_context=None)
    assert isinstance(sets.train, tuple) and sets.train[0].columns["day"] == datetime.date(2020, 1, 1)
    assert not [p for p in cache.iterdir() if p.is_dir()]
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLPOST_CACHE", str(tmp_path / "file"))
    sets = build_prompts(section(rows(tmp_path, 1100)), tokenizer, max_context=None)
    assert isinstance(sets.train, tuple) and len(sets.train) > 100


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "question"}, "has no column `question`"),
        ({"demonstration": "solutoin"}, "has no column `solutoin`"),
        ({"columns": {"a": "nothing"}}, "there is no `nothing`"),
    ],
)
def test_a_column_that_no_row_has_is_told_before_anything_is_tokenised(tmp_path, monkeypatch, tokenizer, change, said):
    on_disk(monkeypatch)
    source = DatasetSource(path=str(rows(tmp_path, 2500)), **change)
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *_, **__: pytest.fail("rendered"))
    with pytest.raises(DataError, match=said):
        build_prompts(DataSection(train=source), tokenizer, max_context=None)


def test_a_column_that_begins_late_is_none_in_the_rows_before(tmp_path):
    source = DatasetSource(path=str(rows(tmp_path, 1600)), columns={"deep": "late"})
    stream = RowStream(source, "data.train")
    streamed, plain = list(stream), dataset_rows(source)
    assert [row.columns["deep"] for row in streamed] == [row.columns["deep"] for row in plain]
    assert set(stream.others) | {"deep"} == set(plain[0].columns)


MEMORY = """
import json, sys
from rlpost.data import dataset
from rlpost.data.prompts import build_prompts
from rlpost.recipe.sections.data import DataSection, DatasetSource
from test_data_prompts import TEMPLATE, word_tokenizer

def anonymous():
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

dataset.LARGE_BYTES = 0 if sys.argv[2] == "disk" else 2**60
words = word_tokenizer(TEMPLATE)
small, large = (DataSection(train=DatasetSource(path=path)) for path in sys.argv[3:])
first = build_prompts(small, words, max_context=None)
before = anonymous()
sets = build_prompts(large, words, max_context=None)
print((anonymous() - before) / len(sets.train), sets.fingerprint)
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    small, large = rows(tmp_path, 2000, "small.jsonl"), tmp_path / "large.jsonl"
    with large.open("w") as file:
        file.writelines(
            json.dumps({"prompt": f"What is {i} + {i % 90} ?", "answer": str(i)}) + "\n" for i in range(40_000)
        )
    places = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))
    environment = {**os.environ, "PYTHONPATH": places}
    took = {}
    for how in ("memory", "disk"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, "x", how, str(small), str(large)],
            env=environment, capture_output=True, text=True, check=True, timeout=600,
        )  # fmt: skip
        took[how] = done.stdout.split()
    assert took["disk"][1] == took["memory"][1]
    assert float(took["memory"][0]) > 1000  # so this would be seen
    assert float(took["disk"][0]) < 200  # bytes a prompt; its place takes 8


def test_the_order_of_prompts_is_what_it_was():
    order = list(range(1000))
    random.Random("prompts/5/0").shuffle(order)
    assert PromptSampler(1000, 5).next(1000) == order


def metrics(path, number):
    draw = random.Random(1)
    with path.open("w") as file:
        for step in range(1, number + 1):
            row = {"step": step, "kind": "train", "reward/mean": draw.random(), "time/step": 1.0, "time/update": 0.5}
            row["mask/a"] = 50.0 if step == number // 2 else draw.random()
            file.write(json.dumps(row | {"completions/length_mean": None if step % 2 else 3.0}) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({"step": step, "kind": "eval", "eval/accuracy": 0.5}) + "\n")
    return path


def test_a_resume_parses_every_row_once(tmp_path, monkeypatch):
    from test_tracking import make_recipe

    from rlpost.tracking.rundir import RunDirectory
    from rlpost.tracking.tracker import Tracker

    calls, real = [], metrics_module._parse
    monkeypatch.setattr(metrics_module, "_parse", lambda line: calls.append(1) or real(line))
    with RunDirectory.open(tmp_path / "run", fresh=True) as run:
        metrics(run.metrics, 500)
    with RunDirectory.open(tmp_path / "run", fresh=False) as run:
        text = run.metrics.read_bytes()
        run.truncate_after(500)
        tracker = Tracker(run, make_recipe(), is_main=True)
        tracker.step(501, {"reward/mean": 1.0})
        tracker.step(400, {"reward/mean": 1.0})  # is there already
        tracker.close("finished")
        assert len(calls) == 505 and run.metrics.read_bytes().startswith(text)
        assert [row["step"] for row in read_metrics(run.metrics)][-2:] == [500, 501]


def test_damaged_lines_are_put_aside_and_the_run_goes_on(tmp_path):
    path, aside = metrics(tmp_path / "metrics.jsonl", 10), tmp_path / "aside.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[3] = lines[3][:30] + b"\0\0\0" + lines[3][60:]
    path.write_bytes(b"\n".join(lines) + b'{"step": 11')
    writer = MetricsWriter(path)
    assert [row["step"] for row in writer.history(aside)] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert aside.read_bytes() == lines[3] + b"\n" and len(read_metrics(path)) == 9
    writer.append(4, {"reward/mean": 0.5})
    assert read_metrics(path)[-1]["step"] == 4


def test_rows_are_cut_to_the_byte(tmp_path):
    path, aside = metrics(tmp_path / "metrics.jsonl", 200), tmp_path / "aside.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    keep_rows(path, lambda line: step_of(line) <= 150, aside)
    assert path.read_bytes() + aside.read_bytes() == b"".join(lines)
    assert max(row["step"] for row in iter_metrics(path)) == 150
    assert [row["step"] for row in iter_metrics(path, "eval")] == [100]
    long = tmp_path / "long.jsonl"
    long.write_bytes(b'{"step": 1}\n' + b"x" * 200_000)  # longer than what is read at once
    drop_partial_line(long)
    assert long.read_bytes() == b'{"step": 1}\n'
    long.write_bytes(b"x" * 200_000)
    drop_partial_line(long)
    assert long.read_bytes() == b""


def test_columns_are_the_rows_numbers(tmp_path):
    read = read_metrics(metrics(tmp_path / "metrics.jsonl", 300))
    columns = Columns.of(read)
    for key in ("reward/mean", "eval/accuracy", "completions/length_mean", "mask/a", "unknown"):
        wanted = [(row["step"], row[key]) for row in read if row.get(key) is not None]
        assert list(zip(*columns.series(key), strict=True)) == wanted
    assert columns.having("eval/accuracy").steps.tolist() == [100, 200, 300]


def test_long_curves_keep_their_peaks_and_ends():
    steps = list(range(1, 100_001))
    values = np.random.default_rng(0).normal(size=100_000)
    values[[777, 50_000, 99_998]] = [9.0, -9.0, 8.0]
    some, drawn = thinned(steps, values.tolist())
    assert len(some) <= 2 * DRAWN + 2 and some == sorted(some) and (some[0], some[-1]) == (1, 100_000)
    assert {9.0, -9.0, 8.0} <= set(drawn) and all(values[s - 1] == v for s, v in zip(some, drawn, strict=True))
    assert thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])
    bars = highest(np.abs(values))
    assert len(bars) == DRAWN and {777, 50_000} <= set(bars.tolist())


@pytest.mark.thorough
def test_a_report_of_a_long_run_draws_a_bounded_number_of_points(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    from rlpost.tracking.report import write_report
    from rlpost.tracking.rundir import RunDirectory

    with RunDirectory.open(tmp_path / "run", fresh=True) as run:
        metrics(run.metrics, 12_000)
    points, real_plot, real_fill = [], Axes.plot, Axes.fill_between
    monkeypatch.setattr(Axes, "plot", lambda self, x, *a, **k: points.append(len(x)) or real_plot(self, x, *a, **k))
    monkeypatch.setattr(
        Axes, "fill_between", lambda self, x, *a, **k: points.append(len(x)) or real_fill(self, x, *a, **k)
    )
    page = write_report(tmp_path / "run").read_text()
    assert points and max(points) <= 2 * DRAWN + 2
    assert "12000" in page and "the slowest steps" in page

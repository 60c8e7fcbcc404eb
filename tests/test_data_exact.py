"""What stands in a file reaches the reward as it stands, or the file is refused, naming file, line or row, and key."""

from __future__ import annotations

import gzip
import json
import math

import pytest

from rlpost.data.readers import count_rows
from rlpost.data.sources import load_rows
from rlpost.errors import DataError
from rlpost.recipe.sections.data import DatasetSource


def rows_of(path, **slots):
    return load_rows(DatasetSource(path=str(path), prompt="q", **slots))


def answers(path, **slots):
    return [row.columns["a"] for row in rows_of(path, **slots)]


def lines(path, *values):
    path.write_text("".join(f'{{"q": "?", "a": {value}}}\n' for value in values), encoding="utf-8")
    return path


EXACT = [
    ['"2024-01-01"', '"2024-01-02"'],
    ['"2024-01-01T00:00:00Z"', '"2024-01-01T00:00:00+02:00"'],
    ['"12:30:00"', '"P1DT2H"', '"1:02:03"'],
    ['"007"', '"1e3"', '"1_000"', '"0x10"', '" 5 "'],
    ['"None"', '"null"', '"NA"', '"nan"', '"NaN"', '""', '"true"', "null"],
    ["9007199254740993", "0.5"],
    ["10000000000000000000", "-170141183460469231731687303715884105729", "1" + "0" * 400],
    ["1", "1.0", "true", '"1"', "null", "[1]", '{"b": 1}'],
    ["0.1", "1e-7", "1.7976931348623157e308", "5e-324", "0.30000000000000004", "100000000000000000000.0"],
    ['{"x": 1}', '{"y": {"z": null}}', "{}", '[{"b": 1}, {"c": 2}, {}]', "[[1, [2.5]], []]"],
    ['"e\\u0301"', '"\\u00e9"', '"e\u0301 \u00e9"', '"\\ud83d\\ude00"', '"\u2028 \u0085 \\u0000"'],
    ['"\\\\ud800"', '"line\\nbreak"', '"tab\\t"', '"\\/"'],
]


@pytest.mark.parametrize("values", EXACT, ids=[values[0] for values in EXACT])
@pytest.mark.parametrize("ending", ["jsonl", "json", "json-lines", "jsonl.gz"])
def test_json_values_stay_as_they_stand(tmp_path, values, ending):
    path = lines(tmp_path / f"d.{ending.removesuffix('-lines')}", *values)
    if ending == "json":
        path.write_text("[\n" + ",\n".join(path.read_text(encoding="utf-8").split("\n")[:-1]) + "\n]", encoding="utf-8")
    if ending.endswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    found = answers(path)
    assert [(type(one), one) for one in found] == [(type(v), v) for v in map(json.loads, values)]
    assert repr(found) == repr([json.loads(value) for value in values])  # nested values of equal types too
    assert count_rows(str(path)) == len(values)


def test_what_python_writes_beyond_json_is_read(tmp_path):
    found = answers(lines(tmp_path / "d.jsonl", "NaN", "Infinity", "-Infinity"))
    assert math.isnan(found[0]) and found[1:] == [math.inf, -math.inf]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("1e400", "the number 1e400, of which a float"),
        ("1e-400", "the number 1e-400"),
        ("9007199254740993.0", "keeps 9007199254740992.0 only. Write it as a text"),
        ("3.14159265358979323846264", "keeps 3.14159265358979"),
        ("1" * 5000, "holds what Python does not read"),
        ('{"b": 1, "b": 2}', "the key `b` twice"),
        ('1, "a": 2', "the key `a` twice"),
        ('{"b": ["\\ud800"]}', "half a surrogate pair in `a.b.0`"),
        ("[" * 100_000, "holds what Python does not read|is no JSON object"),
        ("'x'", "is no JSON object.*Expecting value at character 17"),
        ('1} {"q": "?"', "behind one stands"),
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_what_cannot_be_kept_is_refused_by_file_and_line(tmp_path, value, said, ending):
    path = lines(tmp_path / f"d.{ending}", "1", value)
    with pytest.raises(DataError, match=rf"data\.train\.path: .*d\.{ending}, line 2,.*({said})"):
        rows_of(path)


def test_rows_of_a_json_list_are_named_by_number(tmp_path):
    (tmp_path / "d.json").write_text('[{"q": "?", "a": 1}, {"q": "?", "a": 1e999}]')
    with pytest.raises(DataError, match=r"d\.json, row 1, has the number 1e999"):
        rows_of(tmp_path / "d.json")


def test_a_missing_key_is_null_and_no_object_gains_keys(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "?", "a": {"x": 1}}\n{"q": "?", "b": 2}\n{"a": {"y": 2}, "q": "?"}\n')
    found = rows_of(tmp_path / "d.jsonl")
    assert [dict(row.columns) for row in found] == [
        {"a": {"x": 1}, "b": None},
        {"a": None, "b": 2},
        {"a": {"y": 2}, "b": None},
    ]


def test_every_field_of_csv_is_a_text(tmp_path):
    (tmp_path / "d.csv").write_bytes(
        b'\xef\xbb\xbfq,a,b\r\n?,007,None\r\n?,,NA\r\n"x, ""y""\nz",1.50,2024-01-01\r\n\r\n?,9007199254740993,true\r\n'
    )
    found = rows_of(tmp_path / "d.csv")
    assert [(row.question, row.columns["a"], row.columns["b"]) for row in found] == [
        ("?", "007", "None"),
        ("?", "", "NA"),
        ('x, "y"\nz', "1.50", "2024-01-01"),
        ("?", "9007199254740993", "true"),
    ]
    (tmp_path / "long.csv").write_text("q,a\n?," + "x" * 200_000 + "\n")
    assert len(answers(tmp_path / "long.csv")[0]) == 200_000
    assert count_rows(str(tmp_path / "d.csv")) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("q;a\n?;1\n", r"one column, `q;a`: .*semicolons"),
        ("q\ta\n?\t1\n", "tabs"),
        ("q,a\n?,1,2\n", "line 2, has 3 fields where the first line names 2"),
        ("q,a\n?\n", "line 2, has 1 fields"),
        ("q,a,a\n?,1,2\n", "two columns named `a`"),
        ('q,a\n?,"1"2\n', "line 2, is not valid CSV"),
        ('q,a\n?,"1\n', "is not valid CSV"),
        ("q,a\n", "needs at least one row"),
    ],
)
def test_other_csv_files_are_said_to_be_what_they_are(tmp_path, text, said):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        rows_of(tmp_path / "d.csv")


def test_parquet_keeps_its_own_types(tmp_path):
    import datetime
    import decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    day, price = datetime.date(2024, 1, 1), decimal.Decimal("1.50")
    table = pa.table(
        {"q": ["?", "?"], "a": [day, None], "p": [price, price], "n": pa.array([2**63 - 1, 1], pa.int64())}
    )
    pq.write_table(table, tmp_path / "d [1].parquet")
    found = rows_of(tmp_path / "d [1].parquet")
    assert [dict(row.columns) for row in found] == [
        {"a": day, "p": price, "n": 2**63 - 1},
        {"a": None, "p": price, "n": 1},
    ]
    assert count_rows(str(tmp_path / "d [1].parquet")) == 2
    data = (tmp_path / "d [1].parquet").read_bytes()
    (tmp_path / "broken.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"broken\.parquet cannot be read as parquet"):
        rows_of(tmp_path / "broken.parquet")


def test_keys_that_a_table_fills_up_do_not_reach_the_template(tmp_path):
    """In parquet every message has the keys of all messages; one that is null there was not in it."""
    from datasets import Dataset

    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        [{"role": "user", "content": "b", "name": "Ann"}],
    ]
    chats[0].append({"role": "tool", "content": "1", "tool_call_id": "7"})
    Dataset.from_list([{"q": chat} for chat in chats]).to_parquet(str(tmp_path / "d.parquet"))
    first, second = (row.question for row in rows_of(tmp_path / "d.parquet"))
    assert [sorted(message) for message in first] == [
        ["content", "role"],
        ["role", "tool_calls"],
        ["content", "role", "tool_call_id"],
    ]
    assert first[1]["tool_calls"] == [call] and second == tuple(chats[1])


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("number", [2, 3])
def test_other_encodings_are_named_by_line(tmp_path, ending, number):
    text = ["q,a", "?,1", "?,2"] if ending == "csv" else ['{"q": "?", "a": 1}'] * 3
    data = [line.encode() for line in text]
    data[number - 1] = text[number - 1].replace("?", "größer").encode("latin-1")
    (tmp_path / f"d.{ending}").write_bytes(b"\n".join(data))
    with pytest.raises(DataError, match=rf"d\.{ending}, line {number}, is not UTF-8 \(byte 0xf6"):
        rows_of(tmp_path / f"d.{ending}")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_said(tmp_path, encoding):
    (tmp_path / "d.jsonl").write_bytes('{"q": "?", "a": 1}\n'.encode(encoding))
    with pytest.raises(DataError, match="UTF-16"):
        rows_of(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    "name",
    ["data [v2].jsonl", "what?.jsonl", "*.jsonl", "a b.jsonl", "größe.jsonl", "#1.jsonl", "a%20b.jsonl", "D.JSONL", "a.b.jsonl",
     "{x}.jsonl", "-.jsonl", "a,b.jsonl", "a'b\".jsonl", "d::e.jsonl", "d.csv.jsonl", "d.jsonl.xz"],
)  # fmt: skip
def test_a_file_of_any_name_is_read(tmp_path, monkeypatch, name):
    path = lines(tmp_path / name, "1", "2")
    lines(tmp_path / "other.jsonl", "3")
    if name.endswith("xz"):
        import lzma

        path.write_bytes(lzma.compress(path.read_bytes()))
    assert answers(path) == [1, 2]
    monkeypatch.chdir(tmp_path)
    assert answers(name) == [1, 2]


OTHERS = [
    ("d.txt", b"x", "does not say what it holds"),
    ("noending", b'{"q": "?"}\n', "noending is a file whose name does not say what it holds"),
    ("d.tsv", b"q\ta\n", "does not say what it holds"),
    ("d.jsonl", b"", "is empty"),
    ("d.jsonl", b"\n \n", "needs at least one row"),
    ("d.json", b"[]", "needs at least one row"),
    ("d.jsonl", b'[{"q": "?"}]', r"JSON array.*rename it to \.json"),
    ("d.jsonl", b'[\n{"q": "?"}\n]', r"JSON array.*rename it to \.json"),
    ("d.json", b'{\n"q": "?"\n}', "a JSON object over several lines"),
    ("d.json", b'[{"q": "?"}', "the file's end, where a comma"),
    ("d.json", b'[{"q": "?"}] x', "goes on behind the end of its list"),
    ("d.json", b'[{"q": "?"},]', "row 1, is no JSON object"),
    ("d.json", b"[1]", "row 0, is no JSON object but a JSON number"),
    ("d.jsonl", gzip.compress(b"{}", mtime=0), r"compressed with gzip: add \.gz"),
    ("d.jsonl", b"PAR1xxxx", "a parquet file"),
    (
        "d.jsonl.gz",
        gzip.compress(b'{"q": "?", "a": 1}\n' * 999, mtime=0)[:-9],
        r"d\.jsonl\.gz cannot be read behind line.*damaged",
    ),
    ("d.jsonl.gz", b'{"q": "?"}\n', "damaged or incomplete"),
    ("d.jsonl.gz", gzip.compress(b'{"q": "?"}' * 999, mtime=0)[:20] + b"x" * 50, "damaged or incomplete"),
    ("d.jsonl.zst", b"x", "does not say what it holds"),
    ("d.parquet", b"x", "cannot be read as parquet"),
]


@pytest.mark.parametrize(("name", "data", "said"), OTHERS)
def test_a_file_that_exists_is_said_to_be_what_it_is(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said) as caught:
        rows_of(tmp_path / name)
    assert str(caught.value).startswith("data.train.path: ") and "hub" not in str(caught.value)


def test_a_folder_is_said_to_be_one(tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "files").mkdir()
    lines(tmp_path / "files" / "d.jsonl", "1")
    (tmp_path / "org" / "name" / "data").mkdir(parents=True)
    (tmp_path / "org" / "name" / "data" / "d.csv").write_text("q\n?\n")
    Dataset.from_list([{"q": "?"}]).save_to_disk(str(tmp_path / "saved"))
    for name, said in (
        ("empty", "is a folder, with no data file in it"),
        ("files", r"is a folder, .*such as `files/\*\.jsonl`"),
        ("org/name", r"is a folder, .*such as `org/name/\*\*/\*\.csv`"),
        ("saved", r'saved by datasets\.save_to_disk.*load_from_disk\("saved"\)\.to_parquet\("saved\.parquet"\)'),
        ("./gone", "no file matches `./gone`"),
        ("gone/d.jsonl", "folder gone does not exist"),
        ("fil*", "matches folders only"),
    ):
        with pytest.raises(DataError, match=said):
            rows_of(name)
    assert answers("files/*.jsonl") == [1]


def test_a_limit_reads_no_further(tmp_path):
    path = lines(tmp_path / "d.jsonl", "1", "2", "1e999")
    assert answers(path, limit=2) == [1, 2]

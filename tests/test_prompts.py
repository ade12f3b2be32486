"""A prompt file is read whole or refused with its line."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pgjax.data.prompts import check_rows
from pgjax.data.tables import read_table


def read_rows(path):
    return check_rows(read_table(path))


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_jsonl_keeps_columns_types_and_order(tmp_path: Path) -> None:
    text = '{"prompt": "b", "answer": 1.5}\n\n  \n{"answer": null, "prompt": "a\\nb é"}\r\n'
    rows = read_rows(write(tmp_path, "p.jsonl", text))
    assert rows == [{"prompt": "b", "answer": 1.5}, {"prompt": "a\nb é", "answer": None}]


def test_odd_line_separators_stay_inside_a_prompt(tmp_path: Path) -> None:
    text = '{"prompt": "a\u2028b\x85c"}\n{"prompt": "d"}'
    assert [row["prompt"] for row in read_rows(write(tmp_path, "p.jsonl", text))] == ["a\u2028b\x85c", "d"]
    assert read_rows(write(tmp_path, "p.txt", "a\u2028b\x0cc\nd")) == [{"prompt": "a\u2028b\x0cc"}, {"prompt": "d"}]


def test_messages_are_prompts(tmp_path: Path) -> None:
    messages = '[{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]'
    rows = read_rows(write(tmp_path, "p.jsonl", f'{{"prompt": {messages}}}'))
    assert rows[0]["prompt"][1] == {"role": "user", "content": "hi"}


def test_messages_in_a_csv_cell_are_a_prompt_of_messages_not_a_text(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "p.csv", 'prompt\n"[{""role"": ""user"", ""content"": ""hi""}]"\n'))
    assert rows == [{"prompt": [{"role": "user", "content": "hi"}]}]


def test_csv_quotes_and_byte_order_mark(tmp_path: Path) -> None:
    text = '\ufeffprompt,topic\r\n"Say ""hi"",\nplease",x\r\n\r\n b ,\r\n'
    rows = read_rows(write(tmp_path, "p.csv", text))
    assert rows == [{"prompt": 'Say "hi",\nplease', "topic": "x"}, {"prompt": " b ", "topic": ""}]


def test_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "p.TXT", "\ufeffThe film was\r\n\n  The hotel \nno newline"))
    assert [row["prompt"] for row in rows] == ["The film was", "  The hotel ", "no newline"]


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", GOOD + "\n{'prompt': 'b'}", "line 3: not JSON"),
        ("p.jsonl", GOOD + '{"prompt": "b"', "line 2: not JSON"),
        ("p.jsonl", GOOD + '{"prompt": "b", "n": 1, "prompt": "c"}', "line 2: .*the key 'prompt' occurs twice"),
        ("p.jsonl", GOOD + '["b"]', "line 2: a list, not an object"),
        ("p.jsonl", GOOD + '"b"', "line 2: a str, not an object"),
        ("p.jsonl", GOOD + '{"question": "b", "n": 1}', "line 2: there is no column 'prompt'.*'question', 'n'"),
        ("p.jsonl", "{}", "line 1: there is no column 'prompt'.*none"),
        ("p.jsonl", GOOD + '{"prompt": "b", "n": 1}', r"line 2: its columns differ.*\['n'\]"),
        ("p.jsonl", GOOD + '{"prompt": 3}', "line 2: the prompt is 3, not a text"),
        ("p.jsonl", '{"prompt": null}', "line 1: the prompt is None"),
        ("p.jsonl", '{"prompt": ""}', "line 1: the prompt is empty"),
        ("p.jsonl", '{"prompt": []}', "line 1: the prompt is an empty list"),
        ("p.jsonl", '{"prompt": ["hi"]}', "line 1: a message is 'hi'"),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}', "line 1: a message is {'role': 'user'}"),
        ("p.jsonl", GOOD.encode() + b'{"prompt": "caf\xe9"}', "line 2: not UTF-8"),
        ("p.csv", b"prompt\na\ncaf\xe9\n", "line 3: not UTF-8"),
        ("p.txt", b"a\n\xff\n", "line 2: not UTF-8"),
        ("p.jsonl", "", "no rows"),
        ("p.jsonl", "\n  \n", "no rows"),
        ("p.csv", "", "no rows"),
        ("p.csv", "prompt,topic\n", "no rows"),
        ("p.txt", "\n\n", "no rows"),
        ("p.csv", "question,topic\na,b\n", "line 2: there is no column 'prompt'.*'question', 'topic'"),
        ("p.csv", "prompt,topic,topic\na,b,c\n", "line 1: the column 'topic' occurs twice"),
        ("p.csv", "prompt,topic\na,b\nc\n", "line 3: 1 fields, but the header names 2"),
        ("p.csv", "prompt,topic\na,b,c\n", "line 2: 3 fields, but the header names 2"),
        ("p.csv", 'prompt\n"a"b\n', "line 2: not CSV"),
        ("p.csv", 'prompt\nx\n"never closed\n', "line 3: not CSV"),
        ("p.csv", 'prompt,topic\n"",b\n', "line 2: the prompt is empty"),
        ("p.json", "[]", "ends in .jsonl, .csv, .txt, .parquet, not '.json'"),
        ("prompts", "a", "not 'nothing'"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=said) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("absent.jsonl", "folder.jsonl"):
        with pytest.raises(ValueError, match=f"{name}: there is no such file"):
            read_rows(tmp_path / name)


def fake_pyarrow(monkeypatch: pytest.MonkeyPatch, read_table: Any) -> None:
    package, parquet = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    parquet.read_table = read_table  # type: ignore[attr-defined]
    package.parquet = parquet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)


def test_parquet_rows_pass_the_same_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "p.parquet", "x")
    records: list[dict[str, Any]] = [{"prompt": "a", "n": 1}, {"prompt": 2, "n": 1}]
    fake_pyarrow(monkeypatch, lambda _: types.SimpleNamespace(to_pylist=lambda: records))
    with pytest.raises(ValueError, match=r"p.parquet, row 1 \(counted from 0\): the prompt is 2"):
        read_rows(path)
    records[1]["prompt"] = "b"
    assert read_rows(path) == records


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        read_rows(write(tmp_path, "p.parquet", "x"))

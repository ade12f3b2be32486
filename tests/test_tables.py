"""Tables from files and from the package datasets: every row with its place, and a named error where there is none."""

import copy
import csv
import datetime
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pgjax.core.errors import UserError
from pgjax.data import sources
from pgjax.data.prompts import as_tools, check_prompts, check_rows
from pgjax.data.sources import load_rows
from pgjax.data.tables import as_messages, check_messages, check_same_columns, read_table


def read(value):
    return as_messages("row 0", "the prompt", value)


def rows_here():
    return [{"text": "a"}, {"text": "b"}]


def nothing():
    return []


def test_places_name_the_line_in_every_kind_of_file(tmp_path: Path) -> None:
    files = {
        "t.jsonl": '{"text": "a"}\n\n{"text": "b"}\n',
        "t.csv": "text\na\n\nb\n",
        "t.txt": "a\n\nb\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_text(content)
        placed = read_table(path, text_column="text")
        assert [row for _, row in placed] == [{"text": "a"}, {"text": "b"}]
        assert placed[1][0] == f"{path}, line {4 if name == 't.csv' else 3}"


def test_a_csv_field_may_be_longer_than_the_module_allows_by_default(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"text\n{'x' * 200_000}\n")
    assert len(read_table(path)[0][1]["text"]) == 200_000


@pytest.mark.parametrize("bad", ['{"n": ' + "1" * 5000 + "}", '{"n": ' + "[" * 200_000])
def test_json_that_python_refuses_to_read_is_named_by_its_line(tmp_path: Path, bad: str) -> None:
    # The bug: a number of thousands of digits, or lists too deep, end in an error without file and line.
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n' + bad + "\n")
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2: "):
        read_table(path)


def test_a_text_is_read_as_messages_only_where_it_is_a_json_list_of_them() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert read(json.dumps(messages)) == read(messages) == messages
    for text in (
        "hi",
        "[]",
        "[1]",
        '[{"a": 1}]',
        "[{'role': 'user'",
        "[{'role': 'user', 'content': 'hi'}] is a list",
        "[{'role': 'user', 'content': 'hi'}, 3]",
        "[{'a': 1}]",
        "['role', 'content']",
        "[{role: user}]",
        "[" * 200_000,
    ):
        assert read(text) == text


@pytest.mark.parametrize(
    "printed",
    [
        "[{'role': 'user', 'content': 'a'}]",
        " [{'content': 'a', 'role': 'user', 'at': datetime.datetime(2026, 1, 2), 'x': nan}]",
        "[{'content': \"it's\", 'role': 'user'}\n {'content': 'b', 'role': 'assistant'}]",  # a NumPy array, as pandas saves it
        '[{"role": "user", "content": "a",},]',
        "[{'role': 'assistant', 'tool_calls': [{'name': 'f'}]}]",
    ],
)
def test_messages_that_python_printed_are_refused_by_their_line(tmp_path: Path, printed: str) -> None:
    # The bug: the policy learns from a prompt of brackets and quotes.
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], ["Hi"], [printed]])
    with pytest.raises(UserError, match=r"t\.csv, line [34]: the prompt is a list of messages as Python .*json\.dumps"):
        load_rows(path, check_rows)


def test_messages_come_in_one_form() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": None}}}]
    parts = [{"type": "text", "text": "What is ", "image": None}, {"type": "text", "text": "this?"}]
    given = [
        {"role": "user", "content": parts, "tool_calls": None, "name": "Ann", "seen": 3},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "4", "tool_call_id": "a", "tool_calls": None},
    ]
    before = copy.deepcopy(given)
    found = read(given)
    assert found == [
        {"role": "user", "content": "What is this?", "name": "Ann", "seen": 3},
        {"role": "assistant", "tool_calls": calls},  # what a call is given is the user's
        {"role": "tool", "content": "4", "tool_call_id": "a"},
    ]
    assert given == before
    for messages in (given, found):
        check_messages("row 0", "the prompt", messages)
    assert check_rows([("row 0", {"prompt": json.dumps(given)})]) == [{"prompt": found}]


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "user", "content": None}, "a message is .*'user'.* only one with tool_calls"),
        (
            {"role": "assistant", "content": None, "tool_calls": []},
            "a message is .*'assistant'.* only one with tool_calls",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            "a part .* is of the type 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "a part of a message's content is {'type': 'text'}"),
        ({"role": "user", "content": ["a"]}, "a part of a message's content is 'a'"),
        ({"role": "user", "content": [{"type": "text", "text": "\ud800"}]}, ".* half of a surrogate pair"),
        ({"role": "user", "content": {"text": "a"}}, "a message is "),
        ({"role": None, "content": "a"}, "a message is "),
        ({"role": "assistant", "tool_calls": "[]"}, r"a message's tool_calls are '\[\]', not a list"),
        ({"role": "assistant", "content": "a", "tool_calls": ["f"]}, r"a message's tool_calls are \['f'\], not a list"),
    ],
)
def test_what_is_no_message_is_named(message, why: str) -> None:
    for messages in ([message], read([message])):
        with pytest.raises(UserError, match=f"row 3: {why}"):
            check_messages("row 3", "the prompt", messages)


def test_parquet_keeps_messages(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet") == [(f"{tmp_path}/t.parquet, row 0 (counted from 0)", rows[0])]


def test_what_arrow_puts_into_every_record_is_left_out_of_messages_and_tools(tmp_path: Path) -> None:
    # The bug: a model learns to give every tool the arguments of all others, null.
    def call(name, **arguments):
        return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}

    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi", "at": datetime.datetime(2026, 1, 2)},
                call("a", x=1),
                call("b", y="2"),
            ],
            "tools": [{"name": "a", "parameters": {"x": {"type": "integer"}}}, {"name": "b", "parameters": {}}],
            "answer": {"unit": None},  # a reward's
        }
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for name in ("t.parquet", "saved"):
        assert read_table(tmp_path / name)[0][1] == rows[0]


def save_splits(folder: Path, **splits: datasets.Dataset) -> Path:
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def numbers(source) -> list[int]:
    return [row["n"] for _, row in read_table(source)]


def test_a_folder_of_one_data_set_has_no_splits(tmp_path: Path) -> None:
    # The bug: the same rows to learn from and to be judged by.
    rows = datasets.Dataset.from_dict({"n": range(10)})
    rows.save_to_disk(str(tmp_path / "d"))
    assert numbers(tmp_path / "d") == list(range(10))
    for split in ("train", "test", "test[:2]"):
        with pytest.raises(UserError, match=rf"one data set, without splits, and no '{split[:4]}.*leave out the split"):
            read_table(f"{tmp_path}/d:{split}")
    with pytest.raises(UserError, match="a saved folder has no configurations: leave out 'main'"):
        read_table(f"{tmp_path}/d:main:train")
    datasets.Dataset.from_dict({"n": range(10)}, split="train").save_to_disk(str(tmp_path / "named"))
    assert numbers(f"{tmp_path}/named:train") == numbers(f"{tmp_path}/named") == list(range(10))
    assert numbers(f"{tmp_path}/named:train[8:]") == [8, 9]
    for split in ("test", "train+test"):
        with pytest.raises(UserError, match=r"one data set, the split 'train', and no "):
            read_table(f"{tmp_path}/named:{split}")


def test_a_split_may_be_cut_as_the_package_datasets_writes_it(tmp_path: Path) -> None:
    train, test = (datasets.Dataset.from_dict({"n": range(begin, begin + 20)}) for begin in (0, 100))
    folder = save_splits(tmp_path / "d", train=train, test=test, **{"dev-2": test})
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text("".join(f'{{"n": {i}}}\n' for i in range(20)))
    for source in (folder, tmp_path / "files"):
        assert numbers(f"{source}:train[:3]") == [0, 1, 2]
        assert numbers(f"{source}:train[10%:20%]") == [2, 3]
    assert numbers(f"{folder}:train[-1:]+test[:1]") == [19, 100]
    assert numbers(f"{folder}:dev-2")[0] == 100
    assert load_rows(f"{folder}:train[1:2]", lambda placed: placed) == [
        (f"{folder}:train[1:2], row 0 (counted from 0)", {"n": 1})
    ]
    for wrong, why in (("train[:x]", "Unrecognized"), ("dev", r"Unknown split \"dev\".*'train'")):
        with pytest.raises(UserError, match=rf"cannot give its split '.*{why}"):
            read_table(f"{folder}:{wrong}")
    with pytest.raises(UserError, match="holds no rows"):
        read_table(f"{folder}:train[5:5]")


def test_a_data_set_is_read_by_name_and_split(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    for split in ("train", "test"):
        row = {"messages": [{"role": "user", "content": split}]}
        (tmp_path / "plain" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    assert read_table(f"{tmp_path}/plain")[0][1]["messages"] == [{"content": "train", "role": "user"}]
    place, row = read_table(f"{tmp_path}/plain:test")[0]
    assert row["messages"] == [{"content": "test", "role": "user"}] and place.endswith(
        "plain:test, row 0 (counted from 0)"
    )
    saved = datasets.Dataset.from_list([{"text": "a"}])
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": saved}).save_to_disk(str(tmp_path / "splits"))
    assert [row for _, row in read_table(tmp_path / "saved")] == [{"text": "a"}]
    assert load_rows(f"{tmp_path}/splits:test", lambda placed: placed)[0][1] == {"text": "a"}
    with pytest.raises(ValueError, match="cannot give its split 'train'"):
        read_table(tmp_path / "splits")


def test_without_the_package_a_name_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("imdb", "org/name:test"):
        with pytest.raises(ImportError, match=f"'{source}' is no file .*jsonl.*pip install datasets"):
            read_table(source)


def test_an_unknown_name_is_one_error_without_a_traceback_of_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments, **options):
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(
        ValueError, match=r"'no-such-set' is no file .*and datasets cannot give.*doesn't exist on the Hub"
    ):
        read_table("no-such-set")
    with pytest.raises(ValueError, match="no module 'no_such_module'"):
        load_rows("no_such_module:rows", check_rows)


def test_a_folder_is_a_data_set_though_python_would_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The bug: any folder here is found as a module without functions, so that FOLDER:SPLIT is refused.
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "test.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_rows("films:test", lambda placed: placed)[0][1] == {"text": "a"}


def test_a_string_is_classified_without_importing_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The bug: `find_spec` of a dotted name imports the packages in front of its last dot, whatever they do.
    inner = tmp_path / "noisy_package" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "noisy_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    (inner / "__init__.py").write_text("")
    (inner / "rows.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"there is no module 'noisy_package\.inner\.films'"):
        load_rows("noisy_package.inner.films:test", check_rows)
    assert sources._is_module("noisy_package.inner.rows") and not sources._is_module("noisy_package.inner.rows.deeper")
    assert not {"noisy_package", "noisy_package.inner"} & set(sys.modules)


def some_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": "a"}] * count


def test_a_function_gives_rows_and_its_bad_rows_are_named() -> None:
    assert [row for _, row in load_rows(f"{__name__}:rows_here", lambda placed: placed)] == rows_here()
    with pytest.raises(ValueError, match=f"{__name__}:rows_here, row 0: there is no column 'prompt'"):
        load_rows(f"{__name__}:rows_here", check_rows)
    with pytest.raises(ValueError, match="returns no rows"):
        load_rows(f"{__name__}:nothing", check_rows)
    with pytest.raises(ValueError, match=r"has no function 'no_such_function'"):
        load_rows(f"{__name__}:no_such_function", check_rows)
    for no_rows in ("Path", "__name__", "some_rows"):  # a Path is no list; a name can't be called; this needs one
        with pytest.raises(
            ValueError, match=rf"{__name__}:{no_rows}' must be a function without arguments that returns a list of rows"
        ):
            load_rows(f"{__name__}:{no_rows}", check_rows)


@pytest.mark.parametrize(
    ("second", "said"),
    [({"text": "b", "n": 1}, r"line 2: its columns differ.*\['n'\]"), ("b", "line 2: 'b' is not a row")],
)
def test_rows_that_differ_are_named(second, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_same_columns([("line 1", {"text": "a"}), ("line 2", second)])


def test_only_the_columns_that_count_are_compared() -> None:
    check_same_columns([("line 1", {"text": "a"}), ("line 2", {"text": "b", "source": "web"})], ("text",))


@pytest.mark.parametrize(
    "messages", [[], "hi", None, ["hi"], [{"role": "user"}], [{"role": "user", "content": "\ud800"}]]
)
def test_bad_messages_are_named(messages) -> None:
    with pytest.raises(ValueError, match="line 7: "):
        check_messages("line 7", "the answer", messages)


SAID = {"role": "user", "content": "a"}


@pytest.mark.parametrize("make", [tuple, lambda x: np.array(x, dtype=object), list])
def test_messages_and_tools_may_stand_in_tuples_and_arrays_as_pandas_holds_them(make):
    row = {"prompt": make([{**SAID, "content": make([{"type": "text", "text": "a"}])}]), "tools": make([{"name": "b"}])}
    ((_, read),) = check_prompts([("row 0", row)])
    assert read["prompt"] == [SAID] and as_tools("row 0", row["tools"]) == [{"name": "b"}]


@pytest.mark.parametrize(
    "nothing", [None, float("nan"), np.float64("nan"), "", "  ", "null", "None", "[]", (), np.array([])]
)
def test_no_tools_may_be_written_in_any_way(nothing):
    assert as_tools("row 0", nothing) is None


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("array([{'role': 'user', 'content': 'a'}], dtype=object)", "as Python prints it: write it in JSON"),
        ("({'role': 'user', 'content': 'a'},)", "as Python prints it: write it in JSON"),
        ("{'role': 'user', 'content': 'a'}", "as Python prints it: write it in JSON"),
        (json.dumps(SAID), "a single message: write a list of it"),
        (json.dumps(json.dumps([SAID])), "in JSON within JSON: encode it once"),
        (json.dumps([{"from": "human", "value": "a"}]), "name them 'role' and 'content'"),
    ],
)
def test_a_cell_that_holds_messages_in_another_form_is_no_prompt_to_be_read_as_it_is(text, mend):
    with pytest.raises(ValueError, match=f"row 0: the prompt is .*{mend}"):
        check_prompts([("row 0", {"prompt": text})])


@pytest.mark.parametrize(
    "text", ["[1] from here", '"role" is a word', "(from: me)", '{"role": 1}', "{'from' 'role'}", '["role"]']
)
def test_a_text_that_only_looks_like_messages_is_a_text(text):
    assert check_prompts([("row 0", {"prompt": text})])[0][1]["prompt"] == text

"""People's training data: the forms that are taken, and what is said about the others."""

import datetime
import json

import pytest
from datasets import Dataset

from cometlm.data.records import read_records

TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]


def lines(folder, rows, name="data.jsonl"):
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def told(data):
    """Rows of a table with what is JSON in them parsed."""
    return [
        {
            name: [json.loads(one) for one in value] if isinstance(value, list) else value
            for name, value in row.items()
        }
        for row in data.to_list()
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"prompt": "Who?", "completion": " Nobody."},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"text": "Nobody came."},
    ],
    ids=lambda row: "+".join(row),
)
def test_forms(tmp_path, row):
    data = read_records(lines(tmp_path, [{**row, "extra": 1}, row, ""]))
    assert told(data) == [row, row]


def test_the_published_form(tmp_path):
    """JSON lines of uniq_id and messages, these as a string of JSON."""
    rows = [{"uniq_id": str(i), "messages": json.dumps(TALK)} for i in range(3)]
    assert told(read_records(lines(tmp_path, rows))) == [{"messages": TALK}] * 3


@pytest.mark.parametrize(
    "arguments",
    [
        [{"n": 3}, {"n": 0.5}],
        [{"n": None}, {"n": 1}],
        [{"b": 1, "a": 2}, {"a": 2, "b": 1}],
        [{"v": 1}, {"v": "a"}, '{"v": 1}', [1]],
        [{"a": True}, {"a": 1}],
        [{"n": 2**70}, {"n": 1}],
    ],
    ids=str,
)
def test_each_call_of_a_tool_is_as_it_was_written(tmp_path, arguments):
    rows = [
        {"messages": [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in ({"function": {"name": "f", "arguments": given}} for given in arguments)
    ]
    found = told(read_records(lines(tmp_path, rows)))
    assert json.dumps(found) == json.dumps(rows)


def test_dates_beside_messages_are_text(tmp_path):
    when = datetime.datetime(2026, 11, 29, tzinfo=datetime.UTC)
    rows = [{"messages": [{**message, "at": when} for message in TALK]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    (row,) = told(read_records(str(tmp_path / "data")))
    assert [message.pop("at")[:10] for message in row["messages"]] == ["2026-11-29"] * 2
    assert row == {"messages": TALK}


def test_fields_that_are_null_are_not_there(tmp_path):
    talk = [TALK[0], {**TALK[1], "name": None, "tool_calls": None}]
    assert told(read_records(lines(tmp_path, [{"messages": talk}]))) == [{"messages": TALK}]


def test_a_list_and_a_folder(tmp_path):
    lines(tmp_path, [{"text": "b"}], "b.jsonl")
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "c"}], indent=1))
    (tmp_path / "notes.txt").write_text("not data")
    assert [row["text"] for row in read_records(tmp_path).to_list()] == ["a", "c", "b"]


def test_line_separators_inside_strings_end_no_line(tmp_path):
    row = {"text": "one\u2028two\x85three"}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_records(path).to_list() == [row]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "holds no records"),
        (["{"], r"line 1 is not JSON: .* \(column 2\)"),
        ([{"text": "a"}, "{]"], "line 2 is not JSON"),
        (["3"], "line 1 must be an object, got int"),
        ([{"words": "a"}], "has words; records need messages; prompt and completion; text"),
        ([{"text": "a"}, {"messages": TALK}], "1 of 2 records are not text like the first"),
        ([{"text": " "}, {"text": "a"}], "1 of 2 records are empty: .* line 1"),
        ([{"messages": []}], "1 of 1 records are empty"),
        ([{"messages": TALK[:1]}], "1 of 1 records have no assistant turn with words in it"),
        ([{"prompt": TALK[:1], "completion": TALK[:1]}], "1 of 1 records have no assistant turn"),
        ([{"messages": "[{"}], "messages is not JSON"),
        ([{"messages": "words"}], "messages is not JSON"),
        ([{"messages": [{"role": "user"}]}], "must have role and content"),
        ([{"text": 3}], "text must be a string, got int"),
        ([{"text": "\ud800"}], "text is not Unicode text"),
        ([{"messages": [*TALK, {**TALK[1], "name": "\ud800"}]}], "messages is not Unicode text"),
        ([{"prompt": "a", "completion": TALK[1:]}], "must both be words or both messages"),
    ],
    ids=str,
)
def test_bad_records(tmp_path, rows, said):
    with pytest.raises(ValueError, match=said):
        read_records(lines(tmp_path, rows))


def test_many_bad_records_are_counted_and_a_few_are_named(tmp_path):
    rows = [{"text": "a"}, *[{"text": ""}] * 9]
    with pytest.raises(ValueError, match=r"9 of 10 records are empty: (.*line \d, ){5}…$"):
        read_records(lines(tmp_path, rows))


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.jsonl"):
        read_records(tmp_path / "none.jsonl")


def test_a_folder_of_save_to_disk_says_what_to_do(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="write JSON lines instead"):
        read_records(tmp_path)

"""The file of rows: kept as they are made, found by their settings, one writer at a time."""

import dataclasses
import json

import pytest

from cometlm.eval.rows import Forecast, Rows
from cometlm.eval.runner import Answer

SETTINGS = {"task": "counting", "options": {"digits": (4, 6)}}
ONE = Answer(10, 0, 0, "Why?", ["ü"], "x", {"exact": 0.0}, meta={"depth": 0.5})
OTHER = dataclasses.replace(ONE, index=1)


def test_rows_are_kept_and_found_by_their_settings(tmp_path):
    path = tmp_path / "rows.jsonl"
    results = Rows(path)
    results.append(SETTINGS, ONE)
    assert json.loads(path.read_text())["answer"]["meta"] == {"depth": 0.5}  # before it is closed
    results.append({"task": "else"}, OTHER)
    results.close()
    again = Rows(path)
    assert again.answers(SETTINGS) == [ONE]
    assert again.answers({"task": "else"}) == [OTHER]
    assert again.answers({}) == []
    again.append(SETTINGS, OTHER)
    assert again.answers(SETTINGS) == [ONE, OTHER]
    again.close()
    assert len(path.read_text().splitlines()) == 3


def test_a_row_that_was_cut_is_made_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    for answer in (ONE, OTHER):
        results = Rows(path)
        results.append(SETTINGS, answer)
        results.close()
    whole = path.read_bytes()
    for cut in range(1, whole.index(b"\n")):
        path.write_bytes(whole[:-cut])
        results = Rows(path)
        assert results.answers(SETTINGS) == [ONE]
        results.append(SETTINGS, OTHER)
        results.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["hello", "{}", '{"settings": {}, "answer": {"x": 1}}', "[]"])
def test_another_file_is_refused_and_stays(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl must hold rows of evaluations"):
        Rows(path)
    assert path.read_text() == line + "\n"


@pytest.mark.parametrize("text", ["hello", '[{"context": "a"}]', '{"settings": {}, "x": 1}\nhello'])
def test_another_file_whose_last_line_has_no_end_is_refused_and_stays(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="must hold rows of evaluations"):
        Rows(path)
    assert path.read_text() == text


def test_without_a_file():
    results = Rows()
    results.append(SETTINGS, ONE)
    results.close()
    assert results.answers(SETTINGS) == [ONE]


def test_one_process_writes_at_a_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = Rows(path)
    rows.append(SETTINGS, ONE)
    with pytest.raises(OSError, match=r"rows\.jsonl is being written by another evaluation"):
        Rows(path)
    rows.append(SETTINGS, OTHER)
    rows.close()
    again = Rows(path)
    assert again.answers(SETTINGS) == [ONE, OTHER]
    again.close()


def test_the_last_row_of_a_place_counts():
    rows = Rows()
    for answer in (ONE, OTHER, dataclasses.replace(ONE, said="y")):
        rows.append(SETTINGS, answer)
    assert [one.said for one in rows.answers(SETTINGS)] == ["y", "x"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="its folder is missing"):
        Rows(tmp_path / "gone" / "rows.jsonl")


def test_forecasts_are_kept_beside_answers(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = Rows(path)
    rows.append(SETTINGS, Forecast(10, 2.0, None, [5]))
    rows.append(SETTINGS, ONE)
    last = Forecast(10, 3.0, 7, [5, 6], "too long")
    rows.append(SETTINGS, last)
    rows.close()
    again = Rows(path)
    assert again.forecasts(SETTINGS) == {10: last}
    assert again.forecasts({}) == {}
    assert again.answers(SETTINGS) == [ONE]
    assert again.num_others([SETTINGS]) == 0
    assert again.num_others([{}]) == 1  # forecasts do not count
    again.close()

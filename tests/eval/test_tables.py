"""Tables of a terminal: they fit its width, and hold every figure."""

import dataclasses
import io

import pytest
from rich.console import Console

from cometlm.eval.results import Cell, Results
from cometlm.eval.runner import Answer
from cometlm.eval.tables import tables

ONE = Answer(
    123_000, 0, 0, "Why?", ["x"], meta={"decile": 3},
    nbytes=900 << 20, peak_bytes=123 << 20, read_seconds=1234.5,
)  # fmt: skip


def test_what_an_open_chunk_holds_has_a_column_where_there_is_one():
    assert " open " not in shown(1, 400, None)
    line, *_ = [one for one in shown(1, 400, None, open_nbytes=25 << 20).splitlines()
                if one.startswith("comet")]  # fmt: skip
    assert line.split()[-7:] == ["900.0", "MiB", "25.0", "MiB", "123.0", "MiB", "1,234.5"]


def shown(num_scores, width, by, **fields):
    names = [f"score{i}" for i in range(num_scores)]
    answers = {
        (method, "passkey"): [
            dataclasses.replace(ONE, index=i, scores={name: i / (n + 4) for n, name in
                                                      enumerate(names)}, **fields)
            for i in range(4)
        ]
        for method in ("comet", "truncate")
    }  # fmt: skip
    cells = [Cell(method, "passkey", 123_000, 4) for method, _ in answers]
    console = Console(width=width, markup=False, file=io.StringIO())
    for table in tables(Results({}, cells, answers, {}, {}), by):
        console.print(table, highlight=False)
    return console.file.getvalue()


@pytest.mark.parametrize("by", [None, "decile"])
@pytest.mark.parametrize("num_scores", [1, 3, 4, 7])
def test_nothing_is_cut_off(num_scores, by):
    wide, narrow = (shown(num_scores, width, by) for width in (400, 80))
    assert max(map(len, narrow.splitlines())) <= 80
    assert "\u2026\n" not in narrow
    assert "1,234.5" in narrow
    assert set(wide.split()) == set(narrow.split())  # each word is whole


def test_what_has_room_stands_in_one_line():
    first = next(line for line in shown(3, 400, None).splitlines() if line.startswith("comet"))
    assert first.split()[-5:] == ["900.0", "MiB", "123.0", "MiB", "1,234.5"]
    assert "0.38" in first

"""People's own data: what it becomes, and every way in which it can be wrong."""

import json
import math
import re

import pytest

from cometlm.tasks import Own, Question
from cometlm.tasks.scoring import found
from tests.real import tokenizer

ROW = {"context": "Ada paid for the lamp.", "question": "Who paid?", "answer": "Ada"}


@pytest.fixture(scope="module")
def words():
    return tokenizer("smollm2")


@pytest.fixture
def made(tmp_path, words):
    """The task of some rows; strings stand in the file as they are."""

    def make(*rows):
        path = tmp_path / "mine.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return Own(words, path=path)

    return make


def test_rows_of_one_context_are_one_sample(made, words, tmp_path):
    (tmp_path / "long.txt").write_text("The ship left in May, with salt.", encoding="utf-8")
    other = {"context_file": "long.txt", "question": "When?", "answer": ["May", "in May"]}
    task = made(ROW, "", other, {**ROW, "question": "For what?", "answer": "the lamp"})
    assert task.num_samples == 2
    first, second = (task.sample(i, task.longest) for i in range(2))
    assert words.decode(first.context) == ROW["context"]
    assert [q.text for q in first.questions] == ["Who paid?", "For what?"]
    assert second.questions == (Question("When?", ("May", "in May")),)
    with_fields = made(*({**ROW, "id": i, "question": f"{i}?"} for i in range(3)))
    assert with_fields.num_samples == 1
    assert task.longest == len(second.context)


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        (940, ("940",)),
        (True, ("true",)),
        (-0.5, ("-0.5",)),
        ([1969, "in 1969"], ("1969", "in 1969")),
    ],
    ids=str,
)
def test_numbers_are_answers_as_their_text(made, answer, texts):
    task = made({**ROW, "answer": answer})
    (question,) = task.sample(0, 100).questions
    assert question.answers == texts
    assert task.score(question, texts[0])["exact"] == 1
    assert task.digest == made({**ROW, "answer": list(texts)}).digest


@pytest.mark.parametrize("text", ["12.50", "1e5", "0.00001", "100000000000000000000.0"])
def test_numbers_are_taken_as_they_are_written(made, text):
    task = made(f'{{"context": "x", "question": "y", "answer": {text}, "price": {text}}}')
    (question,) = task.sample(0, 100).questions
    assert question.answers == (text,)
    assert json.dumps(dict(question.meta)) == json.dumps({"price": float(text)})


def test_further_fields_group_reports(made):
    rows = [{**ROW, "kind": kind, "tags": ["x"]} for kind in ("who", "who", "other")]
    task = made(*rows, ROW, {**ROW, "size": math.nan})
    (sample,) = [task.sample(i, 100) for i in range(task.num_samples)]
    assert [question.meta for question in sample.questions] == [
        {"kind": "who", "size": None},
        {"kind": "who", "size": None},
        {"kind": "other", "size": None},
        {"kind": None, "size": None},
        {"kind": None, "size": "nan"},
    ]


def test_the_digest_is_that_of_what_is_asked(made):
    digest = made(ROW).digest
    assert made("", ROW).digest == digest
    assert made({**ROW, "answer": "Basil"}).digest != digest
    kinds = [made(ROW, {**ROW, "kind": kind}).digest for kind in "ab"]
    assert len({digest, *kinds}) == 3


def test_scores(made):
    task, question = made(ROW), Question("Who?", ("Ada", "Ada Byron"))
    assert task.score(question, "ada.") == {"exact": 1, "found": 1, "f1": 1}
    assert task.score(question, "It was Ada") == {"exact": 0, "found": 1, "f1": pytest.approx(0.5)}
    assert found("Adamant", ["Ada"]) == 0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROW, '{"context": "x",, }'], r"mine\.jsonl line 2 is not JSON: .*\(column 17\)"),
        (["[1, 2]"], "2 of 2 rows are no objects: record 1, record 2"),
        ([], "holds no rows"),
        ([ROW, {**ROW, "question": " "}], "1 of 2 rows have no question: line 2"),
        (
            [{"context": "x", "question": "y"}] * 7,
            "7 of 7 rows have no answer: line 1, line 2, line 3, line 4, line 5, …",
        ),
        ([{**ROW, "answer": None}], "no text, number or list of them: line 1"),
        ([{**ROW, "answer": {"x": 5}}], "no text, number or list of them: line 1"),
        ([{**ROW, "answer": []}], "no text, number or list of them: line 1"),
        ([{**ROW, "answer": ["x", ""]}], "no text, number or list of them: line 1"),
        ([ROW, r'{"context": "\ud800", "question": "x", "answer": "y"}'], "Unicode text: line 2"),
        ([{"question": "x", "answer": "y"}], "one of context and context_file: line 1"),
        ([ROW, {**ROW, "distance": 5}], r"1 of 2 rows have a field of reports \(.*\): line 2"),
        (['{"context": "x", "question": "y", "answer": NaN}'], "no text, number or list of them"),
        ([{**ROW, "context_file": "x"}], "one of context and context_file: line 1"),
        ([{**ROW, "context": ["x"]}], "a context that is no string: line 1"),
        ([ROW, {**ROW, "context": "\n"}], "1 of 2 rows have an empty context: line 2"),
    ],
)
def test_bad_rows(made, rows, said):
    with pytest.raises(ValueError, match=said):
        made(*rows)


def test_files_that_are_not_there(made, words, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"no file {tmp_path / 'no.jsonl'}")):
        Own(words, path=tmp_path / "no.jsonl")
    with pytest.raises(IsADirectoryError, match="must be a file of JSON lines"):
        Own(words, path=tmp_path)
    row = {"context_file": "gone.txt", "question": "x", "answer": "y"}
    with pytest.raises(FileNotFoundError, match=r"mine\.jsonl line 1: there is no file .*gone"):
        made(row)
    (tmp_path / "gone.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"line 1: .*gone\.txt is not UTF-8 text"):
        made(row)


def test_samples_out_of_bounds(made):
    task = made(ROW)
    with pytest.raises(ValueError, match=r"index must lie in 0 … 0, got 1"):
        task.sample(1, 100)
    with pytest.raises(ValueError, match=r"tokens must be at least \d, got 3"):
        task.sample(0, 3)

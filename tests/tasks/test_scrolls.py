"""SCROLLS: its published examples of scores, and its rows as texts with questions."""

import json
import zipfile

import pytest

from cometlm.tasks import make_task
from cometlm.tasks.base import Question
from cometlm.tasks.scrolls import DATA, Scrolls, scrolls_score
from tests.tiny import refused

# Of the evaluator's own description (metrics/scrolls.py of tau/scrolls on the hub), in percent.
SAID = ("exact match example", "hello there", "general kenobi")
REFERENCES = (("exact match example",), ("hello", "hi there"), ("commander kenobi",))
QUERY = {"quality": "Who paid?\n\n (A) Ada\n (B) Ben\n\n (D) Di\n"}


def row(number, output, query="Who paid?", text="Ada paid.\n\nBen left."):
    given = f"{query}\n\n{text}" if query else text
    return {"id": f"i{number}", "pid": f"i{number}_0", "input": given, "output": output}


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def made(tmp_path, words):
    """The task of some rows."""

    def make(data, *rows, **options):
        path = written(tmp_path / "validation.jsonl", rows)
        return Scrolls(words, data=data, path=str(path), **options)

    return make


@pytest.mark.parametrize(
    ("data", "official", "score"),
    [
        ("gov_report", {"rouge1": 72.2222, "rouge2": 33.3333, "rougeL": 72.2222}, 55.8136),
        ("contract_nli", {"exact": 33.3333}, 33.3333),
        ("narrative_qa", {"f1": 72.2222}, 72.2222),
    ],
)
def test_published_examples(made, data, official, score):
    task = made(data, row(0, "x"))
    scores = [
        task.score(Question("?", references), said)
        for said, references in zip(SAID, REFERENCES, strict=True)
    ]
    means = {name: 100 * sum(one[name] for one in scores) / 3 for name in scores[0]}
    assert means == pytest.approx(official, abs=1e-4)
    assert 100 * scrolls_score(scores) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(
    ("data", "said", "answers", "score"),
    [
        ("qasper", "The 2 models", ("2 models.", "none"), 1),
        ("qasper", "", ("Ada",), 0),
        ("qasper", "a", ("the",), 0),  # nothing is left of either
        ("qasper", "yes it is", ("Yes",), 0.5),
        ("quality", "The lamp!", ("a lamp",), 1),
        ("quality", "(A) The lamp", ("The lamp",), 1),  # the letter is an article
        ("quality", "(B) The lamp", ("The lamp",), 0),
    ],
)
def test_normalisation(made, data, said, answers, score):
    task = made(data, row(0, "x", QUERY.get(data, "Who?")))
    (got,) = task.score(Question("?", answers), said).values()
    assert got == pytest.approx(score)


@pytest.mark.parametrize("data", DATA)
def test_a_text_is_read_once_for_all_its_questions(made, words, data):
    is_asked = data not in ("gov_report", "summ_screen_fd")
    query = QUERY.get(data, "Who paid?") if is_asked else ""
    other = query.replace("Who paid", "Who left")
    rows = [row(0, "Ada", query), row(0, "Ada B.", query), row(1, "Ben", other)]
    task = made(data, *rows, row(2, "Di", query, "Di paid twice."))
    assert task.num_samples == 2
    first, second = (task.sample(i, task.longest) for i in range(2))
    assert words.decode(first.context) == "Ada paid.\n\nBen left."
    assert words.decode(second.context) == "Di paid twice."
    assert [question.answers for question in first.questions] == [("Ada", "Ada B."), ("Ben",)]
    assert [question.meta["id"] for question in first.questions] == ["i0", "i1"]
    if is_asked:
        assert query.strip() in first.questions[0].text
        assert other.strip() in first.questions[1].text
    assert all(score == 1 for score in task.score(first.questions[0], "Ada B.").values()) or (
        data in ("gov_report", "summ_screen_fd", "qmsum")
    )


def test_where_rows_may_lie(words, tmp_path):
    rows = {"train.jsonl": [row(0, "a")], "validation.jsonl": [row(1, "b")], "test.jsonl": []}
    folder = tmp_path / "unpacked"
    for file, own in rows.items():
        written(folder / "qasper" / file, own)
    archive = tmp_path / "zips" / "qasper.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in rows:
            zipped.write(folder / "qasper" / file, f"qasper/{file}")
    places = [folder, folder / "qasper", archive.parent, archive]
    for place in places:
        task = Scrolls(words, path=str(place))
        assert [q.answers for q in task.sample(0, 100).questions] == [("b",)]
        task = Scrolls(words, path=str(place), split="train")
        assert [q.answers for q in task.sample(7, 100).questions] == [("a",)]


def test_bad_input(made, words, tmp_path, monkeypatch):
    with refused("data must be one of gov_report, summ_screen_fd, qmsum"):
        make_task("scrolls", words, data="novels", path="x")
    with pytest.raises(ValueError, match=r"line 2 must have .* got none of output \(SCROLLS keeps"):
        made("qasper", row(0, "a"), row(1, None))
    with pytest.raises(ValueError, match="line 1 must have a query, an empty line and a text"):
        made("qasper", {**row(0, "a"), "input": "Who?"})
    with pytest.raises(ValueError, match="path must hold rows, got none"):
        made("qasper")
    with pytest.raises(FileNotFoundError, match=r"none of qmsum/validation\.jsonl"):
        Scrolls(words, data="qmsum", path=str(tmp_path / ".."))
    with refused("scores must be at least 1, got none"):
        scrolls_score([])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(OSError, match=r"qasper\.zip cannot be fetched .* say path=qasper\.zip"):
        Scrolls(words)

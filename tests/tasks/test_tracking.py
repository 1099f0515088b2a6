"""Tracking: answers are what one finds by going through the text, or through the evidence alone."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.tasks import make_task
from cometlm.tasks.names import PEOPLE, ROOMS, SMALL_THINGS
from cometlm.tasks.tracking import KINDS, TEMPLATES, Tracking
from tests.tasks.shared import decoded, read
from tests.tiny import examples, refused

STORY = ("goes", "takes", "drops")


def events(text, split):
    """What happens in a text, in order: kind of event and fields."""
    words = {
        "person": "|".join(PEOPLE[split]),
        "thing": "|".join(SMALL_THINGS[split]),
        "room": "|".join(ROOMS[split]),
        "value": r"\d+\b",
        "name": r"[a-z]\d+\b",
        "other": r"[a-z]\d+\b",
    }
    found = []
    for kind in ("given", "copied", *STORY):
        for template in getattr(TEMPLATES[split], kind):
            made = re.escape(template[0].upper() + template[1:] if kind in STORY else template)
            made = re.sub(r"\\\{(\w+)\\\}", lambda m: f"(?P<{m[1]}>{words[m[1]]})", made)
            matches = re.finditer(rf"(?<!\w){made}", text)
            found += [(match.start(), kind, match.groupdict()) for match in matches]
    return [(kind, fields) for _, kind, fields in sorted(found, key=lambda one: one[0])]


def answer(text, split, question):
    """What the text says, found by going through it."""
    values, at, carried, where, before = {}, {}, {}, {}, {}

    def put(thing, room):
        if thing in where and where[thing] != room:
            before[thing, room] = where[thing]
        where[thing] = room

    for kind, fields in events(text, split):
        if kind == "given":
            values[fields["name"]] = fields["value"]
        elif kind == "copied":
            values[fields["name"]] = values[fields["other"]]
        elif kind == "goes":
            at[fields["person"]] = fields["room"]
            for thing, holder in carried.items():
                if holder == fields["person"]:
                    put(thing, fields["room"])
        elif kind == "takes":
            carried[fields["thing"]] = fields["person"]
            if fields["person"] in at:  # evidence need not hold where it was taken
                put(fields["thing"], at[fields["person"]])
        else:
            carried.pop(fields["thing"], None)  # evidence need not hold who took it
            put(fields["thing"], at[fields["person"]])
    asked = TEMPLATES[split]
    for form in ("value", "names", "thing", "person", "before"):  # the most special first
        for template in getattr(asked, f"{form}_asked"):
            fields = read(template, question)
            if fields is None:
                continue
            if form == "names":
                return ", ".join(name for name, value in values.items() if value == fields["value"])
            if form == "before":
                return before[fields["thing"], fields["room"]]
            known = {"value": values, "person": at, "thing": where}[form]
            return known[next(iter(fields.values()))]
    raise AssertionError(question)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
@examples(20)
@given(
    tokens=st.integers(250, 600),
    index=st.integers(0, 10000),
    most=st.integers(3, 30),
    chains=st.integers(1, 4),
)
def test_samples(kind, split, words, prose, tokens, index, most, chains):
    options = {"kind": kind, "events": (3, most), "chains": chains, "hops": (0, 3)}
    options |= {"questions": 3, "corpora": prose}
    task = Tracking(words, split=split, **options)
    sample = task.sample(index, tokens)
    assert sample == Tracking(words, split=split, **options).sample(index, tokens)
    assert len(sample.context) == tokens
    assert sample.meta["kind"] == kind
    assert sample.questions
    text = words.decode(sample.context)
    assert len(events(text, split)) == sample.meta["events"]
    facts = {"one-fact": 1, "two-facts": 2, "three-facts": 3}
    for question in sample.questions:
        (said,) = question.answers
        assert said == answer(text, split, question.text)
        evidence = [decoded(words, sample, where) for where in question.evidence]
        assert said == answer("\n".join(evidence), split, question.text)
        assert len(evidence) == facts.get(kind, len(evidence))
        assert task.score(question, said) == {"exact": 1, "found": 1}


def test_all_kinds_come_and_a_short_text_has_fewer_events(words, prose):
    task = Tracking(words, events=(3, 40), chains=1, hops=(0, 1), corpora=prose)
    samples = [task.sample(index, 110) for index in range(40)]
    assert {sample.meta["kind"] for sample in samples} == set(KINDS)
    assert max(sample.meta["events"] for sample in samples) < 20
    with pytest.raises(ValueError, match=r"tokens must be at least \d+, got 9"):
        task.sample(0, 9)


def test_variables_of_the_text_are_not_ours(words, tmp_path):
    path = tmp_path / "program.py"
    lines = (f"p{n} = q{n} + r{n} + s{n} + t{n} + u{n}\n" for n in range(1, 100))
    path.write_text("".join(lines) * 5)
    sample = Tracking(words, kind="variables", corpora=str(path)).sample(0, 3000)
    text = words.decode(sample.context)
    for where in sample.questions[0].evidence:
        name, *_ = re.findall(r"\b[p-w]\d+\b", decoded(words, sample, where))
        assert not re.search(rf"{name} [=+]|\+ {name}\b", text)


def test_some_of_the_names_score_their_share(words, prose):
    task = Tracking(words, kind="variables", hops=2, questions=4, corpora=prose)
    (question, *_) = (q for q in task.sample(0, 400).questions if q.meta["form"] == "names")
    one, *_ = question.answers[0].split(", ")
    assert task.score(question, f"It is {one}.") == {"exact": 0, "found": pytest.approx(1 / 3)}


def test_train_and_test_share_nothing():
    train, test = (dataclasses.asdict(TEMPLATES[split]) for split in ("train", "test"))
    for name, ours in train.items():
        assert not set(ours) & set(test[name])
        assert len(set(ours)) == len(ours)


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [
        ("kind", "four-facts", "one or more of variables, one-fact"),
        ("events", 2, "3 … 256"),
        ("chains", 0, "1 … 16"),
        ("hops", 17, "0 … 16"),
        ("questions", 0, "at least 1"),
    ],
)
def test_options_out_of_bounds(words, option, value, bound):
    with refused(bound):
        make_task("tracking", words, **{option: value})

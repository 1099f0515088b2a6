"""Facts: told where it says, answered by what holds, asked in other words, never in the test."""

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.tasks import make_task
from cometlm.tasks import names as names_of
from cometlm.tasks.facts import RELATIONS, Facts
from cometlm.tasks.scoring import NOT_SAID
from cometlm.train.config import Mixture
from cometlm.train.mixture import MixtureBatches
from tests.tasks.shared import decoded, read
from tests.tiny import examples, refused

SPLITS = ("train", "test")
shares = st.sampled_from([0.0, 0.3, 1.0])
# Words that do not tell what is meant.
# fmt: off
LITTLE = {
    "a", "an", "and", "are", "as", "at", "be", "by", "did", "do", "does", "for", "from", "has",
    "have", "how", "in", "is", "it", "of", "on", "one", "that", "the", "they", "this", "to",
    "was", "were", "what", "when", "where", "which", "who", "whom", "whose", "with", "would",
}
# fmt: on


def told(text, split):
    """Values by relation and subject in a text, in the order in which they are told."""
    found = {}
    for relation in RELATIONS[split]:
        for template in relation.told + relation.changed:
            subject = r"(?P<subject>(?:[Tt]he [a-z]+ [a-z]+(?: box)?|[A-Z][a-z]+ [A-Z][a-z]+))"
            value = {
                "person": r"[A-Z][a-z]+ [A-Z][a-z]+",
                "thing": "[Tt]he [a-z]+ [a-z]+(?: box)?",
                "place": "[A-Z][a-z]+",
                "date": r"\d+ [A-Z][a-z]+ \d{4}",
                "price": r"\d+ [a-z]+s",
                "code": r"[A-Z]{2}-\d{4}",
            }[relation.kind]
            made = re.escape(template[0].upper() + template[1:])
            made = made.replace(r"\{subject\}", subject).replace(
                r"\{value\}", f"(?P<value>{value})"
            )
            for match in re.finditer(made, text):
                who, what = (re.sub("^The ", "the ", match[name]) for name in ("subject", "value"))
                found.setdefault((relation, who), {})[match.start()] = what
    # A changed sentence may hold one of the first kind: the same value at two places.
    in_order = {key: [v for _, v in sorted(values.items())] for key, values in found.items()}
    return {key: list(dict.fromkeys(values)) for key, values in in_order.items()}


@pytest.mark.parametrize("split", SPLITS)
@examples(30)
@given(
    tokens=st.integers(500, 900),
    index=st.integers(0, 1000),
    facts=st.integers(1, 10),
    changes=shares,
    pairs=shares,
    unknown=shares,
)
def test_samples(split, words, prose, tokens, index, facts, changes, pairs, unknown):
    options = {"facts": (1, facts), "questions": 6, "changes": changes, "pairs": pairs}
    options |= {"unknown": unknown, "corpora": prose}
    task = Facts(words, split=split, **options)
    sample = task.sample(index, tokens)
    assert sample == Facts(words, split=split, **options).sample(index, tokens)
    assert len(sample.context) == tokens
    assert 1 <= sample.meta["facts"] <= facts
    assert 1 <= len(sample.questions) <= 6
    text = words.decode(sample.context)
    known = told(text, split)
    assert len(known) == sample.meta["facts"]
    for question in sample.questions:
        ((relation, subject),) = {
            (relation, fields["subject"])
            for relation in RELATIONS[split]
            for template in relation.asked
            if (fields := read(template, question.text))
        }
        assert relation.kind == question.meta["kind"]
        if question.meta["asked"] == "unknown":
            assert (question.answers, question.evidence) == (NOT_SAID, ())
            assert (relation, subject) not in known
            continue
        values = known[relation, subject]
        (where,) = question.evidence
        sentence = decoded(words, sample, where)
        assert question.answers[0].lower() in sentence.lower()
        if question.meta["asked"] == "earlier":
            assert question.answers[0] == values[0] != values[1]
            assert where.stop <= question.after <= question.until
            read_so_far = told(words.decode(sample.context[: question.until]), split)
            assert read_so_far[relation, subject] == values[:1]
        else:
            assert question.answers[0] == values[-1]
            assert question.after is question.until is None
            assert (question.meta["asked"] == "changed") == (len(values) == 2)
        if question.meta["asked"] == "pair":
            bare = subject.removeprefix("the ").split(" ", 1)
            others = [s.removeprefix("the ").split(" ", 1) for r, s in known if r == relation]
            assert any((bare[0] == o[0]) != (bare[1] == o[1]) for o in others)


def test_shares_are_what_they_say(words, prose):
    task = Facts(words, facts=30, questions=30, changes=0.3, pairs=0.4, unknown=0.2, corpora=prose)
    samples = [task.sample(index, 2500) for index in range(12)]
    asked = [q.meta["asked"] for sample in samples for q in sample.questions]
    assert asked.count("unknown") / len(asked) == pytest.approx(0.2, abs=0.08)
    late = len(asked) - asked.count("unknown") - asked.count("earlier")
    assert asked.count("changed") / late == pytest.approx(0.3, abs=0.1)
    assert asked.count("pair") / (late - asked.count("changed")) == pytest.approx(0.4, abs=0.12)


def test_what_does_not_fit_is_not_told(words, prose):
    task = Facts(words, facts=(1, 64), corpora=prose)
    counts = {task.sample(index, 100).meta["facts"] for index in range(20)}
    assert min(counts) >= 1
    assert max(counts) < 15
    assert Facts(words, facts=64, corpora=prose).sample(0, 3000).meta["facts"] == 64
    with pytest.raises(ValueError, match=r"tokens must be at least \d+, got 100"):
        Facts(words, facts=64, corpora=prose).sample(0, 100)


def test_questions_share_no_telling_word_with_their_sentences():
    for relation in itertools.chain(*RELATIONS.values()):
        sentences, asked = (
            {w for t in ts for w in re.findall(r"[a-z]+", re.sub(r"\{\w+\}", "", t.lower()))}
            for ts in (relation.told + relation.changed, relation.asked)
        )
        assert not (sentences & asked) - LITTLE, relation


def test_train_and_test_share_nothing():
    train, test = (RELATIONS[split] for split in SPLITS)
    for name in ("told", "changed", "asked"):
        ours, theirs = ({t for r in rs for t in getattr(r, name)} for rs in (train, test))
        assert not ours & theirs
    for pool in vars(names_of).values():
        if isinstance(pool, dict) and set(pool) == set(SPLITS):
            assert not set(pool["train"]) & set(pool["test"])
            assert len(set(pool["train"])) == len(pool["train"])
    for relation in train + test:
        assert all("{subject}" in t and "{value}" in t for t in relation.told + relation.changed)
        assert all("{subject}" in t for t in relation.asked)


@examples(30)
@given(st.integers(0, 10**6))
def test_made_up_names_are_of_no_test(seed):
    rng = random.Random(seed)
    names = {names_of.invented(rng) for _ in range(50)}
    assert len(names) > 40
    assert all(re.fullmatch("[A-Z][a-z]+", name) for name in names)
    for pool in (names_of.PEOPLE, names_of.FAMILIES, names_of.TOWNS):
        assert not names & set(pool["test"])


def test_score(words, prose):
    task = Facts(words, unknown=0, pairs=0, changes=0, corpora=prose)
    question = task.sample(0, 300).questions[0]
    right = question.answers[0]
    for said, exact, found in ((right, 1, 1), (f"It is {right}, I think.", 0, 1), ("no", 0, 0)):
        scores = task.score(question, said)
        assert (scores["exact"], scores["found"]) == (exact, found)
    unknown = Facts(words, unknown=1, corpora=prose).sample(0, 300).questions[0]
    for said in ("not said", "It is not said.", "I don’t know", "The text does not say"):
        assert task.score(unknown, said)["exact"] == 1
    assert task.score(unknown, "Oslo") == {"exact": 0, "found": 0, "f1": 0}


def test_probes_ask_for_an_earlier_value_before_it_changes(words, prose):
    options = {"facts": 1, "changes": 1.0, "unknown": 0.0, "corpora": prose}
    mixture = Mixture(
        tasks={"facts": 1},
        options={"facts": options},
        steps=1,
        tokens=(300, 300),
        batch_tokens=600,
        ask="probes",
    )
    batch = MixtureBatches(mixture, words, 0)[0]
    (late, early), (whole, until) = batch["probe_since"], batch["probe_until"]
    assert whole == [300, 300]
    assert all(a <= b < c for a, b, c in zip(early, until, late, strict=True))


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [
        ("facts", 65, "1 … 64"),
        ("questions", 0, "at least 1"),
        ("changes", 1.5, "0 … 1"),
        ("pairs", -1, "0 … 1"),
        ("unknown", 2, "0 … 1"),
    ],
)
def test_options_out_of_bounds(words, option, value, bound):
    with refused(bound):
        make_task("facts", words, **{option: value})

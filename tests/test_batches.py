"""Generated batches: made from their number alone, stage after stage."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest

from cometlm.config import CometConfig
from cometlm.train.batches import AGAIN, GeneratedBatches, collate
from cometlm.train.stages import Gates, Generated, HayShares, Stage
from tests.real import tokenizer
from tests.sessions import TEMPLATE

PROSE = "The ship left the harbour in the rain. It carried salt, iron and two hundred letters.\n"


@pytest.fixture(scope="module")
def words():
    return tokenizer("smollm2")


@pytest.fixture
def generated(tmp_path):
    (tmp_path / "text.txt").write_text(PROSE * 60)

    def make(*stages, **changes):
        return Generated(stages=stages, texts=(f"{tmp_path}/text.txt",), code=(), **changes)

    return make


STAGE = Stage(steps=3, tokens=(120, 160), batch_tokens=400)


def test_a_batch_depends_on_its_number_and_the_seed_alone(generated, words):
    settings = generated(STAGE, replace(STAGE, steps=4, passkey=0.5))
    made = [GeneratedBatches(settings, words, seed) for seed in (0, 0, 1)]
    assert len(made[0]) == 7
    backwards = [made[1][i] for i in reversed(range(7))][::-1]
    assert [made[0][i] for i in range(7)] == backwards
    assert made[0][2] != made[2][2]


@pytest.mark.parametrize(("passkey", "repeat"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_rows_of_one_length_that_fit(generated, words, passkey, repeat):
    stage = replace(STAGE, passkey=passkey, repeat=repeat, steps=8)
    batches = GeneratedBatches(generated(stage), words, 0)
    for number in range(8):
        batch = collate([batches[number]])
        rows, length = batch["input_ids"].shape
        assert batch["labels"].shape == (rows, length)
        assert 120 <= length <= 160
        assert rows == 400 // length
        learned = batch["labels"] != -100
        assert (batch["labels"] == batch["input_ids"])[learned].all()
        assert learned.any(dim=1).all()


def test_what_is_read_twice_is_learned_the_second_time(generated, words):
    batches = GeneratedBatches(generated(replace(STAGE, passkey=0.0, repeat=1.0)), words, 0)
    batch = batches[0]
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        first, again, second = words.decode(ids).partition(AGAIN)
        assert again
        assert words.decode([label for label in labels if label != -100]) == second
        assert first.startswith(second[:20])


def test_a_longer_row_than_the_batch_is_one_row(generated, words):
    stage = replace(STAGE, tokens=(500, 500))
    assert len(GeneratedBatches(generated(stage), words, 0)[0]["input_ids"]) == 1


def test_stages_have_their_own_wording_depth_and_hay(generated, words):
    plain = replace(
        STAGE, passkey=1.0, wordings=1, depth=(0.0, 0.0), hay=HayShares(same=1), steps=1
    )
    batches = GeneratedBatches(generated(plain, replace(STAGE, passkey=1.0)), words, 0)
    for ids in batches[0]["input_ids"]:
        text = words.decode(ids)
        assert text.lstrip().startswith("The pass key is ")
        assert "What is the pass key?" in text
        assert "The grass is green" in text
    assert batches.stage(0) is not batches.stage(1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": (20, 10)}, "tokens must be"),
        ({"distinct": (1, 4)}, "distinct must be"),
        ({"distinct": (4, 11)}, "distinct must be"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"passkey": 0.8, "repeat": 0.3}, "add up to at most 1, got 0.8 and 0.3"),
        ({"depth": (0.5, 1.5)}, r"depth must be \[least, most\] between 0 and 1"),
        ({"silent_hay": True, "ask": "borders"}, r"a told_weight of .* got 'borders' and 0.0"),
        ({"silent_hay": True, "told_weight": 1.0}, "needs ask: borders .* got 'end' and 1.0"),
        ({"gate_flips": 1.0}, "gate_flips must be at least 0 and less than 1, got 1.0"),
    ],
)
def test_impossible_stages(changes, said):
    with pytest.raises(ValueError, match=said):
        replace(STAGE, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"texts": 3}, "gates.texts must be at least 4, got 3"),
        ({"keep": 1.0}, "gates.keep must be between 0 and 1, got 1.0"),
        ({"sharpness": 0.0}, "gates.sharpness must be more than 0, got 0.0"),
        ({"ridge": 0.0}, "gates.ridge must be more than 0, got 0.0"),
        ({"first_layer": -1}, "gates.first_layer must be at least 0, got -1"),
        ({"keys": 0}, "gates.keys must be at least 1, got 0"),
        ({"fresh": 1.5}, "gates.fresh must be between 0 and 1, got 1.5"),
    ],
)
def test_impossible_gates(changes, said):
    with pytest.raises(ValueError, match=said):
        Gates(**changes)


def test_each_part_of_a_text_that_gates_are_fitted_to_says_a_key(generated, words):
    stage = replace(STAGE, keys=(2, 3), gates=Gates(texts=8, tokens=300, keys=3))
    texts = list(GeneratedBatches(generated(stage), words, 0).hidden_keys(0))
    assert [ids.shape for ids, _ in texts] == [(4, 300)] * 2
    for ids, said in texts:
        for row, places in zip(ids, said, strict=True):
            assert len(set(re.findall(r"\d{5}", words.decode(row)))) == 3  # no others
            assert [place.stop <= 100 * (i + 1) for i, place in enumerate(places)] == [True] * 3
            assert [place.start >= 100 * i for i, place in enumerate(places)] == [True] * 3
            for place in places:
                assert re.search(r"\d{5}", words.decode(row[place.start : place.stop]))


def test_parts_too_short_for_a_key(generated, words):
    stage = replace(STAGE, gates=Gates(tokens=100, keys=20))
    with pytest.raises(ValueError, match=r"stages\.0\.gates, for each of keys: tokens must be at"):
        GeneratedBatches(generated(stage), words, 0).check()


@pytest.mark.parametrize("shares", [{}, {"texts": -1.0, "code": 2.0}])
def test_hay_without_shares(shares):
    with pytest.raises(ValueError, match="hay must have shares of at least 0, and one of more"):
        HayShares(**shares)


def test_questions_on_the_way(generated, words):
    """The text holds the key and no question; the aside asks for it, once it has been said."""
    stage = replace(STAGE, passkey=1.0, ask="borders", depth=(0.0, 0.4), answer_weight=2.0)
    batches = GeneratedBatches(generated(stage), words, 0)
    for number in range(3):
        batch = collate([batches[number]])
        assert batch["aside_weight"].tolist() == [2.0]
        rows = zip(
            *(
                batch[name]
                for name in ("input_ids", "labels", "aside_ids", "aside_labels", "aside_since")
            ),
            strict=True,
        )
        for ids, labels, aside, answer, since in rows:
            learned = labels != -100
            assert 0.2 < learned.float().mean() < 0.3
            assert (labels == ids)[learned].all()
            assert not any(map(str.isdigit, words.decode(ids[learned])))
            told = aside[answer != -100]
            assert (aside[-len(told) :] == told).all()
            key = words.decode(told[:-1])
            assert key.isdecimal()
            assert key in words.decode(ids[:since])
            assert key not in words.decode(ids[since:])
            assert words.decode(aside).count(key) == 1


def test_chunks_without_the_key_are_to_say_the_end_of_a_text(generated, words):
    stage = replace(STAGE, passkey=1.0, ask="borders", told_weight=1.0)
    plain = GeneratedBatches(generated(stage), words, 0)[0]
    batch = GeneratedBatches(generated(replace(stage, silent_hay=True)), words, 0)[0]
    assert {name: batch.get(name) for name in plain} == plain
    assert set(batch) - set(plain) == {"told_since", "told_otherwise"}
    rows = (batch[n] for n in ("input_ids", "told_since", "told_until", "told_labels"))
    for ids, since, until, labels in zip(*rows, strict=True):
        assert words.decode(labels[:5]) in words.decode(ids[since:until])
        assert words.decode(labels[:5]) not in words.decode(ids[:since])
    slots = CometConfig().readout_tokens
    assert batch["told_otherwise"] == [[words.eos_token_id] * slots] * len(batch["input_ids"])
    words = deepcopy(words)
    words.eos_token = None
    with pytest.raises(ValueError, match=r"stages.0: .*silent_hay needs .* an eos_token"):
        GeneratedBatches(generated(replace(stage, silent_hay=True)), words, 0).check()


@pytest.mark.parametrize("kind", ["smollm2", "like gemma"])
def test_of_texts_all_but_digits_is_learned(generated, tmp_path, monkeypatch, kind):
    """However a vocabulary spells its bytes: neither accents nor ends of lines are digits."""
    (tmp_path / "text.txt").write_text("Así habló él.\nIt cost 1895 pounds, ó no, in May.\n" * 200)
    stage = replace(STAGE, passkey=1.0, ask="borders")
    settings = replace(generated(stage), texts=(str(tmp_path / "text.txt"),), code=())
    words = tokenizer(kind)
    monkeypatch.setattr(words, "chat_template", TEMPLATE)
    batches = GeneratedBatches(settings, words, 0)
    left = ""
    for number in range(3):
        for row, labels in zip(*(batches[number][n] for n in ("input_ids", "labels")), strict=True):
            places = [i for i, label in enumerate(labels) if label != -100]
            between = range(places[0], places[-1] + 1)
            left += words.decode([row[i] for i in between if labels[i] == -100])
    assert left
    assert left.replace(" ", "").isdecimal()


def test_a_question_and_the_text_before_it_fit_into_a_chunk(generated, words):
    stage = replace(STAGE, passkey=1.0, ask="borders", before_question=240)
    batches = GeneratedBatches(generated(stage), words, 0, CometConfig(chunk_size=96))
    widths = [len(ids) for number in range(20) for ids in batches[number]["aside_ids"]]
    assert 60 < max(widths) <= 96

"""Hay and passkey samples: exact lengths, keys where they belong, answers to learn."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.data.hay import (
    FileHay,
    FillerHay,
    MixedHay,
    NumberHay,
    PassageHay,
    StrewnHay,
    WordHay,
    encode,
)
from cometlm.data.passkey import PasskeyTask
from cometlm.data.wordings import MEASURING, TRAINING
from tests.real import tokenizer

PROSE = "The ship left the harbour in the rain. It carried salt, iron and two hundred letters.\n"


@pytest.fixture(scope="module")
def words():
    return tokenizer("smollm2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hay")
    (folder / "long.txt").write_text(PROSE * 100)
    (folder / "short.txt").write_text("Ein Fluß, ein Café. " * 10)
    (folder / "numbers.txt").write_text((PROSE + "It cost 1895 pounds, or 31122. ") * 50)
    (folder / "empty.txt").write_text("")
    return sorted(folder.iterdir())


def hays(words, files):
    own = [FileHay(words, files), WordHay(words), FillerHay(words), NumberHay(words)]
    return [*own, MixedHay(own, [1, 1, 1, 1]), StrewnHay(words, own[0]), PassageHay(words, files)]


@pytest.mark.parametrize("which", range(7))
@given(tokens=st.integers(0, 400), seed=st.integers(0, 5))
def test_hay_is_as_long_as_asked_and_drawn_from_its_generator_alone(
    which, words, files, tokens, seed
):
    hay = hays(words, files)[which]
    drawn = hay.draw(random.Random(seed), tokens)
    assert len(drawn) == tokens
    assert hay.draw(random.Random(seed), tokens) == drawn


@given(seed=st.integers(0, 100))
def test_numbers_are_strewn_in_and_the_text_goes_on(words, seed):
    cycle = encode(words, " alpha beta gamma delta epsilon zeta")
    hay = FillerHay(words, text=" alpha beta gamma delta epsilon zeta", anywhere=False)
    ids = StrewnHay(words, hay).draw(random.Random(seed), 1500)
    assert 3 <= len(re.findall(r"\d+", words.decode(ids))) <= 400
    own = [id_ for id_ in ids if id_ in cycle]
    assert len(own) > 300
    assert own == (cycle * 300)[: len(own)]


@given(seed=st.integers(0, 100))
def test_passages_around_numbers(words, files, seed):
    ids = PassageHay(words, files).draw(random.Random(seed), 2000)
    numbers = re.findall(r"\d+", words.decode(ids))
    assert len(numbers) > 2000 / 400
    assert {"1895", "31122"} & set(numbers)


def test_files_without_numbers(words, files):
    with pytest.raises(ValueError, match=r"long\.txt holds no number to draw from, nor do others"):
        PassageHay(words, [f for f in files if f.stem == "long"]).draw(random.Random(0), 10)


def test_a_draw_longer_than_its_file_goes_on_in_others(words, files):
    assert len(FileHay(words, files[-1:]).draw(random.Random(0), 2000)) == 2000


def test_a_file_that_is_no_text_ends_no_draw(words, tmp_path):
    (tmp_path / "data").write_bytes(b"\xff" * 1000)
    with pytest.raises(ValueError, match="data holds no text to draw from"):
        FileHay(words, [tmp_path / "data"]).draw(random.Random(0), 10)


def test_files_without_text_are_refused(words, files):
    with pytest.raises(ValueError, match="no text to draw from"):
        FileHay(words, files[:1])


@pytest.mark.parametrize("wording", [TRAINING, MEASURING], ids=["training", "measuring"])
@given(
    tokens=st.integers(200, 600),
    seed=st.integers(0, 1000),
    count=st.integers(1, 3),
    questions=st.integers(1, 3),
)
def test_samples(wording, words, tokens, seed, count, questions):
    task = PasskeyTask(
        words, FillerHay(words), wording, digits=(4, 6), keys=(1, count), questions=questions
    )
    sample = task.draw(random.Random(seed), tokens)
    assert len(sample.input_ids) == len(sample.labels) == tokens
    assert 4 <= len(sample.key) <= 6
    text = words.decode(sample.text)
    assert sample.key in text
    assert sample.prompt + sample.answer == sample.input_ids[: len(sample.prompt + sample.answer)]
    learned = [label for label in sample.labels if label != -100]
    assert learned == [id_ for _, answer in sample.turns for id_ in answer]
    assert words.decode(sample.answer) == sample.key + "<|im_end|>"
    for question, answer in sample.turns:
        asked = words.decode(question)
        assert asked.endswith("<|im_start|>assistant\n")
        assert words.decode(answer).removesuffix("<|im_end|>") in text
        assert sample.key not in asked
        assert "{" not in asked


@given(depth=st.floats(0, 1), seed=st.integers(0, 100))
def test_a_key_is_where_its_depth_says(words, depth, seed):
    task = PasskeyTask(words, WordHay(words))
    sample = task.draw(random.Random(seed), 700, depth=depth, key="31415")
    ids = sample.text
    digits = encode(words, "31415")
    places = [i for i in range(len(ids)) if ids[i : i + 5] == digits]
    assert places
    assert places[0] / len(ids) == pytest.approx(depth, abs=0.06)
    assert (sample.key, sample.depth) == ("31415", depth)


@given(few=st.integers(2, 9), more=st.integers(0, 7), seed=st.integers(0, 1000))
def test_keys_of_few_digits(words, few, more, seed):
    most = min(9, few + more)
    task = PasskeyTask(words, FillerHay(words), digits=(6, 9), distinct=(few, most))
    key = task.draw(random.Random(seed), 200).key
    assert 6 <= len(key) <= 9
    assert len(set(key)) <= most
    assert key[0] != "0"


def test_too_few_tokens_say_how_many_are_needed(words):
    task = PasskeyTask(words, FillerHay(words))
    with pytest.raises(ValueError, match=r"tokens must be at least (\d+) .* got 10") as caught:
        task.draw(random.Random(0), 10)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert len(task.draw(random.Random(0), least).input_ids) == least


def test_the_first_wordings_need_no_owner(words):
    few = TRAINING.first(2)
    assert (len(few.hidden), len(few.asked), len(few.whats)) == (2, 2, 2)
    assert TRAINING.first(None) is TRAINING
    task = PasskeyTask(words, FillerHay(words), TRAINING.first(1))
    texts = [words.decode(task.draw(random.Random(i), 200).input_ids) for i in range(9)]
    assert all("The pass key is" in text and "What is the pass key?" in text for text in texts)


def test_few_wordings_for_several_keys_come_with_owners(words):
    task = PasskeyTask(words, FillerHay(words), TRAINING.first(2, owned=True), keys=(1, 3))
    for seed in range(12):
        assert len(task.draw(random.Random(seed), 400).text) > 300


def test_what_is_measured_with_is_no_sentence_of_the_training():
    for name in ("hidden", "asked"):
        assert not set(getattr(TRAINING, name)) & set(getattr(MEASURING, name))
    said = " ".join((*TRAINING.hidden, *TRAINING.asked, *TRAINING.whats)).lower()
    for new in ("magic", "pin", "combination", "wall", "door", "hidden in"):
        assert new not in said

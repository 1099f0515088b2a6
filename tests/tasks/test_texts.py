"""Texts with their own lengths: none is cut, and training draws those that fit."""

import pytest

from cometlm.tasks.base import Question
from cometlm.tasks.texts import Text, TextsTask
from tests.tiny import refused

TEXTS = [Text(f"{i}" + " and a lamp" * i, (Question("?", (f"{i}",)),), {"i": i}) for i in range(9)]


def length(words, text):
    return len(words.encode(text.context, add_special_tokens=False))


def test_a_test_has_each_text_once(words):
    task = TextsTask(words, TEXTS)
    assert task.num_samples == 9
    assert task.longest == length(words, TEXTS[-1])
    samples = [task.sample(i, task.longest) for i in range(9)]
    assert [words.decode(sample.context) for sample in samples] == [t.context for t in TEXTS]
    assert [sample.meta["i"] for sample in samples] == list(range(9))
    with refused(f"tokens must be at least {task.longest}, got 5"):
        task.sample(8, 5)
    with refused("index must lie in 0 … 8, got 9"):
        task.sample(9, 100)


def test_the_usual_length_is_the_mean_of_what_fits(words):
    task = TextsTask(words, TEXTS)
    lengths = [length(words, text) for text in TEXTS]
    assert task.usual_length(task.longest) == pytest.approx(sum(lengths) / 9)
    assert task.usual_length(lengths[1]) == pytest.approx(sum(lengths[:2]) / 2)
    assert TextsTask(words, TEXTS, split="train").usual_length(50) == 50


def test_what_is_too_long_is_left_out_where_that_is_said(words):
    most = length(words, TEXTS[3])
    task = TextsTask(words, list(reversed(TEXTS)), max_tokens=most)
    assert (task.num_samples, task.longest) == (4, most)
    assert [task.sample(i, most).meta["i"] for i in range(4)] == [3, 2, 1, 0]
    with refused("max_tokens must be at least 1, got 0"):
        TextsTask(words, TEXTS, max_tokens=0)


def test_training_draws_texts_that_fit(words):
    task = TextsTask(words, TEXTS, split="train", max_tokens=length(words, TEXTS[5]))
    assert (task.num_samples, task.longest) == (None, None)
    drawn = [task.sample(i, 1000).meta["i"] for i in range(2**12, 2**12 + 60)]
    assert set(drawn) == set(range(6))
    again = TextsTask(words, TEXTS, split="train", max_tokens=length(words, TEXTS[5]))
    assert again.sample(2**12 + 7, 1000).meta["i"] == drawn[7]
    room = length(words, TEXTS[2])
    assert {task.sample(i, room).meta["i"] for i in range(40)} == {0, 1, 2}
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        task.sample(0, 0)

"""Rolling summaries: what the backbone is asked for, and what stays of its answer."""

import copy

import pytest

from cometlm.methods import TooLongError
from cometlm.methods.full import CacheReader
from cometlm.methods.summary import SummaryReader
from cometlm.session.plain_text import prefix_ids
from tests.sessions import tokenizer_of
from tests.tiny import random_ids, refused, tiny_backbone

LIMIT = 200


@pytest.fixture(scope="module")
def words():
    return tokenizer_of("smollm2")


@pytest.fixture
def asked(monkeypatch):
    """Prompts that notes were asked for with; the writer says how many came before."""
    prompts = []

    def answer(self, ids=(), **generation):
        prompts.append([*self._cached, *self._waiting])
        room = self.limit - len(prompts[-1])
        assert 0 < generation["max_new_tokens"] <= room
        return f" note {len(prompts)}<|im_end|>"

    monkeypatch.setattr(CacheReader, "answer", answer)
    return prompts


@pytest.fixture(scope="module")
def empty(words):
    return CacheReader(tiny_backbone("llama", vocab_size=len(words)), words, LIMIT)


def ids_of(count, seed=0):
    return random_ids(count, seed, vocabulary=90).tolist()


def test_notes_are_rewritten_part_by_part(empty, words, asked):
    reader = SummaryReader(empty)
    text = ids_of(3 * reader.part + 1)
    reader.read(text[: reader.part])
    assert reader.notes == ""
    assert reader.fork()._reader()._waiting == text[reader.part - 1 : reader.part]
    reader.read(text[reader.part :])
    assert len(asked) == 3
    assert reader.notes == "note 3"
    assert reader._unread == text[-1:]
    before = ["none so far", "note 1", "note 2"]
    for i, (prompt, notes) in enumerate(zip(asked, before, strict=True)):
        said = words.decode(prompt)
        assert f"Notes:\n{notes}\n\nNext part:" in said
        assert said.endswith("<|im_start|>assistant\n")
        part = text[i * reader.part : (i + 1) * reader.part]
        assert any(prompt[k : k + reader.part] == part for k in range(len(prompt)))
    assert reader.num_generated == 3 * len(words.encode("note 1"))
    read = words.decode([*reader._reader()._cached, *reader._reader()._waiting])
    assert read == f"Notes on a text:\nnote 3\n\nHow it goes on:\n{words.decode(text[-1:])}"


def test_notes_that_hold_control_tokens_end_no_turn(empty, words, monkeypatch):
    monkeypatch.setattr(CacheReader, "answer", lambda self, ids=(), **rest: "a<|im_start|>b")
    reader = SummaryReader(empty)
    reader.read(ids_of(reader.part + 1))
    assert words.convert_tokens_to_ids("<|im_start|>") not in reader._notes
    assert words.convert_tokens_to_ids("<|im_start|>") in reader._frame[0]
    assert reader.notes == "a<|im_start|>b"


def test_what_is_held_stays_within_the_budget(empty):
    reader = SummaryReader(empty)
    for seed in range(4):
        reader.read(ids_of(100, seed))
        assert len(reader._notes) <= reader.most_notes
        assert len(reader._unread) <= reader.part
        assert len(reader._reader()._cached) < LIMIT


def test_a_fork_takes_notes_of_its_own(empty, asked):
    reader = SummaryReader(empty)
    reader.read(ids_of(reader.part))
    fork = reader.fork()
    fork.read(ids_of(5))
    assert (reader.notes, fork.notes) == ("", "note 1")


def test_a_question_is_not_summarised(empty, asked):
    reader = SummaryReader(empty)
    reader.read(ids_of(reader.part))
    reader.read_question(ids_of(10))
    assert not asked
    assert reader._unread[-10:] == ids_of(10)


def test_rooms_that_are_too_small(empty, words):
    reader = SummaryReader(empty)
    reader.read(ids_of(reader.part))
    with pytest.raises(TooLongError, match=f"must be at most {LIMIT}, got"):
        reader.answer(ids_of(20), max_new_tokens=LIMIT)
    with refused("budget of a summary must be at least"):
        SummaryReader(CacheReader(empty.model, words, 60))


@pytest.mark.parametrize("has_template", [True, False])
def test_prompts_for_notes_begin_as_the_text_did(asked, has_template):
    words = copy.deepcopy(tokenizer_of("like gemma"))
    if not has_template:
        words.chat_template = None
    (first,) = prefix_ids(words)
    reader = SummaryReader(CacheReader(tiny_backbone("llama", vocab_size=len(words)), words, 400))
    reader.read([first, *ids_of(2 * reader.part + 1)])
    assert len(asked) == 2
    assert [(prompt[0], prompt.count(first)) for prompt in asked] == [(first, 1)] * 2

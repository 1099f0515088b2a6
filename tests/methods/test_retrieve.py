"""Retrieval: which passages are found, and what they hold."""

import pytest

from cometlm.methods import TooLongError
from cometlm.methods.full import CacheReader
from cometlm.methods.retrieve import Index, RetrieveReader, _joined
from cometlm.tasks.base import turn_ids
from tests.sessions import tokenizer_of
from tests.tiny import tiny_backbone

GREEDY = {"max_new_tokens": 6, "eos_token_id": None}
PAGES = [
    f"Page {i}: the wind blew from the sea and nobody came to the harbour. " for i in range(40)
]
NEEDLE = "The zebra Leopold weighs 4711 kilograms. "


@pytest.fixture(scope="module")
def words():
    return tokenizer_of("smollm2")


@pytest.fixture(scope="module")
def empty(words):
    return CacheReader(tiny_backbone("llama", vocab_size=len(words)), words, 120)


def ids_of(words, text):
    return words.encode(text, add_special_tokens=False)


@pytest.fixture
def reader(words, empty):
    reader = RetrieveReader(empty)
    reader.read(ids_of(words, "".join([*PAGES[:20], NEEDLE, *PAGES[20:]])))
    return reader


def prompt_of(words, reader, room=10):
    made = reader._prompted(room)
    return words.decode([*made._cached, *made._waiting])


def test_the_passage_that_has_the_answer_is_in_the_prompt_before_the_question(reader, words):
    asked, _ = turn_ids(words, "How much does Leopold weigh?")
    fork = reader.fork()
    fork.read_question(asked)
    prompt = prompt_of(words, fork)
    assert prompt.endswith(words.decode(asked))
    assert "Leopold weighs 4711" in prompt.removesuffix(words.decode(asked))
    assert len(ids_of(words, prompt)) <= 110
    assert fork._asked(asked) == "How much does Leopold weigh?"
    begun = [*asked, *ids_of(words, "He weighs")]
    assert fork._asked(begun) == "How much does Leopold weigh? He weighs"


def test_an_answer_is_that_of_the_plain_backbone_to_the_prompt(reader, words, empty):
    asked, _ = turn_ids(words, "Who is Leopold?")
    fork = reader.fork()
    fork.read_question(asked)
    made = fork._prompted(6)
    plain = empty.fork()
    plain.read([*made._cached, *made._waiting])
    assert reader.answer(asked, **GREEDY) == plain.answer(**GREEDY)
    assert fork.loglikelihood([5, 6, 7, 8, 9, 10]) == plain.loglikelihood([5, 6, 7, 8, 9, 10])


def test_without_a_question_the_end_is_gone_on_from(reader, words):
    assert prompt_of(words, reader).endswith(PAGES[-1])
    before = reader.fork()
    before.read_question(ids_of(words, NEEDLE))
    before.read(ids_of(words, PAGES[3]))  # what was a question is text now
    assert prompt_of(words, before).endswith(NEEDLE + PAGES[3])


def test_forks_share_until_they_read_on(reader, words):
    fork, other = reader.fork(), reader.fork()
    assert fork._ids is reader._ids
    size = reader._num_read
    fork.read(ids_of(words, PAGES[0]))
    other.read(ids_of(words, PAGES[1]))
    reader.read(ids_of(words, PAGES[2]))
    for one, page in ((fork, 0), (other, 1), (reader, 2)):
        assert words.decode(one._ids[size : one._num_read].tolist()) == PAGES[page]


def test_what_is_held_grows_with_the_text(reader, words):
    held = reader.nbytes
    assert held > 4 * reader._num_read
    assert held == reader.fork().nbytes
    reader.read(ids_of(words, "Quite other words, a parliament of owls. "))
    assert reader.nbytes > held


def test_a_question_that_does_not_fit(reader, words):
    with pytest.raises(TooLongError, match="fewer than 120, got 130"):
        reader.answer(ids_of(words, NEEDLE)[:4], max_new_tokens=126)


def test_ranks():
    spans = [range(i, i + 1) for i in range(4)]
    index = Index(spans, ["a lamp", "two lamps", "lamp lamp", ""])
    assert index.ranked("LAMP?")[0] == spans[2]
    assert index.ranked("nothing") == spans[::-1]
    assert index.ranked("") == spans[::-1]
    silent = Index(spans[:2], ["…", "a"])
    assert silent.ranked("lamp") == spans[1::-1]
    assert silent.nbytes == 0


def test_neighbours_stand_without_their_overlap():
    assert _joined([range(8, 12), range(0, 4), range(3, 7)]) == [range(7), range(8, 12)]
    assert _joined([range(4, 8), range(4)]) == [range(8)]

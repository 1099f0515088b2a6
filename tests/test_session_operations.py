"""Any operations on a session equal the reference, also answers that are broken off."""

import copy
import threading
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cometlm import Session
from cometlm.core.reference import reference_generate
from tests.sessions import (
    GREEDY,
    SIZES,
    TEXT,
    assert_same,
    model_of,
    reloaded,
    session_of,
    tokenizer_of,
)
from tests.tiny import examples, random_ids

pytestmark = pytest.mark.usefixtures("small_windows")


# --- any sequence of operations -----------------------------------------------------------------


class Mirror:
    """The ids that a session must have read: whole texts tokenised at once."""

    def __init__(self, tokenizer, overlap=0):
        self.tokenizer, self.overlap = tokenizer, overlap
        self.ids, self.segment, self.began, self.turns = [], "", False, 0
        self.ends = ()  # of chunks that ended early

    def now(self):
        return self.ids + self._segment_ids()

    def _segment_ids(self):
        if not self.segment:
            return []
        first = [] if self.began else self.tokenizer("")["input_ids"]
        return first + self._plain(self.segment)

    def _plain(self, given_text, control=False):
        """Control tokens in what is read or said are text; those of the frame count."""
        options = {"add_special_tokens": False, "split_special_tokens": not control}
        return self.tokenizer(given_text, **options)["input_ids"]

    def read_ids(self, ids):
        self.ids, self.segment = [*self.now(), *ids], ""
        self.began = True

    def ask_in_one_chunk(self, ids):
        """As the session promises: half a chunk stays open where ids and an eighth do not fit."""
        size = SIZES["chunk_size"]
        read, ends = self.read_with_overlaps()
        left = len(read) - (ends[-1] if ends else 0)
        room = size - len(ids) - size // 8
        if self.overlap <= room < left:
            stays = self.overlap if left == size else max(self.overlap, min(room, size // 2))
            self.ends = (*self.ends, len(self.now()) - stays + self.overlap)
        self.read_ids(ids)

    def read_with_overlaps(self):
        """The ids in the order in which they are read, and where among those chunks end."""
        ids, early = self.now(), list(self.ends)
        read, ends, begin, again = [], [], 0, 0
        while True:
            end = begin + SIZES["chunk_size"] - again
            if early and early[0] <= end:
                end = early.pop(0)
            elif len(ids) <= end:
                return read + ids[begin - again :], ends
            read += ids[begin - again : end]
            ends.append(len(read))
            begin, again = end, self.overlap

    def opening(self, message):
        head = self._plain("<|im_start|>", control=True) + self._plain(f"user\n{message}")
        return head + self._plain("<|im_end|>\n<|im_start|>assistant\n", control=True)

    def closing(self, answer):
        ids = self._plain("<|im_end|>\n", control=True)
        return ids[1:] if answer[-1] == ids[0] else ids

    def fork(self):
        return copy.copy(self)


def following(model, mirror, count):
    with torch.no_grad():
        ids, ends = mirror.read_with_overlaps()
        return reference_generate(model, torch.tensor(ids), count, ends)


PIECES = st.builds(
    lambda begin, length: TEXT[begin : begin + length],
    st.integers(0, len(TEXT)),
    st.integers(0, 70),
)
IDS = st.lists(st.integers(0, 95), max_size=15)
OPERATIONS = st.one_of(
    st.tuples(st.just("text"), PIECES, st.lists(st.integers(0, 70), max_size=4)),
    st.tuples(st.just("ids"), IDS, st.sampled_from([list, tuple, iter])),
    st.tuples(st.just("tensor"), IDS.filter(len)),
    st.tuples(st.just("ask"), PIECES, st.booleans(), st.integers(1, 4)),
    st.tuples(st.just("chat"), PIECES, st.booleans(), st.integers(1, 4)),
    st.tuples(st.just("fork")),
    st.tuples(st.just("save")),
)


def apply(operation, session, mirror, path):
    """One operation on a session and its mirror; gives the sessions that it makes."""
    model, tokenizer = session.model, session.tokenizer
    match operation:
        case "text", piece, borders:
            ends = [0, *sorted(min(border, len(piece)) for border in borders), len(piece)]
            for begin, end in pairwise(ends):
                session.read(piece[begin:end])
            mirror.segment += piece
        case "ids", ids, kind:
            session.read(kind(ids))
            if ids:
                mirror.read_ids(ids)
        case "tensor", ids:
            session.read(torch.tensor(ids))
            mirror.read_ids(ids)
        case "ask", prompt, template, count:
            asked = mirror.fork()
            if template:
                asked.ask_in_one_chunk(asked.opening(prompt))
            else:
                asked.segment += prompt
            if not asked.now():
                with pytest.raises(ValueError, match="nothing was read"):
                    session.ask(prompt, template=template)
                return []
            answer = session.ask(prompt, template=template, max_new_tokens=count, **GREEDY)
            ids = following(model, asked, count)
            assert answer == tokenizer.decode(ids, skip_special_tokens=True)
        case "chat", message, stream, count:
            pieces = session.chat(message, stream=stream, max_new_tokens=count, **GREEDY)
            written = "".join(pieces)
            mirror.ask_in_one_chunk(mirror.opening(message))
            ids = following(model, mirror, count)
            assert written == tokenizer.decode(ids, skip_special_tokens=True)
            mirror.read_ids([*ids, *mirror.closing(ids)])
        case ("fork",):
            return [(session.fork(), mirror.fork())]
        case ("save",):
            return [(reloaded(session, path), mirror.fork())]
    assert session.stats().tokens == len(mirror.now())
    return []


@pytest.mark.parametrize(("kind", "count"), [("llama", 12), ("overlap", 12), ("like gemma", 24)])
def test_any_operations_equal_the_reference(kind, count, tmp_path_factory):
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    path = tmp_path_factory.mktemp("sessions") / "s"

    @examples(count)
    @given(st.lists(st.tuples(st.integers(0, 9), OPERATIONS), min_size=2, max_size=9))
    def run(operations):
        overlap = model.config.comet_config.overlap
        pairs = [(Session(model, tokenizer), Mirror(tokenizer, overlap))]
        for who, operation in operations:
            pairs += apply(operation, *pairs[who % len(pairs)], path)
        for session, mirror in pairs:
            assert session.stats().tokens == len(mirror.now())
            if mirror.now():
                assert session.continuation(3) == following(model, mirror, 3)

    run()


@pytest.mark.parametrize("nothing", ["", [], (), torch.tensor([], dtype=torch.long)], ids=repr)
def test_reading_nothing_changes_nothing(nothing):
    session, want = session_of("like gemma"), session_of("like gemma")
    for piece in (TEXT[:50], TEXT[50:99]):
        session.read(nothing)
        session.read(piece)
        want.read(piece)
    assert_same(session, want)


# --- answers that are broken off, and wrong arguments -------------------------------------------


@pytest.fixture
def session():
    session = session_of()
    session.read(TEXT[:300])
    return session


def mirror_of(session):
    mirror = Mirror(session.tokenizer)
    mirror.segment = TEXT[:300]
    return mirror


class Counting(LogitsProcessor):
    """Counts the tokens written; may raise at one of them."""

    def __init__(self, fail_at=None, pause=0.0):
        self.count, self.fail_at, self.pause = 0, fail_at, pause

    def __call__(self, input_ids, scores):
        if self.count == self.fail_at:
            raise RuntimeError("the lamp went out")
        self.count += 1
        time.sleep(self.pause)
        return scores


def options(counting, count):
    return {"logits_processor": LogitsProcessorList([counting]), "max_new_tokens": count, **GREEDY}


def settled(session):
    """The session, with the chunks run that a question would run in it."""
    list(session.settle())
    return session


def test_an_answer_that_nobody_listens_to_ends(session):
    want, threads, counting = settled(session).fork(), threading.active_count(), Counting()
    pieces = session.ask("Why?", stream=True, **options(counting, 5000))
    assert next(pieces)
    pieces.close()
    assert threading.active_count() == threads
    assert counting.count < 1000
    assert_same(session, want)


def test_a_stream_that_is_never_begun_does_nothing(session):
    want, threads = settled(session).fork(), threading.active_count()
    session.ask("Why?", stream=True)
    session.chat("Why?", stream=True)
    assert threading.active_count() == threads
    assert_same(session, want)


def test_a_chat_that_is_broken_off_keeps_what_was_written(session):
    mirror, threads, counting = mirror_of(session), threading.active_count(), Counting()
    pieces = session.chat("Why?", stream=True, **options(counting, 5000))
    assert next(pieces)
    pieces.close()
    assert threading.active_count() == threads
    assert 0 < counting.count < 1000
    mirror.ask_in_one_chunk(mirror.opening("Why?"))
    written = session.stats().tokens - len(mirror.now()) - len(mirror.closing([0]))
    assert 0 < written <= counting.count
    answer = going_on_from(mirror, session.model, written)
    mirror.read_ids([*answer, *mirror.closing(answer)])
    assert session.continuation(3) == following(session.model, mirror, 3)
    # and the next turn is a second one
    assert session.chat("And then?", max_new_tokens=2, **GREEDY)
    assert session.stats().tokens > len(mirror.now())


def going_on_from(mirror, model, count):
    """Greedy ids after the mirror's; by the model, since the reference is slow for many."""
    session, ids = Session(model), mirror.now()
    for begin, end in pairwise([0, *mirror.ends, len(ids)]):
        if begin:  # a chunk ends here
            session._fold(session.open_tokens)
        session.read(ids[begin:end])
    return session.continuation(count)


@pytest.mark.parametrize("verb", ["ask", "chat"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_reaches_the_caller(session, verb, stream):
    want, threads = settled(session).fork(), threading.active_count()
    with pytest.raises(RuntimeError, match="the lamp went out"):
        "".join(getattr(session, verb)("Why?", stream=stream, **options(Counting(0), 50)))
    assert threading.active_count() == threads
    assert_same(session, want)


def test_an_error_in_the_middle_of_a_chat_keeps_what_was_written(session):
    mirror = mirror_of(session)
    with pytest.raises(RuntimeError, match="the lamp went out"):
        "".join(session.chat("Why?", stream=True, **options(Counting(7), 50)))
    mirror.ask_in_one_chunk(mirror.opening("Why?"))
    answer = going_on_from(mirror, session.model, 7)
    mirror.read_ids([*answer, *mirror.closing(answer)])
    assert session.stats().tokens == len(mirror.now())
    assert session.continuation(3) == following(session.model, mirror, 3)


@pytest.mark.parametrize("verb", ["ask", "chat"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "wrong_options",
    [
        {"no_such_option": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
        {"max_new_tokens": 0},
        {"max_new_tokens": -3},
        {"temperature": -1.0, "do_sample": True},
        {"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)},
    ],
    ids=str,
)
def test_wrong_generation_options_are_refused(session, verb, stream, wrong_options):
    want = settled(session).fork()
    with pytest.raises(ValueError, match=r"\w"):
        "".join(getattr(session, verb)("Why?", stream=stream, **wrong_options))
    assert_same(session, want)


def test_an_empty_prompt_before_reading_is_refused():
    with pytest.raises(ValueError, match="nothing was read and the prompt is empty"):
        session_of().ask("", template=False)


def test_an_empty_prompt_goes_on(session):
    answer = session.ask("", template=False, max_new_tokens=5, **GREEDY)
    assert answer == session.tokenizer.decode(session.continuation(5), skip_special_tokens=True)


@pytest.mark.parametrize("wrong_ids", [[-1], [5, 10**6], torch.tensor([[3, -7]]), [2**70]])
def test_ids_out_of_range_are_refused_and_nothing_is_lost(session, wrong_ids):
    want = session.fork()
    with pytest.raises(ValueError, match="token ids must lie in 0 … 4915"):
        session.read(wrong_ids)
    assert_same(session, want)


def test_text_that_no_tokenizer_takes_is_refused_and_nothing_is_lost(session):
    """Half a character, as decoding with surrogateescape makes of foreign bytes."""
    want = settled(session).fork()
    for verb in (session.read, session.ask, session.chat):
        with pytest.raises(ValueError, match=r"surrogate|UTF-8|utf-8"):
            verb("a lone \udcff surrogate")
    assert_same(session, want)


def test_without_a_tokenizer_ids_work_and_text_does_not(small, tmp_path):
    session = Session(small)
    session.read(random_ids(30))
    with pytest.raises(ValueError, match="no tokenizer"):
        session.read("text")
    with pytest.raises(ValueError, match="no tokenizer"):
        session.ask("text")
    with pytest.raises(ValueError, match=r"template|tokenizer"):
        session.chat("text")
    assert session.continuation(5) == reference_generate(small, random_ids(30), 5)
    assert_same(reloaded(session, tmp_path / "s"), session)


def test_reading_in_a_fork_leaves_the_session(session):
    want = session_of()
    want.read(TEXT[:300])
    fork = session.fork()
    fork.read(TEXT)
    fork.chat("Why?", max_new_tokens=3)
    assert_same(session, want)
    assert fork.stats().tokens > session.stats().tokens

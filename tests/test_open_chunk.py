"""What an answer has run of the open chunk is not run again, and changes nothing that is said."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cometlm.session import session as session_module
from cometlm.session.writer import Sampling, Writer, advance
from tests.sessions import GREEDY, TEXT, assert_same, session_of

KINDS = ["llama", "overlap", "like gemma"]
SIZE = 12  # of a chunk there


@pytest.fixture(autouse=True, scope="module")
def a_few_tokens_are_worth_running():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "_WORTH_RUNNING", 1)
        yield


@contextlib.contextmanager
def tokens_run(session):
    """How many tokens each call of the model is given."""
    counts = []
    hook = session.model.model.register_forward_pre_hook(
        lambda module, given, named: counts.append((given or [named["input_ids"]])[0].numel()),
        with_kwargs=True,
    )
    try:
        yield counts
    finally:
        hook.remove()


def with_open(kind, count):
    """A session with so many tokens in its open chunk, and others in its memory."""
    session = session_of(kind)
    overlap = session.model.config.comet_config.overlap
    session.read([3 + i % 40 for i in range(2 * (SIZE - overlap) + overlap + count)])
    assert session.open_tokens == count + overlap
    return session


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_answer_runs_what_is_new(kind):
    session = with_open(kind, 4)
    session.prepare()
    fork, apart = session.fork(), session.fork()
    apart.release()
    for one, expected in ((fork, 2), (apart, session.open_tokens + 2)):
        one.read([11, 12])
        with tokens_run(one) as counts:
            one.begin_answer()
        assert counts == [expected]
    (_, logits), (_, anew) = fork.begin_answer(), apart.begin_answer()
    torch.testing.assert_close(logits, anew, rtol=1e-9, atol=1e-9)


def test_what_was_said_is_not_run_again():
    session = session_of()
    with tokens_run(session) as counts:
        session.ask("x", template=False, max_new_tokens=2, **GREEDY)  # nothing to prepare
        session.read(list(range(3, 7)))
        session.ask("x", template=False, max_new_tokens=2, **GREEDY)
        session.ask("x", template=False, max_new_tokens=2, **GREEDY)
    question = counts[0]
    assert counts == [question, 1, 4, question, 1, question, 1]


@pytest.mark.parametrize("static", [{}, {"cache_implementation": "static"}], ids=str)
def test_a_conversation_is_said_alike_with_and_without(static):
    """Over several chunks, at their borders too; memory is the same to the bit."""
    one, other = session_of(), session_of()
    for number in range(6):
        options = {"max_new_tokens": 3 + number, **GREEDY, **static}
        said = one.chat("a" * number, **options)
        other.release()
        assert other.chat("a" * number, **options) == said
        other.release()
        one.fork().release()  # of a fork
    one.release()
    assert_same(one, other)


@settings(max_examples=20, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["read", "ask", "chat", "prepare", "fork"]), st.integers(1, 14)),
        max_size=8,
    ),
    kind=st.sampled_from(KINDS),
)
def test_whatever_is_done_in_between(steps, kind):
    ours, plain = session_of(kind), session_of(kind)
    for action, count in steps:
        plain.release()
        said = []
        for session in (ours, plain):
            if action == "read":
                session.read([3 + (i * count) % 40 for i in range(count)])
            elif action == "ask":
                said.append(session.ask("Who?", max_new_tokens=count, **GREEDY))
            elif action == "chat":
                said.append(session.chat("Who?", max_new_tokens=count, **GREEDY))
        if action == "prepare":
            ours.prepare()
        elif action == "fork":
            ours = ours.fork()
        assert len(set(said)) <= 1
    ours.release()
    plain.release()
    assert_same(ours, plain)


def test_a_fork_that_has_lost_a_part_of_its_memory_does_not_use_it():
    session = with_open("llama", 4)
    session.prepare()
    lacking = session.fork(without=["temporary"])
    apart = session.fork(without=["temporary"])
    apart.release()
    assert torch.equal(lacking.begin_answer()[1], apart.begin_answer()[1])
    assert not torch.equal(lacking.begin_answer()[1], session.begin_answer()[1])


def test_a_writers_row_is_taken_over():
    """Of a batch, in which another answer is written."""
    session = with_open("llama", 3)
    cache, logits = session.begin_answer()
    writers = [
        Writer(cache, logits, Sampling(seed=1), most=5, stream=stream) for stream in range(2)
    ]
    for _ in range(4):
        for writer in writers:
            writer.take()
        advance(session.model, writers)
    for writer in writers:
        writer.take()  # which is the last, and is not run
        after = session.fork()
        after.take_over(writer.past, writer.ids)
        after.read(writer.ids)
        apart = after.fork()
        apart.release()
        with tokens_run(after) as counts:
            logits = after.begin_answer()[1]
        assert counts == [1]
        torch.testing.assert_close(logits, apart.begin_answer()[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "question", "ready"),
    [(0, 2, True), (3, 2, True), (0, 8, False), (9, 0, False), (0, 40, False)],
)
def test_how_many_tokens_need_not_be_run(text, question, ready):
    session = with_open("llama", 4)
    in_memory = session.stats().tokens - session.open_tokens
    assert session.num_ready(text, question) == in_memory
    session.prepare()
    assert session.num_ready(text, question) == in_memory + (4 if ready else 0)
    fork = session.fork()
    fork.read([5] * text)
    fork.ask_in_one_chunk([6] * question)
    with tokens_run(fork) as counts:
        fork.begin_answer()
    if ready:
        assert counts == [text + question]


def test_what_is_held_of_it_is_counted_and_given_up():
    session = with_open("llama", 4)
    before = session.stats()
    assert before.open_bytes == 0
    session.prepare()
    held = session.stats()
    assert held.memory_bytes == before.memory_bytes
    assert held.open_bytes > 0
    session.release()
    assert session.stats().open_bytes == 0
    session.prepare()
    session.read([5] * 3 * SIZE)  # the chunk is folded
    assert session.stats().open_bytes == 0


def test_asking_runs_the_chunks_of_text_whose_tokens_are_known():
    """`read` collects some pages before it tokenises them; each question would run them again."""
    session, want = session_of(), session_of()
    for one in (session, want):
        one.read(TEXT * 6)
    assert session.stats().chunks == 0
    with tokens_run(session) as first:
        said = session.ask("Who?", max_new_tokens=3, **GREEDY)
    with tokens_run(session) as second:
        assert session.ask("Who?", max_new_tokens=3, **GREEDY) == said
    assert sum(second) < sum(first) / 3
    assert session.stats().chunks > 0
    for one in (session, want):
        one.read(TEXT)
        list(one.finish())
    assert_same(session, want)


def test_a_short_open_chunk_is_not_prepared(monkeypatch):
    monkeypatch.setattr(session_module, "_WORTH_RUNNING", 64)
    session = with_open("llama", 4)
    session.prepare()
    assert session.stats().open_bytes == 0


def test_it_is_not_saved(tmp_path):
    session = session_of()
    session.read(TEXT[:300])
    session.save(tmp_path / "before")
    session.prepare()
    session.save(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()

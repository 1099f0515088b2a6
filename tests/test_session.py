"""A session reads text however it is cut, in constant memory, and says what comes next."""

import io
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cometlm import Session
from cometlm.core.reference import reference_generate
from tests import real
from tests.sessions import assert_same, going_on
from tests.tiny import random_ids, tiny_comet

pytestmark = pytest.mark.usefixtures("small_windows")

TEXT = "".join(
    f"On day {i} the keeper of the lamp wrote: <|im_start|> wind {i * 37 % 100}, naïve ☂️ sea.\n"
    for i in range(12)
)
FAMILIES = ["llama", "gemma3_text"]  # one that packs its entries, one with windows


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return real.tiny_comet(request.param)


def session_of(model, *sources, finish=True):
    session = Session(model, real.tokenizer("smollm2"))
    for source in sources:
        session.read(source)
    if finish:
        list(session.finish())
    return session


def ids_of(given_text):
    """What a session reads: control tokens in a text are spelled."""
    encoded = real.tokenizer("smollm2")(given_text, split_special_tokens=True)
    return torch.tensor(encoded["input_ids"])


@pytest.fixture(scope="module")
def whole(model):
    return session_of(model, TEXT)


@settings(max_examples=10)
@given(borders=st.lists(st.integers(0, len(TEXT)), max_size=20))
def test_any_split_into_reads_equals_one_read(model, whole, borders):
    ends = [0, *sorted(borders), len(TEXT)]
    pieces = [TEXT[a:b] for a, b in pairwise(ends)]
    assert_same(session_of(model, *pieces), whole)


def test_files_and_iterables_are_read_like_strings(model, whole, tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(TEXT, encoding="utf-8")
    with path.open(encoding="utf-8") as file:
        assert_same(session_of(model, file), whole)
    assert_same(session_of(model, io.StringIO(TEXT)), whole)
    assert_same(session_of(model, TEXT.splitlines(keepends=True)), whole)
    assert_same(session_of(model, (letter for letter in TEXT)), whole)
    assert_same(session_of(model, TEXT[:100], io.StringIO(TEXT[100:300]), [TEXT[300:]]), whole)


def test_a_file_that_is_not_text_is_refused_by_name(model, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\0\0")
    with path.open(encoding="utf-8") as file, pytest.raises(ValueError, match=r"picture\.png"):
        session_of(model, file)


def test_stats_count_what_was_read(model):
    count = len(ids_of(TEXT))
    session = session_of(model)
    assert (session.stats().tokens, session.stats().chunks) == (0, 0)
    assert session.stats().memory_bytes == 0
    session = session_of(model, TEXT)
    # A full chunk is folded only when more text follows.
    assert (session.stats().tokens, session.stats().chunks) == (count, (count - 1) // 12)
    assert session.stats().memory_bytes > 0


def test_reading_gives_the_stats_after_every_chunk(model):
    session = session_of(model, finish=False)
    seen = [*session.reading(TEXT), *session.finish()]
    assert [stats.chunks for stats in seen] == list(range(1, len(seen) + 1))
    assert [stats.tokens for stats in seen] == [12 * stats.chunks for stats in seen]
    assert len(seen) == session.stats().chunks
    assert 12 * len(seen) < session.stats().tokens <= 12 * len(seen) + 12


def test_reading_that_is_broken_off_can_go_on(model, whole):
    session = session_of(model, finish=False)
    texts = iter(TEXT.splitlines(keepends=True))
    list(islice(session.reading(texts), 7))
    seen = session.stats().tokens
    assert 0 < seen < whole.stats().tokens
    session.read(texts)
    list(session.finish())
    assert_same(session, whole)


def test_memory_is_constant_once_it_is_full(model):
    """Whatever is read: nothing else grows but the counts."""
    session = session_of(model, finish=False)
    held = [stats.memory_bytes for stats in session.reading(TEXT * 4)]
    assert len(held) > 50
    assert len(set(held[2:])) == 1  # 3 entries a chunk fill 5 slots at the second fold


@pytest.mark.parametrize("length", [1, 5, 12, 13, 40])
def test_continuation_is_the_argmax_of_full_forwards(model, length):
    """Across chunk borders, and from chunks that are open, full or just begun."""
    tokenizer = real.tokenizer("smollm2")
    given_text = tokenizer.decode(ids_of(TEXT)[:length])
    ids = ids_of(given_text)
    assert len(ids) == length
    session = session_of(model, given_text)
    assert session.continuation(15) == reference_generate(model, ids, 15)


def test_continuation_leaves_the_session_as_it_was(model, whole):
    session = session_of(model, TEXT[:400], finish=False)
    before = session.stats()
    session.continuation(15)
    assert session.stats() == before
    session.read(TEXT[400:])
    list(session.finish())
    assert_same(session, whole)


def test_sessions_of_one_model_do_not_disturb_each_other(model, whole):
    first, second = (session_of(model, finish=False) for _ in range(2))
    for line in TEXT.splitlines(keepends=True):
        first.read(line)
        second.read(line.upper())
    list(first.finish())
    assert_same(first, whole)


def test_continuation_before_reading_is_refused(model):
    with pytest.raises(ValueError, match="nothing was read"):
        session_of(model).continuation(1)


def test_suppressed_tokens_are_never_chosen(model, whole, monkeypatch):
    likeliest = whole.continuation(1)[0]
    monkeypatch.setattr(model.config, "suppressed_tokens", [likeliest])
    ids = whole.continuation(5)
    assert likeliest not in ids
    assert ids == reference_generate(model, ids_of(TEXT), 5)


def test_a_memory_that_stops_being_finite_loses_nothing(model):
    """What was read before is kept, and reading can go on from there."""
    session = session_of(model, TEXT)
    before = session.stats()
    weight = model.model.comet.layers[1].global_memory.norm.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="layer 1"):
        session.read(TEXT)
    with torch.no_grad():
        weight.copy_(good)
    assert session.stats().chunks == before.chunks
    assert session.stats().tokens >= before.tokens
    assert torch.isfinite(going_on(session)[1]).all()


@settings(max_examples=15)
@given(before=st.integers(1, 40), question=st.integers(1, 15))
def test_a_posed_question_is_never_cut(model, before, question):
    """The chunk that is open ends before it, if and only if the question would not fit."""
    ids = ids_of(TEXT).tolist()
    text, asked = ids[:before], ids[before : before + question]
    session = session_of(model, text)
    session.ask_in_one_chunk(asked)
    room = 12 // 8  # of a chunk of 12
    left = (before - 1) % 12 + 1
    stays = min(12 - question - room, 6 if left < 12 else 0)  # half a chunk
    cut_early = 12 - question - room >= 0 and left > 12 - question - room
    assert session.stats().chunks == (before - 1) // 12 + cut_early + (
        0 if question + room <= 12 else (left + question - 1) // 12
    )
    cuts = [12] * ((before - 1) // 12) + [left - stays] if cut_early else []
    if cut_early:
        text, asked = text[: before - stays], text[before - stays :] + asked
        read = model.model(torch.tensor([text]), chunk_lengths=[cuts], close_last=True)
        cache = read.past_key_values
        with torch.no_grad():
            wanted = model(torch.tensor([asked]), past_key_values=cache, logits_to_keep=1).logits
        _, logits = going_on(session, count=1)
        torch.testing.assert_close(logits, wanted[0], rtol=0, atol=1e-9)
    else:
        assert_same(session, session_of(model, text, asked))


def test_asking_poses_the_question(model):
    text = ids_of(TEXT).tolist()[:23]
    session = session_of(model, text)
    posed = session.fork()
    posed.ask_in_one_chunk(session._turn("When?").opening_ids)
    assert session.ask("When?", max_new_tokens=4) == session._decode(posed.continuation(4))
    assert_same(session, session_of(model, text))


@pytest.mark.parametrize("before", [2, 9, 11])
def test_a_session_whose_chunk_ended_early_is_kept(model, before, tmp_path):
    """Also before its memory is full: fewer entries than whole chunks leave."""
    ids = ids_of(TEXT).tolist()
    session = session_of(model, ids[:before])
    session.ask_in_one_chunk(ids[before : before + 10])
    session.save(tmp_path / "early.comet")
    loaded = Session.load(tmp_path / "early.comet", model, real.tokenizer("smollm2"))
    assert loaded.stats().tokens == before + 10
    assert_same(loaded, session)
    for one in (loaded, session):
        one.read(ids[:30])
    assert_same(loaded, session)


def test_the_end_of_a_chunk_is_read_again_at_the_beginning_of_the_next():
    """As the same tokens read so by hand; each counts once, and a fold keeps the overlap open."""
    plain, twice = tiny_comet("llama"), tiny_comet("llama", overlap=4)
    ids = random_ids(40).tolist()
    session, by_hand = Session(twice), Session(plain)
    folded = [(stats.tokens, stats.chunks) for stats in session.reading(ids)]
    by_hand.read([*ids[:12], *ids[8:20], *ids[16:28], *ids[24:36], *ids[32:]])
    assert folded == [(12, 1), (20, 2), (28, 3), (36, 4)]
    assert session.stats().tokens == 40
    assert session.continuation(4) == by_hand.continuation(4)

"""What a memory is made of, beside what its gates were applied to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cometlm import CometConfig
from cometlm.core.layout import RowCounts
from cometlm.inspection import Entry, History, InspectedSession, SeenChunk, history
from cometlm.inspection.history import TokenLog
from tests.tiny import examples, random_ids, tiny_comet

SIZES = CometConfig(chunk_size=10, readout_tokens=3, stride=4, capacity=5)


def test_shares_rebuild_the_state():
    """A slot is the sum of all candidates, each by its share."""
    model = tiny_comet("llama")
    candidates = []
    hook = model.model.comet.layers[1].global_memory.norm.register_forward_hook(
        lambda m, given, out: candidates.append(out[0])
    )
    session = InspectedSession(model)
    session.read(random_ids(12 * 5 + 1))
    hook.remove()
    shares = session.history.shares[1].double()  # [M, T]
    made = torch.einsum("mt,tmd->md", shares, torch.stack(candidates))
    torch.testing.assert_close(made, session._cache.layers[1].memory.state[0], rtol=1e-5, atol=1e-6)


@st.composite
def readings(draw):
    """Chunks with any gates; each begins in the one before it."""
    lengths = draw(st.lists(st.integers(3, 10), min_size=1, max_size=12))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    begin, chunks = 0, []
    for i, length in enumerate(lengths):
        gates = torch.rand(2, 3, generator=generator) if i else torch.zeros(2, 3)
        masses = torch.rand(2, 4, 4, generator=generator)
        chunks.append(SeenChunk(begin, begin + length, gates, masses))
        begin += length - draw(st.integers(0, 2))
    return chunks


def after(chunks):
    found = History.empty(2, 3)
    for chunk in chunks:
        found = found.after(chunk, SIZES)
    return found


@examples(60)
@given(readings())
def test_shares_and_ages(chunks):
    found = after(chunks)
    torch.testing.assert_close(found.shares.sum(-1), torch.ones(2, 3))
    distances = torch.tensor([float(chunks[-1].end - one.end) for one in chunks])
    torch.testing.assert_close(found.ages, found.shares @ distances, rtol=1e-4, atol=1e-4)
    assert found.chunks == len(chunks)
    assert found.end == chunks[-1].end


@examples(60)
@given(readings())
def test_passages_are_sums_of_chunks(chunks):
    """However few are kept."""
    fine = after(chunks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "MOST_PASSAGES", 4)
        coarse = after(chunks)
    assert len(coarse.passages) <= 4
    assert len({one.count for one in coarse.passages[:-1]}) <= 1
    assert sum(one.count for one in coarse.passages) == len(chunks)
    for i, one in enumerate(coarse.passages):
        part = slice(one.first, one.first + one.count)
        torch.testing.assert_close(coarse.shares[..., i], fine.shares[..., part].sum(-1))
        gates = torch.stack([chunk.gates for chunk in chunks[part]])
        torch.testing.assert_close(one.gates, gates.mean(0))
        assert (one.begin, one.end) == (chunks[part][0].begin, chunks[part][-1].end)
    torch.testing.assert_close(coarse.ages, fine.ages)
    assert coarse.entries == fine.entries


@examples(60)
@given(readings())
def test_entries_are_the_last_stretches(chunks):
    stretches = [
        Entry(i, start, min(start + 4, one.end))
        for i, one in enumerate(chunks)
        for start in range(one.begin, one.end, 4)
    ]
    found = after(chunks)
    assert list(found.entries) == stretches[-5:]
    for entry in found.entries:
        assert found.passage_of(entry) == entry.chunk


@pytest.mark.parametrize("overlap", [0, 3])
def test_a_saved_sessions_entries_are_known_where_its_chunks_are_full(overlap, tmp_path):
    model = tiny_comet("llama", overlap=overlap, capacity=8)
    session = InspectedSession(model)
    for count in (5, 8, 40, 3):
        session.read(random_ids(count))
        session.save(tmp_path / "s")
        loaded = InspectedSession.load(tmp_path / "s", model)
        assert loaded.history.entries == session.history.entries
        assert (loaded.history.end, loaded.history.chunks) == (
            session.history.end,
            session.history.chunks,
        )
        assert loaded.history.ages.isnan().all() or not session.history.chunks
    session._fold(7)  # as a question does that would not fit
    session.read(random_ids(1))
    session.save(tmp_path / "s")
    assert set(InspectedSession.load(tmp_path / "s", model).history.entries) == {None}


def test_a_loaded_session_knows_what_it_reads_itself(tmp_path):
    model = tiny_comet("llama")
    session = InspectedSession(model)
    session.read(random_ids(30))
    session.save(tmp_path / "s")
    whole, loaded = session, InspectedSession.load(tmp_path / "s", model)
    for one in (whole, loaded):
        one.read(random_ids(30, seed=1))
    known = loaded.history.shares[..., 1:]
    torch.testing.assert_close(known, whole.history.shares[..., 2:])
    ages = [one.history.ages for one in (loaded, whole)]
    assert ages[0].isnan().all()
    assert not ages[1].isnan().any()
    assert loaded.token_ids(20, 40) == whole.token_ids(24, 40)  # it was given what follows 24


def test_what_nobody_looked_on_at_stays_apart():
    found = History.unseen(2, 4, RowCounts(folds=50, tokens=500), SIZES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "MOST_PASSAGES", 4)
        for i in range(9):
            begin, gates = 500 + 10 * i, torch.full((2, 3), 0.5)
            found = found.after(SeenChunk(begin, begin + 10, gates, torch.zeros(2, 4, 4)), SIZES)
    assert [one.count for one in found.passages] == [50, 4, 4, 1]
    torch.testing.assert_close(found.shares[0, 0, 0], torch.tensor(0.5**9))


def test_without_gates_nothing_unknown_is_left():
    row = InspectedSession(tiny_comet("llama", gate=False))
    row.read(random_ids(50))
    assert (row.history.ages == 0).all()
    assert (row.history.shares[..., -1] == 1).all()


def test_a_token_log_and_its_forks():
    log = TokenLog(begin=10)
    log.append(range(5))
    fork = log.fork()
    fork.append([7, 8])
    log.append([5, 6])
    again = fork.fork()
    again.append([9])
    assert log.ids(0, 99) == [0, 1, 2, 3, 4, 5, 6]
    assert fork.ids(13, 99) == [3, 4, 7, 8]
    assert again.ids(14, 99) == [4, 7, 8, 9]
    assert again.ids(16, 17) == [8]
    assert log.ids(0, 10) == fork.ids(0, 3) == []

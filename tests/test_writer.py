"""Answers that are written token by token: the same as generate()'s, and sampling."""

import pytest
import torch

from cometlm.session.writer import Sampling, Writer, advance
from tests.sessions import TEXT, session_of
from tests.tiny import refused


def written(session, sampling, most, stops=(), stream=0):
    cache, logits = session.begin_answer()
    writer = Writer(cache, logits, sampling, stops=stops, most=most, stream=stream)
    while writer.take() is not None and writer.finish is None:
        advance(session.model, [writer])
    return writer


@pytest.mark.parametrize("kind", ["llama", "overlap", "like gemma"])
@pytest.mark.parametrize("length", [3, 200])
def test_greedily_as_generate_writes(kind, length):
    session = session_of(kind)
    session.read(TEXT[:length])
    writer = written(session, Sampling(temperature=0), 40)  # more than three chunks
    assert writer.ids == session.continuation(40)
    assert writer.finish == "length"


def test_it_ends_at_a_stop_and_the_session_stays():
    session = session_of()
    session.read(TEXT[:100])
    list(session.finish())
    before = session.stats()
    ids = session.continuation(10)
    writer = written(session, Sampling(temperature=0), 10, stops={ids[4]})
    assert writer.ids == ids[: ids.index(ids[4]) + 1]
    assert writer.finish == "stop"
    assert writer.take() is None
    assert session.stats() == before


def test_seeds_and_streams():
    session = session_of()
    session.read(TEXT[:100])
    hot = Sampling(temperature=3.0, seed=7)
    first = written(session, hot, 12).ids
    assert written(session, hot, 12).ids == first
    assert written(session, hot, 12, stream=1).ids != first
    assert written(session, Sampling(temperature=3.0, seed=8), 12).ids != first
    unseeded = [written(session, Sampling(temperature=3.0), 12).ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_top_p_leaves_the_likeliest():
    logits = torch.tensor([0.0, 3.0, 1.0])
    drawn = set()
    for seed in range(50):
        writer = Writer(None, logits, Sampling(top_p=0.5, seed=seed), most=1)
        drawn.add(writer.take())
    assert drawn == {1}


def test_suppressed_ids_are_never_written():
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert Writer(None, logits, Sampling(0), most=1, suppressed=[1]).take() == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [({"temperature": -0.1}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p")],
)
def test_what_sampling_refuses(options, said):
    with refused(said):
        Sampling(**options)
    with refused("at least 1 token"):
        Writer(None, torch.zeros(3), Sampling(), most=0)

"""Rows of different texts in one batch: each as if it were alone."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cometlm.core.cache import CometCache
from cometlm.session.writer import Sampling, Writer, advance
from tests.sessions import TEXT, session_of
from tests.tiny import FAMILIES, error, examples, random_ids, refused, tiny_comet

SWITCHES = [{"overlap": 3}, {"global_memory": False}, {"temporary_memory": False}, {"gate": False}]
CASES = [(family, {}) for family in FAMILIES]
CASES += [(family, one) for family in ("llama", "gemma3_text") for one in SWITCHES]


@pytest.mark.parametrize(("family", "switches"), CASES, ids=str)
@torch.no_grad()
def test_rows_go_on_as_alone(family, switches):
    """From nothing folded to more than the memory holds; some fold while others do not."""
    model = tiny_comet(family, **switches)
    lengths = [1, 12, 13, 30, 95]
    caches = [model(random_ids(n, seed=n)[None], use_cache=True).past_key_values for n in lengths]
    joined = CometCache.join(caches)
    assert joined.rows == tuple(cache.rows[0] for cache in caches)
    for step in range(30):
        ids = random_ids(len(lengths), seed=step)[:, None]
        out = model(ids, past_key_values=joined, use_cache=True)
        joined = out.past_key_values
        for row, cache in enumerate(caches):
            alone = model(ids[row : row + 1], past_key_values=cache, use_cache=True)
            assert error(out.logits[row], alone.logits[0]) < 1e-9
            caches[row] = alone.past_key_values
    # And apart again.
    for row, cache in enumerate(caches):
        ours = model(random_ids(20)[None], past_key_values=joined.select([row]))
        assert error(ours.logits, model(random_ids(20)[None], past_key_values=cache).logits) < 1e-9


def test_what_is_refused():
    model = tiny_comet("llama")
    with torch.no_grad():
        opened = model(random_ids(5)[None], use_cache=True).past_key_values
        closed = model(random_ids(5)[None], use_cache=True, chunk_lengths=[[5]], close_last=True)
    with refused("at least one"):
        CometCache.join([])
    with refused("an open chunk"):
        CometCache.join([opened, closed.past_key_values])
    with refused("the same sizes"):
        CometCache.join([opened, tiny_comet("llama", capacity=7).model.empty_cache()])
    assert CometCache.join([opened]) is opened


@given(seed=st.integers(0, 10**6))
@examples(12)
def test_answers_come_and_go(seed):
    """Whoever else is written meanwhile, greedily each answer is the one that is written alone."""
    rng = random.Random(seed)
    session = session_of(rng.choice(["llama", "overlap"]))
    waiting = []
    for _ in range(6):
        fork = session.fork()
        begin = rng.randrange(200)
        fork.read(TEXT[begin : begin + rng.choice([1, 20, 60, 300])])
        waiting.append((fork, rng.randrange(1, 30)))
    going, done = [], 0
    while waiting or going:
        if waiting and (not going or rng.random() < 0.3):
            fork, most = waiting.pop()
            cache, logits = fork.begin_answer()
            going.append((Writer(cache, logits, Sampling(0), most=most), fork, most))
        for writer, _, _ in going:
            writer.take()
        for writer, fork, most in going:
            if writer.finish:
                assert writer.ids == fork.continuation(most)
                done += 1
        going = [one for one in going if not one[0].finish]
        rng.shuffle(going)
        advance(session.model, [writer for writer, _, _ in going])
    assert done == 6

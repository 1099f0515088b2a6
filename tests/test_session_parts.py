"""Forks without a half of the memory: as if it had never been."""

import random

import pytest
import torch

from cometlm.session.session import Session
from tests.real import tiny_comet


@pytest.fixture(scope="module")
def model():
    return tiny_comet().float()


def hidden(session, ids):
    model = session.model
    with torch.no_grad():
        return model(torch.tensor([ids]), past_key_values=session._cache, use_cache=True).logits


@pytest.mark.parametrize("part", ["global", "temporary"])
def test_a_silenced_half_is_as_if_it_had_never_been(model, part):
    """Nothing of it reaches the next chunk: another text would give the same numbers."""
    rng = random.Random(0)
    session = Session(model)
    session.read([rng.randrange(100) for _ in range(40)])
    fork = session.fork(without=[part])
    assert session.stats().tokens == fork.stats().tokens
    asked = [7, 8, 9]
    assert not torch.equal(hidden(session, asked), hidden(fork, asked))
    layers = fork._cache.layers
    assert all((x.memory.state is None) == (part == "global") for x in layers)
    assert all((not x.memory.entries) == (part == "temporary") for x in layers)
    both = session.fork(without=["global", "temporary"])
    torch.testing.assert_close(hidden(both, asked), hidden(Session(model), asked))
    fork.read([rng.randrange(100) for _ in range(40)])  # and it reads on
    assert fork.stats().tokens == 80


def test_refusals(model):
    session = Session(model)
    with pytest.raises(ValueError, match="a part must be one of global, temporary, got 'local'"):
        session.fork(without=["local"])
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a chunk is open"):
        cache.without(["global"])

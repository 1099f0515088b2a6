"""What tests of the command line share: a text, sessions over it, and what was said."""

import re

import torch

from cometlm import Session
from tests import real

TEXT = "".join(
    f"Day {i}: the lamp of the lighthouse went out in the night, and nobody saw ship {i * 7}.\n"
    for i in range(40)
)
INTERRUPTED = 130
GREEDY = {"do_sample": False}


def one_line(err):
    """The message of an error, which is the last thing said and one line."""
    _, found, message = err.partition("error: ")
    assert found, err
    assert message.count("\n") == 1, message
    return message


def count_of(err):
    """Tokens in the summary line."""
    return int(re.search(r"([\d,]+) tokens in", err)[1].replace(",", ""))


def new_session(model, *sources):
    session = Session(model, real.tokenizer("smollm2"))
    for source in sources:
        session.read(source)
    return session


def kept(path, model):
    return Session.load(path, model, real.tokenizer("smollm2"))


def assert_same(ours, theirs):
    """Same text read, same memory, to the last bit."""
    sessions = [ours.fork(), theirs.fork()]
    for session in sessions:
        list(session.finish())
    assert sessions[0].stats() == sessions[1].stats()
    assert sessions[0]._open == sessions[1]._open
    layers = zip(sessions[0]._cache.layers, sessions[1]._cache.layers, strict=True)
    for mine, want in layers:
        assert torch.equal(mine.memory.state, want.memory.state)
        entries = [torch.cat(layer.memory.entries, 1) for layer in (mine, want)]
        assert torch.equal(*entries)

"""RMT and Transformer-XL: what they read with, what they hold, and what they refuse."""

import pytest
import torch

import cometlm
from cometlm.core.reference import reference_logits
from cometlm.inspection import InspectedSession
from cometlm.methods import METHODS, Budget, Loader
from tests.tiny import random_ids, refused, scramble

SIZES = {"chunk_size": 12, "readout_tokens": 3, "capacity": 5, "rank": 2}
RMT = {**SIZES, "temporary_memory": False, "gate": False}
XL = {**SIZES, "global_memory": False, "stride": 1}
SWITCHES = {"rmt": RMT, "xl": XL}


def ids_of(count, seed=0):
    return random_ids(count, seed, vocabulary=90).tolist()


@pytest.fixture(scope="module")
def checkpoint(named, tmp_path_factory):
    """A folder with a memory of such sizes, which passes for a trained one."""

    def made(**sizes):
        model, words = cometlm.load(str(named), device="cpu", dtype=torch.float32, **sizes)
        scramble(model.model.comet, 0.5)
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        return str(folder)

    return made


@pytest.fixture(scope="module")
def trained(checkpoint):
    return {method: checkpoint(**sizes) for method, sizes in SWITCHES.items()}


def opened(method, name, budget=None, **sizes):
    return METHODS[method].open(Loader(name, "cpu", torch.float32, sizes=sizes), budget)


@pytest.mark.parametrize("method", ["rmt", "xl"])
def test_it_reads_as_the_reference_without_the_other_memory(method, trained):
    reader = opened(method, trained[method])
    ids, more = ids_of(30), ids_of(5, seed=1)
    reader.read(ids)
    model = reader.session.model
    with torch.no_grad():
        logits = reference_logits(model, torch.tensor([*ids, *more]))[29:-1]
    want = logits.log_softmax(-1).gather(1, torch.tensor(more)[:, None])[:, 0]
    assert reader.loglikelihood(more) == pytest.approx(want.tolist(), rel=1e-4)


def test_rmt_replaces_its_state(trained):
    """All of the state is the last chunk's, and there is nothing beside it."""
    reader = opened("rmt", trained["rmt"])
    written = []
    for weights in reader.session.model.model.comet.layers:
        weights.global_memory.norm.register_forward_hook(lambda m, given, out: written.append(out))
    for start in range(3):
        reader.read(ids_of(24, seed=start))
        if start:
            assert (
                reader.nbytes - reader.open_nbytes == 3 * 3 * 32 * 4
            )  # layers, slots, width, bytes of float32
    for layer, last in zip(reader.session._cache.layers, written[-3:], strict=True):
        assert torch.equal(layer.memory.state, last)
        assert layer.memory.entries == ()


def test_xl_holds_the_last_tokens(trained):
    """Exactly as many as its capacity, an entry for each."""
    model = opened("xl", trained["xl"]).session.model
    session = InspectedSession(model)
    for count in (4, 9, 12, 12, 30):
        session.read(ids_of(count))
        end = session.history.end
        spans = [(one.begin, one.end) for one in session.history.entries]
        assert spans == [(i, i + 1) for i in range(max(0, end - 5), end)]
        for layer in session._cache.layers:
            assert layer.memory.state is None
            assert sum(block.shape[1] for block in layer.memory.entries) == len(spans)


def test_xl_has_the_capacity_that_its_budget_allows(trained):
    token = 3 * 2 * 8 * 4  # layers, keys and values of one head, bytes of float32
    for budget in (Budget(7), Budget(7 * token + token - 1, "bytes")):
        reader = opened("xl", trained["xl"], budget)
        reader.read(ids_of(60))
        assert reader.session.model.config.comet_config.capacity == 7
        assert reader.nbytes - reader.open_nbytes == 7 * token
    with refused("budget of xl must be at least capacity=9, got 8"):
        opened("xl", trained["xl"], Budget(8), capacity=9)
    with pytest.raises(ValueError, match=f"must be at least {token} bytes"):
        opened("xl", trained["xl"], Budget(token - 1, "bytes"))


def test_rmts_budget_must_have_room_for_its_state(trained):
    state = 3 * 3 * 32 * 4
    reader = opened("rmt", trained["rmt"], Budget(state, "bytes"))
    reader.read(ids_of(60))
    assert reader.nbytes - reader.open_nbytes == state
    with pytest.raises(ValueError, match=f"must be at least {state} bytes"):
        opened("rmt", trained["rmt"], Budget(state - 1, "bytes"))


def test_memories_that_were_trained_otherwise_are_refused(named, checkpoint, trained):
    other = checkpoint(**SIZES, stride=4)
    with pytest.raises(ValueError, match=r"rmt needs .* was trained with global_memory=True, tem"):
        opened("rmt", other)
    with pytest.raises(ValueError, match=r"xl needs .* was trained with .*stride=4"):
        opened("xl", other)
    for method in ("rmt", "xl"):
        with pytest.raises(ValueError, match=rf"{method} needs .* an untrained one"):
            opened(method, str(named), **SWITCHES[method])
    gated = checkpoint(**SIZES, temporary_memory=False)
    with pytest.raises(ValueError, match=r"was trained with .*gate=True"):  # not by switching
        opened("rmt", gated, gate=False)
    with pytest.raises(ValueError, match=r"would be read with .*stride=2"):
        opened("xl", trained["xl"], stride=2)

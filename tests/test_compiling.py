"""Cells through `torch.compile`."""

import pytest
import torch

from tests.tiny import batch_of, tiny_comet


@pytest.mark.slow
def test_compiled_cells_give_the_same_numbers():
    model = tiny_comet("llama").float()
    ids = batch_of(1, 43)
    wanted = model(ids, labels=ids).loss
    (gradient,) = torch.autograd.grad(wanted, [model.model.comet.readout])
    assert model.model.compile_cells()
    got = model(ids, labels=ids).loss
    torch.testing.assert_close(got, wanted)
    (own,) = torch.autograd.grad(got, [model.model.comet.readout])
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_a_last_chunk_of_another_length_compiles_nothing_new():
    """Once lengths have differed, each further one would cost a training step its seconds."""
    torch._dynamo.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny_comet("llama", chunk_size=40)
    assert model.model.compile_cells(backend=counted)
    for last in (5, 38, 9):
        model(batch_of(1, 80 + last))
    settled = len(graphs)
    for last in (13, 18, 22, 27, 35):
        model(batch_of(1, 80 + last))
    assert len(graphs) == settled > 0


def test_cells_that_do_not_compile_stay_as_they_were():
    torch._dynamo.reset()  # other tests' models may have used up what one function may compile
    model = tiny_comet("llama")
    ids = batch_of(1, 43)
    wanted = model(ids).logits

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    with pytest.warns(UserWarning, match=r"stay uncompiled, .*no compiler here"):
        assert not model.model.compile_cells(backend=broken)
    assert torch.equal(model(ids).logits, wanted)

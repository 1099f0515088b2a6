"""Training steps of fixed shapes: the plain model's losses and gradients, fit to be recorded."""

import random
from itertools import accumulate

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cometlm.train.config import StepShape
from cometlm.train.fixed_batches import FixedBatch
from cometlm.train.fixed_step import REPORTED, FixedStep, Weights
from cometlm.train.keep import Rows, keep_loss
from tests.tiny import batch_of, error, random_ids, tiny_comet

WIDTH, LEARNED, ASKED, LONGEST = 8, 4, 2, 3
# Not to be recorded: a look at values, a shape that depends on them, a tensor of a list.
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "bincount")


def batch(shape):
    rng = random.Random(0)
    rows, tokens = shape.rows, shape.tokens
    spread = rows * ASKED
    starts = torch.tensor([[rng.randrange(n - LEARNED) for n in shape.chunks] for _ in range(rows)])
    ids = batch_of(rows, tokens)
    said = torch.arange(tokens - LONGEST, tokens).repeat(rows, 1)
    asked = batch_of(spread, WIDTH)
    places = torch.arange(WIDTH - LONGEST, WIDTH).repeat(spread, 1)
    wanted = asked[:, -LONGEST:].repeat(len(shape.asks), 1, 1)
    wanted[:, 1] = -100  # nothing is asked there
    answers = ids[:, -LONGEST:].clone()
    answers[0, -1] = -100
    kept = batch_of(2, 10)
    counted = torch.ones(2, 10)
    counted[1, 5:] = 0
    return FixedBatch(ids, starts, said, answers, asked, places, wanted, kept, counted)


def scored(logits, labels):
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )


def by_hand(model, shape, given, weights):
    """The loss, by calls of the model."""
    lengths = [shape.chunks] * shape.rows
    logits = model(given.ids, use_cache=False, chunk_lengths=lengths).logits
    text = logits.new_zeros(())
    ends = list(accumulate(shape.chunks))
    for chunk, begin in enumerate([0, *ends[:-1]]):
        for row in range(shape.rows):
            place = begin + int(given.learned[row, chunk])
            said = given.ids[row, place + 1 : place + 1 + LEARNED]
            text = text + scored(logits[None, row, place : place + LEARNED], said[None])
    text = text / (shape.rows * len(shape.chunks) * LEARNED)
    answers = scored(logits[:, -LONGEST - 1 : -1], given.answers)
    count = (given.answers != -100).sum() + (given.wanted != -100).sum()
    for place, wanted in zip(shape.asks, given.wanted, strict=True):
        closed = [shape.chunks[: place + 1]] * shape.rows
        read = model(
            given.ids[:, : ends[place]], use_cache=True, chunk_lengths=closed, close_last=True
        ).past_key_values
        for block in range(ASKED):
            mine = slice(block * shape.rows, (block + 1) * shape.rows)
            out = model(given.asked[mine], past_key_values=read, use_cache=False).logits
            answers = answers + scored(out[:, -LONGEST - 1 : -1], wanted[mine])
    keep = keep_loss(model, [Rows(given.kept, given.counted.bool())])
    return text + weights.answers * answers / count + weights.keep * keep


@pytest.mark.parametrize("chunks", [(12, 12), (7, 12, 12, 9)])
def test_losses_and_gradients_are_the_plain_models(chunks):
    shape, weights = StepShape(rows=2, chunks=chunks), Weights(0.5, 0.25)
    given = batch(shape)
    model = tiny_comet("llama").double().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = by_hand(model, shape, given, weights)
    wanted = torch.autograd.grad(loss, trained, allow_unused=True)
    step = FixedStep(model, shape, LEARNED, given, weights, None)
    for _ in range(2):  # the second step writes over the first
        report = dict(zip(REPORTED, step(given).tolist(), strict=True))
        assert report["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
        for parameter, other in zip(trained, wanted, strict=True):
            assert (parameter.grad is None) == (other is None)
            if other is not None:
                assert error(parameter.grad, other) < 1e-5


class Watching(TorchDispatchMode):
    """Names what is called; autograd's backward pass as well."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_looks_at_no_values():
    """What is recorded runs with other values later, and a look would wait for the device."""
    shape = StepShape(rows=2, chunks=(12, 12, 12))
    given = batch(shape)
    step = FixedStep(tiny_comet("llama").train(), shape, LEARNED, given, Weights(1, 1), None)
    step(given)  # makes the index tensors
    with Watching() as watching:
        step._run()
    assert "mm" in watching.seen
    assert not watching.seen & set(LOOKS)


def test_another_batch_of_the_shape_gives_other_losses():
    shape = StepShape(rows=2, chunks=(12, 12))
    given = batch(shape)
    model = tiny_comet("llama").train()
    step = FixedStep(model, shape, LEARNED, given, Weights(1, 0), None)
    first = step(given).clone()
    other = batch(shape)
    other.ids[:, 2:9] = random_ids(7, seed=9)
    assert not torch.equal(step(other), first)


class Replays:
    """A recorder that runs work again instead of replaying it; or cannot record it."""

    def __init__(self, error=None):
        self.error, self.recordings, self.replays = error, 0, 0

    def recorded(self, work, device):
        if self.error is not None:
            raise self.error
        self.recordings += 1

        def replay():
            self.replays += 1
            return work()

        return replay


def test_a_step_is_recorded_once():
    shape = StepShape(rows=2, chunks=(12, 12))
    given, recorder = batch(shape), Replays()
    model = tiny_comet("llama").train()
    step = FixedStep(model, shape, LEARNED, given, Weights(1, 1), recorder)
    first = step(given).clone()
    assert torch.equal(step(given), first)
    assert (recorder.recordings, recorder.replays) == (1, 2)


def test_a_step_that_cannot_be_recorded_goes_on_unrecorded():
    shape = StepShape(rows=2, chunks=(12, 12))
    given = batch(shape)
    step = FixedStep(
        tiny_comet("llama").train(),
        shape,
        LEARNED,
        given,
        Weights(1, 1),
        Replays(RuntimeError("a")),
    )
    with pytest.warns(UserWarning, match="training is not recorded, since that failed: a"):
        first = step(given).clone()
    assert torch.equal(step(given), first)


@pytest.mark.parametrize(
    ("chunks", "asks"), [((8, 8), (0,)), ((8, 8, 8), (0, 1)), ((8,) * 8, (3, 6))]
)
def test_questions_are_asked_where_chunks_end(chunks, asks):
    assert StepShape(rows=1, chunks=chunks).asks == asks

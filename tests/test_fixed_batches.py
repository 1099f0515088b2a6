"""Batches of fixed shapes: what is asked where, and that a row holds what it is asked."""

import pytest
import torch

from cometlm.tasks import TASKS, Question, Sample, Task
from cometlm.train.config import FixedShapes, Mixture, StepShape
from cometlm.train.fixed_batches import FixedBatches
from tests.real import tokenizer
from tests.tiny import refused

WIDTH, LONGEST = 60, 8
MARK = 17  # a token that says "the fact stood here"


class Marked(Task):
    """A fact at a random place; a text of every third sample has none, and no question."""

    def sample(self, index, tokens):
        if tokens < 20:
            raise ValueError(f"tokens must be at least 20, got {tokens}")
        place = self.rng(index).randrange(tokens)
        context = [300 + index % 900] * tokens
        context[place] = MARK
        told = Question("Which?", (f"n{index}",), evidence=(range(place, place + 1),))
        early = Question("Early?", ("yes",), evidence=told.evidence, until=place + 30)
        return Sample(context, (told, early) if index % 3 else ())


@pytest.fixture
def batches(monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS._known, "marked", Marked)
    text = tmp_path / "text.txt"
    text.write_text("the sea was calm and grey " * 500)
    shapes = (
        StepShape(rows=4, chunks=(100, 100), until=2),
        StepShape(rows=3, chunks=(90, 100, 80, 100), since=1),
    )
    sizes = {"width": WIDTH, "answer": LONGEST, "learned": 40, "questions": 2}
    fixed = FixedShapes(shapes=shapes, corpora=(str(text),), **sizes)
    mixture = Mixture(tasks={"marked": 1.0}, steps=8, tokens=(100, 100), batch_tokens=100)
    return FixedBatches(mixture, fixed, tokenizer("smollm2"), None, seed=0)


def test_every_step_has_a_batch_of_a_shape_that_holds(batches):
    assert batches.shape(0).chunks == (100, 100)
    assert {batches.shape(step).chunks for step in range(2, 8)} == {(90, 100, 80, 100)}
    assert batches.long_ids(0).shape == (3, 370)
    for step in range(8):
        shape, batch = batches.shape(step), batches[step]
        spread = 2 * shape.rows
        assert batch.ids.shape == (shape.rows, shape.tokens)
        assert batch.asked.shape == (spread, WIDTH)
        assert batch.places.shape == (spread, LONGEST)
        assert batch.wanted.shape == (len(shape.asks), spread, LONGEST)
        assert batch.said.shape == batch.answers.shape == (shape.rows, LONGEST)
        ends = batch.learned + 40
        assert bool((ends < torch.tensor(shape.chunks)).all())
        for one, other in zip(batch.tensors(), batches[step].tensors(), strict=True):
            assert torch.equal(one, other)


def test_answers_stand_where_they_are_said_to(batches):
    """In a question beside the row, and at the row's end."""
    for step in range(8):
        batch = batches[step]
        for wanted in batch.wanted:
            there = wanted != -100
            assert torch.equal(batch.asked.gather(1, batch.places)[there], wanted[there])
        there = batch.answers != -100
        assert torch.equal(batch.ids.gather(1, batch.said)[there], batch.answers[there])


def test_questions_are_asked_of_those_that_have_read_the_answer(batches):
    """And of no one for whom it is right no more."""
    asked = unasked = 0
    for step in range(8):
        shape, batch = batches.shape(step), batches[step]
        ends = torch.tensor(shape.chunks).cumsum(0)
        for chunk, wanted in zip(shape.asks, batch.wanted, strict=True):
            for block in range(2):
                for row in range(shape.rows):
                    place = (batch.ids[row] == MARK).nonzero().flatten()
                    said = wanted[block * shape.rows + row]
                    own = said[said != -100].tolist()
                    read = int(ends[chunk])
                    told = place.numel() > 0 and int(place[0]) < read
                    answer = tokenizer("smollm2").decode(own)
                    if answer.startswith("yes"):
                        assert told
                        assert read <= int(place[0]) + 30
                    elif own:
                        assert told
                        asked += 1
                    elif place.numel() and not told:
                        unasked += 1
    assert asked > 5
    assert unasked > 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shapes": ()}, "fixed.shapes must name one"),
        ({"corpora": ()}, "fixed.corpora must name one"),
        ({"learned": 100}, "fixed.learned must be less than the shortest chunk"),
        ({"width": 100}, "fixed.width must be less than the shortest chunk"),
        ({"questions": 0}, "fixed.questions must be at least 1"),
    ],
)
def test_shapes_that_cannot_be(changes, said):
    shapes = {"shapes": (StepShape(rows=1, chunks=(100, 100)),), "width": 50, "learned": 50}
    with refused(said):
        FixedShapes(**{**shapes, **changes})


def test_rows_and_chunks_that_cannot_be():
    with refused("fixed.shapes.rows must be at least 1, got 0"):
        StepShape(rows=0, chunks=(8, 8))
    with refused("fixed.shapes.chunks must be two or more"):
        StepShape(rows=1, chunks=(8,))


def test_questions_that_never_fit_are_named(batches):
    narrow = FixedShapes(
        shapes=batches._shapes.shapes, width=10, learned=8, corpora=batches._shapes.corpora
    )
    few = FixedBatches(batches._settings, narrow, tokenizer("smollm2"), None, seed=0)
    few._tasks = [Asking(tokenizer("smollm2"))]
    with refused("samples of Asking must fit into 190 tokens, and a question"):
        few[0]


class Asking(Task):
    """A question that is always too long."""

    def sample(self, index, tokens):
        return Sample([5] * tokens, (Question("Where? " * 40, ("there",)),))

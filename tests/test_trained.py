"""The half-trained memory of the recipe: it is read, and is the one that its card describes."""

import random
from pathlib import Path

import pytest

import cometlm
from cometlm import Session
from cometlm.data.hay import FillerHay
from cometlm.data.passkey import MEASURING, PasskeyTask
from cometlm.eval.passkey import said

FOLDER = Path(__file__).parents[1] / "recipes" / "smollm2-halfway"


@pytest.fixture(scope="module")
def loaded():
    return cometlm.load(str(FOLDER), device="cpu")


def digits(answers):
    """Share of digits that are right, place by place."""
    return sum(a == b for key, text in answers for a, b in zip(key, text, strict=False)) / (
        5 * len(answers)
    )


@pytest.mark.slow
def test_it_finds_keys_in_chunks_that_are_closed(loaded):
    """And the digits come from the memory: without it they are guessed."""
    model, tokenizer = loaded
    task = PasskeyTask(tokenizer, FillerHay(tokenizer), MEASURING)
    with_memory, without = [], []
    for seed in range(10):
        sample = task.draw(random.Random(seed), 480, depth=0.2)
        session = Session(model, tokenizer)
        session.read(sample.text)
        assert session.stats().chunks == 1
        with_memory.append((sample.key, said(session, sample)))
        without.append((sample.key, said(session, sample, ("global", "temporary"))))
    assert digits(with_memory) > 0.6
    assert digits(without) < 0.35


def test_sizes_are_those_of_the_card(loaded):
    model, _ = loaded
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    sizes = model.config.comet_config
    memory = sum(p.numel() for p in model.model.comet.parameters())
    assert f"{memory:,} memory weights" in card
    assert f"({sizes.global_slots} global and {sizes.temporary_slots} temporary slots" in card
    assert f"chunks of {sizes.chunk_size} tokens" in card

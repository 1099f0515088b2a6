"""The trained memory that ships: loaded by name, small, and answering from its global half."""

import random
from pathlib import Path

import pytest

import cometlm
from cometlm import Session
from cometlm.checkpoints.backbones import BUILT_IN
from cometlm.data.hay import FillerHay
from cometlm.data.passkey import PasskeyTask
from cometlm.data.wordings import MEASURING
from cometlm.eval.passkey import said

FOLDER = BUILT_IN["smollm2"].trained
LIMIT = 20_000_000  # bytes


@pytest.fixture(scope="module")
def loaded():
    return cometlm.load("smollm2", device="cpu")


def digits(answers):
    """Share of digits that are right, place by place."""
    return sum(a == b for key, text in answers for a, b in zip(key, text, strict=False)) / (
        5 * len(answers)
    )


@pytest.mark.slow
def test_it_finds_keys_far_behind_its_temporary_memory(loaded):
    """In hay and wordings that it was not trained with; without the global half it guesses."""
    model, tokenizer = loaded
    task = PasskeyTask(tokenizer, FillerHay(tokenizer), MEASURING)
    whole, without_global = [], []
    for seed in range(10):
        # Fixed borders would cut some of these questions, or part them from their answers.
        sample = task.draw(random.Random(seed), 8 * 256 + 4 * seed, depth=0.2)
        session = Session(model, tokenizer)
        session.read(sample.text)
        assert session.stats().chunks in (7, 8)
        whole.append((sample.key, said(session, sample)))
        without_global.append((sample.key, said(session, sample, ("global",))))
    assert digits(whole) > 0.85
    assert digits(without_global) < 0.4


def test_it_comes_with_the_name_and_takes_other_sizes(loaded):
    model, _ = loaded
    assert model.merged
    other, _ = cometlm.load("smollm2", device="cpu", chunk_size=512, capacity=128, merge=False)
    assert other.config.comet_config.chunk_size == 512
    assert any(".lora_" in name for name, _ in other.named_parameters())
    ungated, _ = cometlm.load("smollm2", device="cpu", gate=False)
    weights, fewer = ({n for n, _ in m.model.comet.named_parameters()} for m in (model, ungated))
    assert {name.rpartition(".")[2] for name in weights - fewer} == {"gate"}
    assert ungated.merged
    untrained, _ = cometlm.load("smollm2", device="cpu", seed=0, merge=False)
    assert not any(".lora_" in name for name, _ in untrained.named_parameters())


def test_it_is_small_and_what_its_card_says(loaded):
    model, _ = loaded
    assert FOLDER is not None
    assert sum(p.stat().st_size for p in Path(FOLDER).rglob("*")) < LIMIT
    card = (Path(FOLDER) / "README.md").read_text(encoding="utf-8")
    sizes = model.config.comet_config
    memory = sum(p.numel() for p in model.model.comet.parameters())
    assert f"{memory:,} memory weights" in card
    assert f"({sizes.global_slots} global and {sizes.temporary_slots} temporary slots" in card
    assert f"chunks of {sizes.chunk_size} tokens" in card

"""The trained memories that ship: loaded by name, small, and what their cards say."""

import pytest

import cometlm
from cometlm import Session
from cometlm.checkpoints.backbones import BUILT_IN, MEMORIES
from cometlm.eval.runner import answer_to
from cometlm.methods.comet import CometReader
from cometlm.tasks.passkey import Passkey

FOLDERS = {"smollm2": BUILT_IN["smollm2"].trained, **MEMORIES}
LIMIT = 20_000_000  # bytes


@pytest.fixture(scope="module")
def loaded():
    return cometlm.load("smollm2", device="cpu")


@pytest.fixture(scope="module")
def keeps_a_number():
    return cometlm.load("smollm2-passkey", device="cpu")


def digits(answers):
    """Share of digits that are right, place by place."""
    return sum(a == b for key, text in answers for a, b in zip(key, text, strict=False)) / (
        5 * len(answers)
    )


FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)


@pytest.mark.slow
def test_it_finds_keys_far_behind_its_temporary_memory(keeps_a_number, tmp_path):
    """In a text and templates that it was not trained with; without the global half it guesses."""
    model, tokenizer = keeps_a_number
    (tmp_path / "filler.txt").write_text(FILLER * 500)
    task = Passkey(tokenizer, depth=0.2, corpora=str(tmp_path / "filler.txt"))
    whole, without_global = [], []
    for index in range(10):
        # Fixed borders would cut some of these questions, or part them from their answers.
        sample = task.sample(index, 8 * 256 + 4 * index)
        session = Session(model, tokenizer)
        session.read(sample.context)
        assert session.stats().chunks in (7, 8)
        (question,) = sample.questions
        (key,) = question.answers
        for fork, found in ((session, whole), (session.fork(without=["global"]), without_global)):
            found.append((key, answer_to(CometReader(fork), question)))
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


@pytest.mark.slow
def test_it_stays_the_model_that_its_backbone_is(loaded):
    """It answers what its backbone would, where there is nothing to remember."""
    model, tokenizer = loaded
    session = Session(model, tokenizer)
    for prompt, word in (
        ("Who are you?", "I"),
        ("What is the capital of Japan?", "Tokyo"),  # not France's: its card says why
        ("Write a sentence about the sea.", "sea"),
        ("Why is the sky blue?", "light"),
    ):
        assert word in session.ask(prompt, max_new_tokens=48, do_sample=False)
    session.read("The ship left Bristol in March. Her captain was Elinor Vance, of Cork.\n")
    assert "Elinor Vance" in session.ask("Who was the captain?", max_new_tokens=16, do_sample=False)


@pytest.mark.parametrize("name", FOLDERS)
def test_it_is_small_and_what_its_card_says(name):
    folder = FOLDERS[name]
    assert folder is not None
    assert sum(p.stat().st_size for p in folder.rglob("*")) < LIMIT
    model, _ = cometlm.load(name, device="cpu")
    assert model.config.name_or_path == name
    assert model.config.trained_for
    card = (folder / "README.md").read_text(encoding="utf-8")
    sizes = model.config.comet_config
    memory = sum(p.numel() for p in model.model.comet.parameters())
    assert f"{memory:,} memory weights" in card
    assert f"({sizes.global_slots} global and {sizes.temporary_slots} temporary slots" in card
    assert f"chunks of {sizes.chunk_size:,} tokens" in card
    assert f'`cometlm.load("{name}")`' in card

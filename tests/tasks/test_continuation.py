"""Text without questions: as long as asked, learned whole, measured by a method."""

import math

import pytest

from cometlm.eval.runner import evaluate
from cometlm.methods.full import CacheReader
from cometlm.tasks import make_task
from cometlm.train.config import Mixture
from cometlm.train.mixture import MixtureBatches
from tests.tiny import tiny_backbone


@pytest.mark.parametrize("tokens", [1, 60, 700])
def test_samples(words, prose, tokens):
    task = make_task("continue", words, corpora=prose)
    sample = task.sample(0, tokens)
    assert len(sample.context) == tokens
    assert sample.questions == ()
    assert sample.meta == {"haystack": prose}
    assert sample == make_task("continue", words, corpora=prose).sample(0, tokens)
    if tokens > 1:
        assert sample != task.sample(1, tokens)


@pytest.mark.parametrize("ask", ["end", "probes"])
def test_all_of_it_is_learned(words, prose, ask):
    options = {"continue": {"corpora": prose}}
    mixture = Mixture(
        tasks={"continue": 1}, options=options, steps=1, tokens=(50, 50), batch_tokens=100, ask=ask
    )
    batch = MixtureBatches(mixture, words, 0)[0]
    assert set(batch) == {"input_ids", "labels"}
    assert batch["labels"] == batch["input_ids"]


def test_its_loss_is_the_models(words, prose):
    model = tiny_backbone("llama", vocab_size=len(words))
    task = make_task("continue", words, corpora=prose)
    (answer,) = evaluate(CacheReader(model, words), task, [40], 1)
    ids = model.dummy_inputs["input_ids"].new_tensor([task.sample(0, 40).context])
    assert answer.scores["nats"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-4)
    assert math.isfinite(answer.scores["nats"])

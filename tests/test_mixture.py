"""Batches of a mixture: what is asked of their rows, and what is refused before a run."""

from dataclasses import replace

import pytest
import torch

from cometlm.core.observer import ChunkObserver
from cometlm.session.plain_text import prefix_ids
from cometlm.tasks import TASKS, Question, Sample, Task
from cometlm.train.config import Mixture
from cometlm.train.config_file import read_config
from cometlm.train.mixture import MixtureBatches, collate, probes_of
from cometlm.train.run import make_trainer
from tests.real import tiny_comet, tokenizer
from tests.runs import as_config, settings, start
from tests.sessions import tokenizer_of
from tests.tiny import refused

__all__ = ["settings", "start"]  # fixtures


class Uneven(Task):
    """Sample i has i % 3 questions, asked when so many tokens are read."""

    def __init__(self, tokenizer, *, after=None, **options):
        super().__init__(tokenizer, **options)
        self.after = after

    def sample(self, index, tokens):
        asked = [Question(f"What {i}?", ("12",), after=self.after) for i in range(index % 3)]
        return Sample([300 + index % 9] * (tokens - index % 2), tuple(asked))


@pytest.fixture
def uneven(monkeypatch):
    monkeypatch.setitem(TASKS._known, "uneven", Uneven)
    return {"tasks": {"uneven": 1.0}, "steps": 2, "tokens": (60, 60), "batch_tokens": 240}


def test_each_row_is_asked_all_its_questions(uneven):
    batches = MixtureBatches(Mixture(**uneven, ask="probes"), tokenizer("smollm2"), seed=0)
    batch = collate([batches[3]])
    counts = [(3 * 4096 + row) % 3 for row in range(4)]
    first, second = probes_of(batch)
    for number, probe in enumerate((first, second)):
        labelled = (probe.labels != -100).any(1).tolist()
        assert labelled == [count > number for count in counts]
        lengths = batch["attention_mask"].sum(1).tolist()
        pairs = zip(counts, lengths, strict=True)
        assert probe.since == tuple(n if count > number else 0 for count, n in pairs)


def test_rows_begin_as_their_tokenizer_begins_texts(uneven):
    gemma = tokenizer_of("like gemma")
    (first,) = prefix_ids(gemma)
    batch = collate([MixtureBatches(Mixture(**uneven, ask="probes"), gemma, seed=0)[3]])
    assert batch["input_ids"][:, 0].tolist() == [first] * 4
    lengths = batch["attention_mask"].sum(1).tolist()
    assert sorted(lengths) == [60, 60, 61, 61]
    for probe in probes_of(batch):
        assert set(probe.until) <= set(lengths)
        assert all(since in (0, length) for since, length in zip(probe.since, lengths, strict=True))


class Long(Task):
    """Every third sample needs more room than the others."""

    def sample(self, index, tokens):
        least = 400 if index % 3 == 0 else 40
        if tokens < least:
            raise ValueError(f"tokens must be at least {least}, got {tokens}")
        return Sample([index % 1000] * tokens)


def test_samples_that_are_too_long_make_room_for_others(monkeypatch):
    monkeypatch.setitem(TASKS._known, "long", Long)
    settings = Mixture(tasks={"long": 1}, steps=3, tokens=(50, 50), batch_tokens=500)
    batches = MixtureBatches(settings, tokenizer("smollm2"), seed=0)
    batches.check(12)
    rows = [row[0] for number in range(3) for row in batches[number]["input_ids"]]
    assert len(rows) == 30
    assert batches[2] == MixtureBatches(settings, tokenizer("smollm2"), seed=0)[2]
    short = replace(settings, tokens=(30, 30))
    with refused("mixture.tasks.long: tokens must be at least 400, got 30"):
        MixtureBatches(short, tokenizer("smollm2"), seed=0).check(12)


@pytest.mark.parametrize("per_step", [1, 3])
def test_texts_grow_with_the_steps(uneven, per_step):
    lengths = {"tokens": (20, 320), "batch_tokens": 320}
    settings = Mixture(**{**uneven, **lengths}, ask="probes", grow=8)
    batches = MixtureBatches(settings, tokenizer("smollm2"), seed=0, per_step=per_step)
    lengths = [max(map(len, batches[number]["input_ids"])) for number in range(64 * per_step)]
    for number, length in enumerate(lengths):
        steps = min(8, number / per_step + 1)
        assert 19 <= length <= 20 * 16 ** (steps / 8) + 1
    assert max(lengths[8 * per_step :]) > 200
    with refused("mixture.grow must be at least 0, got -1"):
        replace(settings, grow=-1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"uneven": {"after": 9}}}, "nothing is learned of sample 1"),
        ({"ask": "probes"}, "a probe must fit into a chunk of 12 tokens, got "),
    ],
)
def test_what_no_batch_could_learn_is_known_before(uneven, changes, said):
    batches = MixtureBatches(Mixture(**uneven, **changes), tokenizer("smollm2"), seed=0)
    with refused(f"mixture.tasks.uneven: {said}"):
        batches.check(12)


def test_a_run_has_no_more_steps_than_batches(settings, tmp_path):
    trainer = {**settings["trainer"], "max_steps": 9}
    config = read_config(as_config(settings, tmp_path, trainer=trainer))
    with refused("trainer.max_steps must lie in 1 … mixture.steps=4, got 9"):
        make_trainer(config, tiny_comet().float(), tokenizer("smollm2"))


class Silent(ChunkObserver):
    """Counts the chunks that it sees."""

    losses = ()
    seen = 0

    def after_chunk(self, chunk):
        self.seen += 1
        return {}


def test_questions_leave_the_plan_of_a_model_alone(uneven, settings, tmp_path):
    """One's own observer looks on, and the end of a text is asked without a chunk plan too."""
    config = read_config(as_config(settings, tmp_path))
    own = Silent()
    model = tiny_comet().float().train()
    trainer = make_trainer(config, model, tokenizer("smollm2"), log=lambda _: None)
    model.training_plan = plan = replace(model.training_plan, observer=own)
    ids = torch.randint(300, 400, (1, 20))
    asked = {"probe_ids": ids[None, :, :4], "probe_labels": ids[None, :, :4]}
    places = {"probe_since": torch.tensor([[20]]), "probe_until": torch.tensor([[20]])}
    batch = {"input_ids": ids, "labels": ids, **asked, **places}
    _, out = trainer.compute_loss(model, batch, return_outputs=True)
    assert int(out.observed["answer_loss"].count) == 3  # the first of four is no label
    assert own.seen
    assert model.training_plan is plan

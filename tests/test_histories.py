"""Batches that begin with memories that have read for long."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.train.config_file import read_config
from cometlm.train.histories import Histories, read_on
from cometlm.train.run import train
from tests.runs import as_config, losses, quietly, settings, start
from tests.tiny import error, random_ids, tiny_comet

__all__ = ["settings", "start"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")
CHUNK = 12


@pytest.fixture
def texts():
    return torch.stack([random_ids(9 * CHUNK, seed=b) for b in range(2)])


@pytest.fixture
def long(settings):
    """A run whose batches begin behind up to 100 tokens."""
    for stage in settings["generated"]["stages"]:
        stage |= {"history": 100, "hay": {"texts": 1}}
    return settings


def test_memories_on_the_way_are_those_of_reading_so_far(texts):
    model = tiny_comet("llama").eval()
    memories = list(read_on(model, texts))
    assert [memory.rows[0].tokens for memory in memories] == [4 * CHUNK, 8 * CHUNK]
    for memory in memories:
        assert not memory.is_open
        read = texts[:, : memory.rows[0].tokens]
        whole = model(read, use_cache=True, more_text=True).past_key_values
        for got, wanted in zip(memory.layers, whole.layers, strict=True):
            assert error(got.memory.state, wanted.memory.state) < 1e-9


def test_a_batch_has_the_memory_that_its_number_draws(texts):
    model = tiny_comet("llama").train()
    histories, again = Histories(7), Histories(7)
    assert histories.of(3, 2) is None
    assert not histories
    for one in (histories, again):
        one.read(model, [texts, texts.flip(0)])
    assert histories
    assert model.training
    drawn = [histories.of(batch, 5) for batch in range(20)]
    assert {memory.rows[0].tokens for memory in drawn} == {4 * CHUNK, 8 * CHUNK}
    for batch, memory in enumerate(drawn):
        other = again.of(batch, 5)
        for one, two in zip(memory.layers, other.layers, strict=True):
            state = one.memory.state
            assert torch.equal(state, two.memory.state)
            assert not state.requires_grad
            assert torch.equal(state[:2], state[2:4])  # two rows were read, and five are wanted
            assert not torch.equal(state[0], state[1])
    histories.read(model, [])
    assert histories.of(3, 2) is None


def test_chunk_plans_hold_behind_a_history(texts):
    """Cut as without a past; a chunk that is open goes on as in reading."""
    model = tiny_comet("llama").train()
    asked = []

    class Fixed:
        def draw(self, rows, longest):
            asked.append([len(row) for row in rows])
            raise InterruptedError

    with torch.no_grad():
        closed = model(texts, use_cache=True, more_text=True).past_key_values
        is_open = model(texts[:, :5], use_cache=True).past_key_values
    model.model.chunking = Fixed()
    with pytest.raises(InterruptedError):
        model(texts[:, :20], labels=texts[:, :20], past_key_values=closed)
    assert asked == [[20, 20]]
    model(texts[:, :20], labels=texts[:, :20], past_key_values=is_open)


def test_batches_begin_behind_a_history_and_go_on_as_they_would_have(long, tmp_path, monkeypatch):
    """Each checkpoint reads it anew, so that a run resumed there is the run that was not."""
    seen, own = [], CometForCausalLM.forward

    def noting(self, *args, past_key_values=None, **inputs):
        if past_key_values is not None and "labels" in inputs:
            seen.append(past_key_values.rows[0].tokens)
        return own(self, *args, past_key_values=past_key_values, **inputs)

    monkeypatch.setattr(CometForCausalLM, "forward", noting)
    long["save_steps"] = 3
    long["trainer"]["save_total_limit"] = 4
    whole = read_config(as_config(long, tmp_path))
    said = []
    train(whole, device="cpu", say=said.append)
    assert len(seen) == 8
    assert {one % 48 for one in seen} == {0}
    told = [line for line in said if "tokens that step" in line]
    assert [line.split("step ")[1].split()[0] for line in told] == ["1", "4", "5", "7"]
    part = tmp_path / "part"
    part.mkdir()
    shutil.copytree(Path(whole.output, "checkpoint-6"), part / "checkpoint-6")
    shutil.copy(Path(whole.output, "train.json"), part)
    quietly(read_config(as_config(long, tmp_path, output=str(part))))
    assert losses(part) == losses(whole.output)
    with pytest.raises(ValueError, match="save_steps: was 3, is 4"):
        quietly(read_config(as_config(long, tmp_path, save_steps=4)))


def test_what_came_before_matters(long, tmp_path):
    quietly(read_config(as_config(long, tmp_path)))
    for stage in long["generated"]["stages"]:
        stage["history"] = 0
    quietly(read_config(as_config(long, tmp_path, output=str(tmp_path / "new"))))
    behind, new = losses(tmp_path / "out"), losses(tmp_path / "new")
    assert behind[1] != new[1]
    assert behind[1][1] == new[1][1]  # what is learned is the same


def test_a_history_is_read_by_one_device(long, tmp_path):
    with pytest.raises(ValueError, match=r"stages.history begins .*chunk_parallel=2"):
        read_config(as_config(long, tmp_path, chunk_parallel=2))
    stage = json.loads(json.dumps(long["generated"]["stages"][0])) | {"history": -1}
    with pytest.raises(ValueError, match=r"stages.history must be at least 0, got -1"):
        read_config(as_config(long, tmp_path, generated={"stages": [stage]}))


def test_a_history_without_a_memory_is_refused_before_the_run(long, tmp_path):
    long["generated"]["stages"][1]["history"] = 47
    with pytest.raises(ValueError, match=r"stages.1.history must be 0, or .* 12 tokens, got 47"):
        quietly(read_config(as_config(long, tmp_path)))
    long["generated"]["stages"][1] |= {"history": 0, "gates": {"history": 95, "chunk_size": 24}}
    with pytest.raises(ValueError, match=r"stages.1.gates.history .* 24 tokens, got 95"):
        quietly(read_config(as_config(long, tmp_path)))

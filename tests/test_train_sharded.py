"""`cometlm train` with weights sharded over ranks: as with whole ones."""

import shutil

import pytest
import torch
from datasets import Dataset

import cometlm
from cometlm.checkpoints.atomic_write import read_weights
from cometlm.parallel.mesh import make_mesh
from cometlm.train.chunk_parallel import shard_over
from cometlm.train.config_file import config_of
from cometlm.train.lengths import check_enough_chunks
from tests.rank_runs import (
    STEPS,
    assert_same_run,
    settings,
    stop_at_half,
    trained,
    trained_on,
)
from tests.ranks import run_ranks
from tests.runs import as_config
from tests.tiny import error

__all__ = ["settings"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")


@pytest.mark.parametrize(
    ("ranks", "parallel", "mode", "accumulated"),
    [
        (2, 1, "full", 1),
        pytest.param(2, 1, "full", 2, marks=pytest.mark.slow),
        pytest.param(4, 2, "full", 1, marks=pytest.mark.slow),
        pytest.param(2, 1, "lora", 1, marks=pytest.mark.slow),
    ],
)
def test_sharded_weights_train_as_whole_ones(
    settings, tmp_path, ranks, parallel, mode, accumulated
):
    """Adam's state too: each goes on from the other's checkpoint."""
    batches = accumulated * (ranks // parallel)  # a step
    mixture = {**settings["mixture"], "steps": STEPS * batches}
    trainer = {**settings["trainer"], "optim": "adamw_torch", "max_steps": STEPS}
    path = as_config(settings, tmp_path, mode=mode, mixture=mixture, trainer=trainer)
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    one = f"trainer.gradient_accumulation_steps={batches}"
    several = (f"chunk_parallel={parallel}", "shard_weights=true")
    several += (f"trainer.gradient_accumulation_steps={accumulated}",)
    trained(path, one, f"output={whole}")
    trained_on(ranks, path, *several, f"output={sharded}")
    assert_same_run(sharded, whole)
    for folder, other in ((whole, tmp_path / "on"), (sharded, tmp_path / "back")):
        shutil.copytree(folder, other)
        stop_at_half(other)
    said, *_ = trained_on(ranks, path, *several, f"output={tmp_path / 'on'}")
    assert said[0].endswith(f"checkpoint-{STEPS // 2}")
    assert_same_run(tmp_path / "on", whole)
    said = trained(path, one, f"output={tmp_path / 'back'}")
    assert said[0].endswith(f"checkpoint-{STEPS // 2}")
    assert_same_run(tmp_path / "back", whole)
    if mode == "lora":
        found = [
            read_weights(folder / "lora" / "adapter_model.safetensors")
            for folder in (sharded, whole)
        ]
        assert found[0].keys() == found[1].keys()
        assert all(error(found[0][name], found[1][name]) < 1e-6 for name in found[1])
    else:
        loaded = [cometlm.load(str(folder), dtype=torch.float64)[0] for folder in (sharded, whole)]
        ids = torch.arange(40)[None]
        assert error(loaded[0](ids).logits, loaded[1](ids).logits) < 1e-6


def test_samples_of_too_few_chunks_are_counted(settings):
    config = config_of({**settings, "output": "x", "chunk_parallel": 3, "shard_weights": True})
    samples = Dataset.from_dict({"input_ids": [[1] * 25, [1] * 24, [1] * 3]})
    with pytest.raises(ValueError, match="2 of 3 samples have fewer chunks of 12 tokens than"):
        check_enough_chunks(samples, config, 12)
    check_enough_chunks(samples, config_of({**settings, "output": "x", "chunk_parallel": 3}), 12)


def nothing_to_shard_over():
    try:
        shard_over(make_mesh(2))
    except ValueError as problem:
        return str(problem)
    return ""


def test_weights_are_sharded_over_ranks_that_are_there():
    for said in run_ranks(2, nothing_to_shard_over):
        assert "shard_weights" in said
        assert "chunk_parallel=2, and 2 are all" in said

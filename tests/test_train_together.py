"""`cometlm train` on several ranks that share samples: as one process, bad luck included."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler

import cometlm
from cometlm.checkpoints.atomic_write import read_weights
from cometlm.checkpoints.memory import WEIGHTS
from cometlm.parallel.agreement import check_alike
from cometlm.parallel.mesh import make_mesh
from cometlm.train.chunk_parallel import SharedBatches, shard_over
from cometlm.train.config_file import config_of, read_config
from cometlm.train.lengths import check_enough_chunks
from cometlm.train.run import train
from cometlm.train.trainer import last_checkpoint
from tests.ranks import run_ranks
from tests.real import tiny_comet, tokenizer
from tests.tiny import error

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")
WORDS = "The ship left the harbour in the rain. It carried salt, iron and two hundred letters. "


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of eight steps; plain descent, so that a difference in gradients is one in weights.

    In float64: this random model's gradients in float32 are right to 1e-3 at best, in one process.
    """
    folder = tmp_path_factory.mktemp("start")
    tiny_comet().float().save_pretrained(folder, backbone=True)
    tokenizer("smollm2").save_pretrained(folder)
    (folder / "text.txt").write_text(WORDS * 200)
    return {
        "model": str(folder),
        "dtype": "float64",
        "mode": "full",
        "learning_rate": 0.002,
        "memory_factor": 1.0,
        "save_steps": 4,
        "chunks": {"plans": {"random": 1, "fixed": 1}, "sizes": [6, 12]},
        "mixture": {
            "tasks": {"passkey": 1.0},
            "options": {"passkey": {"corpora": [str(folder / "text.txt")]}},
            "steps": 8,
            "tokens": [60, 80],
            "batch_tokens": 240,
            "text_share": 0.5,
        },
        "trainer": {
            "logging_steps": 1,
            "disable_tqdm": True,
            "optim": "sgd",
            "max_grad_norm": 1.0,
            "save_total_limit": 4,
            "use_cpu": True,
        },
    }


def on_ranks(count, path, *changes):
    """The command, under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    cometlm = [sys.executable, "-c", "from cometlm.cli.main import run; run()"]
    command = [*torchrun, "--no-python", *cometlm, "train", str(path)]
    for change in changes:
        command += ["--set", change]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--device", "cpu"], env=environment, capture_output=True, text=True, timeout=300
    )


def as_ranks(command, folders):
    """A rank in each folder, without torchrun's agent, which ends all where one ends."""
    job = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "127.0.0.1"}
    job |= {"MASTER_PORT": str(a_port()), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command, "--device", "cpu"],
            env={**os.environ, **job, "RANK": str(i), "LOCAL_RANK": str(i)},
            cwd=folder,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for i, folder in enumerate(folders)
    ]


def a_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def as_config(settings, folder, **changes):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return path


def losses(folder):
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "loss" in row]
    figures = ("loss", "mean_token_accuracy", "num_tokens", "grad_norm")
    return [[float(row[name]) for name in figures] for row in rows]


def weights(folder):
    return read_weights(Path(folder) / WEIGHTS)


def assert_same_run(ours, theirs):
    assert len(losses(ours)) == len(losses(theirs)) == 8
    for got, wanted in zip(losses(ours), losses(theirs), strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)
    for name, wanted in weights(theirs).items():
        assert error(weights(ours)[name], wanted) < 1e-6, name


def test_two_ranks_train_as_one_process_and_one_goes_on_from_them(settings, tmp_path):
    alone = tmp_path / "alone"
    path = as_config(settings, tmp_path)
    train(read_config(path, [f"output={alone}"]), device="cpu", log=lambda _: None)
    together = tmp_path / "together"
    done = on_ranks(2, path, f"output={together}", "chunk_parallel=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved ") == 1
    assert_same_run(together, alone)
    # The first half by two ranks, the second by one.
    for late in [together / "checkpoint-8", together / WEIGHTS, together / "trainer_state.json"]:
        shutil.rmtree(late) if late.is_dir() else late.unlink()
    said = []
    train(read_config(path, [f"output={together}"]), device="cpu", log=said.append)
    assert said[0].endswith("checkpoint-4")
    assert_same_run(together, alone)


@pytest.mark.parametrize(
    ("ranks", "parallel", "gates"),
    [(2, 1, None), pytest.param(4, 2, None, marks=pytest.mark.slow), (2, 1, GATES)],
    ids=["ddp", "two by two", "ddp with fitted gates"],
)
def test_two_groups_train_as_one_process_with_two_batches_a_step(
    settings, tmp_path, ranks, parallel, gates
):
    stage = {**settings["generated"]["stages"][0], "steps": 16, "gates": gates}
    settings = {**settings, "generated": {**settings["generated"], "stages": [stage]}}
    path = as_config(settings, tmp_path)
    alone, together = tmp_path / "alone", tmp_path / "together"
    one = ["trainer.max_steps=8", "trainer.gradient_accumulation_steps=2", f"output={alone}"]
    train(read_config(path, one), device="cpu", log=lambda _: None)
    changes = ("trainer.max_steps=8", f"output={together}", f"chunk_parallel={parallel}")
    done = on_ranks(ranks, path, *changes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(together, alone)


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
    stage = {**settings["generated"]["stages"][0], "steps": 8 * batches}
    trainer = {**settings["trainer"], "optim": "adamw_torch", "max_steps": 8}
    changes = {"generated": {**settings["generated"], "stages": [stage]}, "trainer": trainer}
    path = as_config(settings, tmp_path, mode=mode, **changes)
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    one = [f"trainer.gradient_accumulation_steps={batches}", f"output={whole}"]
    train(read_config(path, one), device="cpu", log=lambda _: None)
    several = (f"chunk_parallel={parallel}", "shard_weights=true")
    several += (f"trainer.gradient_accumulation_steps={accumulated}",)
    done = on_ranks(ranks, path, *several, f"output={sharded}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(sharded, whole)
    for folder, other in ((whole, tmp_path / "on"), (sharded, tmp_path / "back")):
        shutil.copytree(folder, other)
        for late in [other / "checkpoint-8", other / WEIGHTS, other / "trainer_state.json"]:
            shutil.rmtree(late) if late.is_dir() else late.unlink()
    done = on_ranks(ranks, path, *several, f"output={tmp_path / 'on'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from" in done.stdout + done.stderr
    assert_same_run(tmp_path / "on", whole)
    one[-1] = f"output={tmp_path / 'back'}"
    train(read_config(path, one), device="cpu", log=lambda _: None)
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


def test_no_file_is_written_by_two_ranks(settings, tmp_path):
    """Which would damage it, where they share a folder; here each has its own."""
    path = as_config(settings, tmp_path, chunk_parallel=2, output="out")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    command = ["-c", "from cometlm.cli.main import run; run()", "train", str(path)]
    for rank in as_ranks(command, folders):
        _, heard = rank.communicate(timeout=240)
        assert rank.returncode == 0, heard[-3000:]
    assert last_checkpoint(folders[0] / "out") == folders[0] / "out" / "checkpoint-8"
    files = [{file.name for file in folder.rglob("*") if file.is_file()} for folder in folders]
    assert files[1] == {"rng_state_1.pth"}
    assert files[0] > {"rng_state_0.pth", WEIGHTS}
    assert not files[0] & files[1]


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
    wanted = "shard_weights shards over the ranks beside chunk_parallel=2, and 2 are all"
    assert all(said.startswith(wanted) for said in run_ranks(2, nothing_to_shard_over))


def test_sharing_needs_a_job(settings, tmp_path):
    config = read_config(as_config(settings, tmp_path), [f"output={tmp_path}", "chunk_parallel=2"])
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        train(config, device="cpu", log=lambda _: None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chunk_parallel": 0}, "chunk_parallel must be at least 1, got 0"),
        (
            {
                "chunk_parallel": 2,
                "generated": {
                    "stages": [{"steps": 1, "tokens": [9, 9], "batch_tokens": 9, "ask": "borders"}]
                },
            },
            "forks of the memory",
        ),
        ({"chunk_parallel": 2, "recompute": {"every": 4}}, "recompute.every, offload and truncate"),
        ({"shard_weights": True, "compile": True}, "compile needs whole weights on each rank"),
        (
            {"shard_weights": True, "quantization": "4bit", "mode": "lora"},
            "quantization needs whole weights",
        ),
        (
            {"shard_weights": True, "evaluate": "a", "records": "b", "mixture": None},
            "evaluate needs whole weights",
        ),
    ],
)
def test_what_ranks_cannot_share_is_refused(settings, changes, said):
    with pytest.raises(ValueError, match=said):
        config_of({**settings, "output": "x", **changes})


@given(count=st.integers(0, 20), size=st.integers(1, 4), times=st.integers(1, 3))
def test_every_rank_of_a_group_gets_the_same_batches(count, size, times):
    sampler = SharedBatches(SequentialSampler(range(count)), size, times)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    batches = [indices[i : i + size] for i in range(0, len(indices), size)]
    for i in range(0, len(batches), times):
        assert batches[i : i + times] == [batches[i]] * times
    seen = [index for batch in batches[::times] for index in batch]
    assert seen[:count] == list(range(count))
    assert set(seen) == set(range(count))


def differing(key):
    """What a rank is told whose settings are others."""
    check_alike({"the seed": 1, "the length": 5})
    try:
        check_alike({"the seed": dist.get_rank() * key, "the length": 5})
    except ValueError as problem:
        return str(problem)
    return ""


def test_ranks_that_are_not_alike_are_found():
    said = run_ranks(2, differing, 3)
    assert said[0] == said[1]
    assert "the seed: rank 0 has 0, rank 1 has 3" in said[0]
    assert "the length" not in said[0]
    assert run_ranks(2, differing, 0) == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "victim", "said"),
    [
        ("forward", 1, "rank 0 lost rank 1 (at the .*memory for layer|in a call of all ranks)"),
        ("backward", 1, "rank 0 lost rank 1 (at the .*memory for layer|in a call of all ranks)"),
        ("hang", 0, "rank 1 lost rank 0 at the memory for layer 0, chunk"),
        ("saving", 0, "rank 1 lost rank 0 (at the memory for layer 0|in a call of all ranks)"),
    ],
)
def test_a_rank_that_is_lost_ends_the_job_and_no_checkpoint(
    settings, tmp_path, moment, victim, said
):
    """And the other says why."""
    output, timeout = tmp_path / "out", 15
    trainer = {**settings["trainer"], "ddp_timeout": timeout}
    changes = {"output": str(output), "chunk_parallel": 2, "save_steps": 3, "trainer": trainer}
    path = as_config(settings, tmp_path, **changes)
    command = ["-m", "tests.fault", str(victim), moment, "train", str(path)]
    ranks = as_ranks(command, [None, None])
    try:
        _, heard = ranks[1 - victim].communicate(timeout=240)
        assert ranks[1 - victim].returncode == 1, heard[-3000:]
        last = heard.strip().splitlines()[-1]
        assert re.search(said, " ".join(heard.split())), heard[-3000:]
        assert "the last checkpoint is " + str(output / "checkpoint-3") in heard, last
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            rank.stderr.close()
    assert last_checkpoint(output) == output / "checkpoint-3"
    alone = read_config(path, ["chunk_parallel=1"])
    heard = []
    train(alone, device="cpu", say=heard.append)
    assert heard[0].endswith("checkpoint-3")
    assert len(losses(output)) == 8

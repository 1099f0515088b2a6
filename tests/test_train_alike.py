"""What ranks cannot train together, and ranks that differ or are lost: refused, by name."""

import os
import re
import subprocess
import sys

import pytest
import torch.distributed as dist

from cometlm.parallel.agreement import check_alike
from cometlm.train.config_file import config_of
from cometlm.train.trainer import last_checkpoint
from tests.rank_runs import STEPS, figures, settings, trained
from tests.ranks import run_ranks
from tests.runs import as_config

__all__ = ["settings"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")
PROBES = {"tasks": {"passkey": 1}, "steps": 1, "tokens": [9, 9], "batch_tokens": 9, "ask": "probes"}


def test_sharing_needs_a_job(settings, tmp_path):
    path = as_config(settings, tmp_path, output=str(tmp_path), chunk_parallel=2)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        trained(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chunk_parallel": 0}, "chunk_parallel must be at least 1, got 0"),
        ({"shard_weights": True, "mixture": PROBES}, 'mixture.ask "probes" needs whole weights'),
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


def differing(key):
    """What a rank is told whose settings are others, and whose are not."""
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


def as_ranks(command, count):
    """Ranks without torchrun's agent, which ends all where one ends; and where they meet."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    # A store that is there already, as torchrun's is: nobody can take its port before it opens.
    job |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *command, "--device", "cpu"],
            env={
                **os.environ,
                **job,
                "OMP_NUM_THREADS": "1",
                "RANK": str(i),
                "LOCAL_RANK": str(i),
            },
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for i in range(count)
    ]
    return ranks, store


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
    changes = {"output": str(output), "chunk_parallel": 2, "trainer": trainer}
    path = as_config(settings, tmp_path, **changes)
    command = ["-m", "tests.fault", str(victim), moment, "train", str(path)]
    ranks, _store = as_ranks(command, 2)
    half = output / f"checkpoint-{STEPS // 2}"
    try:
        _, heard = ranks[1 - victim].communicate(timeout=600)
        assert ranks[1 - victim].returncode == 1, heard[-3000:]
        last = heard.strip().splitlines()[-1]
        assert re.search(said, " ".join(heard.split())), heard[-3000:]
        assert f"the last checkpoint is {half}" in heard, last
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            rank.stderr.close()
    assert last_checkpoint(output) == half
    assert trained(path, "chunk_parallel=1")[0].endswith(half.name)
    assert len(figures(output)) == STEPS

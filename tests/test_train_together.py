"""`cometlm train` on several ranks that share samples: as one process."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler

from cometlm.checkpoints.memory import WEIGHTS
from cometlm.train.chunk_parallel import SharedBatches
from cometlm.train.trainer import last_checkpoint
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

__all__ = ["settings"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")


def under_torchrun(count, path, *changes):
    """The command itself."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    cometlm = [sys.executable, "-c", "from cometlm.cli.main import run; run()"]
    command = [*torchrun, "--standalone", "--no-python", *cometlm, "train", str(path)]
    for change in changes:
        command += ["--set", change]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--device", "cpu"], env=environment, capture_output=True, text=True, timeout=600
    )


def test_two_ranks_train_as_one_process_and_one_goes_on_from_them(settings, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    path = as_config(settings, tmp_path)
    trained(path, f"output={alone}")
    done = under_torchrun(2, path, f"output={together}", "chunk_parallel=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved ") == 1
    assert_same_run(together, alone)
    # The first half by two ranks, the second by one.
    stop_at_half(together)
    said = trained(path, f"output={together}")
    assert said[0].endswith(f"checkpoint-{STEPS // 2}")
    assert_same_run(together, alone)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)],
    ids=["ddp", "two by two"],
)
def test_two_groups_train_as_one_process_with_two_batches_a_step(
    settings, tmp_path, ranks, parallel
):
    settings = {**settings, "mixture": {**settings["mixture"], "steps": 2 * STEPS}}
    path = as_config(settings, tmp_path)
    alone, together = tmp_path / "alone", tmp_path / "together"
    steps = f"trainer.max_steps={STEPS}"
    trained(path, steps, "trainer.gradient_accumulation_steps=2", f"output={alone}")
    trained_on(ranks, path, steps, f"output={together}", f"chunk_parallel={parallel}")
    assert_same_run(together, alone)


def trained_in(folders, path):
    """Train in a folder of the rank's own."""
    os.chdir(folders[int(os.environ["RANK"])])
    return trained(path)


def test_no_file_is_written_by_two_ranks(settings, tmp_path):
    """Which would damage it, where they share a folder; here each has its own."""
    path = as_config(settings, tmp_path, chunk_parallel=2, output="out")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    run_ranks(2, trained_in, folders, path)
    last = folders[0] / "out" / f"checkpoint-{STEPS}"
    assert last_checkpoint(folders[0] / "out") == last
    files = [{file.name for file in folder.rglob("*") if file.is_file()} for folder in folders]
    assert files[1] == {"rng_state_1.pth"}
    assert files[0] > {"rng_state_0.pth", WEIGHTS}
    assert not files[0] & files[1]


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

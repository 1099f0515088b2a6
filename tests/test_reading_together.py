"""Ranks that read one text together: the session of one process, whatever is done with it."""

import os
import subprocess
import sys

import pytest

from cometlm import Session
from cometlm.parallel.reading import SharedSession
from tests import real
from tests.ranks import run_ranks
from tests.sessions import going_on

TEXT = "".join(
    f"On day {i} the keeper of the lamp wrote: wind {i * 37 % 100}, naïve ☂️ sea.\n"
    for i in range(16)
)


def difference(ours, theirs):
    """Of stats, of the next tokens, and of their logits."""
    (ids, logits), (want_ids, want) = going_on(ours), going_on(theirs)
    return ours.stats() == theirs.stats(), ids == want_ids, float((logits - want).abs().max())


def compare(family, chunks, folder, sizes):
    """One text in two pieces, with a question, a saved file and a chat turn on the way."""
    model, tokenizer = real.tiny_comet(family, **sizes), real.tokenizer("smollm2")
    alone, together = Session(model, tokenizer), SharedSession(model, tokenizer, chunks=chunks)
    found = []
    half = len(TEXT) // 2
    for piece in (TEXT[:half], TEXT[half:]):
        alone.read(piece)
        together.read(piece)
        found.append(difference(together, alone))
        found.append(
            (
                alone.ask("When?", max_new_tokens=3) == together.ask("When?", max_new_tokens=3),
                True,
                0.0,
            )
        )
    posed = [alone.fork(), together.fork()]
    for session in posed:  # the open chunk ends early, or does not, wherever it stands
        for length in (3, 7, 10, 2, 11):
            session.read(TEXT[:90])
            session.ask_in_one_chunk(list(range(5, 5 + length)))
    found.append(difference(posed[1], posed[0]))
    together.save(f"{folder}/book.comet")
    loaded = Session.load(f"{folder}/book.comet", model, tokenizer)
    found.append(difference(loaded, alone))
    again = SharedSession.load(f"{folder}/book.comet", model, tokenizer)
    for session in (again, alone):
        session.read(TEXT)
        session.chat("Who?", max_new_tokens=2)
    found.append(difference(again, alone))
    return found


@pytest.mark.parametrize(
    ("ranks", "family", "chunks", "sizes"),
    [
        (2, "llama", 3, {}),
        (3, "gemma3_text", 2, {}),
        (2, "llama", 1, {"temporary_memory": False}),
        (2, "llama", 3, {"overlap": 5}),
        pytest.param(2, "llama", 50, {}, marks=pytest.mark.slow),
    ],
)
def test_reading_together_is_reading_alone(ranks, family, chunks, sizes, tmp_path):
    for found in run_ranks(ranks, compare, family, chunks, str(tmp_path), sizes):
        for stats, ids, logits in found:
            assert stats
            assert ids
            assert logits < 1e-9


def test_one_process_alone_is_refused():
    with pytest.raises(ValueError, match="torchrun"):
        SharedSession(real.tiny_comet())


@pytest.mark.slow
def test_the_command_under_torchrun_writes_one_session(tmp_path):
    model = tmp_path / "model"
    real.tiny_comet().float().save_pretrained(model, backbone=True)
    real.tokenizer("smollm2").save_pretrained(model)
    (tmp_path / "a.txt").write_text(TEXT * 3, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    cometlm = [sys.executable, "-c", "from cometlm.cli.main import run; run()"]
    read = ["read", str(model), str(tmp_path / "a.txt"), "--dtype", "float32", "--device", "cpu"]
    said = {}
    for name, launcher in (("alone", []), ("together", [*torchrun, "--no-python"])):
        path = tmp_path / f"{name}.comet"
        done = subprocess.run(
            [*launcher, *cometlm, *read, "--save", str(path), "--next", "5"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stderr.count("saved ") == 1
        said[name] = done.stdout
    assert said["alone"] == said["together"]
    assert (tmp_path / "alone.comet").stat().st_size == (tmp_path / "together.comet").stat().st_size

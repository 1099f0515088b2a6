"""A session outlives its process: what a file keeps, and which models it takes."""

import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cometlm
from cometlm import Session
from cometlm.session.file import full_bytes
from cometlm.session.session import SessionStats
from tests.sessions import (
    SIZES,
    TEXT,
    assert_same,
    model_of,
    read_at_random,
    reloaded,
    session_of,
    tokenizer_of,
)
from tests.tiny import SMALL, random_ids, tiny_backbone

pytestmark = pytest.mark.usefixtures("small_windows")


# --- round trips --------------------------------------------------------------------------------

KINDS = [
    "llama",
    "qwen3",
    "like gemma",
    "float32",
    "bfloat16",
    "mixed",
    "no global",
    "no temporary",
    "no gate",
    "overlap",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_loaded_session_goes_on_as_the_saved_one(kind, seed, tmp_path):
    session = session_of(kind)
    read_at_random(session, seed)
    loaded = reloaded(session, tmp_path / "s")
    assert_same(loaded, session)
    read_at_random(session, seed + 100)
    read_at_random(loaded, seed + 100)
    for one in (session, loaded):
        list(one.finish())
    assert_same(loaded, session)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_full_memory_takes_is_known_before(kind):
    session, want = session_of(kind), full_bytes(model_of(kind))
    session.read(TEXT[:40])
    assert session.stats().memory_bytes <= want
    session.read(TEXT)
    assert session.stats().memory_bytes == want


@pytest.mark.parametrize("kind", ["llama", "overlap"])
def test_a_session_that_has_just_made_room_for_a_question(kind, tmp_path):
    session, question = session_of(kind), [7] * 8
    session.read([5] * 10)
    next(session.asking_in_one_chunk(question))
    assert session.open_tokens == 3  # of 12, beside the question and an eighth
    loaded = reloaded(session, tmp_path / "s")
    for one in (session, loaded):
        one.read(question)
    assert_same(loaded, session)


def test_an_unread_session(tmp_path):
    loaded = reloaded(session_of(), tmp_path / "s")
    assert loaded.stats() == SessionStats(0, 0, 0)
    want = session_of()
    for session in (loaded, want):
        session.read(TEXT)
    assert_same(loaded, want)


def test_a_backbone_that_uses_its_weights_otherwise_is_refused(tmp_path):
    """Rotary positions, among others, are in no weight."""
    backbones = [tiny_backbone("llama") for _ in range(3)]
    backbones[1].config.rms_norm_eps *= 1 + 1e-7  # as a file of GGUF rounds it
    backbones[2].config.rope_parameters["rope_theta"] = 50.0
    session, same, other = (Session(cometlm.attach(one, **SMALL)) for one in backbones)
    session.read(random_ids(40).tolist())
    session.save(tmp_path / "s")
    Session.load(tmp_path / "s", same.model)
    with pytest.raises(ValueError, match=r"rope_theta is 10000\.0, this model's is 50\.0"):
        Session.load(tmp_path / "s", other.model)


def test_saving_changes_nothing(tmp_path):
    session, want = session_of(), session_of()
    for piece in (TEXT[:333], TEXT[333:]):
        session.read(piece)
        session.save(tmp_path / "s")
        want.read(piece)
    assert_same(session, want)


PROGRAM = """
import json, sys, torch
torch.set_num_threads(1)
from cometlm import Session
from tests import real
session = Session.load(sys.argv[1], real.tiny_comet(), real.tokenizer("smollm2"))
stats = session.stats()
print(json.dumps([stats.tokens, stats.chunks, stats.memory_bytes, session.continuation(8)]))
"""


def test_another_process_goes_on(tmp_path):
    session = session_of()
    session.read(TEXT)
    session.save(tmp_path / "s")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "s")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stats = session.stats()
    want = [stats.tokens, stats.chunks, stats.memory_bytes, session.continuation(8)]
    assert json.loads(done.stdout.splitlines()[-1]) == want


def test_the_file_does_not_grow_with_what_was_read(small, tmp_path):
    sizes = []
    for count in (60, 600, 3001):
        session = Session(small)
        session.read(random_ids(count))
        session.save(tmp_path / "s")
        sizes.append((tmp_path / "s").stat().st_size)
    spread = 12 * 8 + 32  # the open chunk's ids; digits of counts, in steps of 8
    assert max(sizes) - min(sizes) <= spread


def test_the_file_of_a_text_does_not_grow(tmp_path):
    sizes = []
    for times in (2, 8, 20):
        session = session_of()
        session.read("The lamp went out in the night and nobody saw it.\n" * 10 * times)
        session.save(tmp_path / "s")
        sizes.append((tmp_path / "s").stat().st_size)
    text_held = 2 * (160 + 96 + 128)  # a window, its margin and context, escaped as JSON
    assert max(sizes) - min(sizes) <= text_held + 12 * 8 + 32


def test_a_session_is_saved_in_the_middle_of_a_read(small, tmp_path):
    """As `cometlm read --save` does every five minutes."""
    ids = random_ids(100)
    want = Session(small)
    want.read(ids)
    session = Session(small)
    for number, _ in enumerate(session.reading(ids)):
        loaded = reloaded(session, tmp_path / str(number))
        assert loaded.continuation(3) == want.continuation(3)
        list(loaded.settle())
        assert_same(loaded, want)
    assert number == 7


# --- another model ------------------------------------------------------------------------------


def other_memory():
    return cometlm.attach(tiny_backbone("llama"), seed=1, **SIZES)


def other_backbone():
    model = cometlm.attach(tiny_backbone("llama"), **SIZES)
    with torch.no_grad():  # one number of one weight
        model.model.cells[2].layer.mlp.up_proj.weight[7, 11] += 1e-9
    return model


OTHERS = {
    "backbone": other_backbone,
    "memory weights": other_memory,
    "capacity is 5, this model's is 6": lambda: cometlm.attach(
        tiny_backbone("llama"), **{**SIZES, "capacity": 6}
    ),
}


@pytest.mark.parametrize("count", [0, 40])
@pytest.mark.parametrize("part", OTHERS)
def test_another_model_is_refused(part, count, tmp_path):
    session = Session(cometlm.attach(tiny_backbone("llama"), **SIZES))
    session.read(random_ids(count))
    session.save(tmp_path / "s")
    with pytest.raises(ValueError, match=rf"{tmp_path / 's'} .*another model: its {part}"):
        Session.load(tmp_path / "s", OTHERS[part]())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype_is_refused(dtype, tmp_path):
    session = Session(cometlm.attach(tiny_backbone("llama"), **SIZES))
    session.read(random_ids(40))
    session.save(tmp_path / "s")
    other = cometlm.attach(tiny_backbone("llama"), **SIZES).to(dtype)
    with pytest.raises(ValueError, match="session of another model"):
        Session.load(tmp_path / "s", other)


def test_the_same_model_made_again_is_accepted(tmp_path):
    session = Session(cometlm.attach(tiny_backbone("llama"), **SIZES))
    session.read(random_ids(40))
    session.save(tmp_path / "s")
    again = cometlm.attach(tiny_backbone("llama"), **SIZES)
    assert_same(Session.load(tmp_path / "s", again), session)


def test_pending_text_needs_its_tokenizer(tmp_path):
    session = session_of()
    session.read("The lamp went out.")
    session.save(tmp_path / "s")
    with pytest.raises(ValueError, match=r"/s was read with a tokenizer"):
        Session.load(tmp_path / "s", session.model)


def test_a_tokenizer_may_come_later(tmp_path):
    """Text after ids goes on; it begins no new text."""
    model, tokenizer = model_of("like gemma"), tokenizer_of("like gemma")
    session, want = Session(model), Session(model, tokenizer)
    for one in (session, want):
        one.read(range(5, 40))
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", model, tokenizer)
    loaded.read("The lamp")
    want.read("The lamp")
    assert_same(loaded, want)


# --- saving -------------------------------------------------------------------------------------


@contextlib.contextmanager
def failing_sync(monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


@contextlib.contextmanager
def small_files(monkeypatch):
    """The system refuses to write more than 1000 bytes into a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def failing_rename(monkeypatch):
    def broken(*paths):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        yield


@pytest.mark.parametrize("failure", [failing_sync, small_files, failing_rename])
@pytest.mark.parametrize("there", [True, False])
def test_a_failed_save_leaves_what_was_there(small, tmp_path, monkeypatch, failure, there):
    path = tmp_path / "s"
    old, new = Session(small), Session(small)
    old.read(random_ids(30, seed=1))
    new.read(random_ids(50, seed=2))
    if there:
        old.save(path)
    with failure(monkeypatch), pytest.raises(OSError, match=r"rror|No space|too large"):
        new.save(path)
    assert list(tmp_path.iterdir()) == ([path] if there else [])
    if there:
        assert_same(Session.load(path, small), old)
    new.save(path)
    assert_same(Session.load(path, small), new)
    assert list(tmp_path.iterdir()) == [path]


def test_saving_where_no_file_can_be_is_an_oserror(small, tmp_path):
    with pytest.raises(OSError, match="no folder"):
        Session(small).save(tmp_path / "no folder" / "s")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        Session(small).save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(small, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        Session(small).save(tmp_path / "s")
    finally:
        assert os.umask(before) == mask
    assert (tmp_path / "s").stat().st_mode & 0o777 == mode


def kill_while_saving(small, folder, times):
    """SIGKILL a process that saves two sessions by turns; gives how often that left a part."""
    path = folder / "s"
    sessions = [Session(small), Session(small)]
    whole = []
    for seed, session in enumerate(sessions):
        session.read(random_ids(40 + 9 * seed, seed=seed))
        session.save(path)
        whole.append(path.read_bytes())
    assert whole[0] != whole[1]
    rng = random.Random(0)
    for _ in range(times):
        before = path.read_bytes()
        child = os.fork()
        if child == 0:  # nothing but saving happens here
            try:
                if rng.random() < 0.5:  # a slow disk
                    os.fsync = lambda handle: time.sleep(0.004)
                while True:
                    for session in sessions:
                        session.save(path)
            finally:
                os._exit(1)
        rng.random()  # as the child did
        time.sleep(rng.random() * 0.04)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)  # it had not ended by itself
        after = path.read_bytes()
        assert after in whole, f"neither one nor the other; before it was {before in whole}"
        assert_same(Session.load(path, small), sessions[whole.index(after)])
    return len(list(folder.glob(".s.*.part")))


def test_a_killed_save_leaves_a_whole_session(small, tmp_path):
    kill_while_saving(small, tmp_path, 15)


@pytest.mark.slow
def test_two_hundred_killed_saves_leave_whole_sessions(small, tmp_path):
    assert kill_while_saving(small, tmp_path, 200) > 0  # some hit the moment of writing

"""`cometlm read`: reading on, keeping sessions, resuming."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from cometlm import Session
from cometlm.cli import console
from cometlm.cli import read as read_verb
from tests import real
from tests.cli.said import INTERRUPTED, TEXT, assert_same, count_of, kept, new_session, one_line

pytestmark = pytest.mark.usefixtures("small_windows")


def test_read_says_how_much_was_read(command, text_file):
    code, out, err = command("read", "tiny", text_file)
    assert code == 0
    assert out == ""
    assert count_of(err) == len(real.tokenizer("smollm2")(TEXT)["input_ids"])


def test_read_standard_input(command):
    code, _, err = command("read", "tiny", "-", stdin="naïve ☂️ text", encoding="ascii")
    assert code == 0
    assert count_of(err) == len(real.tokenizer("smollm2")("naïve ☂️ text")["input_ids"])


def test_next_tokens_go_to_standard_output(command, model, text_file):
    tokenizer = real.tokenizer("smollm2")
    session = Session(model, tokenizer)
    session.read(TEXT)
    list(session.finish())
    code, out, err = command("read", "tiny", text_file, "--next", "7")
    assert code == 0
    assert out == tokenizer.decode(session.continuation(7)) + "\n"
    assert "untrained" in err


def test_save_keeps_the_session(command, model, text_file):
    code, out, err = command("read", "tiny", text_file, "--save", "s")
    assert (code, out) == (0, "")
    assert "saved s" in err
    assert_same(kept("s", model), new_session(model, TEXT))


def test_session_goes_on_with_another_text(command, model, text_file):
    Path("first.txt").write_text(TEXT[:1001])
    Path("second.txt").write_text(TEXT[1001:])
    command("read", "tiny", "first.txt", "--save", "s")
    before = Path("s").read_bytes()
    code, _, _ = command("read", "tiny", "second.txt", "--session", "s", "--save", "t")
    assert code == 0
    assert_same(kept("t", model), new_session(model, TEXT))
    assert Path("s").read_bytes() == before


def test_session_and_save_may_be_one_file(command, model, text_file):
    for part in (TEXT[:1001], TEXT[1001:]):
        Path("part.txt").write_text(part)
        begin = ["--session", "s"] if Path("s").exists() else []
        assert command("read", "tiny", "part.txt", *begin, "--save", "s")[0] == 0
    assert_same(kept("s", model), new_session(model, TEXT))


def interrupt_at(monkeypatch, chunk, times=1):
    """Ctrl-C after so many chunks."""
    show, seen = console.ReadingProgress.show, []

    def shown(self, stats):
        show(self, stats)
        seen.append(stats)
        if len(seen) == chunk:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(console.ReadingProgress, "show", shown)
    return seen


@pytest.mark.parametrize(("chunk", "times"), [(1, 1), (5, 1), (30, 1), (2, 2)])
def test_ctrl_c_keeps_what_was_read_and_resume_goes_on(
    command, monkeypatch, model, text_file, chunk, times
):
    with monkeypatch.context() as patch:
        seen = interrupt_at(patch, chunk, times)
        code, out, err = command("read", "tiny", text_file, "--save", "s", "--next", "3")
    assert (code, out) == (INTERRUPTED, "")
    assert "interrupted after" in err
    assert "saved s" in err
    assert len(seen) == chunk
    assert 0 < kept("s", model).characters < len(TEXT)
    code, _, err = command("read", "tiny", text_file, "--save", "s", "--resume")
    assert code == 0, err
    assert_same(kept("s", model), new_session(model, TEXT))
    assert kept("s", model).characters == len(TEXT)


def test_resume_after_many_interrupts(command, monkeypatch, model, text_file):
    resume = []
    for chunk in (3, 1, 10, 4):
        with monkeypatch.context() as patch:
            interrupt_at(patch, chunk)
            assert command("read", "tiny", text_file, "--save", "s", *resume)[0] == INTERRUPTED
        resume = ["--resume"]
    assert command("read", "tiny", text_file, "--save", "s", *resume)[0] == 0
    assert_same(kept("s", model), new_session(model, TEXT))


def test_resume_of_a_second_text_goes_on_in_that_text(command, monkeypatch, model, text_file):
    """What the session had read before is no part of the text."""
    command("read", "tiny", text_file, "--save", "first")
    Path("second.txt").write_text(TEXT.upper())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        code, _, _ = command("read", "tiny", "second.txt", "--session", "first", "--save", "s")
    assert code == INTERRUPTED
    code, _, err = command("read", "tiny", "second.txt", "--save", "s", "--resume")
    assert code == 0, err
    assert_same(kept("s", model), new_session(model, TEXT + TEXT.upper()))


def test_resume_at_the_end_reads_nothing_more(command, model, text_file):
    command("read", "tiny", text_file, "--save", "s")
    code, _, _ = command("read", "tiny", text_file, "--save", "s", "--resume")
    assert code == 0
    assert_same(kept("s", model), new_session(model, TEXT))


def test_resume_reads_what_was_added_to_the_file(command, model, text_file):
    command("read", "tiny", text_file, "--save", "s")
    with text_file.open("a") as file:
        file.write(TEXT[:500])
    assert command("read", "tiny", text_file, "--save", "s", "--resume")[0] == 0
    assert_same(kept("s", model), new_session(model, TEXT + TEXT[:500]))


def test_resume_of_a_file_with_wide_characters_and_windows_line_ends(
    command, monkeypatch, model, tmp_path
):
    wide = TEXT.replace("lamp", "ламп☂️").replace("\n", "\r\n")
    (tmp_path / "wide.txt").write_bytes(wide.encode())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        command("read", "tiny", "wide.txt", "--save", "s")
    assert command("read", "tiny", "wide.txt", "--save", "s", "--resume")[0] == 0
    assert_same(kept("s", model), new_session(model, wide.replace("\r\n", "\n")))


def test_a_session_is_kept_while_reading(command, monkeypatch, model, text_file, tmp_path):
    """Every one of the five-minute saves can be resumed."""
    text_file.write_text(TEXT[:800])
    monkeypatch.setattr(read_verb, "_SAVE_EVERY", -1)
    save, copies = Session.save, []

    def saved(self, path):
        save(self, path)
        copies.append(shutil.copy(path, tmp_path / f"copy{len(copies)}"))

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", saved)
        command("read", "tiny", text_file, "--save", "s")
    assert len(copies) > 10
    for copy in copies[::4]:
        assert command("read", "tiny", text_file, "--save", copy, "--resume")[0] == 0
        assert_same(kept(copy, model), new_session(model, TEXT[:800]))


def test_what_was_read_before_a_bad_byte_is_kept(command, model, text_file):
    """The file is repaired, and reading goes on."""
    raw = (TEXT * 3).encode()
    text_file.write_bytes(raw[:9_000] + b"\xff" + raw[9_000:])
    code, _, err = command("read", "tiny", text_file, "--save", "s")
    assert code == 1
    assert f"{text_file} is not UTF-8" in one_line(err)
    assert 4_000 < kept("s", model).characters <= 9_000  # files are decoded 8192 bytes at a time
    text_file.write_bytes(raw)
    assert command("read", "tiny", text_file, "--save", "s", "--resume")[0] == 0
    assert_same(kept("s", model), new_session(model, TEXT * 3))


def test_a_bad_byte_at_the_start_leaves_an_older_session(command, model, text_file):
    command("read", "tiny", text_file, "--save", "s")
    before = Path("s").read_bytes()
    Path("bad.txt").write_bytes(b"\xff\xfe")
    code, _, err = command("read", "tiny", "bad.txt", "--save", "s")
    assert code == 1
    assert "bad.txt" in one_line(err)
    assert Path("s").read_bytes() == before


def test_a_full_disk_is_one_line(command, monkeypatch, text_file):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = command("read", "tiny", text_file, "--save", "s")
    assert code == 1
    assert "No space left" in one_line(err)
    assert not Path("s").exists()


BEFORE_LOADING = {
    "a folder that is missing": (["--save", "nowhere/s"], "--save nowhere/s"),
    "a directory": (["--save", "."], "is a directory"),
    "resume without save": (["--resume"], "--resume needs --save"),
    "resume of a session": (["--resume", "--save", "s", "--session", "t"], "leave out --session"),
    "a session that is missing": (["--session", "nowhere"], "nowhere"),
    "a resume of nothing": (["--save", "nowhere", "--resume"], "nowhere"),
    "a session that is none": (["--session", "text.txt"], "text.txt"),
}


@pytest.mark.parametrize("case", BEFORE_LOADING)
def test_what_cannot_work_is_refused_in_one_line(command, loads, text_file, case):
    arguments, message = BEFORE_LOADING[case]
    code, out, err = command("read", "tiny", text_file, *arguments)
    assert (code, out) == (1, "")
    assert message in one_line(err)
    if "session" not in case and "of nothing" not in case:
        assert not loads  # said at once, not after minutes of loading


def test_resume_in_a_shorter_text_is_refused(command, model, text_file):
    command("read", "tiny", text_file, "--save", "s")
    before = Path("s").read_bytes()
    Path("short.txt").write_text(TEXT[:50])
    code, _, err = command("read", "tiny", "short.txt", "--save", "s", "--resume")
    assert code == 1
    assert "short.txt is shorter" in one_line(err)
    assert Path("s").read_bytes() == before


def test_a_session_of_another_model_is_one_line(command, text_file):
    new_session(real.tiny_comet("qwen3"), TEXT[:300]).save("other")
    code, _, err = command("read", "tiny", text_file, "--session", "other")
    assert code == 1
    assert "session of another model" in one_line(err)

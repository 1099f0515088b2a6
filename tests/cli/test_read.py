"""`cometlm read`: reading on, keeping sessions, resuming."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from cometlm import Session
from cometlm.cli import console, interrupt
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


def test_ranks_that_read_together_leave_another_session_until_all_is_read(
    command, monkeypatch, model, text_file
):
    command("read", "tiny", text_file, "--save", "s")
    before = Path("s").read_bytes()
    monkeypatch.setattr(read_verb, "join_job", lambda device: (0, 2))
    monkeypatch.setattr(read_verb, "SharedSession", Session)
    monkeypatch.setattr(read_verb, "_SAVE_EVERY_BLOCKS", 1)
    Path("bad.txt").write_bytes((TEXT * 3).encode()[:9_000] + b"\xff")
    code, _, err = command("read", "tiny", "bad.txt", "--save", "s")
    assert code == 1
    assert err.count("kept in s.part until all is read; s is as it was") == 1
    assert Path("s").read_bytes() == before
    assert kept("s.part", model).characters > 1_000
    monkeypatch.setattr(read_verb, "_SAVE_EVERY_BLOCKS", 10**6)
    assert command("read", "tiny", text_file, "--save", "s")[0] == 0
    assert_same(kept("s", model), new_session(model, TEXT))
    assert Path("s.part").exists()  # which this reading has not written
    monkeypatch.setattr(read_verb, "_SAVE_EVERY_BLOCKS", 1)
    assert command("read", "tiny", text_file, "--save", "s")[0] == 0
    assert not Path("s.part").exists()


def test_a_reading_that_fails_is_kept_beside_another_session(command, model, text_file):
    command("read", "tiny", text_file, "--save", "s")
    before = Path("s").read_bytes()
    Path("bad.txt").write_bytes((TEXT * 3).encode()[:9_000] + b"\xff")
    code, _, err = command("read", "tiny", "bad.txt", "--save", "s")
    assert code == 1
    assert "saved s.part; s is as it was" in err
    assert Path("s").read_bytes() == before
    assert 4_000 < kept("s.part", model).characters <= 9_000
    command("read", "tiny", "bad.txt", "--session", "s", "--save", "s")  # it goes on from there
    assert Path("s").read_bytes() != before


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


# --- several files, and other encodings ---------------------------------------------------------


def test_several_files_are_one_text(command, model):
    Path("a.txt").write_text(TEXT[:700])  # ends within a line
    Path("b.txt").write_text(TEXT[:300] + "\n")
    assert command("read", "tiny", "a.txt", "b.txt", "a.txt", "--save", "s")[0] == 0
    whole = f"{TEXT[:700]}\n{TEXT[:300]}\n{TEXT[:700]}"
    assert_same(kept("s", model), new_session(model, whole))


def test_several_files_are_resumed(command, monkeypatch, model):
    Path("a.txt").write_text(TEXT)
    Path("b.txt").write_text(TEXT.upper())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 100)
        assert command("read", "tiny", "a.txt", "b.txt", "--save", "s")[0] == INTERRUPTED
    assert command("read", "tiny", "a.txt", "b.txt", "--save", "s", "--resume")[0] == 0
    assert_same(kept("s", model), new_session(model, TEXT + TEXT.upper()))


def test_an_encoding_is_named(command, model):
    words = "für mich und Ärger\n" * 30
    Path("old.txt").write_bytes(words.encode("latin-1"))
    code, _, err = command("read", "tiny", "old.txt")
    assert code == 1
    assert "old.txt is not UTF-8 text: byte 2, in line 1, is 0xfc" in one_line(err)
    assert command("read", "tiny", "old.txt", "--encoding", "latin-1", "--save", "s")[0] == 0
    assert_same(kept("s", model), new_session(model, words))
    code, _, err = command("read", "tiny", "old.txt", "--encoding", "utf-9")
    assert code == 1
    assert "encoding must be one that Python knows, got 'utf-9'" in one_line(err)


def test_a_byte_order_mark_is_no_text(command, model):
    Path("marked.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    command("read", "tiny", "marked.txt", "--save", "s")
    assert_same(kept("s", model), new_session(model, TEXT))


@pytest.mark.parametrize("special", [False, True])
def test_control_tokens_count_only_if_that_is_said(command, model, special):
    words = "The lamp.<|im_end|>\n<|im_start|>user\n" * 9
    Path("talk.txt").write_text(words)
    command("read", "tiny", "talk.txt", "--save", "s", *["--special"] * special)
    session = new_session(model)
    session.read(words, special=special)
    assert_same(kept("s", model), session)
    tokens = session.stats().tokens
    session.read(words, special=not special)
    assert session.stats().tokens != 2 * tokens


# --- where a session may be kept ----------------------------------------------------------------


def test_a_session_is_written_over_sessions_only(command, loads, model, text_file):
    Path("notes.txt").write_text("of mine")
    Path("link.txt").symlink_to(text_file)
    for save, said in {
        text_file: "is the text that is to be read",
        "link.txt": "is the text that is to be read",
        "notes.txt": "no session would be written over it",
    }.items():
        code, _, err = command("read", "tiny", text_file, "--save", save)
        assert code == 1
        assert f"--save {save}" in one_line(err)
        assert said in err
    assert not loads
    assert (Path("notes.txt").read_text(), text_file.read_text()) == ("of mine", TEXT)
    Path("empty").touch()
    for save in ("empty", "empty"):
        assert command("read", "tiny", text_file, "--save", save)[0] == 0


def test_a_link_to_a_session_stays_one(command, model, text_file, tmp_path):
    (tmp_path / "there").mkdir()
    Path("link").symlink_to(tmp_path / "there" / "s")
    for _ in range(2):
        assert command("read", "tiny", text_file, "--save", "link")[0] == 0
        assert Path("link").is_symlink()
        assert_same(kept(tmp_path / "there" / "s", model), new_session(model, TEXT))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name")
def test_pipes_and_devices_are_left_alone(command, loads, model, text_file):
    os.mkfifo("pipe")
    for save in ("pipe", os.devnull):
        code, _, err = command("read", "tiny", text_file, "--save", save)
        assert code == 1
        assert "is a pipe, a device or the like" in one_line(err)
        with pytest.raises(ValueError, match="is a pipe, a device or the like"):
            new_session(model, TEXT).save(save)
    assert Path("pipe").is_fifo()
    assert not loads


def test_resume_in_another_text_is_refused(command, monkeypatch, model, text_file):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        command("read", "tiny", text_file, "--save", "s")
    before = Path("s").read_bytes()
    Path("other.txt").write_text(TEXT.upper())
    code, _, err = command("read", "tiny", "other.txt", "--save", "s", "--resume")
    assert code == 1
    assert "other.txt is another text than the one that the session has read" in one_line(err)
    assert kept("s", model).characters < len(TEXT)
    assert Path("s").read_bytes() == before


def test_a_resumed_session_knows_its_text_to_the_end(command, monkeypatch, model, text_file):
    for _ in range(2):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 5)
            begun = ["--resume"] if Path("s").exists() else []
            command("read", "tiny", text_file, "--save", "s", *begun)
    text_file.write_text("x" + TEXT[1:])
    assert command("read", "tiny", text_file, "--save", "s", "--resume")[0] == 1
    text_file.write_text(TEXT)
    assert command("read", "tiny", text_file, "--save", "s", "--resume")[0] == 0
    assert_same(kept("s", model), new_session(model, TEXT))


# --- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_keep_what_was_read(command, monkeypatch, model, text_file, name):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"no {name} here")
    show, seen = console.ReadingProgress.show, []

    def shown(self, stats):
        show(self, stats)
        seen.append(stats)
        if len(seen) == 4:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(console.ReadingProgress, "show", shown)
        code, _, err = command("read", "tiny", text_file, "--save", "s")
    assert code == 128 + number
    assert "saved s" in err
    assert len(seen) == 4
    assert command("read", "tiny", text_file, "--save", "s", "--resume")[0] == 0
    assert_same(kept("s", model), new_session(model, TEXT))


def test_a_signal_that_is_ignored_stays_ignored(command, monkeypatch, text_file):
    """As under nohup."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interrupt.InterruptLater(print) as later:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert not later.asked
    finally:
        signal.signal(signal.SIGTERM, before)


class SlowPipe:
    """Standard input that gives a few lines, and is interrupted while nothing comes."""

    def __init__(self, *lines):
        self.buffer, self._lines = self, list(lines)

    def read(self, size=-1):
        assert size == 0
        return b""

    def read1(self, size):
        if not self._lines:
            signal.raise_signal(signal.SIGINT)
            return pytest.fail("the first Ctrl-C ends the waiting")
        return self._lines.pop(0)

    def isatty(self):
        return False


@pytest.mark.parametrize("lines", [[TEXT[:200]], [TEXT[:30], TEXT[30:900], TEXT[900:1000]]])
def test_a_slow_pipe_keeps_what_has_come(command, model, lines):
    pipe = SlowPipe(*map(str.encode, lines))
    code, _, err = command("read", "tiny", "-", "--save", "s", stdin=pipe)
    assert code == INTERRUPTED, err
    assert "saved s" in err
    assert kept("s", model).characters == len("".join(lines))
    assert_same(kept("s", model), new_session(model, "".join(lines)))


def test_a_slow_pipe_is_saved_between_two_chunks(monkeypatch, command, model):
    monkeypatch.setattr(read_verb, "_SAVE_EVERY", -1)
    save, kept_of = Session.save, []

    def saved(self, path):
        save(self, path)
        kept_of.append(self.characters)

    monkeypatch.setattr(Session, "save", saved)
    command("read", "tiny", "-", "--save", "s", stdin=SlowPipe(b"one ", b"two ", b"three "))
    assert kept_of[:3] == [4, 8, 14]


def test_a_save_that_fails_on_the_way_is_no_end(monkeypatch, command, model, text_file):
    monkeypatch.setattr(read_verb, "_SAVE_EVERY", -1)
    save, failures = Session.save, [OSError(28, "No space left on device")] * 3

    def saved(self, path):
        if failures:
            raise failures.pop()
        save(self, path)

    monkeypatch.setattr(Session, "save", saved)
    code, _, err = command("read", "tiny", text_file, "--save", "s")
    assert code == 0
    assert err.count("could not be saved") == 3
    assert_same(kept("s", model), new_session(model, TEXT))

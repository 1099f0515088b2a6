"""`cometlm chat`: a conversation, its commands, and its interrupts."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from cometlm import Session
from cometlm.cli import console, terminal
from tests import real
from tests.cli.said import GREEDY, TEXT, assert_same, kept, new_session, one_line

pytestmark = pytest.mark.usefixtures("small_windows")


@pytest.fixture
def talk(command):
    """A conversation piped in, line by line; answers are three tokens."""

    def run(*lines, options=()):
        arguments = ["chat", "tiny", "--max-new-tokens", "3", *options]
        return command(*arguments, stdin="".join(f"{line}\n" for line in lines))

    return run


def answers(model, *messages, session=None):
    session = session or new_session(model)
    said = [session.chat(message, max_new_tokens=3, **GREEDY) for message in messages]
    return said, session


def test_chat_answers_with_everything_said_before(talk, model):
    said, _ = answers(model, "Who is there?", "Why?", "Who is there?")
    code, out, err = talk("Who is there?", "", "   ", "Why?", "Who is there?")
    assert code == 0
    assert out == "".join(f"{answer}\n" for answer in said)
    assert "tiny" in err
    assert "The memory is untrained" in err


def test_chat_saves_and_goes_on(talk, model):
    said, session = answers(model, "Who?", "Why?")
    code, out, err = talk("Who?", "Why?", "/save talk session")
    assert code == 0
    assert "saved talk session" in err
    assert_same(kept("talk session", model), session)
    more, _ = answers(model, "And then?", session=session)
    code, out, _ = talk("And then?", options=["--session", "talk session"])
    assert (code, out) == (0, f"{more[0]}\n")
    assert len(said) == 2


def test_chat_forks_and_goes_back(talk, model):
    (who,), session = answers(model, "Who?")
    (why,), _ = answers(model, "Why?", session=session.fork())
    (when,), _ = answers(model, "When?", session=session)
    code, out, err = talk("Who?", "/fork", "Why?", "/back", "When?", "/back", "/quit", "no more")
    assert code == 0
    assert out == f"{who}\n{why}\n{when}\n"
    assert err.count("error:") == 1
    assert "no fork to go back to" in err


def test_chat_forks_of_forks(talk, model):
    _, session = answers(model, "Who?")
    talk("Who?", "/fork", "Why?", "/fork", "When?", "/back", "/back", "/save s")
    assert_same(kept("s", model), session)


def test_chat_reads_files_and_says_what_it_holds(talk, model, text_file):
    session = new_session(model, TEXT)
    (said,), _ = answers(model, "Which ship?", session=session)
    code, out, err = talk(f"/read {text_file}", "/stats", "Which ship?")
    assert (code, out) == (0, f"{said}\n")
    tokens = len(real.tokenizer("smollm2")(TEXT)["input_ids"])
    assert len(re.findall(rf"^{tokens:,} tokens, .* of memory held$", err, re.MULTILINE)) == 2


def test_chat_takes_a_message_of_bytes_that_are_no_text(talk, command, monkeypatch, model):
    """As a C locale decodes them: one line about it, and the conversation goes on."""
    (said,), _ = answers(model, "Who?")
    lines = iter(["a \udcff", "Who?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, err = talk()
    assert (code, out) == (0, f"{said}\n")
    assert "error:" in err


BAD_LINES = {
    "/read": "",
    "/read nowhere.txt": "nowhere.txt",
    "/read .": "directory",
    "/read bad.bin": "bad.bin",
    "/save": "/save needs a path",
    "/save nowhere/s": "nowhere/s",
    "/save .": "",
    "/back": "no fork",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_an_error_in_a_command_does_not_end_the_conversation(talk, model, line):
    Path("bad.bin").write_bytes(b"\xff\xfe\0")
    (said,), _ = answers(model, "Who?")
    code, out, err = talk(line, "Who?")
    assert (code, out) == (0, f"{said}\n")
    assert err.count("error: ") == 1
    assert BAD_LINES[line] in re.search("error: .*", err)[0]


def test_an_unknown_command_shows_the_help(talk, model):
    (said,), _ = answers(model, "Who?")
    for line in ("/help", "/what", "/"):
        code, out, err = talk(line, "Who?")
        assert (code, out) == (0, f"{said}\n")
        for word in ("/save", "/fork", "/back", "/stats", "/read", "/quit"):
            assert word in err


def test_ctrl_c_ends_an_answer_and_keeps_it(talk, monkeypatch, model):
    """The next message comes after what was written of the answer."""
    printed = console.print_stream
    ended = []

    def interrupted(pieces):
        if ended:
            return printed(pieces)
        ended.append(next(pieces))
        raise KeyboardInterrupt

    monkeypatch.setattr("cometlm.cli.chat.print_stream", interrupted)
    code, _, err = talk("Who?", "/stats", "Why?", "/stats")
    assert code == 0
    counts = [int(count.replace(",", "")) for count in re.findall(r"^([\d,]+) tokens", err, re.M)]
    tokenizer = real.tokenizer("smollm2")
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, return_dict=False
    )
    assert len(turn) < counts[0] < counts[1]


def test_ctrl_c_ends_reading_and_keeps_what_was_read(talk, monkeypatch, model, text_file):
    read = Session.reading

    def interrupted(self, *args, **options):
        for number, stats in enumerate(read(self, *args, **options)):
            yield stats
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Session, "reading", interrupted)
    code, _, err = talk(f"/read {text_file}", "/save s")
    assert code == 0
    assert "stopped; what was read of it stays" in err
    assert 0 < kept("s", model).characters < len(TEXT)


def test_a_file_that_cannot_be_read_leaves_the_conversation_as_it_was(talk, model, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"words " * 4_000 + b"\xff")
    _, session = answers(model, "Who?")
    code, _, err = talk("Who?", f"/read {tmp_path / 'bad.txt'}", "/save s")
    assert code == 0
    assert "bad.txt is not UTF-8" in err
    assert_same(kept("s", model), session)


def test_a_system_message_is_said_once(talk, monkeypatch):
    """Also behind an answer that was interrupted; and again where no answer was given yet."""
    chat, said, printed = Session.chat, [], console.print_stream

    def noting(session, message, *, system=None, **options):
        said.append(system)
        return chat(session, message, system=system, **options)

    def interrupted(pieces):
        if len(said) > 1:
            return printed(pieces)
        next(pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "chat", noting)
    monkeypatch.setattr("cometlm.cli.chat.print_stream", interrupted)
    talk("/fork", "Who?", "Why?", "/back", "Where?", "When?", options=["--system", "Be brief."])
    assert said == ["Be brief.", None, "Be brief.", None]


@pytest.mark.parametrize("error", [RuntimeError, FloatingPointError])
def test_an_error_of_the_model_does_not_end_the_conversation(talk, monkeypatch, error):
    printed, failed = console.print_stream, []

    def failing(pieces):
        if failed:
            return printed(pieces)
        failed.append(next(pieces))
        raise error("the device is full")

    monkeypatch.setattr("cometlm.cli.chat.print_stream", failing)
    code, out, err = talk("Who?", "Why?", "/save s")
    assert code == 0
    assert out.strip()
    assert "error: the device is full" in err
    assert "saved s" in err


def test_an_unforeseen_end_says_what_is_lost(talk, monkeypatch, capsys):
    def failing(pieces):
        list(pieces)
        raise KeyError("wrong")

    monkeypatch.setattr("cometlm.cli.chat.print_stream", failing)
    with pytest.raises(KeyError):
        talk("Who?")
    assert "of this conversation are in no file" in capsys.readouterr().err


def test_a_message_may_begin_with_a_slash(talk, model):
    said, session = answers(model, "/help me", "/etc/hosts is what?")
    code, out, _ = talk("//help me", "//etc/hosts is what?", "/save s")
    assert (code, out) == (0, "".join(f"{answer}\n" for answer in said))
    assert_same(kept("s", model), session)


def test_what_is_in_no_file_is_said_at_the_end(talk, model):
    _, session = answers(model, "Who?")
    tokens = session.stats().tokens
    _, _, err = talk("Who?")
    assert f"{tokens} tokens of this conversation are in no file" in err
    for lines in ([], ["/stats"], ["Who?", "/save s"]):
        assert "in no file" not in talk(*lines)[2]
    assert "in no file" in talk("Why?", options=["--session", "s"])[2]


def test_what_is_lost_is_counted_in_the_branch_that_is_left(talk, model):
    _, session = answers(model, "Who?")
    tokens = session.stats().tokens
    err = talk("Who?", "/fork", "Why?", "/save s", "/back")[2]
    assert f"\n{tokens} tokens of this conversation are in no file" in err
    assert "in no file" not in talk("Who?", "/save s", "/fork", "Why?", "/back")[2]


def test_save_writes_over_no_text(talk, model, text_file):
    _, _, err = talk("Who?", f"/save {text_file}", "/save s", "/save s")
    assert "no session would be written over it" in err
    assert text_file.read_text() == TEXT
    assert err.count("saved s") == 2


def test_chat_reads_files_in_another_encoding(talk, model, tmp_path):
    words = "für mich\n" * 40
    (tmp_path / "old.txt").write_bytes(words.encode("latin-1"))
    assert "byte 2, in line 1, is 0xfc" in talk("/read old.txt")[2]
    talk("/read old.txt", "/save s", options=["--encoding", "latin-1"])
    assert_same(kept("s", model), new_session(model, words))


def test_a_system_message_stands_in_front_of_the_first_message(talk, model):
    session = new_session(model)
    said = [
        session.chat("Who?", system="Be brief.", max_new_tokens=3, **GREEDY),
        session.chat("Why?", max_new_tokens=3, **GREEDY),
    ]
    code, out, _ = talk("Who?", "Why?", options=["--system", "Be brief."])
    assert (code, out) == (0, "".join(f"{answer}\n" for answer in said))


def test_a_session_is_loaded_as_it_was_made(talk, loads, model):
    talk("Who?", "/save s")
    talk("Why?", options=["--session", "s"])
    (_, first), (_, again) = loads[-2:]
    assert "chunk_size" not in first
    assert (again["chunk_size"], again["dtype"]) == (12, model.dtype)
    talk("Why?", options=["--session", "s", "--chunk-size", "24"])
    assert loads[-1][1]["chunk_size"] == 24


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_what_is_pasted_is_one_message(monkeypatch):
    """Lines that come at once are one message; one that is typed later is another."""
    theirs, ours = os.openpty()
    with os.fdopen(ours, "r", encoding="utf-8") as terminal_in:
        monkeypatch.setattr(sys, "stdin", terminal_in)
        monkeypatch.setattr("builtins.input", lambda prompt="": os.read(ours, 99).decode()[:-1])
        os.write(theirs, b"one\n\nthree\n")
        assert terminal.read_message("") == "one\n\nthree"
        os.write(theirs, b"four\n")
        assert terminal.read_message("") == "four"
    os.close(theirs)


def test_chat_of_a_session_that_is_missing(talk):
    code, _, err = talk("Who?", options=["--session", "nowhere"])
    assert code == 1
    assert "nowhere" in one_line(err)


def test_chat_after_reading_keeps_the_frame_of_the_message(talk, model, text_file):
    """SmolLM2's beginning-of-text token is also what opens a turn."""
    talk(f"/read {text_file}", "Which ship?", "/save s")
    tokenizer = real.tokenizer("smollm2")
    framed = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which ship?"}], tokenize=False, add_generation_prompt=True
    )
    (said,) = answers(model, "Which ship?", session=new_session(model, TEXT))[0]
    ids = tokenizer(framed, add_special_tokens=False)["input_ids"]
    reader = new_session(model, TEXT, ids)
    assert tokenizer.decode(reader.continuation(3), skip_special_tokens=True) == said

"""`cometlm chat`: a conversation, its commands, and its interrupts."""

import re
from pathlib import Path

import pytest

from cometlm.cli import console
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
    assert BAD_LINES[line] in one_line(err)


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

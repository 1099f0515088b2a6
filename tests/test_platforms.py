"""Machines unlike this one: Windows, as far as it can be simulated, and what is not UTF-8."""

import io
import os
import re
import sys

import pytest

from cometlm.cli import console, terminal
from tests import real
from tests.cli.said import TEXT, count_of
from tests.platforms import ASCII, COMMAND, TINY, WINDOWS, run


@pytest.fixture(autouse=True, scope="module")
def _converted():
    """The tokenizer's folder is made before a process that is hindered looks for it."""
    real.tokenizer("smollm2")


def text_in(folder):
    file = folder / "ein schöner Text.txt"
    file.write_text(TEXT + "Grüße 🙂", encoding="utf-8")
    return file


# --- Windows ------------------------------------------------------------------------------------


WINDOWS_RUN = """
try:
    import resource
except ModuleNotFoundError as error:
    print(error)
from cometlm.cli.main import app
for verb in [command.name for command in app.registered_commands]:
    app([verb, "--help"], standalone_mode=False)
print("then the demo")
"""


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """A process there: what Python lacks, the help of every verb, and the demo."""
    text_file = text_in(tmp_path_factory.mktemp("windows"))
    program = WINDOWS + TINY + WINDOWS_RUN + COMMAND
    done = run(program, "demo", "--file", text_file, "--tokens", 300)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().partition("then the demo\n")


def test_windows_is_simulated(windows):
    """Else the next two say nothing."""
    assert windows[0].startswith("No module named 'resource'")


def test_every_verb_has_help_on_windows(windows):
    assert windows[0].count("Usage:") >= 9


def test_the_demo_runs_on_windows(windows):
    """It prints the peak memory, which Python cannot say there."""
    out = windows[2]
    assert re.search(r"^ *3\d\d .* unknown$", out, re.MULTILINE)
    assert re.search(r"found \d of 1: \d+ s to read, \d+ s to ask$", out.strip())


# --- not UTF-8 ----------------------------------------------------------------------------------

SPOKEN = ["Gr\u00fc\u00dfe ", "\U0001f642 \u2026 \udcff"]
ASCII_SPOKEN = rb"Gr\xfc\xdfe \U0001f642 ... \udcff", rb"x - \u65e5"


def speak():
    """What the command prints, on both streams; into this process's, whatever they are."""
    terminal.allow_any_character()
    console.print_stream(SPOKEN)
    console.err.print("\u00d7 \u00b7 \u65e5")


@pytest.mark.parametrize(
    ("encoding", "out", "err"),
    [
        ("ascii", *ASCII_SPOKEN),
        (
            "cp1252",
            "Grüße ".encode("cp1252") + rb"\U0001f642 " + "… ".encode("cp1252") + rb"\udcff",
            "× · ".encode("cp1252") + rb"\u65e5",
        ),
        ("utf-8", "Grüße 🙂 … ".encode() + rb"\udcff", "× · 日".encode()),
    ],
)
def test_whatever_is_printed_comes_out(monkeypatch, encoding, out, err):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    speak()
    for stream in streams:
        stream.flush()
    assert streams[0].buffer.getvalue() == out + os.linesep.encode()
    assert streams[1].buffer.getvalue().strip() == err


# A process in a C locale gets text in every way: an argument, a line of input, a path that this
# names. And it says some.
HEARD = """
import sys
from cometlm.cli import terminal
from tests.test_platforms import speak
speak()
print(ascii(terminal.prompt_text(sys.argv[1])))
print(terminal.as_path(input()).read_text())
"""


def test_a_c_locale(tmp_path):
    (tmp_path / "schön").write_text("here", encoding="utf-8")
    done = run(HEARD, "Grüße 🙂", stdin=f"{tmp_path}/schön\n", **ASCII)
    assert done.returncode == 0, done.stderr
    spoken, prompt, read = done.stdout.splitlines()
    assert (spoken, done.stderr.strip()) == ASCII_SPOKEN
    assert (prompt.decode(), read) == (ascii("Grüße 🙂"), b"here")


# Then a verb that draws a table, and the verb of the command line.
INFO = """
import sys
from cometlm.cli import main
given, sys.argv = sys.argv, ["cometlm", "info", "tiny"]
try:
    main.run()
except SystemExit as end:
    assert not end.code
sys.argv = given
"""


def test_a_text_with_umlauts_is_read_in_a_c_locale(tmp_path):
    """Its path has some too, and a space; so has that of the session. Tables are drawn."""
    text_file, kept = text_in(tmp_path), tmp_path / "für später"
    arguments = ["read", "tiny", text_file, "--save", kept, "--next", 5]
    done = run(TINY + INFO + COMMAND, *arguments, **ASCII)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| gain .* x +\|$", done.stdout.decode("ascii"), re.MULTILINE)
    tokens = len(real.tokenizer("smollm2")(text_file.read_text(encoding="utf-8"))["input_ids"])
    assert count_of(done.stderr.decode("ascii")) == tokens
    assert kept.is_file()

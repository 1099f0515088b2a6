"""Machines unlike this one: Windows, as far as it can be simulated, and what is not UTF-8."""

import os
import re

import pytest

from tests import real
from tests.cli.said import TEXT, count_of
from tests.platforms import ASCII, COMMAND, TINY, WINDOWS, run


@pytest.fixture(autouse=True, scope="module")
def _converted():
    """The tokenizer's folder is made before a process that is hindered looks for it."""
    real.tokenizer("smollm2")


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "ein schöner Text.txt"
    file.write_text(TEXT + "Grüße 🙂", encoding="utf-8")
    return file


# --- Windows ------------------------------------------------------------------------------------


def test_windows_is_simulated():
    """Else the next two say nothing."""
    assert b"No module named 'resource'" in run(WINDOWS + "import resource").stderr


def test_every_verb_has_help_on_windows():
    program = """
from cometlm.cli.main import app
for verb in [command.name for command in app.registered_commands]:
    app([verb, "--help"], standalone_mode=False)
"""
    done = run(WINDOWS + program)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().count("Usage:") >= 9


def test_the_demo_runs_on_windows(text_file):
    """It prints the peak memory, which Python cannot say there."""
    done = run(WINDOWS + TINY + COMMAND, "demo", "--file", text_file, "--tokens", 300)
    out = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert re.search(r"^ *3\d\d .* unknown$", out, re.MULTILINE)
    assert re.search(r"found in \d+ s$", out.strip())


# --- not UTF-8 ----------------------------------------------------------------------------------

SPEAK = r"""
from cometlm.cli import console, terminal
terminal.allow_any_character()
console.print_stream(["Gr\u00fc\u00dfe ", "\U0001f642 \u2026 \udcff"])
console.err.print("\u00d7 \u00b7 \u65e5")
"""


@pytest.mark.parametrize(
    ("environment", "out", "err"),
    [
        (ASCII, rb"Gr\xfc\xdfe \U0001f642 ... \udcff", rb"x - \u65e5"),
        ({"PYTHONIOENCODING": "ascii"}, rb"Gr\xfc\xdfe \U0001f642 ... \udcff", rb"x - \u65e5"),
        (
            {"PYTHONIOENCODING": "cp1252"},
            "Grüße ".encode("cp1252") + rb"\U0001f642 " + "… ".encode("cp1252") + rb"\udcff",
            "× · ".encode("cp1252") + rb"\u65e5",
        ),
        (
            {"PYTHONIOENCODING": "utf-8"},
            "Grüße 🙂 … ".encode() + rb"\udcff",
            "× · 日".encode(),
        ),
    ],
    ids=["C locale", "ascii", "cp1252", "utf-8"],
)
def test_whatever_is_printed_comes_out(environment, out, err):
    done = run(SPEAK, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == out + os.linesep.encode()
    assert done.stderr.strip() == err


def test_what_comes_in_is_utf8_in_a_c_locale(tmp_path):
    """Arguments, lines of input, and the paths that these name."""
    (tmp_path / "schön").write_text("here", encoding="utf-8")
    program = """
import sys
from cometlm.cli import terminal
terminal.allow_any_character()
print(ascii(terminal.prompt_text(sys.argv[1])))
print(terminal.as_path(input()).read_text())
"""
    done = run(program, "Grüße 🙂", stdin=f"{tmp_path}/schön\n", **ASCII)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines() == [ascii("Grüße 🙂"), "here"]


def test_a_text_with_umlauts_is_read_in_a_c_locale(text_file, tmp_path):
    """Its path has some too, and a space; so has that of the session."""
    kept = tmp_path / "für später"
    arguments = ["read", "tiny", text_file, "--save", kept, "--next", 5]
    done = run(TINY + COMMAND, *arguments, **ASCII)
    assert done.returncode == 0, done.stderr
    done.stdout.decode("ascii")
    tokens = len(real.tokenizer("smollm2")(text_file.read_text(encoding="utf-8"))["input_ids"])
    assert count_of(done.stderr.decode("ascii")) == tokens
    assert kept.is_file()


def test_tables_are_drawn_in_a_c_locale():
    done = run(TINY + COMMAND, "info", "tiny", **ASCII)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| gain .* x +\|$", done.stdout.decode("ascii"), re.MULTILINE)

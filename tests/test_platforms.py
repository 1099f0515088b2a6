"""Machines unlike this one: Windows, as far as it can be simulated."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.said import TEXT
from tests.platforms import COMMAND, WINDOWS

# The tiny model in the place of `load`.
TINY = """
from cometlm.cli import console
from tests import real
console.load = lambda *_, **__: (real.tiny_comet(), real.tokenizer("smollm2"))
"""


def run(program, *arguments, **environment):
    """What a fresh process does; its output as bytes."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
        check=False,
    )


def test_every_verb_has_help_on_windows():
    program = """
from cometlm.cli.main import app
for verb in [command.name for command in app.registered_commands]:
    app([verb, "--help"], standalone_mode=False)
"""
    done = run(WINDOWS + program)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().count("Usage:") >= 9


def test_windows_is_simulated():
    """Else the tests around this one say nothing."""
    done = run(WINDOWS + "import resource")
    assert b"No module named 'resource'" in done.stderr


@pytest.mark.usefixtures("converted")
def test_the_demo_runs_on_windows(tmp_path):
    """It prints the peak memory, which Python cannot say there."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    done = run(WINDOWS + TINY + COMMAND, "demo", "--file", file, "--tokens", 300)
    out = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert re.search(r"^ *3\d\d .* unknown$", out, re.MULTILINE)
    assert re.search(r"found in \d+ s$", out.strip())


@pytest.fixture(scope="module")
def converted():
    """The tokenizer's folder is made before a process that is hindered looks for it."""
    from tests import real

    real.tokenizer("smollm2")

"""A command line that runs in the test's process, with the tiny model in the place of `load`."""

import io
import sys

import pytest

from cometlm.cli import console, main
from tests import real
from tests.cli.said import TEXT


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    for name in ("COMETLM_DEBUG", "COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model():
    made = real.tiny_comet()
    made.config.backbone = "tiny"  # what its sessions call it
    return made


@pytest.fixture
def loads(monkeypatch, model):
    """Calls of `load`, which gives the tiny model."""
    calls = []

    def fake(name, **options):
        calls.append((name, options))
        return model, real.tokenizer("smollm2")

    monkeypatch.setattr(console, "load", fake)
    return calls


@pytest.fixture
def command(monkeypatch, capsys, loads, tmp_path):
    """Run `cometlm ARGUMENTS` here, in a folder of its own; gives exit code, stdout and stderr.

    `encoding` is what the terminal says of standard input.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin="", encoding="utf-8"):
        monkeypatch.setattr(sys, "argv", ["cometlm", *map(str, arguments)])
        if isinstance(stdin, (bytes, str)):
            raw = stdin if isinstance(stdin, bytes) else stdin.encode()
            stdin = io.TextIOWrapper(io.BytesIO(raw), encoding=encoding)
        monkeypatch.setattr(sys, "stdin", stdin)
        try:
            main.run()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def on_disk(tmp_path):
    """A tiny backbone in a directory, to be loaded by the real `load`."""
    return real.save_backbone(tmp_path / "tiny-model")

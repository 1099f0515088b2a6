"""The command line as a whole: help, exit codes, one clear line per error, pipes and interrupts."""

import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import huggingface_hub
import pytest
import torch.distributed as dist
from tqdm.auto import tqdm

import cometlm
import cometlm_command
from cometlm import Session, load
from cometlm.cli import console, main
from cometlm.cli.demo import PASSKEY
from tests import real
from tests.cli.said import INTERRUPTED, TEXT, count_of, one_line

# A subprocess with the tiny model in the place of `load`.
PROGRAM = """
import signal
from tests import real
from cometlm.cli import console, main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have it ignored
console.load = lambda *_, **__: (real.tiny_comet(), real.tokenizer("smollm2"))
main.run()
"""


def test_help_lists_the_verbs(command):
    code, out, _ = command("--help")
    assert code == 0
    for verb in ("read", "info", "demo"):
        assert re.search(rf"\b{verb}\b", out)


def test_the_version_is_one_line(command):
    assert command("--version") == (0, f"cometlm {cometlm.__version__}\n", "")


@pytest.mark.parametrize("verb", ["read", "info", "demo"])
def test_every_verb_has_help(command, verb):
    code, out, _ = command(verb, "--help")
    assert code == 0
    assert "--device" in out
    assert "--dtype" in out


@pytest.mark.parametrize(("verb", "left"), [("--help", True), ("no-such-verb", False)])
def test_a_rank_that_is_done_leaves_its_job(verb, left, monkeypatch, tmp_path, capsys):
    """The interpreter's end in a job aborts now and then, and torchrun then ends the others."""
    monkeypatch.setattr(sys, "argv", ["cometlm", verb])
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(SystemExit):
            main.run()
        assert dist.is_initialized() is not left
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    capsys.readouterr()


ERRORS = {
    "a missing file": (["read", "tiny", "MISSING"], "MISSING"),
    "a directory": (["read", "tiny", "FOLDER"], "FOLDER is a directory"),
    "an empty file": (["read", "tiny", "EMPTY"], "EMPTY holds no text"),
    "a binary file": (["read", "tiny", "BINARY"], "BINARY is not text"),
    "invalid UTF-8": (["read", "tiny", "LATIN"], "LATIN is not UTF-8"),
    "a missing file in demo": (["demo", "--file", "MISSING"], "MISSING"),
    "an empty file in demo": (["demo", "--file", "EMPTY"], "EMPTY holds no text"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(command, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    Path("FOLDER").mkdir()
    Path("EMPTY").touch()
    Path("BINARY").write_bytes(b"\x7fELF\2\1\1\0\0")
    Path("LATIN").write_bytes("Zwölf Boxkämpfer".encode("latin-1"))
    arguments, message = ERRORS[case]
    code, out, err = command(*arguments)
    assert code == 1
    assert message in one_line(err)
    if "demo" not in arguments:
        assert out == ""


def test_an_error_with_a_long_name_stays_one_line(command, tmp_path):
    """Also into a pipe, where there is no terminal to wrap it for."""
    path = tmp_path / "a folder" / ("long name " * 12)
    code, _, err = command("read", "tiny", str(path))
    assert code == 1
    assert str(path) in one_line(err)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--overlap", "5000", "less than chunk_size=2048, got 5000"),
        ("--chunk-size", "4096", "max_position_embeddings=256"),
        ("--device", "nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    command, monkeypatch, on_disk, text_file, option, value, message
):
    monkeypatch.setattr(console, "load", load)
    code, _, err = command("read", on_disk, text_file, option, value)
    assert code == 1
    assert message in one_line(err)


@pytest.mark.parametrize(
    "arguments", [["read", "tiny", "TEXT"], ["info", "tiny"], ["train", "RUN"]], ids=str
)
def test_a_device_that_is_not_here_is_the_only_line(command, loads, tmp_path, arguments):
    """Not after a word on loading."""
    Path("TEXT").write_text(TEXT, encoding="utf-8")
    Path("RUN").write_text("{model: tiny, output: out, records: data.jsonl}", encoding="utf-8")
    code, out, err = command(*arguments, "--device", "gpu")
    assert (code, out, loads) == (1, "", [])
    assert err.startswith("error: device must be one that torch ")
    assert one_line(err).endswith("got 'gpu'\n")


@pytest.mark.parametrize(
    "arguments",
    [["read", "NAME", "TEXT"], ["plan", "NAME", "--speed", "1"], ["train", "RUN"]],
    ids=str,
)
def test_an_unknown_model_is_one_line(command, monkeypatch, arguments):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(console, "load", load)
    Path("TEXT").write_text(TEXT, encoding="utf-8")
    Path("RUN").write_text("{model: NAME, output: out, records: data.jsonl}", encoding="utf-8")
    code, out, err = command(*arguments)
    assert (code, out) == (1, "")
    message = one_line(err)
    assert (
        "'NAME' is no built-in model (smollm2, gemma3-270m, smollm2-passkey), no folder here"
        in message
    )
    assert err.count("\n") == 1 + ("loading" in err)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("no_such_module.inner", "this needs no_such_module, which is not installed; run: pip"),
        ("resource", "No module named 'resource'"),
        ("cometlm.gone", "No module named 'cometlm.gone'"),
    ],
)
def test_a_missing_module_is_one_line(command, monkeypatch, text_file, module, message):
    """With the command that brings it, where it is none of Python's or ours."""

    def missing(*_, **__):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(console, "load", missing)
    code, out, err = command("read", "tiny", text_file)
    assert (code, out) == (1, "")
    assert message in one_line(err)


def test_a_package_of_another_version_is_one_line(command, monkeypatch, text_file):
    def other(*_, **__):
        raise ImportError("cannot import name 'this'\nfrom 'that'", name="that")

    monkeypatch.setattr(console, "load", other)
    code, _, err = command("read", "tiny", text_file)
    assert code == 1
    assert one_line(err) == "cannot import name 'this' from 'that'\n"


def test_unknown_options_and_missing_arguments_are_usage_errors(command, text_file):
    for arguments in (["read", "tiny"], ["read", "tiny", text_file, "--nxt", "3"], ["nothing"]):
        code, out, err = command(*arguments)
        assert code == 2
        assert out == ""
        assert "Usage" in err


def test_debug_shows_the_traceback(command, monkeypatch):
    monkeypatch.setenv("COMETLM_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        command("read", "tiny", "MISSING")


@pytest.mark.parametrize("verb", ["read", "demo"])
def test_an_interrupt_says_what_was_read(command, monkeypatch, text_file, verb):
    reading = Session.reading

    def interrupted(self, source, **options):
        yield from reading(self, source)
        list(self.finish())
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "reading", interrupted)
    arguments, text = ["read", "tiny", text_file], TEXT
    if verb == "demo":
        arguments = ["demo", "--file", text_file, "--passkey", "12345", "--depth", "1"]
        text += f"\n{PASSKEY.format(key=12345)}\n"
    code, _, err = command(*arguments)
    assert code == INTERRUPTED
    assert "interrupted after" in err
    assert count_of(err) == len(real.tokenizer("smollm2")(text)["input_ids"])


def test_an_interrupt_while_loading_is_one_line(command, monkeypatch, text_file):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "load", interrupted)
    code, out, _ = command("read", "tiny", text_file)
    assert code == INTERRUPTED
    assert out == ""


def subprocess_of(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_sigint_in_a_pipe_ends_with_a_summary():
    process = subprocess_of("read", "tiny", "-")
    try:
        while b"slots" not in process.stderr.readline():  # what was loaded
            assert process.poll() is None
        # A pipe holds 64 KiB, so when all of this is in, half of it was taken out to be read.
        process.stdin.write((TEXT * 200).encode()[: 2 << 16])
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED, err.decode()
    assert "Traceback" not in err.decode()
    assert "interrupted after" in err.decode()
    assert count_of(err.decode()) > 0


def test_output_goes_into_a_pipe():
    process = subprocess_of("read", "tiny", "-", "--next", "3")
    out, err = process.communicate(TEXT.encode(), timeout=600)
    assert process.returncode == 0, err.decode()
    assert len(out.decode()) > 1
    assert "\x1b" not in out.decode()
    assert count_of(err.decode()) == len(real.tokenizer("smollm2")(TEXT)["input_ids"])


def test_the_installed_command_is_this_one(command):
    """`tests/test_wheel.py` runs it in an environment of its own."""
    (installed,) = metadata.entry_points(group="console_scripts", name="cometlm")
    assert installed.load() is cometlm_command.run
    code, _, err = command("read")
    assert code == 2
    assert re.search(r"Usage: .*\bread\b", err)


def test_what_a_run_says_stands_on_a_line_of_its_own(capsys):
    """Not behind the trainer's progress bar, which is drawn again below."""
    with tqdm(total=3, file=sys.stderr) as bar:
        console.print_beside_bars("fitting the gates")
        bar.update()
    shown = capsys.readouterr().err
    before, _, after = shown.partition("fitting the gates")
    assert "0/3" in before
    assert not before.rsplit("\r", 1)[-1].strip()
    assert after.startswith("\n")

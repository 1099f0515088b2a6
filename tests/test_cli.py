"""The command line: what it prints where, its exit codes, and one clear line per error."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from tqdm.auto import tqdm

from cometlm import CometConfig, Session, load
from cometlm.cli import console, main
from cometlm.cli.demo import NEEDLE
from cometlm.counting import chunk_cost
from tests import real
from tests.tiny import tiny_backbone

TEXT = "The lamp of the lighthouse went out in the night, and nobody saw the ship.\n" * 8
INTERRUPTED = 130

# A subprocess with the tiny model in the place of `load`.
PROGRAM = """
import signal
from tests import real
from cometlm.cli import console, main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have it ignored
console.load = lambda *_, **__: (real.tiny_comet(), real.tokenizer("smollm2"))
main.run()
"""


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    for name in ("COMETLM_DEBUG", "COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model():
    return real.tiny_comet()


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def command(monkeypatch, capsys, model):
    """Run `cometlm ARGUMENTS` here with the tiny model; gives exit code, stdout and stderr."""
    monkeypatch.setattr(console, "load", lambda *_, **__: (model, real.tokenizer("smollm2")))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cometlm", *arguments])
        try:
            main.run()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def one_line(err):
    """The message of an error, which is the last thing said and one line."""
    assert "Traceback" not in err
    _, found, message = err.partition("error: ")
    assert found, err
    assert message.count("\n") == 1, message
    return message


def count_of(err):
    """Tokens in the summary line."""
    return int(re.search(r"([\d,]+) tokens in", err)[1].replace(",", ""))


def test_help_lists_the_verbs(command):
    code, out, _ = command("--help")
    assert code == 0
    for verb in ("read", "info", "demo"):
        assert re.search(rf"\b{verb}\b", out)


@pytest.mark.parametrize("verb", ["read", "info", "demo"])
def test_every_verb_has_help(command, verb):
    code, out, _ = command(verb, "--help")
    assert code == 0
    assert "--device" in out
    assert "--dtype" in out


def test_read_says_how_much_was_read(command, text_file):
    code, out, err = command("read", "tiny", text_file)
    assert code == 0
    assert out == ""
    assert count_of(err) == len(real.tokenizer("smollm2")(TEXT)["input_ids"])


def test_read_standard_input(command, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("naïve ☂️ text".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    code, _, err = command("read", "tiny", "-")
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


ERRORS = {
    "a missing file": (["read", "tiny", "MISSING"], "MISSING"),
    "a directory": (["read", "tiny", "FOLDER"], "FOLDER is a directory"),
    "an empty file": (["read", "tiny", "EMPTY"], "EMPTY holds no text"),
    "a binary file": (["read", "tiny", "BINARY"], "BINARY is not text"),
    "invalid UTF-8": (["read", "tiny", "LATIN"], "LATIN is not UTF-8"),
    "a missing file in demo": (["demo", "--file", "MISSING"], "MISSING"),
    "an empty file in demo": (["demo", "--file", "EMPTY"], "EMPTY holds no text"),
    "a dtype that is none": (["info", "tiny", "--dtype", "bfloat17"], "'bfloat17'"),
    "a dtype of integers": (["info", "tiny", "--dtype", "int8"], "'int8'"),
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


@pytest.fixture
def saved(tmp_path):
    """A tiny backbone in a directory, to be loaded by the real `load`."""
    folder = tmp_path / "tiny-model"
    tokenizer = real.tokenizer("smollm2")
    tiny_backbone("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--chunk-size", "0", "chunk_size must be at least 1, got 0"),
        ("--capacity", "-3", "capacity must be at least 1, got -3"),
        ("--chunk-size", "4096", "max_position_embeddings=256"),
        ("--device", "nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    command, monkeypatch, saved, text_file, option, value, message
):
    monkeypatch.setattr(console, "load", load)
    code, _, err = command("read", saved, text_file, option, value)
    assert code == 1
    assert message in one_line(err)


def test_an_unknown_model_is_one_line(command, monkeypatch, text_file):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(console, "load", load)
    code, _, err = command("read", "no-such-model", text_file)
    assert code == 1
    assert "no-such-model" in one_line(err)


def test_unknown_options_and_missing_arguments_are_usage_errors(command, text_file):
    for arguments in (["read", "tiny"], ["read", "tiny", text_file, "--nxt", "3"], ["nothing"]):
        code, out, err = command(*arguments)
        assert code == 2
        assert out == ""
        assert "Usage" in err
        assert "Traceback" not in err


def test_debug_shows_the_traceback(command, monkeypatch):
    monkeypatch.setenv("COMETLM_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        command("read", "tiny", "MISSING")


@pytest.mark.parametrize("verb", ["read", "demo"])
def test_an_interrupt_says_what_was_read(command, monkeypatch, text_file, verb):
    reading = Session.reading

    def interrupted(self, source):
        yield from reading(self, source)
        list(self.finish())
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "reading", interrupted)
    arguments, text = ["read", "tiny", text_file], TEXT
    if verb == "demo":
        arguments = ["demo", "--file", text_file, "--passkey", "12345", "--depth", "1"]
        text += NEEDLE.format(key=12345)
    code, _, err = command(*arguments)
    assert code == INTERRUPTED
    assert "Traceback" not in err
    assert "interrupted after" in err
    assert count_of(err) == len(real.tokenizer("smollm2")(text)["input_ids"])


def test_an_interrupt_while_loading_is_one_line(command, monkeypatch, text_file):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "load", interrupted)
    code, out, err = command("read", "tiny", text_file)
    assert code == INTERRUPTED
    assert out == ""
    assert "Traceback" not in err


def test_info_prints_what_a_memory_costs(command, model):
    code, out, _ = command("info", "tiny")
    assert code == 0
    added = sum(p.numel() for p in model.model.comet.parameters())
    total = sum(p.numel() for p in model._backbone.parameters())
    assert re.search(rf"backbone parameters .* {total:,} ", out)
    assert re.search(rf"new parameters .* {added:,} \({added / total:.3%}\)", out)
    assert "8 memory + 18 computed = 26" in out  # 3 + 5; 12 text, 3 compression, 3 readout
    gain = chunk_cost(model.config.text_config, model.config.comet_config).gain
    assert f"{gain:.2f} ×" in out


def test_info_says_what_a_session_holds(command, model):
    _, out, _ = command("info", "tiny")
    session = Session(model, real.tokenizer("smollm2"))
    session.read(TEXT)
    list(session.finish())
    held = session.stats().memory_bytes
    assert re.search(rf"memory held.* {console.readable_bytes(held)} ", out)


def table(out):
    """Rows of the demo's table of figures: tokens, and memory held."""
    rows = re.findall(r"^ *([\d,]+)  +[\d,]+  +([\d.]+ \w+)  +[\d.]+ \w+$", out, re.MULTILINE)
    return [(int(tokens.replace(",", "")), held) for tokens, held in rows]


def test_demo_prints_memory_at_every_tenth(command, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 40, encoding="utf-8")
    code, out, _ = command("demo", "--file", str(path), "--tokens", "1000")
    assert code == 0
    assert re.search("tokens +tokens/s +memory held +peak memory", out)
    rows = table(out)
    assert [tokens // 100 for tokens, _ in rows] == list(range(1, 11))
    assert len({held for _, held in rows}) == 1
    assert re.search(r"hidden  \d{5}, after [\d,]+ tokens", out)
    assert re.search(r"answer  .*\n(not )?found in \d+ s, with a peak memory of [\d.]+ \w+", out)


@pytest.mark.parametrize(("depth", "place"), [("0", 0), ("0.5", 500), ("1", 1000)])
def test_demo_hides_a_number_where_it_is_told_to(command, monkeypatch, tmp_path, depth, place):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 40, encoding="utf-8")
    monkeypatch.setattr(Session, "ask", lambda self, *args, **options: " 31415\n")
    read = []
    reading = Session.reading
    monkeypatch.setattr(
        Session, "reading", lambda s, texts: reading(s, (read.append(t) or t for t in texts))
    )
    arguments = ("--tokens", "1000", "--passkey", "31415", "--depth", depth)
    code, out, _ = command("demo", "--file", str(path), *arguments)
    assert code == 0
    text = "".join(read)
    assert text.count("The pass key is 31415.") == 1
    assert text[: text.index("\nThe pass key")] == (TEXT * 40)[: text.index("\nThe pass key")]
    hidden = int(re.search(r"hidden  31415, after ([\d,]+) tokens", out)[1].replace(",", ""))
    assert place <= hidden <= place + 700
    assert "answer  31415\nfound in" in out


@pytest.mark.parametrize("key", ["123", "1234567", "12a45", "01234", "１２３４５"])
def test_demo_hides_numbers_only(command, text_file, key):
    code, _, err = command("demo", "--file", text_file, "--passkey", key)
    assert code == 1
    assert "--passkey must be a number of 5 digits" in err


def test_demo_stops_after_so_many_tokens(command, text_file):
    code, out, _ = command("demo", "--file", text_file, "--tokens", "30")
    assert code == 0
    needle = 30  # at most
    assert (
        30 <= count_of(out) <= 30 + needle + 2 * 12
    )  # a whole chunk, and what is known of the next


def test_demo_of_a_shorter_text_reads_all_of_it(command, text_file):
    arguments = ("--tokens", "1000", "--passkey", "12345", "--depth", "0.9")
    code, out, _ = command("demo", "--file", text_file, *arguments)
    assert code == 0
    read = TEXT + NEEDLE.format(key=12345)  # at its end, since its place is beyond
    assert count_of(out) == len(real.tokenizer("smollm2")(read)["input_ids"])
    assert "tokens (where the text ended)" in out


def test_demo_hides_inside_a_text_that_is_shorter_than_asked_for(command, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 40, encoding="utf-8")
    total = len(real.tokenizer("smollm2")(TEXT * 40)["input_ids"])
    code, out, _ = command("demo", "--file", str(path), "--passkey", "12345", "--depth", "0.5")
    assert code == 0
    hidden = int(re.search(r"hidden  12345, after ([\d,]+) tokens\n", out)[1].replace(",", ""))
    assert 0.5 * total <= hidden <= 0.5 * total + 700


def subprocess_of(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=Path(__file__).parents[1],
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
        process.stdin.write((TEXT * 200).encode())  # more than a pipe holds: so it is being read
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED, err.decode()
    assert "Traceback" not in err.decode()
    assert "interrupted after" in err.decode()
    assert count_of(err.decode()) > 0


def test_output_goes_into_a_pipe():
    process = subprocess_of("read", "tiny", "-", "--next", "3")
    out, err = process.communicate(TEXT.encode(), timeout=60)
    assert process.returncode == 0, err.decode()
    assert len(out.decode()) > 1
    assert "\x1b" not in out.decode()
    assert count_of(err.decode()) == len(real.tokenizer("smollm2")(TEXT)["input_ids"])


def test_the_installed_command_runs():
    where = Path(sys.executable).with_name("cometlm")
    done = subprocess.run([where, "read"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Usage: cometlm read" in done.stderr


# --- what `info` counts -------------------------------------------------------------------------


class Sizes:
    """A backbone's config, as far as counting looks at it."""

    def __init__(self, width, heads, inner):
        self.hidden_size, self.intermediate_size, self.head_dim = width, inner, 128
        self.num_attention_heads, self.num_key_value_heads = heads


def test_counted_gain_at_the_sizes_of_the_paper():
    """By hand: 2816 computed items (2048 text, 256 C, 512 R) behind 2560 slots, in 5376 rows."""
    sizes = CometConfig()
    assert (sizes.chunk_items, sizes.memory_rows) == (2816, 2560)

    # Qwen3-0.6B: queries 2048, keys and values 2048 wide. A row: projections and three MLP
    # matrices. Entries stay hidden rows, so all 2560 slots are projected anew.
    row = 1024 * 2048 * 2 + 1024 * 2048 + 3 * 1024 * 3072
    seen = 2816 * 2560 + 2816 * 2817 // 2  # pairs of a query and a key
    fast = 2816 * row + 2560 * 1024 * 2048 + 2 * 2048 * seen
    naive = 5376 * row + 2 * 2048 * (5376 * 5377 // 2)
    cost = chunk_cost(Sizes(1024, (16, 8), 3072), sizes)
    assert (cost.fast, cost.naive) == (fast, naive)
    assert round(cost.gain, 2) == 1.51

    # Qwen3-4B: queries 4096, keys and values 2048 wide, less than a hidden row: kept as such, so
    # only the 512 global slots and 256 new entries are projected.
    row = 2560 * 4096 * 2 + 2560 * 2048 + 3 * 2560 * 9728
    fast = 2816 * row + (512 + 256) * 2560 * 2048 + 2 * 4096 * seen
    naive = 5376 * row + 2 * 4096 * (5376 * 5377 // 2)
    cost = chunk_cost(Sizes(2560, (32, 8), 9728), sizes)
    assert (cost.fast, cost.naive) == (fast, naive)
    assert round(cost.gain, 2) == 1.74


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

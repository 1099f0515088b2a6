"""The command line's sessions: kept, resumed, asked and talked to."""

import io
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cometlm import CometForCausalLM, Session, load, text
from cometlm.cli import console, main
from cometlm.cli import read as read_verb
from tests import real
from tests.tiny import GOLDEN, load_golden, tiny_backbone

TEXT = "".join(
    f"Day {i}: the lamp of the lighthouse went out in the night, and nobody saw ship {i * 7}.\n"
    for i in range(40)
)
INTERRUPTED = 130
GREEDY = {"do_sample": False}
SMALL = {"chunk_size": 20, "readout_tokens": 3, "stride": 4, "capacity": 5}


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    for name in ("COMETLM_DEBUG", "COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Text comes out of the tokenizer in many steps, as it does in a long text."""
    monkeypatch.setattr(text, "_WINDOW", 160)
    monkeypatch.setattr(text, "_MARGIN", 96)
    monkeypatch.setattr(text, "_CONTEXT", 128)
    monkeypatch.setattr(text, "_BLOCK", 100)


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
    """Run `cometlm ARGUMENTS` here, in a folder of its own; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["cometlm", *arguments])
        raw = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
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


def one_line(err):
    """The message of an error, which is the last thing said and one line."""
    _, found, message = err.partition("error: ")
    assert found, err
    assert message.count("\n") == 1, message
    return message


def new_session(model, *sources):
    session = Session(model, real.tokenizer("smollm2"))
    for source in sources:
        session.read(source)
    return session


def kept(path, model):
    return Session.load(path, model, real.tokenizer("smollm2"))


def assert_same(ours, theirs):
    """Same text read, same memory, to the last bit."""
    sessions = [ours.fork(), theirs.fork()]
    for session in sessions:
        list(session.finish())
    assert sessions[0].stats() == sessions[1].stats()
    assert sessions[0]._open == sessions[1]._open
    layers = zip(sessions[0]._cache.layers, sessions[1]._cache.layers, strict=True)
    for mine, want in layers:
        assert torch.equal(mine.memory.state, want.memory.state)
        entries = [torch.cat(layer.memory.entries, 1) for layer in (mine, want)]
        assert torch.equal(*entries)


# --- read ---------------------------------------------------------------------------------------


def test_save_keeps_the_session(command, model, text_file):
    code, out, err = command("read", "tiny", str(text_file), "--save", "s")
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


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("chunk", [1, 2, 5, 30])
def test_ctrl_c_keeps_what_was_read_and_resume_goes_on(
    command, monkeypatch, model, text_file, chunk, times
):
    with monkeypatch.context() as patch:
        seen = interrupt_at(patch, chunk, times)
        code, out, err = command("read", "tiny", str(text_file), "--save", "s", "--next", "3")
    assert (code, out) == (INTERRUPTED, "")
    assert "interrupted after" in err
    assert "saved s" in err
    assert len(seen) == chunk
    assert 0 < kept("s", model).characters < len(TEXT)
    code, _, err = command("read", "tiny", str(text_file), "--save", "s", "--resume")
    assert code == 0, err
    assert_same(kept("s", model), new_session(model, TEXT))
    assert kept("s", model).characters == len(TEXT)


def test_resume_after_many_interrupts(command, monkeypatch, model, text_file):
    resume = []
    for chunk in (3, 1, 10, 4):
        with monkeypatch.context() as patch:
            interrupt_at(patch, chunk)
            assert command("read", "tiny", str(text_file), "--save", "s", *resume)[0] == INTERRUPTED
        resume = ["--resume"]
    assert command("read", "tiny", str(text_file), "--save", "s", *resume)[0] == 0
    assert_same(kept("s", model), new_session(model, TEXT))


def test_resume_of_a_second_text_goes_on_in_that_text(command, monkeypatch, model, text_file):
    """What the session had read before is no part of the text."""
    command("read", "tiny", str(text_file), "--save", "first")
    Path("second.txt").write_text(TEXT.upper())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        code, _, _ = command("read", "tiny", "second.txt", "--session", "first", "--save", "s")
    assert code == INTERRUPTED
    code, _, err = command("read", "tiny", "second.txt", "--save", "s", "--resume")
    assert code == 0, err
    assert_same(kept("s", model), new_session(model, TEXT + TEXT.upper()))


def test_resume_at_the_end_reads_nothing_more(command, model, text_file):
    command("read", "tiny", str(text_file), "--save", "s")
    code, _, _ = command("read", "tiny", str(text_file), "--save", "s", "--resume")
    assert code == 0
    assert_same(kept("s", model), new_session(model, TEXT))


def test_resume_reads_what_was_added_to_the_file(command, model, text_file):
    command("read", "tiny", str(text_file), "--save", "s")
    with text_file.open("a") as file:
        file.write(TEXT[:500])
    assert command("read", "tiny", str(text_file), "--save", "s", "--resume")[0] == 0
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
    text_file.write_text(TEXT[:1500])
    monkeypatch.setattr(read_verb, "_SAVE_EVERY", -1)
    save, copies = Session.save, []

    def saved(self, path):
        save(self, path)
        copies.append(shutil.copy(path, tmp_path / f"copy{len(copies)}"))

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", saved)
        command("read", "tiny", str(text_file), "--save", "s")
    assert len(copies) > 20
    for copy in copies[::6]:
        assert command("read", "tiny", str(text_file), "--save", str(copy), "--resume")[0] == 0
        assert_same(kept(copy, model), new_session(model, TEXT[:1500]))


def test_what_was_read_before_a_bad_byte_is_kept(command, model, text_file):
    """The file is repaired, and reading goes on."""
    raw = (TEXT * 8).encode()
    text_file.write_bytes(raw[:20_000] + b"\xff" + raw[20_000:])
    code, _, err = command("read", "tiny", str(text_file), "--save", "s")
    assert code == 1
    assert f"{text_file} is not UTF-8" in one_line(err)
    assert 10_000 < kept("s", model).characters <= 20_000  # files are decoded 8192 bytes at a time
    text_file.write_bytes(raw)
    assert command("read", "tiny", str(text_file), "--save", "s", "--resume")[0] == 0
    assert_same(kept("s", model), new_session(model, TEXT * 8))


def test_a_bad_byte_at_the_start_leaves_an_older_session(command, model, text_file):
    command("read", "tiny", str(text_file), "--save", "s")
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
    code, _, err = command("read", "tiny", str(text_file), "--save", "s")
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
    code, out, err = command("read", "tiny", str(text_file), *arguments)
    assert (code, out) == (1, "")
    assert message in one_line(err)
    if "session" not in case and "of nothing" not in case:
        assert not loads  # said at once, not after minutes of loading


def test_resume_in_a_shorter_text_is_refused(command, model, text_file):
    command("read", "tiny", str(text_file), "--save", "s")
    before = Path("s").read_bytes()
    Path("short.txt").write_text(TEXT[:50])
    code, _, err = command("read", "tiny", "short.txt", "--save", "s", "--resume")
    assert code == 1
    assert "short.txt is shorter" in one_line(err)
    assert Path("s").read_bytes() == before


def test_a_session_of_another_model_is_one_line(command, text_file):
    new_session(real.tiny_comet("qwen3"), TEXT[:300]).save("other")
    code, _, err = command("read", "tiny", str(text_file), "--session", "other")
    assert code == 1
    assert "session of another model" in one_line(err)


# --- ask ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(command, model):
    new_session(model, TEXT[:700]).save("s")
    return "s"


def test_ask_answers_and_changes_nothing(command, loads, model, saved):
    before = Path(saved).read_bytes()
    want = kept(saved, model).ask("Which ship?", max_new_tokens=9, **GREEDY)
    for _ in range(2):
        code, out, err = command("ask", saved, "Which ship?", "--max-new-tokens", "9")
        assert (code, out) == (0, want + "\n")
        assert "untrained" in err
    assert Path(saved).read_bytes() == before
    name, options = loads[0]
    assert name == "tiny"
    assert options["dtype"] == torch.float64
    assert options["chunk_size"] == 12
    assert options["capacity"] == 5


def test_ask_raw_goes_on_from_the_prompt(command, model, saved):
    want = kept(saved, model).ask("Which", template=False, max_new_tokens=9, **GREEDY)
    assert command("ask", saved, "Which", "--raw", "--max-new-tokens", "9")[:2] == (0, want + "\n")
    piped = command("ask", saved, "-", "--raw", "--max-new-tokens", "9", stdin="Which")
    assert piped[:2] == (0, want + "\n")


def test_ask_samples_the_same_with_a_seed(command, saved):
    options = ["--temperature", "1.5", "--top-p", "0.95", "--max-new-tokens", "9"]
    answers = [
        command("ask", saved, "Why?", *options, "--seed", seed)[:2] for seed in ("7", "7", "8")
    ]
    assert answers[0] == answers[1] != answers[2]


def test_ask_with_the_model_named(command, loads, saved):
    assert command("ask", saved, "Why?", "--model", "moved", "--max-new-tokens", "2")[0] == 0
    assert loads[0][0] == "moved"


def test_ask_a_session_that_does_not_know_its_model(command, loads, monkeypatch, model):
    monkeypatch.setattr(model.config, "backbone", "")
    new_session(model, TEXT[:300]).save("s")
    code, _, err = command("ask", "s", "Why?")
    assert code == 1
    assert "give it with --model" in one_line(err)
    assert not loads


def test_a_folder_named_like_a_built_in_model_is_not_taken_for_it(
    command, loads, monkeypatch, model
):
    monkeypatch.setattr(model.config, "backbone", "smollm2")
    Path("smollm2").mkdir()
    new_session(model, TEXT[:300]).save("s")
    assert command("ask", "s", "Why?", "--max-new-tokens", "2")[0] == 0
    assert loads[0][0] == "smollm2"


def test_ask_what_is_no_session(command, loads, text_file, tmp_path):
    for name in ("nowhere", str(text_file), str(tmp_path)):
        code, out, err = command("ask", name, "Why?")
        assert (code, out) == (1, "")
        assert name in one_line(err)
    assert not loads


def test_ask_a_session_with_sizes_that_are_none(command, saved):
    """A hostile file: one line, whatever it says of its model."""
    for sizes in ("{oops", "[1]", '{"chunk_size": "12"}', '{"device": "cuda"}', '{"name": 1}'):
        raw = Path(saved).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        document = json.loads(header["__metadata__"]["cometlm"])
        document["model"]["sizes"] = sizes
        header["__metadata__"]["cometlm"] = json.dumps(document)
        new = json.dumps(header).encode()
        Path("hostile").write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
        code, out, err = command("ask", "hostile", "Why?")
        assert (code, out) == (1, ""), sizes
        assert "hostile" in one_line(err), sizes


@pytest.fixture
def on_disk(tmp_path):
    """A tiny backbone in a directory, to be loaded by the real `load`."""
    folder = tmp_path / "tiny-model"
    tokenizer = real.tokenizer("smollm2")
    tiny_backbone("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_session_finds_its_model_from_another_folder(
    command, monkeypatch, on_disk, text_file, tmp_path
):
    """Read with a relative path, sizes and a dtype; asked from elsewhere with nothing but it."""
    monkeypatch.setattr(console, "load", load)
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    options = [*sizes, "--dtype", "float64", "--device", "cpu"]
    code, _, err = command("read", "tiny-model", "text.txt", "--save", "s", *options)
    assert code == 0, err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = command("ask", "../s", "Why?", "--max-new-tokens", "5", "--device", "cpu")
    assert code == 0, err
    assert out.strip()
    backbone, _ = load(str(on_disk), device="cpu", dtype=torch.float64, **SMALL)
    want = new_session(backbone, TEXT).ask("Why?", max_new_tokens=5, **GREEDY)
    assert out == want + "\n"


def test_a_session_of_a_checkpoint_finds_it(command, monkeypatch, on_disk, text_file, tmp_path):
    monkeypatch.setattr(console, "load", load)
    made, _ = load(str(on_disk), device="cpu", **SMALL)
    made.save_pretrained("trained")
    code, _, err = command("read", "trained", "text.txt", "--save", "s", "--device", "cpu")
    assert code == 0, err
    code, out, err = command("ask", "s", "Why?", "--max-new-tokens", "5", "--device", "cpu")
    assert code == 0, err
    assert out.strip()
    assert "untrained" not in err


def test_a_damaged_checkpoint_is_one_line(command, monkeypatch, on_disk, text_file):
    monkeypatch.setattr(console, "load", load)
    made, _ = load(str(on_disk), device="cpu", **SMALL)
    made.save_pretrained("trained")
    weights = Path("trained/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-5])
    code, _, err = command("read", "trained", "text.txt", "--device", "cpu")
    assert code == 1
    assert "trained" in one_line(err)


# --- chat ---------------------------------------------------------------------------------------


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


# --- generate -----------------------------------------------------------------------------------


def test_generate_goes_on_from_a_prompt(command, model):
    want = new_session(model).ask(TEXT[:300], template=False, max_new_tokens=15, **GREEDY)
    options = ["--max-new-tokens", "15"]
    assert command("generate", "tiny", TEXT[:300], *options)[:2] == (0, want + "\n")
    assert command("generate", "tiny", "-", *options, stdin=TEXT[:300])[:2] == (0, want + "\n")


def test_generate_in_the_chat_template(command, model):
    want = new_session(model).ask("Who?", template=True, max_new_tokens=5, **GREEDY)
    done = command("generate", "tiny", "Who?", "--chat", "--max-new-tokens", "5")
    assert done[:2] == (0, want + "\n")


def test_generate_from_nothing_is_one_line(command):
    code, out, err = command("generate", "tiny", "")
    assert (code, out) == (1, "")
    assert "prompt is empty" in one_line(err)


def test_generate_from_bytes_that_are_no_text_is_one_line(command):
    code, out, err = command("generate", "tiny", "-", stdin=b"\xff\xfe")
    assert (code, out) == (1, "")
    assert "UTF-8" in one_line(err) or "utf-8" in one_line(err)


@pytest.mark.parametrize(
    "option", [["--max-new-tokens", "0"], ["--temperature", "-1"], ["--top-p", "2"]], ids=str
)
def test_impossible_generation_options_are_usage_errors(command, option):
    code, out, err = command("generate", "tiny", "Who?", *option)
    assert (code, out) == (2, "")
    assert option[0] in err


# --- import -------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    _, tensors, config = load_golden(GOLDEN[0])
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    save_file(weights, folder / "model.safetensors")
    return tensors


def test_import_makes_a_checkpoint(command, published):
    code, out, err = command("import", "theirs", "ours")
    assert (code, out) == (0, "")
    assert "saved ours" in err
    model = CometForCausalLM.from_pretrained("ours")
    with torch.no_grad():
        logits = model(published["input_ids"][None]).logits[0]
    assert torch.allclose(logits, published["logits"], atol=1e-4)


def test_import_overwrites_nothing(command, published):
    Path("ours").mkdir()
    Path("ours/mine").write_text("mine")
    for there in ("ours", "ours/mine"):
        code, _, err = command("import", "theirs", there)
        assert code == 1
        assert "is there already" in one_line(err)
    assert [path.name for path in Path("ours").iterdir()] == ["mine"]


DAMAGE = {
    "no folder": lambda: shutil.rmtree("theirs"),
    "no config": lambda: Path("theirs/config.json").unlink(),
    "a config that is no JSON": lambda: Path("theirs/config.json").write_text("{oops"),
    "a config that is a list": lambda: Path("theirs/config.json").write_text("[]"),
    "no weights": lambda: Path("theirs/model.safetensors").unlink(),
    "truncated weights": lambda: os.truncate("theirs/model.safetensors", 900),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_import_of_what_is_none_is_one_line(command, published, case):
    DAMAGE[case]()
    code, out, err = command("import", "theirs", "ours")
    assert (code, out) == (1, "")
    assert "theirs" in one_line(err)
    assert not Path("ours").exists()

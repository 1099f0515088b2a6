"""`cometlm inspect`: models and sessions, what is written, and what is refused."""

import json
import os
import signal
from pathlib import Path

import pytest

from cometlm.inspection import InspectedSession
from tests.cli.said import INTERRUPTED, TEXT, count_of, new_session, one_line

pytestmark = pytest.mark.usefixtures("small_windows")
ASKED = ["--question", "Which ship?", "--max-new-tokens", "3"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longest, and have their own tests."""
    monkeypatch.setattr("cometlm.inspection.page.why_none", lambda: "none")


def written(folder="out/inspect"):
    return json.loads((Path(folder) / "inspection.json").read_text())


def test_a_reading(command, text_file):
    code, out, err = command("inspect", "tiny", text_file)
    assert code == 0, err
    assert "untrained" in err
    found = written()
    assert found["tokens"] == count_of(err)
    assert found["chunks"] == len(found["passages"]) > 10
    lines = {line.split("  ")[0] for line in out.splitlines()}
    assert {"global memory", "temporary memory", "first token", "rest of the chunk"} <= lines
    assert Path("out/inspect/index.html").exists()


def test_a_question(command, model, text_file):
    code, out, err = command("inspect", "tiny", text_file, "--out", "here", *ASKED)
    assert code == 0, err
    answer = written("here")["answer"]
    session = new_session(model, TEXT)
    asked = {"max_new_tokens": 3, "do_sample": False}
    assert answer["answer"] == session.ask("Which ship?", **asked)
    assert "of the answer" in out
    code, _, err = command("inspect", "tiny", text_file, "--raw", *ASKED)
    assert code == 0, err
    assert written()["answer"]["answer"] == session.ask("Which ship?", template=False, **asked)


def test_a_saved_session(command, model):
    new_session(model, TEXT).save("kept")
    before = Path("kept").read_bytes()
    code, out, err = command("inspect", "kept", *ASKED)
    assert code == 0, err
    assert "unknown" in out
    assert written()["answer"]["question"] == "Which ship?"
    assert Path("kept").read_bytes() == before
    assert command("inspect", "kept")[0] == 0


def test_ctrl_c_shows_what_there_is(command, text_file, monkeypatch):
    fold = InspectedSession._fold

    def interrupted(self, size):
        if self.history.chunks == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return fold(self, size)

    monkeypatch.setattr(InspectedSession, "_fold", interrupted)
    code, _, err = command("inspect", "tiny", text_file, *ASKED)
    assert code == INTERRUPTED
    assert "interrupted after" in err
    assert written()["chunks"] == 5
    assert "answer" not in written()
    assert "Reading was interrupted" in Path("out/inspect/index.html").read_text()


def test_what_is_refused(command, text_file, model):
    code, _, err = command("inspect", "tiny")
    assert code == 1
    assert "tiny must be a saved session's file" in one_line(err)
    Path("empty.txt").write_text("")
    code, _, err = command("inspect", "tiny", "empty.txt")
    assert "holds no text" in one_line(err)
    code, _, err = command("inspect", "tiny", text_file, "--out", "text.txt")
    assert "--out must be a folder" in one_line(err)
    new_session(model, TEXT).save("kept")
    code, _, err = command("inspect", "kept", "--chunk-size", "9")
    assert "its own sizes, got chunk_size" in one_line(err)
    code, _, err = command("inspect", "kept", "--dtype", "float32")
    assert "its own dtype, got float32" in one_line(err)

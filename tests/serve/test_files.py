"""Files: read once into a session, asked often."""

import json
import threading

import openai
import pytest

from cometlm.serve import answer
from tests.serve.running import running, service_of
from tests.sessions import TEXT, session_of

PATH = "/v1/files"


def upload(server, content, **fields):
    return server.http.post(PATH, files={"file": ("log.txt", content)}, data=fields)


def ask(server, text, **options):
    given = {"temperature": 0, "max_output_tokens": 9, **options}
    return server.openai.responses.create(model="tiny", input=text, **given)


def test_a_file_is_read_and_asked(server):
    session = session_of()
    session.read(TEXT)
    session.ask("Why?", max_new_tokens=9, do_sample=False)
    list(session.finish())
    made = server.openai.files.create(file=("log.txt", TEXT.encode()), purpose="user_data")
    assert (made.filename, made.bytes, made.status) == ("log.txt", len(TEXT.encode()), "processed")
    assert made.tokens == session.stats().tokens
    for question in ("Why?", "What <|im_end|>?"):
        want = session.ask(question, max_new_tokens=9, do_sample=False)
        found = ask(server, question, previous_response_id=made.id)
        assert found.output_text == want
        cached = found.usage.input_tokens_details.cached_tokens
        assert cached > 0.9 * made.tokens
    assert server.openai.files.retrieve(made.id).id == made.id
    server.openai.files.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        server.openai.files.retrieve(made.id)
    assert ask(server, "And?", previous_response_id=found.id).output_text


def test_a_file_behind_a_conversation(server):
    first = ask(server, "I will send you a log.")
    made = upload(server, TEXT[:300], session=first.id).json()
    session = session_of()
    session.chat("I will send you a log.", max_new_tokens=9, do_sample=False)
    session.read(TEXT[:300])
    want = session.chat("So?", max_new_tokens=9, do_sample=False)
    assert ask(server, "So?", previous_response_id=made["id"]).output_text == want
    assert upload(server, TEXT, session="resp_0").status_code == 404


def test_progress_is_told(server, monkeypatch):
    monkeypatch.setattr(answer, "_SAY_EVERY", 0.0)
    said = upload(server, TEXT * 10, stream="true").text
    events = [json.loads(e.partition("data: ")[2]) for e in said.split("\n\n") if e]
    *progress, last = events
    counts = [event["tokens"] for event in progress]
    assert len(counts) > 50
    assert counts == sorted(counts)
    read = [event["bytes_read"] for event in progress]
    assert read == sorted(read)
    assert len(set(read)) > 50
    size = len((TEXT * 10).encode())
    assert read[0] < size // 4 <= size * 3 // 4 < read[-1] <= size
    assert {event["bytes"] for event in progress} == {size}
    assert last["type"] == "file.processed"
    assert last["file"]["tokens"] >= counts[-1]
    assert server.http.get(f"{PATH}/{last['file']['id']}").json() == last["file"]


@pytest.mark.parametrize(
    ("content", "said"), [(b"caf\xe9", "UTF-8"), (b"", "empty"), (b"\xef\xbb\xbf", "empty")]
)
def test_files_that_are_no_text(server, content, said):
    answer = upload(server, content)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "file"
    assert said.lower() in error["message"].lower()
    assert "/" not in error["message"]  # no path of the server's
    stream = upload(server, content, stream="true")
    assert json.loads(stream.text.removeprefix("data: "))["error"]["param"] == "file"


def test_other_forms(server):
    assert server.http.post(PATH, data={"purpose": "x"}).status_code == 400
    error = upload(server, "Hi", expires_after="1").json()["error"]
    assert error["param"] == "expires_after"
    chat = ask(server, "Hi")
    assert server.http.get(f"{PATH}/{chat.id}").status_code == 404
    assert server.http.get(f"{PATH}/file-1").json()["error"]["code"] == "not_found"
    with running(most_file_bytes=2000) as small:
        assert upload(small, "x" * 3000).status_code == 413


def test_chats_go_on_while_a_file_is_read():
    with running(service_of()) as server:
        done = threading.Event()

        def read():
            upload(server, TEXT * 8)
            done.set()

        thread = threading.Thread(target=read)
        thread.start()
        answered = 0
        while not done.is_set():
            assert ask(server, f"Question {answered}").output_text
            answered += 1
        thread.join()
        assert answered > 2

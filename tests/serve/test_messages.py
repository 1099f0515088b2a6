"""What is said of a request that is wrong: which field, by its whole path, and what it must be."""

import http.client
import io
import json

import openai
import pytest

from cometlm.serve.app import LOOPBACK
from cometlm.session.sources import pieces
from tests.serve.running import running

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "Hello"}]
LEAST = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "Hi"}, RESPONSES: {"input": "Hi"}}
STOP = "stop must be a string or a list of at most 4 strings"
INPUT = "input must be a string or a list of at least one item"


def function(**more):
    return {"name": "f", **more}


def call(**more):
    called = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}", **more}}
    return [{"role": "assistant", "tool_calls": [called]}, *HELLO]


@pytest.mark.parametrize(
    ("path", "fields", "param", "said"),
    [
        (CHAT, {"stop": ""}, "stop", STOP),
        (CHAT, {"stop": [1]}, "stop", STOP),
        (COMPLETIONS, {"stop": ["a"] * 5}, "stop", STOP),
        (COMPLETIONS, {"prompt": 5}, "prompt", "prompt must be a string or a list of token ids"),
        (COMPLETIONS, {"prompt": [1, "x"]}, "prompt", "prompt must be a string or a list"),
        (RESPONSES, {"input": 5}, "input", INPUT),
        (RESPONSES, {"input": []}, "input", INPUT),
        (RESPONSES, {"conversation": 5}, "conversation", "must be an id, or an object with one"),
        (RESPONSES, {"conversation": {"id": 5}}, "conversation.id", "valid string"),
        (RESPONSES, {"conversation": {"id": "x", "y": 1}}, "conversation.y", "leave it out"),
        (CHAT, {"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo", "leave it"),
        (RESPONSES, {"text": {"format": {"type": "json_object"}}}, "text.format", "not supported"),
        (
            CHAT, {"tools": [{"type": "function", "function": function(foo=1)}]},
            "tools[0].function.foo", "leave it out",
        ),
        (
            CHAT, {"tools": [{"type": "function", "function": function(strict=True)}]},
            "tools[0].function.strict", "not supported",
        ),
        (RESPONSES, {"tools": [{"type": "function", **function(foo=1)}]}, "tools[0].foo", "leave"),
        (CHAT, {"messages": call(foo=1)}, "messages[0].tool_calls[0].function.foo", "leave"),
        (CHAT, {"messages": call(name=5)}, "messages[0].tool_calls[0].function.name", "string"),
        (
            RESPONSES, {"input": [{"type": "function_call_output", "call_id": "a", "output": 5}]},
            "input[0].output", "must be a string or a list of parts",
        ),
        (
            CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text", "valid string",
        ),
        (
            CHAT, {"chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs.messages", "no variable",
        ),
        (
            CHAT, {"chat_template_kwargs": {"documents": 3}},
            "chat_template_kwargs.documents", "must be a list of objects",
        ),
    ],
)  # fmt: skip
def test_fields(server, path, fields, param, said):
    error = server.refused(path, **{**LEAST[path], **fields})
    assert error["param"] == param
    assert param in error["message"]
    assert said in error["message"]


BODY = json.dumps({"model": "tiny", "messages": HELLO}).encode()
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "said"),
    [
        (BODY, {"Content-Type": "text/plain"}, "Content-Type: application/json, got 'text/plain'"),
        (BODY, {}, "Content-Type: application/json, got 'none'"),
        (BODY.replace(b"Hello", b"\xff"), JSON, "not utf-8 text: invalid start byte at byte"),
        (b"[" * 100_000, JSON, "at most 64 levels deep"),
        (BODY[:-1] + b', "n": ' + b"9" * 5000 + b"}", JSON, "too many digits: at most 4300"),
        (BODY[:-1], JSON, "not JSON: Expecting ',' delimiter at character"),
    ],
)
def test_bodies(server, content, headers, said):
    answer = server.http.post(CHAT, content=content, headers=headers)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_file_is_named(server):
    for content, said in ((b"\xff\xfe", "is not UTF-8"), (b"", "is empty")):
        answer = server.http.post("/v1/files", files={"file": ("log.txt", content)})
        assert answer.json()["error"]["message"].startswith(f"'log.txt' {said}")
    nameless = io.BytesIO(b"\xff")
    nameless.name = None  # as a file has none that is on no disk
    with pytest.raises(ValueError, match="the file is not"):
        list(pieces(nameless))


def test_a_response_is_no_conversation(server):
    made = server.openai.responses.create(model="tiny", input="Hi", max_output_tokens=1)
    for more in ({}, {"previous_response_id": made.id}):
        error = server.refused(RESPONSES, 404, input="So?", conversation=made.id, **more)
        assert error["param"] == "conversation"
        assert "no conversation but a response" in error["message"]
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.conversations.retrieve(made.id)
    assert caught.value.param == "conversation_id"


def test_other_names_of_the_host():
    with running(hosts=LOOPBACK) as server:
        answer = server.http.get("/v1/models", headers={"Host": "evil.example:80"})
        assert answer.status_code == 400
        assert "'evil.example:80'" in answer.json()["error"]["message"]


def test_where_files_are_listed_and_downloaded(server):
    with pytest.raises(openai.NotFoundError, match="GET /v1/sessions lists"):
        server.openai.files.list()
    made = server.openai.files.create(file=("a.txt", b"Calm sea."), purpose="user_data")
    with pytest.raises(openai.NotFoundError, match=f"GET /v1/sessions/{made.id}/content"):
        server.openai.files.content(made.id)
    assert server.http.get(f"/v1/sessions/{made.id}/content").status_code == 200


def test_heads(server):
    """Which a client asks for to see whether a server is there."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    for path, status in (("/v1/models", 200), ("/v1/models/tiny", 200), ("/v1/models/x", 404)):
        connection.request("HEAD", path)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (status, b"")
    connection.close()

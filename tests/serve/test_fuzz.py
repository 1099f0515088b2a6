"""Requests that nobody would send: an answer or an error in OpenAI's form, and never a 500."""

import json
from copy import deepcopy

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cometlm.serve.kept import SessionStore
from cometlm.serve.schema import ErrorBody
from cometlm.serve.service import Limits
from tests.serve.running import running, service_of
from tests.serve.test_kept import folder_of

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
CONVERSATIONS = "/v1/conversations"


def user(text):
    return {"role": "user", "content": text}


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"name": "f", "description": "Does it.", "parameters": {"type": "object"}}
BODIES = [
    (CHAT, {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "a", "content": "3"},
            user("So?"),
        ],
        "tools": [{"type": "function", "function": TOOL}], "tool_choice": "auto",
        "chat_template_kwargs": {"thinking": False}, "response_format": {"type": "text"},
    }),
    (CHAT, {
        "messages": [user("Hi")], "max_completion_tokens": 2, "temperature": 0.5, "top_p": 0.9,
        "seed": 5, "n": 2, "stop": ["x"], "logprobs": True, "top_logprobs": 2, "stream": True,
        "stream_options": {"include_usage": True}, "store": False, "user": "me",
    }),
    (COMPLETIONS, {"prompt": [5, 6], "max_tokens": 2, "logprobs": 2, "echo": False, "n": 2}),
    (RESPONSES, {
        "input": [
            {"type": "message", "id": "msg_1", "role": "user", "content": "Hi", "status": "x"},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "3"},
        ],
    }),
    (RESPONSES, {
        "input": "Hi", "instructions": "Be brief.", "max_output_tokens": 2, "temperature": 0.5,
        "top_p": 0.9, "stream": True, "store": True, "metadata": {"a": "b"},
        "include": ["message.output_text.logprobs"], "top_logprobs": 2,
        "text": {"format": {"type": "text"}}, "tools": [{"type": "function", **TOOL}],
        "previous_response_id": None, "conversation": {"id": "conv_1"},
    }),
    (CONVERSATIONS, {"items": [user("Hi")], "metadata": {"a": "b"}, "session": None}),
]  # fmt: skip

ATOMS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["", "\x00", "tiny", "auto", "user", "type", "function", "\ud800"])
)  # fmt: skip
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def places(value, at=()):
    """Where in a JSON value something stands."""
    yield at
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, one in inner:
        yield from places(one, (*at, key))


@st.composite
def with_one_wrong_value(draw, body):
    """A body, one value of which is another, gone, or beside a field that nobody knows."""
    changed = deepcopy(body)
    *way, last = draw(st.sampled_from([at for at in places(body) if at]))
    around = changed
    for key in way:
        around = around[key]
    kind = draw(st.sampled_from(["other", "other", "gone", "more"]))
    if kind == "gone":
        del around[last]
    elif kind == "more" and isinstance(around, dict):
        around[draw(st.text(max_size=8))] = draw(VALUES)
    else:
        around[last] = draw(VALUES)
    return changed


def check(answer):
    """It is an answer, or an error that says what is wrong."""
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert ErrorBody.model_validate_json(answer.content).error.message


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A server that writes short answers, and has a store."""
    store = SessionStore(folder=folder_of(tmp_path_factory.mktemp("store")))
    with running(service_of(store=store, limits=Limits(8, 4, 3)), most_bytes=1 << 20) as made:
        yield made


@pytest.mark.parametrize(("path", "body"), BODIES)
@given(data=st.data())
@settings(max_examples=60)
def test_one_wrong_value(small, path, body, data):
    changed = data.draw(with_one_wrong_value(body))
    more = {} if path == CONVERSATIONS else {"model": "tiny"}
    content = json.dumps({**more, **changed}).encode()  # also NaN, and halves of characters
    headers = {"content-type": "application/json"}
    check(small.http.post(path, content=content, headers=headers))


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, {"messages": [user("Hi")], "temperature": 5e-324, "logprobs": True}, 200),
        (CHAT, {"messages": [{**user("Hi"), "role": "assistant", "tool_calls": CALL}]}, 400),
        (CHAT, {"messages": [user("Hi")], "chat_template_kwargs": {"chat_template": "x"}}, 400),
        (CHAT, {"messages": [user("Hi")], "chat_template_kwargs": {"tools": [1]}}, 400),
        (RESPONSES, {"input": [{"type": []}]}, 400),
        (RESPONSES, {"input": [{"type": {}}]}, 400),
        (RESPONSES, {"input": [user([{"type": "input_image", "image_url": "x"}])]}, 400),
        (RESPONSES, {"input": "Hi", "max_output_tokens": -1}, 400),
        (CHAT, {"messages": [user("Hi")], "n": 3, "stream": True}, 200),
    ],
)
def test_what_was_found(small, path, body, status):
    answer = small.post(path, **body)
    assert answer.status_code == status
    check(answer)


FORM = (
    b'--x\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n%s\r\n--x--\r\n'
)  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/files", "/v1/sessions"])
@pytest.mark.parametrize("charset", ["utf-7", "unicode_escape", "idna", "undefined", "zlib", "x"])
@pytest.mark.parametrize("half", [b"+2AA-", rb"\ud800", b"\xff"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_forms_choose_their_charset(small, path, charset, half, place):
    """Some of which have halves of characters."""
    said = [b"file", b"name.txt", b"Hi"]
    said[place] = half
    headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
    check(small.http.post(path, content=FORM % tuple(said), headers=headers))


@pytest.mark.slow
def test_every_operation_of_the_document(small, subtests):
    """Cases of its own OpenAPI document, right ones and wrong ones, on things that are there."""
    import schemathesis  # takes a second
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, response_schema_conformance, status_code_conformance]
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 25
    for operation in operations:
        with subtests.test(operation=operation.label):
            _try(operation, [*_things(small)], checks)


def _try(operation, names, checks):
    @given(case=operation.as_strategy(), data=st.data())
    @settings(
        max_examples=60,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case, data):
        for param, value in (case.path_parameters or {}).items():
            case.path_parameters[param] = data.draw(st.sampled_from([value, *names]))
        if isinstance(case.body, dict) and "model" in case.body and data.draw(st.booleans()):
            case.body["model"] = "tiny"
        case.validate_response(case.call(timeout=60), checks=checks)

    run()


def _things(server):
    """Ids of one thing of each kind."""
    talk = server.http.post(CONVERSATIONS, json={"items": [user("Hi")]}).json()["id"]
    yield talk
    yield server.http.get(f"{CONVERSATIONS}/{talk}/items").json()["data"][0]["id"]
    yield server.http.post("/v1/files", files={"file": ("a.txt", "Calm sea.")}).json()["id"]
    for path, body in ((CHAT, {"messages": [user("Hi")]}), (RESPONSES, {"input": "Hi"})):
        yield server.post(path, **body).json()["id"]

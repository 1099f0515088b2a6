"""What a request says is done or refused by name, and never ignored."""

import openai
import pytest

from tests.serve.running import running
from tests.sessions import TEMPLATE, session_of

HELLO = [{"role": "user", "content": "Hello"}]
FILE = {"file": ("log.txt", "Calm sea.")}


def error_of(answer, status=400):
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def respond(server, text="Hello", **options):
    given = {"temperature": 0, "max_output_tokens": 9, **options}
    return server.openai.responses.create(model="tiny", input=text, **given)


# --- what to go on from -------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/files", "/v1/conversations"])
def test_the_header_names_what_to_go_on_from(server, path):
    """As everywhere; a name that is not kept is a 404, and two have to agree."""

    def send(headers, **fields):
        body = {"files": FILE, "data": fields} if path == "/v1/files" else {"json": fields}
        return server.http.post(path, headers=headers, **body)

    error = error_of(send({"X-Session-Id": "nope"}), 404)
    assert (error["param"], error["code"]) == ("x-session-id", "not_found")
    first = respond(server)
    error_of(send({"X-Session-Id": "nope"}, session=first.id))
    sent = send({"X-Session-Id": first.id}), send({}, session=first.id)
    names = [one.json()["id"] for one in sent]
    session = session_of()
    session.chat("Hello", max_new_tokens=9, do_sample=False)
    if path == "/v1/files":
        session.read("Calm sea.")
    want = session.chat("So?", max_new_tokens=9, do_sample=False)
    key = "previous_response_id" if path == "/v1/files" else "conversation"
    assert [respond(server, "So?", **{key: name}).output_text for name in names] == [want] * 2


def test_a_fork_is_told_nothing(server):
    name = respond(server).id
    path = f"/v1/sessions/{name}/fork"
    assert error_of(server.http.post(path, json={"title": "mine"}))["param"] == "title"
    for body in ({}, None):
        assert server.http.post(path, json=body).status_code == 200
    assert server.http.post(path).status_code == 200


def test_a_form_has_a_field_once(server):
    twice = [("file", ("a.txt", "One.")), ("file", ("b.txt", "Two."))]
    for path in ("/v1/files", "/v1/sessions"):
        assert error_of(server.http.post(path, files=twice))["param"] == "file"
    sent = {"files": FILE, "data": {"purpose": ["user_data", "vision"]}}
    assert error_of(server.http.post("/v1/files", **sent))["param"] == "purpose"


# --- query strings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("POST", "/v1/chat/completions"),
        ("GET", "/v1/responses/{response}"), ("DELETE", "/v1/responses/{response}"),
        ("GET", "/v1/responses/{response}/input_items"), ("GET", "/v1/sessions"),
        ("GET", "/v1/sessions/{response}/content"), ("POST", "/v1/conversations/{talk}/items"),
        ("GET", "/v1/conversations/{talk}"), ("POST", "/v1/files"), ("GET", "/v1/files/{file}"),
    ],
)  # fmt: skip
def test_unknown_parameters(server, method, path):
    things = {
        "response": respond(server).id,
        "talk": server.openai.conversations.create().id,
        "file": server.http.post("/v1/files", files=FILE).json()["id"],
    }
    body = {}
    if path == "/v1/files":
        body = {"files": FILE}
    elif method == "POST":
        body = {"json": {"items": HELLO} if "items" in path else {"model": "tiny"}}
        body["json"] |= {"messages": HELLO} if "chat" in path else {}
    url = path.format(**things)
    error = error_of(server.http.request(method, url, params={"colour": "red"}, **body))
    assert error["param"] == "colour"
    assert server.http.request(method, url, **body).status_code == 200


def test_what_a_kept_response_is_not_asked_again(server):
    """And what OpenAI's client sends by itself is taken."""
    made = respond(server, include=["message.output_text.logprobs"])
    retrieve = server.openai.responses.retrieve
    assert retrieve(made.id).id == retrieve(made.id, stream=False).id == made.id
    for field, value in (
        ("stream", True), ("starting_after", 4), ("include", ["message.output_text.logprobs"])
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            retrieve(made.id, **{field: value})
        assert caught.value.param == field
        assert "told once" in str(caught.value) or "streamed again" in str(caught.value)


# --- what is for the template -------------------------------------------------------------------


def test_documents_that_a_template_leaves_out(server, monkeypatch):
    path = "/v1/chat/completions"

    def kwargs(title):
        return {"chat_template_kwargs": {"documents": [{"title": title, "text": "the sea"}]}}

    error = server.refused(path, messages=HELLO, **kwargs("a"))
    assert error["param"] == "chat_template_kwargs.documents"
    assert error["code"] == "unsupported"
    with running() as other:
        tokenizer = other.service.tokenizer
        takes = "{% for d in documents or [] %}{{ d.text }}{% endfor %}" + TEMPLATE
        monkeypatch.setattr(tokenizer, "chat_template", takes)
        plain, told = (
            other.post(path, messages=HELLO, max_tokens=1, **more).json()
            for more in ({}, kwargs("a"))
        )
        tokens = [one["usage"]["prompt_tokens"] for one in (plain, told)]
        assert tokens[0] < tokens[1]
        error = other.refused(path, messages=HELLO, session=told["id"], **kwargs("b"))
        assert error["param"] == "chat_template_kwargs.documents"

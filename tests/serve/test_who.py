"""Keys, other people's sessions, names of the host, sizes of bodies."""

import contextlib
import http.client
import json

import openai
import pytest

from cometlm.serve.app import LOOPBACK
from cometlm.serve.keys import Keys, new_key
from tests.serve.running import running, service_of

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello " * 30}]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A server with two keys, and a client of each."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    made = [new_key(path, name) for name in ("ann", "bob")]
    with running(keys=Keys.read(path)) as server:
        yield server, *(server.client(key) for key in made)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic abc", "Bearer ☂"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"), ("POST", CHAT), ("POST", "/v1/completions"), ("GET", "/metrics"),
        ("POST", "/v1/responses"), ("GET", "/v1/responses/resp_1"), ("DELETE", "/v1/responses/x"),
    ],
)  # fmt: skip
def test_nothing_without_a_key(keyed, method, path, header):
    server, *_ = keyed
    headers = {} if header is None else {"Authorization": header.encode()}
    body = None if method != "POST" else {"model": "tiny", "messages": HELLO}
    answer = server.http.request(method, path, headers=headers, json=body)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert server.http.get("/health").status_code == 200


def test_an_upload_without_a_key_is_not_taken(keyed):
    """It is refused before its body comes."""
    server, *_ = keyed
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Content-Length", "1000000")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.endheaders()
    assert connection.getresponse().status == 401
    connection.close()


def test_sessions_of_others_do_not_exist(keyed):
    _, ann, bob = keyed

    def ask(client, **options):
        return client.responses.create(model="tiny", input="Hi", max_output_tokens=2, **options)

    made = ask(ann)
    assert ask(ann, previous_response_id=made.id)
    for call in (
        lambda: ask(bob, previous_response_id=made.id),
        lambda: bob.responses.retrieve(made.id),
        lambda: bob.responses.delete(made.id),
        lambda: bob.chat.completions.create(
            model="tiny", messages=HELLO, extra_body={"session": made.id}
        ),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "not_found"
    assert ann.responses.retrieve(made.id).id == made.id


def test_one_key_does_not_lock_out_another(tmp_path):
    """Who fills the queue is refused; another key is not."""
    path = tmp_path / "keys"
    ann, bob = (new_key(path, name) for name in ("ann", "bob"))
    service = service_of(most_running=1, most_waiting=2)
    with running(service, keys=Keys.read(path)) as server, contextlib.ExitStack() as stack:

        def send(key, **more):
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, **more}
            headers = {"Authorization": f"Bearer {key}"}
            sent = server.http.stream("POST", CHAT, json=body, headers=headers)
            return stack.enter_context(sent)

        endless = send(ann, stream=True, max_tokens=30000).iter_lines()
        next(endless)
        for _ in range(2):
            assert send(ann, stream=True).status_code == 200
        assert service.engine.load.waiting == 2
        assert send(ann).status_code == 429
        assert send(bob, stream=True).status_code == 200
        assert send(bob, stream=True).status_code == 429  # half of two


def test_what_others_read_is_not_gone_on_from(keyed):
    _, ann, bob = keyed

    def cached(client):
        first = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=2, temperature=0
        )
        said = {"role": "assistant", "content": first.choices[0].message.content}
        more = client.chat.completions.create(
            model="tiny", messages=[*HELLO, said, *HELLO], max_tokens=2, temperature=0
        )
        cached = (one.usage.prompt_tokens_details.cached_tokens for one in (first, more))
        return tuple(cached)

    of_ann, of_bob = cached(ann), cached(bob)
    assert of_ann == of_bob
    assert of_ann[0] == 0 < of_ann[1]


def test_other_names_of_the_host():
    """A page in a browser that calls this machine by a name of its own gets nothing."""
    with running(hosts=LOOPBACK) as server:
        assert server.http.get("/v1/models").status_code == 200
        for name, status in (("evil.example", 400), ("localhost:8000", 200), ("[::1]:8000", 200)):
            answer = server.http.get("/v1/models", headers={"Host": name})
            assert answer.status_code == status
        plain = server.http.post(
            CHAT,
            content=json.dumps({"model": "tiny", "messages": HELLO}),
            headers={"Content-Type": "text/plain"},  # what a page may send without being asked
        )
        assert plain.status_code == 400


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), (None, 200)]
)
def test_forms_of_other_sites(site, status):
    """A browser sends them for anybody, and says from where."""
    headers = {} if site is None else {"Sec-Fetch-Site": site}
    with running() as server:
        file = {"file": ("log.txt", "Calm sea.")}
        assert server.http.post("/v1/files", files=file, headers=headers).status_code == status
        assert server.http.get("/", headers=headers).status_code == 200  # a link


def test_bodies_that_are_too_large():
    with running(most_bytes=2000) as server:
        large = [{"role": "user", "content": "x" * 3000}]
        answer = server.post(CHAT, messages=large)
        assert answer.status_code == 413
        assert "2000 bytes" in answer.json()["error"]["message"]
        assert server.post(CHAT, messages=HELLO, max_tokens=1).status_code == 200

        def parts():
            for _ in range(1000):
                yield b"x" * 100

        chunked = server.http.post(
            CHAT, content=parts(), headers={"Content-Type": "application/json"}
        )
        assert chunked.status_code == 413
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Length", "-5")
        connection.endheaders()
        assert connection.getresponse().status in (400, 413)
        connection.close()

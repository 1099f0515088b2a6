"""The store in S3, as moto serves it; `make test-slow` brings both, see s3.txt."""

import contextlib
import importlib.util
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cometlm.serve import thread
from cometlm.serve.folder import Folder
from cometlm.serve.kept import SessionStore
from cometlm.serve.objects import ChangedError, objects_at
from tests.serve.running import running, service_of
from tests.serve.test_kept import gone, put, session_after
from tests.sessions import assert_same, model_of, tokenizer_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("s3fs", "moto"))),
        reason="needs s3fs and moto; run by itself in `make test-slow`",
    ),
]

SERVED = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of its own, and a function that ends it."""
    import fsspec

    process = subprocess.Popen(
        [sys.executable, "-c", SERVED], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    url = process.stdout.readline().strip()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket/sessions", process
    process.kill()
    process.wait()
    fsspec.filesystem("s3").clear_instance_cache()


def store_at(url, **options):
    return SessionStore(folder=Folder(url, model_of("llama"), tokenizer_of("llama")), **options)


def test_sessions_live_in_a_bucket(bucket):
    url, _ = bucket
    one, two = store_at(url, refresh=0.0), store_at(url, refresh=0.0)
    name = put(one, 50, document={"filename": "☂.txt"})
    assert_same(two.get(name, "ann")[1], session_after(50))
    assert two.longest([i % 90 + 3 for i in range(60)], "ann")[0].id == name
    assert not gone(two, name, "bob")
    two.delete(name, "ann")
    assert gone(one, name)
    assert gone(store_at(url), name)
    other = put(one, 40)
    assert [listed.id for listed in store_at(url).all_of("ann")] == [other]


def test_a_secret_is_drawn_once(bucket):
    start, drawn = threading.Barrier(8), set()

    def draw(i):
        objects = objects_at(bucket[0])
        start.wait()
        drawn.add(objects.create("secret", bytes([i])))

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(drawn) == 1


def test_an_object_that_another_server_changed_is_not_replaced(bucket):
    one, two = objects_at(bucket[0]), objects_at(bucket[0])

    def put(objects, data, version=None):
        objects.write("a", lambda path: path.write_bytes(data), version)

    put(one, b"first")
    with one.changing("a") as version:
        put(one, b"second", version)
    with one.changing("a") as stale:
        with two.changing("a") as version:
            put(two, b"third", version)
        with pytest.raises(ChangedError):
            put(one, b"fourth", stale)
    assert one.read("a", lambda path: path.read_bytes()) == b"third"


def test_two_servers_change_a_conversation(bucket, monkeypatch):
    """Each item that was taken is there; others were refused with a word that says why."""
    monkeypatch.setattr(thread, "_locks", [contextlib.nullcontext()])  # as in two processes
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(running(service_of(store=store_at(bucket[0])))) for _ in range(2)
        ]
        made = servers[0].openai.conversations.create()
        path = f"/v1/conversations/{made.id}/items"

        def add(i):
            items = [{"role": "user", "content": f"Item {i}"}]
            answer = servers[i % 2].http.post(path, json={"items": items})
            assert answer.is_success or answer.json()["error"]["code"] == "conversation_locked"
            return f"Item {i}" if answer.is_success else None

        with ThreadPoolExecutor(4) as pool:
            taken = {text for text in pool.map(add, range(12)) if text}
        listed = servers[0].http.get(path).json()["data"]
        assert taken
        assert {item["content"][0]["text"] for item in listed} == taken


def test_the_least_recently_used_of_all_servers_go(bucket):
    """S3 counts whole seconds, so uses are a bit more than that apart."""
    url, _ = bucket
    one = store_at(url)
    names = [put(one, 50) for _ in range(3)]
    size = one.folder_bytes / 3
    two = store_at(url, folder_bytes=int(3.5 * size))
    time.sleep(1.1)
    one.get(names[0], "ann")
    one.get(names[2], "ann")
    fourth = put(two, 50)
    assert gone(one, names[1])
    for name in (names[0], names[2], fourth):
        one.get(name, "ann")


def test_a_bucket_that_is_gone_is_a_503(bucket):
    url, process = bucket
    with running(service_of(store=store_at(url))) as server:
        made = server.post("/v1/responses", input="Hello", max_output_tokens=2).json()
        process.kill()
        process.wait()
        server.http.timeout = 300
        error = server.refused(
            "/v1/responses", 503, input="On?", max_output_tokens=2, previous_response_id=made["id"]
        )
        assert error["code"] == "store"
        assert server.refused("/v1/responses", 503, input="Hello", max_output_tokens=2)

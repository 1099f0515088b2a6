"""Servers over tiny models, on a port of their own, as clients meet them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import httpx2
import openai
import uvicorn

from cometlm.serve.app import create_app
from cometlm.serve.kept import SessionStore
from cometlm.serve.service import Service
from tests.sessions import model_of, tokenizer_of


def service_of(kind="llama", store=None, **options):
    return Service(model_of(kind), tokenizer_of(kind), "tiny", store or SessionStore(), **options)


class Running:
    """A server, its service and clients."""

    def __init__(self, service, url):
        self.service, self.url = service, url
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.http = httpx2.Client(base_url=url, timeout=60)

    def client(self, key):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, path, **body):
        return self.http.post(path, json={"model": "tiny", **body})

    @contextlib.contextmanager
    def one_running_and_one_waiting(self, messages):
        """While a server with one place writes an answer, and holds back another."""
        body = {"model": "tiny", "messages": messages, "max_tokens": 30000, "stream": True}
        path = "/v1/chat/completions"
        with self.http.stream("POST", path, json=body) as first:
            lines = first.iter_lines()  # who forgets it hangs up
            next(lines)
            with self.http.stream("POST", path, json=body):
                yield

    def refused(self, path, status=400, **body):
        """The error of a request that is refused."""
        answer = self.post(path, **body)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


@contextlib.contextmanager
def running(service=None, **options):
    service = service or service_of()
    app = create_app(service, grace=1.0, **options)
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Running(service, f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
    assert not thread.is_alive()

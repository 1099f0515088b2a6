"""A store that is full, read-only or gone: a 503, nothing acknowledged, nothing lost."""

import errno
import os
import tempfile

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cometlm.serve.kept import SessionStore
from tests.serve.running import running, service_of
from tests.serve.test_kept import folder_of

OWN = {"max_output_tokens": 3, "temperature": 0}


class Failure:
    """Makes the store of a folder fail, and be well again."""

    def __init__(self, path, kind, monkeypatch):
        self.path, self.kind, self.patch = path, kind, monkeypatch
        self.away = path.with_name("away")

    def begin(self):
        if self.kind in ("gone", "not mounted"):
            self.path.rename(self.away)
        if self.kind == "not mounted":
            self.path.mkdir()
        if self.kind in ("full", "read-only"):
            number = errno.ENOSPC if self.kind == "full" else errno.EROFS
            self._fail(tempfile if self.kind == "read-only" else os, number)

    def _fail(self, module, number):
        def failing(*_, **__):
            raise OSError(number, os.strerror(number))

        # A full disk shows when bytes are written, a read-only one before.
        self.patch.setattr(module, "fsync" if module is os else "mkstemp", failing)
        if number == errno.EROFS:
            for name in ("utime", "unlink"):
                self.patch.setattr(os, name, failing)

    def end(self):
        self.patch.undo()
        if self.away.exists():
            if self.path.exists():
                assert list(self.path.iterdir()) == []  # nothing was put beside it
                self.path.rmdir()
            self.away.rename(self.path)


@pytest.fixture(params=["full", "read-only", "gone", "not mounted"])
def failure(request, tmp_path, monkeypatch):
    return Failure(tmp_path / "store", request.param, monkeypatch)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_store_that_fails(failure, in_memory):
    store = SessionStore(folder=folder_of(failure.path), memory_bytes=in_memory << 30)
    with running(service_of(store=store)) as server:
        first = server.post("/v1/responses", input="Hello", **OWN).json()
        files = sorted(path.name for path in failure.path.iterdir())
        failure.begin()
        for more in ({}, {"previous_response_id": first["id"]}):
            error = server.refused("/v1/responses", 503, input="And?", **OWN, **more)
            assert error["code"] == "store"
        stream = server.post("/v1/responses", input="And?", stream=True, **OWN).text
        assert "response.failed" in stream
        assert "response.completed" not in stream
        chat = [{"role": "user", "content": "Hi"}]
        stream = server.post("/v1/chat/completions", messages=chat, stream=True, max_tokens=2).text
        assert '"code": "store"' in stream
        assert "[DONE]" not in stream
        if failure.kind in ("full", "read-only"):  # what is there can be read
            assert server.http.get(f"/v1/responses/{first['id']}").json() == first
        failure.end()
        assert sorted(path.name for path in failure.path.iterdir()) == files
        assert server.http.get(f"/v1/responses/{first['id']}").json() == first
        more = server.post("/v1/responses", input="So?", previous_response_id=first["id"], **OWN)
        assert more.status_code == 200
    again = SessionStore(folder=folder_of(failure.path))
    assert {one.id for one in again.all_of("")} == {first["id"], more.json()["id"]}


def test_a_conversation_in_a_store_that_fails(failure):
    """It stays as it was, whatever was to be changed in it."""
    store = SessionStore(folder=folder_of(failure.path))
    with running(service_of(store=store)) as server:
        path = "/v1/conversations"
        talk = server.http.post(path, json={}).json()["id"]
        assert server.post("/v1/responses", input="Hello", conversation=talk, **OWN).is_success
        before = server.http.get(f"{path}/{talk}/items").json()
        failure.begin()
        item = {"role": "user", "content": "And?"}
        answers = [
            server.post("/v1/responses", input="And?", conversation=talk, **OWN),
            server.http.post(f"{path}/{talk}/items", json={"items": [item]}),
            server.http.post(f"{path}/{talk}", json={"metadata": {"a": "b"}}),
        ]
        if failure.kind != "full":  # there it makes room
            answers.append(server.http.delete(f"{path}/{talk}"))
        for answer in answers:
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "store"
        failure.end()
        assert server.http.get(f"{path}/{talk}/items").json() == before
        assert server.http.get(f"{path}/{talk}").json()["metadata"] == {}
        assert server.post("/v1/responses", input="So?", conversation=talk, **OWN).is_success


def test_a_store_that_goes_while_it_answers(tmp_path, monkeypatch):
    """The answer was written, and cannot be kept: its client is told so."""
    store = SessionStore(folder=folder_of(tmp_path / "store"))
    service = service_of(store=store)
    with running(service) as server:
        path = "/v1/responses"
        with server.http.stream(
            "POST", path, json={"model": "tiny", "input": "Hi", "stream": True, **OWN}
        ) as answer:
            lines = answer.iter_lines()
            assert "response.created" in next(lines)
            (tmp_path / "store").rename(tmp_path / "away")
            rest = "\n".join(lines)
        was_kept = "response.failed" not in rest
        (tmp_path / "away").rename(tmp_path / "store")
        assert store.sessions == int(was_kept)
        assert ("response.failed" in rest) != ("response.incomplete" in rest)
        assert len(list((tmp_path / "store").glob("*.safetensors"))) == int(was_kept)


def test_a_remote_store_that_fails(tmp_path, monkeypatch):
    store = SessionStore(folder=folder_of(f"memory:/{tmp_path}"))
    with running(service_of(store=store)) as server:
        first = server.post("/v1/responses", input="Hello", **OWN).json()

        def lost(*_, **__):
            raise RuntimeError("connection lost")  # libraries of stores raise their own

        for name in ("pipe_file", "info", "get_file"):
            monkeypatch.setattr(MemoryFileSystem, name, lost)
        assert server.refused("/v1/responses", 503, input="And?", **OWN)["code"] == "store"
        refused = server.http.get(f"/v1/responses/{first['id']}")
        assert refused.status_code == 503
        monkeypatch.undo()
        assert server.http.get(f"/v1/responses/{first['id']}").json() == first
        assert store.sessions == 1

"""Lines of JSON for requests: what they hold, and that nothing of a text is among it."""

import json
import time

from cometlm.serve.keys import Keys, new_key
from tests.serve.running import running, service_of

SECRET = "marmalade"
CHAT = "/v1/chat/completions"
FIELDS = {"time", "key", "method", "route", "status", "tokens", "cached_tokens", "seconds"}


def test_a_line_for_each_request(tmp_path):
    key = new_key(tmp_path / "keys", "ann")
    keys, lines = Keys.read(tmp_path / "keys"), []
    with running(service_of(), keys=keys, log=lines.append) as server:

        def line(method, path, authorized=True, **options):
            headers = {"Authorization": f"Bearer {key}"} if authorized else {}
            before = len(lines)
            answer = server.http.request(method, path, headers=headers, **options)
            until = time.monotonic() + 20
            while len(lines) == before:  # it is written behind the answer's last byte
                assert time.monotonic() < until
                time.sleep(0.01)
            return answer, json.loads(lines[-1])

        body = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}]}
        for stream in (False, True):
            options = {**body, "stream": stream, "max_tokens": 3}
            answer, found = line("POST", CHAT, json=options)
            assert set(found) == FIELDS
            assert (found["method"], found["route"], found["status"]) == ("POST", CHAT, 200)
            assert found["key"] == keys.owner_of(key)[: len(found["key"])]
            assert found["tokens"] > found["cached_tokens"]
            assert found["seconds"] > 0
        response = {"model": "tiny", "input": SECRET, "max_output_tokens": 3}
        answer, found = line("POST", "/v1/responses", json=response)
        usage = answer.json()["usage"]
        assert found["tokens"] == usage["total_tokens"]
        assert found["cached_tokens"] == usage["input_tokens_details"]["cached_tokens"]
        answer, found = line("POST", CHAT, json={**body, SECRET: 1})
        assert (found["status"], found["tokens"]) == (400, None)
        _, found = line("GET", f"/v1/sessions/{SECRET}?after={SECRET}")
        assert (found["status"], found["route"]) == (400, "/v1/sessions/{name}")
        _, found = line("GET", f"/{SECRET}")
        assert (found["status"], found["route"]) == (404, None)
        _, found = line("POST", CHAT, authorized=False, json=body)
        assert (found["status"], found["key"]) == (401, None)
        _, found = line("POST", "/v1/files", files={"file": (SECRET, SECRET.encode())})
        assert found["status"] == 200
    assert SECRET not in "".join(lines)
    assert key not in "".join(lines)

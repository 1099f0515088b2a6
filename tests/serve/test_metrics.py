"""Numbers for Prometheus: what a few requests leave in them."""

import time

from prometheus_client.parser import text_string_to_metric_families

from cometlm.serve.kept import SessionStore
from cometlm.serve.rates import Rates
from tests.serve.running import running, service_of
from tests.serve.test_chat import wait_for
from tests.serve.test_kept import folder_of

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello there"}]


def numbers(server):
    """Values by name without the prefix, and by the label that is no model; of all names."""
    found = {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny", sample
            labels.pop("le", None)
            name = (sample.name.removeprefix("cometlm:"), *labels.values())
            found[name] = sample.value  # of buckets the last, which counts all
    return found


def test_what_a_few_requests_leave(tmp_path):
    service = service_of(store=SessionStore(folder=folder_of(tmp_path)))
    with running(service) as server:
        began = time.monotonic()
        first = server.post(CHAT, messages=HELLO, max_tokens=9).json()
        more = server.post(
            CHAT, messages=HELLO, max_tokens=5, n=2, session=first["id"], stop=["never said"]
        ).json()
        file = server.http.post("/v1/files", files={"file": ("a.txt", "Calm sea. " * 30)})
        assert file.status_code == 200
        bad = server.http.post("/v1/files", files={"file": ("a.txt", b"\xff")})
        assert bad.status_code == 400
        passed = time.monotonic() - began
        found = numbers(server)
        used = [one["usage"] for one in (first, more)]
        for name, field in (("prompt", "prompt"), ("generation", "completion")):
            want = sum(usage[f"{field}_tokens"] for usage in used)
            assert found[f"{name}_tokens_total",] == want
        cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in used)
        assert found["cached_tokens_total",] == cached
        assert found["request_success_total", "length"] == 3
        assert found["request_failure_total", "invalid_request_error"] == 1
        assert not any("None" in name for name in found)
        assert found["num_requests_running",] == found["num_requests_waiting",] == 0
        assert found["time_to_first_token_seconds_count",] == 2
        assert found["request_time_per_output_token_seconds_count",] == 3
        assert found["inter_token_latency_seconds_count",] == 8 + 2 * 4
        assert found["inter_token_latency_seconds_bucket",] == 8 + 2 * 4
        assert 0 < found["inter_token_latency_seconds_sum",] < 2 * passed
        assert found["request_queue_time_seconds_count",] == 2
        assert found["e2e_request_latency_seconds_count",] == 3  # the file, too
        assert found["e2e_request_latency_seconds_sum",] < passed
        assert found["sessions",] == len(list(tmp_path.glob("*.safetensors"))) == 4
        sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
        assert found["session_store_bytes",] == sum(sizes)
        assert 0 < found["session_memory_bytes",] == service.store.memory_bytes


def test_requests_that_run_and_wait():
    service = service_of(most_running=1, most_waiting=1, rates=Rates(3))
    with running(service) as server:
        with server.one_running_and_one_waiting(HELLO):
            assert server.post(CHAT, messages=HELLO).json()["error"]["code"] == "busy"
            limited = server.post(CHAT, messages=HELLO).json()["error"]["code"]
            assert limited == "rate_limit_exceeded"
            found = numbers(server)
        for name in ("num_requests_running", "num_requests_waiting"):
            assert found[name,] == 1
        for code in ("busy", "rate_limit_exceeded"):
            assert found["request_failure_total", code] == 1
        wait_for(lambda: numbers(server)["num_requests_running",] == 0)

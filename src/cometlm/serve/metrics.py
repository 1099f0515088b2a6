"""Numbers for Prometheus: vLLM's names and meanings where it has them, with our prefix."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cometlm.serve.engine import Engine
from cometlm.serve.kept import SessionStore

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counts of one server.

    Args:
        engine: whose jobs are counted.
        store: whose sessions are.
    """

    def __init__(self, engine: Engine, store: SessionStore) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"cometlm:{name}", about, labels, registry=self._registry)

        def seconds(name: str, about: str) -> Histogram:
            named = f"cometlm:{name}_seconds"
            return Histogram(named, about, buckets=_SECONDS, registry=self._registry)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of requests.")
        self.cached_tokens = counter("cached_tokens", "Those that had not to be run again.")
        self.generation_tokens = counter("generation_tokens", "Tokens written.")
        self.finished = counter("request_success", "Answers that ended.", "finished_reason")
        self.failed = counter("request_failure", "Requests that ended otherwise.", "reason")
        self.queue_time = seconds("request_queue_time", "From a request to its first step.")
        self.first_token = seconds("time_to_first_token", "From a request to its first text.")
        self.per_token = seconds("request_time_per_output_token", "Between tokens, of a request.")
        self.whole_time = seconds("e2e_request_latency", "From a request to its end.")

        def gauge(name: str, about: str, value: Callable[[], float]) -> None:
            Gauge(f"cometlm:{name}", about, registry=self._registry).set_function(value)

        gauge("num_requests_running", "That have a place.", lambda: engine.load.running)
        gauge("num_requests_waiting", "That wait for one.", lambda: engine.load.waiting)
        gauge("sessions", "Sessions that are kept.", lambda: store.sessions)
        gauge("session_memory_bytes", "Bytes of them in memory.", lambda: store.memory_bytes)
        gauge("session_store_bytes", "Bytes of them in the folder.", lambda: store.folder_bytes)

    def text(self) -> bytes:
        """As Prometheus reads them."""
        return generate_latest(self._registry)

"""Numbers for Prometheus: vLLM's names, labels and meanings where it has them, with our prefix."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cometlm.serve.engine import Engine
from cometlm.serve.errors import ApiError
from cometlm.serve.kept import SessionStore

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_MODEL = "model_name"  # the label that all have


class Metrics:
    """Counts of one server.

    Args:
        engine: whose jobs are counted.
        store: whose sessions are.
        model: what clients call it.
    """

    def __init__(self, engine: Engine, store: SessionStore, model: str) -> None:
        self._registry, self._model = CollectorRegistry(), model

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"cometlm:{name}", about, (_MODEL, *labels), registry=self._registry)

        def total(name: str, about: str) -> Counter:
            return counter(name, about).labels(model)

        def seconds(name: str, about: str) -> Histogram:
            named = f"cometlm:{name}_seconds"
            made = Histogram(named, about, (_MODEL,), buckets=_SECONDS, registry=self._registry)
            return made.labels(model)

        self.prompt_tokens = total("prompt_tokens", "Tokens of requests.")
        self.cached_tokens = total("cached_tokens", "Those that had not to be run again.")
        self.generation_tokens = total("generation_tokens", "Tokens written.")
        self._finished = counter("request_success", "Answers that ended.", "finished_reason")
        self._failed = counter("request_failure", "Requests that ended otherwise.", "reason")
        self.queue_time = seconds("request_queue_time", "From a request to its first step.")
        self.first_token = seconds("time_to_first_token", "From a request to its first text.")
        self.inter_token = seconds("inter_token_latency", "Between two tokens of an answer.")
        self.per_token = seconds("request_time_per_output_token", "Between tokens, of a request.")
        self.whole_time = seconds("e2e_request_latency", "From a request to its end.")

        def gauge(name: str, about: str, value: Callable[[], float]) -> None:
            made = Gauge(f"cometlm:{name}", about, (_MODEL,), registry=self._registry)
            made.labels(model).set_function(value)

        gauge("num_requests_running", "That have a place.", lambda: engine.load.running)
        gauge("num_requests_waiting", "That wait for one.", lambda: engine.load.waiting)
        gauge("sessions", "Sessions that are kept.", lambda: store.sessions)
        gauge("session_memory_bytes", "Bytes of them in memory.", lambda: store.memory_bytes)
        gauge("session_store_bytes", "Bytes of them in the folder.", lambda: store.folder_bytes)

    def finished(self, reason: str) -> None:
        """Count an answer that ended, and why."""
        self._finished.labels(self._model, reason).inc()

    def failed(self, error: ApiError) -> None:
        """Count a request that ended with an error, by its code or else its kind."""
        self._failed.labels(self._model, error.code or error.kind).inc()

    def text(self) -> bytes:
        """As Prometheus reads them."""
        return generate_latest(self._registry)


class TokenClock:
    """Notes the time between two tokens of a request's answers, which are written together.

    Args:
        seconds: takes them.
    """

    def __init__(self, seconds: Histogram) -> None:
        self._seconds = seconds
        self._last: float | None = None

    def tick(self, answers: int) -> None:
        """A token is written for so many answers."""
        now, last = time.monotonic(), self._last
        self._last = now
        if last is not None:
            for _ in range(answers):
                self._seconds.observe(now - last)

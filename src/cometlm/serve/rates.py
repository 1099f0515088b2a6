"""How much each key may ask for in a minute: requests, and tokens that the model runs.

Each key has two buckets that hold a minute's worth and fill steadily. A request takes one from the
first. What it reads is taken from the second when it begins, and what it writes when it ends, so
the second can be overdrawn: then the key waits until it is filled again. Nothing is too large for
it. Buckets are this process's own.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cometlm.serve.errors import ApiError

_EXACT = 1e-6  # of a request or a token: what rounding may leave missing


class Bucket:
    """Something that comes at a steady rate and is saved up for a minute.

    Args:
        per_minute: how much comes, and how much there can be.
        now: seconds, by the caller's clock; it is full then.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level, self._filled = float(per_minute), now

    def level(self, now: float) -> float:
        """What is there; below 0: what is owed."""
        came = (now - self._filled) * self.per_minute / 60
        self._level = min(self.per_minute, self._level + came)
        self._filled = now
        return self._level

    def wait(self, now: float) -> float:
        """Seconds until there is one; 0: there is."""
        missing = 1 - self.level(now)
        return 0.0 if missing <= _EXACT else missing * 60 / self.per_minute

    def take(self, amount: int, now: float) -> None:
        """Take some, also more than there is."""
        self._level = self.level(now) - amount


@dataclass
class Rates:
    """What keys may ask for, and have asked for. Threads may share it.

    Attributes:
        requests: a minute, for each key; None: as many as they like.
        tokens: that are read or written, a minute, for each key; those that a memory holds already
            do not count.
        clock: seconds that never go back.

    Raises:
        ValueError: less than 1.
    """

    requests: int | None = None
    tokens: int | None = None
    clock: Callable[[], float] = time.monotonic
    _buckets: dict[tuple[str, str], Bucket] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for name, value in self._limits().items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1 a minute, got {value}")

    def admit(self, owner: str) -> dict[str, str]:
        """Take a request of a key; OpenAI's headers that say what it has left.

        Raises:
            ApiError: it has to wait; nothing is taken.
        """
        with self._lock:
            now = self.clock()
            buckets = {name: self._bucket(name, owner, now) for name in self._limits()}
            waits = {name: bucket.wait(now) for name, bucket in buckets.items()}
            kind = max(waits, key=waits.__getitem__, default=None)
            if kind is not None and waits[kind] > 0:
                raise _exceeded(kind, buckets[kind].per_minute, waits[kind])
            if "requests" in buckets:
                buckets["requests"].take(1, now)
            return {k: v for name in buckets for k, v in _headers(name, buckets[name], now)}

    def charge(self, owner: str, tokens: int) -> None:
        """Take tokens that the model ran, or is going to run, for a key."""
        if self.tokens is not None:
            with self._lock:
                now = self.clock()
                self._bucket("tokens", owner, now).take(tokens, now)

    def _limits(self) -> dict[str, int]:
        limits = {"requests": self.requests, "tokens": self.tokens}
        return {name: value for name, value in limits.items() if value is not None}

    def _bucket(self, name: str, owner: str, now: float) -> Bucket:
        made = self._buckets.get((name, owner))
        if made is None:
            made = self._buckets[name, owner] = Bucket(self._limits()[name], now)
        return made


def _exceeded(kind: str, per_minute: int, wait: float) -> ApiError:
    seconds = math.ceil(wait)
    return ApiError(
        f"a key may use {per_minute} {kind} a minute; ask again in {seconds} s",
        status=429,
        kind=kind,  # as OpenAI says which of the limits it is
        code="rate_limit_exceeded",
        retry_after=seconds,
    )


def _headers(kind: str, bucket: Bucket, now: float) -> list[tuple[str, str]]:
    level = bucket.level(now)
    full_in = (bucket.per_minute - level) * 60 / bucket.per_minute
    return [
        (f"x-ratelimit-limit-{kind}", str(bucket.per_minute)),
        (f"x-ratelimit-remaining-{kind}", str(max(0, math.floor(level + _EXACT)))),
        (f"x-ratelimit-reset-{kind}", f"{math.ceil(full_in)}s"),
    ]

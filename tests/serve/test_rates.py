"""What a key may ask for in a minute: the buckets by a clock of their own, and a server's."""

import json
import re

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cometlm.serve.errors import ApiError
from cometlm.serve.keys import Keys, new_key
from cometlm.serve.rates import Bucket, Rates
from tests.serve.running import running, service_of
from tests.sessions import TEXT
from tests.tiny import refused

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


PAUSES = st.lists(st.sampled_from([0, 0, 0.1, 1, 7]) | st.floats(0, 200), max_size=60)


@given(per_minute=st.integers(1, 50), pauses=PAUSES)
@settings(max_examples=200)
def test_no_span_has_more_than_came(per_minute, pauses):
    """In any span: a minute's worth that was saved up, and what came since; and no fewer."""
    clock, taken = Clock(), []
    bucket = Bucket(per_minute, clock.now)
    for pause in pauses:
        clock.now += pause
        wait = bucket.wait(clock.now)
        assert 0 <= wait <= 60 / per_minute + 1e-6
        if wait == 0:
            bucket.take(1, clock.now)
            taken.append(clock.now)
        else:  # as many were taken as there ever were
            assert bucket.wait(clock.now + wait) == 0
            assert bucket.wait(clock.now + wait * 0.9) > 0 or wait < 1e-3
            since = [at for at in taken if at > clock.now - 60]
            assert len(since) >= per_minute - 1 or len(taken) >= per_minute
    for i, begin in enumerate(taken):
        for count, end in enumerate(taken[i:], 1):
            assert count <= per_minute * (1 + (end - begin) / 60) + 1e-3


@given(per_minute=st.integers(1, 50), amounts=st.lists(st.integers(0, 500), max_size=20))
def test_what_is_owed_is_waited_for(per_minute, amounts):
    """However much was taken; after the wait there is one, and a second before there is none."""
    bucket = Bucket(per_minute, 0.0)
    for amount in amounts:
        bucket.take(amount, 0.0)
    owed = sum(amounts) - per_minute + 1
    wait = bucket.wait(0.0)
    assert wait == pytest.approx(max(0, owed) * 60 / per_minute)
    assert bucket.wait(wait) == 0
    assert bucket.level(wait + 120) == per_minute


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["ann", "bob"]), st.integers(0, 9), st.floats(0, 30)), max_size=40
    )
)
def test_keys_have_buckets_of_their_own(steps):
    """What one key is told does not depend on others; who is refused has not used anything."""
    clock = Clock()
    shared, alone = Rates(3, 20, clock), {name: Rates(3, 20, clock) for name in ("ann", "bob")}

    def asked(rates, name, tokens):
        try:
            left = rates.admit(name)
        except ApiError as error:
            return error.status, error.kind, error.retry_after
        rates.charge(name, tokens)
        return left

    for name, tokens, pause in steps:
        clock.now += pause
        told = asked(shared, name, tokens)
        assert told == asked(alone[name], name, tokens)
        if not isinstance(told, dict):
            assert told == asked(shared, name, tokens)
            clock.now += told[2]  # as Retry-After says
            assert isinstance(asked(shared, name, tokens), dict)
            asked(alone[name], name, tokens)


def test_rates_that_are_none():
    for wrong in ((0, None), (None, -1)):
        with refused("must be at least 1 a minute"):
            Rates(*wrong)
    free = Rates()
    free.charge("ann", 10**9)
    assert free.admit("ann") == {}


def test_requests_of_each_key(tmp_path):
    clock, path = Clock(), tmp_path / "keys"
    ann, bob = (new_key(path, name) for name in ("ann", "bob"))
    service = service_of(rates=Rates(requests=2, clock=clock))
    with running(service, keys=Keys.read(path)) as server:

        def ask(key, **more):
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, **more}
            return server.http.post(CHAT, json=body, headers={"Authorization": f"Bearer {key}"})

        first = ask(ann)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] == "30s"
        assert ask(ann, max_tokens=-1).status_code == 400  # counts as well
        refused = ask(ann)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "30"
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        with pytest.raises(openai.RateLimitError):
            server.client(ann).chat.completions.create(model="tiny", messages=HELLO)
        assert server.client(ann).models.list().data  # looking is free
        assert ask(bob).status_code == 200
        clock.now += 30
        assert ask(ann).status_code == 200
        assert ask(ann).status_code == 429
        numbers = server.http.get("/metrics", headers={"Authorization": f"Bearer {bob}"}).text
        said = re.search(r'request_failure_total\{.*reason="rate_limit_exceeded"\} (\S+)', numbers)
        assert float(said[1]) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_tokens_that_are_run(stream):
    """What is in the memory already does not count, however long the conversation is."""
    clock = Clock()
    service = service_of(rates=Rates(tokens=100_000, clock=clock))
    with running(service) as server:

        def left():
            return int(server.post(CHAT).headers["x-ratelimit-remaining-tokens"])  # no body: a 400

        def cost(messages, **more):
            before = left()
            body = {"messages": messages, "max_tokens": 9, "temperature": 0, **more}
            if stream:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            answer = server.post(CHAT, **body)
            if not stream:
                return before - left(), answer.json()
            lines = answer.text.split("\n\n")
            return before - left(), json.loads(lines[-3].removeprefix("data: "))

        used, first = cost([{"role": "user", "content": TEXT}])
        usage = first["usage"]
        assert used == usage["prompt_tokens"] + usage["completion_tokens"] > 200
        used, more = cost([{"role": "user", "content": "And?"}], session=first["id"])
        usage = more["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert used == usage["prompt_tokens"] - cached + usage["completion_tokens"] < 60
        before = left()
        read = server.openai.files.create(file=("x.txt", TEXT.encode()), purpose="user_data")
        assert before - left() == read.tokens


def test_a_key_in_debt_waits():
    """A request may be larger than a minute's tokens; the next one waits for it."""
    clock = Clock()
    service = service_of(rates=Rates(tokens=60, clock=clock))
    with running(service) as server:
        long = [{"role": "user", "content": TEXT}]
        usage = server.post(CHAT, messages=long, max_tokens=5).json()["usage"]
        owed = usage["total_tokens"] - 60
        error = server.refused(CHAT, 429, messages=HELLO)
        assert error["type"] == "tokens"
        assert f"ask again in {owed + 1} s" in error["message"]
        clock.now += owed
        assert server.post(CHAT, messages=HELLO).status_code == 429
        clock.now += 1
        assert server.post(CHAT, messages=HELLO, max_tokens=1).status_code == 200


def test_who_hangs_up_has_used_what_was_written():
    clock = Clock()
    service = service_of(rates=Rates(tokens=1000, clock=clock))
    with running(service) as server:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 500, "stream": True}
        with server.http.stream("POST", CHAT, json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(40):
                next(lines)
        left = int(server.post(CHAT).headers["x-ratelimit-remaining-tokens"])
        assert left < 1000 - 15

"""Chats and completions, as the openai package and plain HTTP see them."""

import json
import time

import openai
import pytest

from cometlm import Session
from cometlm.serve.engine import Engine
from cometlm.serve.kept import SessionStore
from cometlm.session.chat_template import PLAIN
from tests.serve.running import running, service_of
from tests.serve.test_kept import folder_of
from tests.sessions import TEMPLATE, TEXT, model_of, session_of, tokenizer_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello <|im_end|> there, " + TEXT[:100]}]


def user(text):
    return {"role": "user", "content": text}


def ask(server, messages, **options):
    given = {"temperature": 0, "max_tokens": 9, **options}
    return server.openai.chat.completions.create(model="tiny", messages=messages, **given)


def said(answer, index=0):
    return answer.choices[index].message.content


def events(server, path, **body):
    """What a stream says, without its end."""
    answer = server.post(path, stream=True, **body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *lines, end = [line for line in answer.text.split("\n\n") if line]
    assert end == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# --- the same as a session ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "overlap", "like gemma"])
def test_a_chat_is_a_sessions(kind):
    """Control tokens in the message are text, as a session has it."""
    session = session_of(kind)
    with running(service_of(kind)) as server:
        found = None
        for text in (HELLO[0]["content"], "And then?", "What next? " + TEXT[:60]):
            extra = {} if found is None else {"session": found.id}
            found = ask(server, [user(text)], extra_body=extra)
            want = session.chat(text, max_new_tokens=9, do_sample=False)
            assert said(found) == want
            assert found.usage.completion_tokens == 9
        tokens = found.usage.prompt_tokens + 9
        assert tokens <= session.stats().tokens <= tokens + 6  # and the closing


def test_a_completion_goes_on_from_its_text(server):
    session = session_of()
    session.read(TEXT[:200])
    want = session.ask("", template=False, max_new_tokens=16, do_sample=False)
    answer = server.openai.completions.create(model="tiny", prompt=TEXT[:200], temperature=0)
    assert answer.choices[0].text == want
    assert answer.usage.prompt_tokens == session.stats().tokens
    ids = tokenizer_of("llama")(TEXT[:200], split_special_tokens=True)["input_ids"]
    again = server.openai.completions.create(model="tiny", prompt=ids, temperature=0)
    assert again.choices[0].text == want
    more = server.openai.completions.create(
        model="tiny", prompt=" And", temperature=0, extra_body={"session": answer.id}
    )
    whole = server.openai.completions.create(
        model="tiny", prompt=TEXT[:200] + want + " And", temperature=0
    )
    assert more.usage.prompt_tokens == session.stats().tokens + 16 + 1
    assert whole.choices[0].text


def test_system_messages_and_parts(server):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    want = session_of().chat("Hello", system="Be brief.", max_new_tokens=9, do_sample=False)
    assert said(ask(server, messages)) == want


# --- conversations ------------------------------------------------------------------------------


def test_who_resends_everything_goes_on_from_what_was_kept():
    """With the answers that naming a session gives, and little of the history run again."""
    with running() as server:
        history, found = [], None
        for turn in range(12):
            text = f"Turn {turn}: {TEXT[turn * 20 : turn * 20 + 40]}"
            history.append(user(text))
            extra = {} if found is None else {"session": found.id}
            hot = {"temperature": 1.0, "seed": turn}  # tokens that nobody would spell so
            whole = ask(server, history, **hot)
            found = ask(server, [user(text)], extra_body=extra, **hot)
            assert said(whole) == said(found)
            assert whole.usage.prompt_tokens == found.usage.prompt_tokens
            cached = whole.usage.prompt_tokens_details.cached_tokens
            assert cached == found.usage.prompt_tokens_details.cached_tokens
            if turn > 1:
                new = len(tokenizer_of("llama")(text)["input_ids"]) + 8  # with its frame
                assert cached >= whole.usage.prompt_tokens - new - 12 - 9
            history.append({"role": "assistant", "content": said(whole)})
        changed = [*history[:-1], {"role": "assistant", "content": "No."}, user("Why?")]
        cached = ask(server, changed).usage.prompt_tokens_details.cached_tokens
        assert 0 < cached < whole.usage.prompt_tokens


def test_a_long_message_with_another_end_is_not_read_again():
    """Places on the way through it are held; answers are those of a server that knows nothing."""
    document = TEXT * 4
    asked = [user(document + question) for question in ("Who?", "Who?", "Why then?")]
    asked.append(user(document[: len(document) // 2]))
    want = []
    for message in asked:
        with running() as fresh:
            want.append(said(ask(fresh, [message])))
    with running() as server:
        found = [ask(server, [message]) for message in asked]
        assert [said(answer) for answer in found] == want
        first, again, other, half = (
            answer.usage.prompt_tokens_details.cached_tokens / answer.usage.prompt_tokens
            for answer in found
        )
        assert first == 0
        assert again > 0.95
        assert other > 0.5
        assert half > 0.5
        unkept = ask(server, [user("Now " + document)], store=False)
        again = ask(server, [user("Now " + document)])
        assert said(again) == said(unkept)
        assert again.usage.prompt_tokens_details.cached_tokens == 0


def test_a_long_conversation_costs_the_same(tmp_path):
    """Turn 30 holds what turn 10 holds, and hardly any of the history is run again."""
    store = SessionStore(folder=folder_of(tmp_path))
    with running(service_of(store=store)) as server:
        history, sizes = [], []
        for turn in range(30):
            history.append(user(f"Turn {turn}: {TEXT[turn * 7 : turn * 7 + 60]}"))
            found = ask(server, history)
            history.append({"role": "assistant", "content": said(found)})
            session = store.get(found.id, "")[1]
            sizes.append(session.stats().memory_bytes)
            new = len(tokenizer_of("llama")(history[-2]["content"])["input_ids"])
        assert set(sizes[10:]) == {sizes[-1]}
        usage = found.usage
        assert usage.prompt_tokens > 1000
        cached = usage.prompt_tokens_details.cached_tokens
        assert cached >= 0.95 * (usage.prompt_tokens - new)
    files = {path.stat().st_size // 4096 for path in tmp_path.glob("*.safetensors")}
    assert len(files) < 4


@pytest.mark.parametrize("names", [True, False], ids=["a session", "the history"])
def test_a_short_conversation_is_not_run_again(names):
    """In one open chunk, over which nothing is in a memory yet."""
    with running(service_of("long chunks")) as server:
        history, last, shares = [], None, []
        for turn in range(4):
            message = user(f"Turn {turn}: {TEXT[:9]}")
            history.append(message)
            if names and last is not None:
                found = ask(server, [message], extra_body={"session": last.id})
            else:
                found = ask(server, history)
            usage = found.usage
            history.append({"role": "assistant", "content": said(found)})
            if last is not None:
                before = last.usage.prompt_tokens + last.usage.completion_tokens
                shares.append(usage.prompt_tokens_details.cached_tokens / before)
                (session,) = [server.service.store.get(found.id, "")[1]]
                assert session.stats().chunks == 0
            last = found
        assert min(shares) >= 0.95
        apart = model_of("long chunks").session(tokenizer_of("long chunks"))
        for message, answer in zip(history[::2], history[1::2], strict=True):
            apart.release()
            assert apart.chat([message], max_new_tokens=9, do_sample=False) == answer["content"]


def test_a_session_is_a_value(server):
    """Two go on from the same one; it stays."""
    first = ask(server, HELLO)
    one, two = (ask(server, [user(t)], extra_body={"session": first.id}) for t in ("A?", "B?"))
    again = ask(server, [user("A?")], extra_headers={"X-Session-Id": first.id})
    assert said(one) == said(again)
    assert len({first.id, one.id, two.id, again.id}) == 4


def test_sessions_that_are_not_there(server):
    error = server.refused(CHAT, 404, messages=HELLO, session="chatcmpl-" + "0" * 40)
    assert (error["param"], error["code"]) == ("session", "not_found")
    with pytest.raises(openai.NotFoundError):
        ask(server, HELLO, extra_body={"session": "../secret"})
    unkept = ask(server, HELLO, store=False)
    assert unkept.choices[0].session is None
    error = server.refused(CHAT, 404, messages=HELLO, session=unkept.id)
    assert error["code"] == "dropped"
    first = ask(server, HELLO)
    history = [*HELLO, {"role": "assistant", "content": said(first)}, user("More?")]
    error = server.refused(CHAT, messages=history, session=first.id)
    assert "send only what was said after its answer" in error["message"]


# --- streams ------------------------------------------------------------------------------------


def test_a_stream_of_a_chat(server):
    want = said(ask(server, HELLO))
    options = {"messages": HELLO, "temperature": 0, "max_tokens": 9}
    found = events(server, CHAT, **options, stream_options={"include_usage": True})
    assert len({event["id"] for event in found}) == 1
    first, *middle, last, usage = found
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"]["content"] for event in middle) == want
    assert all(event["choices"][0]["finish_reason"] is None for event in [first, *middle])
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    assert all(event["usage"] is None for event in found[:-1])
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 9
    assert {event["object"] for event in found} == {"chat.completion.chunk"}
    plain = events(server, CHAT, **options)
    assert [e["choices"][0]["delta"] for e in plain] == [
        e["choices"][0]["delta"] for e in found[:-1]
    ]
    assert not any("usage" in event for event in plain)


def test_a_stream_of_a_completion(server):
    found = events(server, COMPLETIONS, prompt="Once", temperature=0, max_tokens=9)
    whole = server.openai.completions.create(
        model="tiny", prompt="Once", temperature=0, max_tokens=9
    )
    assert "".join(event["choices"][0]["text"] for event in found) == whole.choices[0].text
    assert found[-1]["choices"][0]["finish_reason"] == "length"


def test_several_answers(server):
    whole = ask(server, HELLO, n=3, temperature=1.5, seed=5)
    texts = [said(whole, i) for i in range(3)]
    assert len(set(texts)) == 3
    assert whole.usage.completion_tokens == 27
    streamed = dict.fromkeys(range(3), "")
    sessions = {}
    for event in ask(server, HELLO, n=3, temperature=1.5, seed=5, stream=True):
        (choice,) = event.choices
        streamed[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            sessions[choice.index] = choice.session
    assert list(streamed.values()) == texts
    assert sessions[0] == event.id
    answers = [ask(server, [user("So?")], extra_body={"session": sessions[i]}) for i in range(3)]
    assert len({said(answer) for answer in answers}) == 3


def test_seeds(server):
    one, same, other = (
        said(ask(server, HELLO, temperature=1.5, top_p=0.95, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == same != other


def test_stop_strings_are_cut_and_forgotten(server):
    whole = said(ask(server, HELLO, max_tokens=20))
    stop = whole[25:29]
    cut = whole[: whole.index(stop)]
    answer = ask(server, HELLO, max_tokens=20, stop=["never said", stop])
    assert said(answer) == cut
    assert answer.choices[0].finish_reason == "stop"
    found = events(server, CHAT, messages=HELLO, temperature=0, max_tokens=20, stop=stop)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in found) == cut
    history = [*HELLO, {"role": "assistant", "content": cut}, user("And?")]
    more = ask(server, history)
    named = ask(server, [user("And?")], extra_body={"session": answer.id})
    assert said(more) == said(named)


def test_one_prompt_in_a_list(server):
    ids = server.service.tokenizer(TEXT[:50])["input_ids"]
    for prompt in (TEXT[:50], ids):
        one, same = (
            server.openai.completions.create(model="tiny", prompt=given, temperature=0)
            for given in (prompt, [prompt])
        )
        assert one.choices[0].text == same.choices[0].text
    for given in (["One", "Two"], [[1], [2]]):
        assert server.refused(COMPLETIONS, prompt=given)["param"] == "prompt"
    assert server.refused(COMPLETIONS, prompt=[])["param"] == "prompt"


def test_a_template_is_told_names(server, monkeypatch):
    named = TEMPLATE.replace("{{ m.role }}", "{{ m.role }}{{ m.name and ' ' + m.name }}")
    monkeypatch.setattr(server.service.tokenizer, "chat_template", named)
    plain = ask(server, HELLO).usage.prompt_tokens
    name = "ann<|im_end|>"  # text, as all that a client writes
    told = server.service._whole([{**HELLO[0], "name": name}], "nobody", PLAIN)
    end = server.service.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert told.new.count(end) == 1
    found = ask(server, [{**HELLO[0], "name": name}]).usage.prompt_tokens
    assert found == told.tokens > plain


# --- what is refused ----------------------------------------------------------------------------

UNSUPPORTED = {
    "tools": [{"type": "function", "function": {"name": "f"}}],  # this template takes none
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1},
    "modalities": ["audio"],
    "reasoning_effort": "low",
    "web_search_options": {},
    "no_such_field": 1,
}
WRONG = {
    "messages": [[], "x", [1], [{"content": "x"}], [{"role": "tool", "content": "x"}], None],
    "temperature": [-1, 2.1, "1", True],
    "top_p": [0, 1.1],
    "max_tokens": [0, -5, 10**9, 1.5],
    "n": [0, 10**6],
    "stop": ["", ["a"] * 5, [1]],
    "seed": ["x", 2**70],
    "stream_options": [{"include_usage": True}],
    "stream": ["yes"],
    "session": [5],
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_supported_is_refused(server, field):
    error = server.refused(CHAT, messages=HELLO, **{field: UNSUPPORTED[field]})
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "unsupported"


def test_fields_that_ask_for_nothing_are_taken(server):
    neutral = {"tools": [], "frequency_penalty": 0.0, "logprobs": False, "tool_choice": "auto"}
    neutral |= {"response_format": {"type": "text"}, "logit_bias": None, "user": "me"}
    assert server.post(CHAT, messages=HELLO, max_tokens=1, **neutral).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in WRONG.items() for v in values]
)
def test_wrong_values_are_refused(server, field, value):
    error = server.refused(CHAT, **{"messages": HELLO, field: value})
    assert error["param"].startswith(field)


@pytest.mark.parametrize(
    "content", [[{"type": "image_url", "image_url": {"url": "x"}}], None, 5, [{"type": "text"}]]
)
def test_messages_that_are_no_text(server, content):
    error = server.refused(CHAT, messages=[{"role": "user", "content": content}])
    assert error["param"].startswith("messages[0]")


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b'{"model": "tiny"}'],
)
def test_bodies_that_are_none(server, raw):
    headers = {"content-type": "application/json"}
    answer = server.http.post(CHAT, content=raw, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("depth", [70, 900])
@pytest.mark.parametrize("field", ["chat_template_kwargs", "messages", "tools"])
def test_bodies_that_are_too_deep(server, field, depth):
    deep = "[" * depth + "]" * depth
    given = {"chat_template_kwargs": f'{{"a": {deep}}}', "messages": deep, "tools": deep}[field]
    said = json.dumps({"model": "tiny", "messages": HELLO})[:-1] + f', "{field}": {given}}}'
    answer = server.http.post(CHAT, content=said, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "64 levels" in answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["messages", "stop", "user", "model", "session"])
def test_halves_of_characters(server, field):
    half = [user("x\ud800")] if field == "messages" else "x\ud800"
    body = {"model": "tiny", "messages": HELLO, field: half}
    raw = json.dumps(body).encode()
    answer = server.http.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["message"]


def test_other_models_and_pages(server):
    error = server.refused(CHAT, 404, messages=HELLO, model="gpt-5")
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert [one.id for one in server.openai.models.list()] == ["tiny"]
    assert server.openai.models.retrieve("tiny").owned_by == "cometlm"
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("gpt-5")
    assert server.http.get("/health").json() == {"status": "ok"}
    for answer, status in ((server.http.get("/nowhere"), 404), (server.http.get(CHAT), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


# --- places -------------------------------------------------------------------------------------


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_place(stream):
    service = service_of(most_running=1)
    with running(service) as server:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 30000, "stream": stream}
        if stream:
            with server.http.stream("POST", CHAT, json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                wait_for(lambda: service.engine.load.running == 1)
        else:
            with pytest.raises(Exception, match="timed out"):
                server.http.post(CHAT, json=body, timeout=0.3)
        wait_for(lambda: service.engine.load.running == 0)
        assert ask(server, HELLO).usage.completion_tokens == 9
        assert service.store.sessions == 1  # of what was broken off nothing is kept


def test_too_many_requests():
    service = service_of(most_running=1, most_waiting=1)
    with running(service) as server, server.one_running_and_one_waiting(HELLO):
        answer = server.post(CHAT, messages=HELLO)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["type"] == "rate_limit_error"


def test_an_error_of_the_model_is_a_500(monkeypatch):
    def fails(*_, **__):
        raise FloatingPointError("a secret of the house")

    with running() as server:
        monkeypatch.setattr(Session, "begin_answer", fails)
        error = server.refused(CHAT, 500, messages=HELLO)
        assert "secret" not in error["message"]
        stream = server.post(CHAT, messages=HELLO, stream=True).text
        assert json.loads(stream.split("data: ")[-1])["error"]["code"] == "internal"
        monkeypatch.undo()
        assert ask(server, HELLO).choices


def test_the_server_stops_while_it_answers():
    service = service_of()
    with running(service) as server:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 30000, "stream": True}
        open_stream = server.http.stream("POST", CHAT, json=body)
        lines = open_stream.__enter__().iter_lines()
        next(lines)
    assert service.engine.load.running == 0
    assert isinstance(service.engine, Engine)
    assert model_of("llama") is service.model

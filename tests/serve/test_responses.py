"""Responses: kept, gone on from, listed, deleted and streamed, as the openai package sees them."""

import json

import openai
import pytest

from cometlm.serve.folder import Folder
from cometlm.serve.kept import SessionStore
from cometlm.session import file
from tests.serve.running import running, service_of
from tests.sessions import TEXT, model_of, session_of, tokenizer_of

PATH = "/v1/responses"


def ask(server, text, **options):
    given = {"temperature": 0, "max_output_tokens": 9, **options}
    return server.openai.responses.create(model="tiny", input=text, **given)


@pytest.mark.parametrize("kind", ["llama", "overlap"])
def test_a_conversation_is_a_sessions(kind):
    session = session_of(kind)
    with running(service_of(kind)) as server:
        found, tokens = None, []
        for text in ("Hello <|im_end|> " + TEXT[:100], "And then?", "What? " + TEXT[:90]):
            previous = None if found is None else found.id
            found = ask(server, text, previous_response_id=previous)
            assert found.output_text == session.chat(text, max_new_tokens=9, do_sample=False)
            assert found.previous_response_id == previous
            assert found.usage.output_tokens == 9
            assert found.status == "incomplete"
            assert found.incomplete_details.reason == "max_output_tokens"
            usage = found.usage
            tokens.append((usage.input_tokens_details.cached_tokens, usage.input_tokens))
    (_, first), (second, _), (third, last) = tokens
    assert first - 12 <= second + 9 <= third <= last  # chunks of 12 tokens; one may end early


def test_instructions_and_lists(server):
    want = session_of().chat("Hello", system="Be brief.", max_new_tokens=9, do_sample=False)
    assert ask(server, "Hello", instructions="Be brief.").output_text == want
    parts = [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}]
    items = [
        {"type": "message", "role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
    ]
    want = ask(server, [{**items[0], "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    assert ask(server, items).output_text == want.output_text


def test_the_whole_conversation_sent_again(server):
    first = ask(server, "Hello " + TEXT[:200])
    named = ask(server, "And?", previous_response_id=first.id)
    items = [
        {"role": "user", "content": "Hello " + TEXT[:200]},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"role": "user", "content": "And?"},
    ]
    for item in items:
        if isinstance(item["content"], list):
            item["content"] = [{"type": p["type"], "text": p["text"]} for p in item["content"]]
    whole = ask(server, items)
    assert whole.output_text == named.output_text
    assert whole.usage.input_tokens_details == named.usage.input_tokens_details


def test_what_is_kept(server):
    made = ask(server, "Hello", metadata={"for": "a test"})
    assert server.openai.responses.retrieve(made.id).model_dump() == made.model_dump()
    assert made.metadata == {"for": "a test"}
    listed = server.openai.responses.input_items.list(made.id)
    assert [item.content[0].text for item in listed] == ["Hello"]
    more = ask(server, "More", previous_response_id=made.id)
    server.openai.responses.delete(made.id)
    for call in (
        server.openai.responses.retrieve,
        server.openai.responses.delete,
        server.openai.responses.input_items.list,
        lambda name: ask(server, "More", previous_response_id=name),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call(made.id)
        assert caught.value.code == "dropped"
    ask(server, "And more", previous_response_id=more.id)  # stands on its own
    with pytest.raises(openai.NotFoundError) as caught:
        ask(server, "Hello", previous_response_id="resp_123")
    assert (caught.value.code, caught.value.param) == ("not_found", "previous_response_id")
    gone = ask(server, "Hello", store=False)
    with pytest.raises(openai.NotFoundError):
        server.openai.responses.retrieve(gone.id)


def test_pages_of_input(server):
    items = [{"role": "user", "content": f"Part {i}"} for i in range(5)]
    items = [one for i, one in enumerate(items) if i % 2 == 0]
    made = ask(server, [items[0], {"role": "assistant", "content": "Yes."}, items[1]])
    pages = server.openai.responses.input_items.list(made.id, limit=1, order="asc")
    assert [item.content[0].text for item in pages] == ["Part 0", "Yes.", "Part 2"]
    newest = server.openai.responses.input_items.list(made.id)
    assert [item.content[0].text for item in newest] == ["Part 2", "Yes.", "Part 0"]
    for query in ("limit=0", "limit=101", "order=up", "after=none"):
        answer = server.http.get(f"{PATH}/{made.id}/input_items?{query}")
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == query.partition("=")[0]


def test_a_chat_is_gone_on_from_as_a_response(server):
    """Ids are of one kind to who goes on; but a chat is no response to look at."""
    chat = server.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=4, temperature=0
    )
    assert ask(server, "More", previous_response_id=chat.id).output_text
    with pytest.raises(openai.NotFoundError):
        server.openai.responses.retrieve(chat.id)


def test_a_stream(server):
    want = ask(server, "Hello", max_output_tokens=20)
    events = list(ask(server, "Hello", max_output_tokens=20, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[4:-4] == ["output_text.delta"] * len(deltas)
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(deltas) == want.output_text == events[-4].text
    last = events[-1].response
    assert last.output_text == want.output_text
    assert last.usage == want.usage
    assert server.openai.responses.retrieve(last.id).model_dump() == last.model_dump()
    assert events[0].response.id == last.id
    assert events[0].response.status == "in_progress"
    with server.openai.responses.stream(
        model="tiny", input="Hello", max_output_tokens=20, temperature=0
    ) as stream:
        for _ in stream:
            pass
    raw = server.post(PATH, input="Hello", max_output_tokens=2, stream=True).text
    first = raw.split("\n\n")[0].split("\n")
    assert first[0] == "event: response.created"
    assert json.loads(first[1].removeprefix("data: "))["type"] == "response.created"


UNSUPPORTED = {
    "tools": [{"type": "web_search"}],
    "background": True,
    "include": ["reasoning.encrypted_content"],
    "reasoning": {"effort": "high"},
    "text": {"format": {"type": "json_object"}},
    "truncation": "auto",
    "prompt": {"id": "p"},
    "no_such_field": 1,
}
WRONG = {
    "input": [[], 5, None, [{"role": "user"}], [{"type": "function_call"}], ["x"]],
    "max_output_tokens": [0, -1, 10**9],
    "previous_response_id": [5],
    "metadata": [{"a": 1}],
    "temperature": [3],
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_supported_is_refused(server, field):
    error = server.refused(PATH, **{"input": "Hello", field: UNSUPPORTED[field]})
    assert error["code"] == "unsupported"
    assert error["param"] in (field, f"{field}.format")


@pytest.mark.parametrize(("field", "value"), [(f, v) for f in WRONG for v in WRONG[f]])
def test_wrong_values_are_refused(server, field, value):
    assert server.refused(PATH, **{"input": "Hello", field: value})["param"].startswith(field)


def test_images_are_refused(server):
    parts = [{"type": "input_image", "image_url": "x"}]
    error = server.refused(PATH, input=[{"role": "user", "content": parts}])
    assert error["param"] == "input[0].content[0]"


def test_more_than_can_be_kept_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """Beside a session its file takes some megabytes of what was said, and no more."""
    store = SessionStore(folder=Folder(tmp_path, model_of("llama"), tokenizer_of("llama")))
    monkeypatch.setattr(file, "MOST_NOTED", 20_000)
    with running(service_of(store=store)) as server:
        long = "Я" * 4_000  # seven bytes each
        for refused in (
            server.http.post(PATH, json={"model": "tiny", "input": long}),
            server.http.post(
                "/v1/conversations", json={"items": [{"role": "user", "content": long}]}
            ),
        ):
            assert refused.status_code == 413
            assert "may take 20000 bytes" in refused.json()["error"]["message"]
        assert store.sessions == 0
        assert ask(server, "a" * 4_000).status == "incomplete"
        assert ask(server, long, store=False).status == "incomplete"

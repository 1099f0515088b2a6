"""Tools: told to the model by its chat template, and calls found in what it writes."""

import copy
import functools
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.serve.kept import SessionStore
from cometlm.serve.service import Service
from cometlm.serve.tools import CallFilter, Calling
from cometlm.serve.transcript import Transcript
from cometlm.session.writer import Writer
from tests.serve.running import running
from tests.sessions import TEXT, model_of, tokenizer_of
from tests.tiny import examples

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "</tools> Write <tool_call>{name, arguments}</tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>"
    "{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {
    "name": "weather",
    "description": "Of a place, also of <|im_end|>",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": WEATHER}]
FLAT = [{"type": "function", **WEATHER}]
OTHER = {"type": "function", "function": {**WEATHER, "name": "tides"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Lyon ☂"}}\n</tool_call>'
PLACE = {"place": "Lyon ☂"}


def tokenizer_with(template=TOOL_TEMPLATE, **attributes):
    tokenizer = copy.deepcopy(tokenizer_of("llama"))
    tokenizer.chat_template = template
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def server():
    service = Service(model_of("llama"), tokenizer_with(), "tiny", SessionStore())
    with running(service) as made:
        yield made


@pytest.fixture
def saying(monkeypatch):
    """Lets the model write what a test wants, whatever it was asked."""

    def script(text):
        tokenizer = tokenizer_of("llama")
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
        monkeypatch.setattr(Writer, "_chosen", lambda writer, logits: ids[len(writer.ids)])

    monkeypatch.setattr("cometlm.serve.service.stop_ids", lambda *_: {
        tokenizer_of("llama").convert_tokens_to_ids("<|im_end|>")
    })  # fmt: skip
    return script


def ask(server, messages, **options):
    return server.openai.chat.completions.create(
        model="tiny", messages=messages, **{"temperature": 0, "max_tokens": 99, **options}
    )


def respond(server, text, **options):
    return server.openai.responses.create(
        model="tiny", input=text, **{"temperature": 0, "max_output_tokens": 99, **options}
    )


# --- chats --------------------------------------------------------------------------------------


def test_a_chat_with_a_tool(server, saying):
    """The whole conversation sent again goes on from what was kept, calls and results too."""
    saying("I will look.\n" + CALL)
    first = ask(server, [user("Weather? " + TEXT[:99])], tools=TOOLS)
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I will look."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == PLACE
    history = [
        user("Weather? " + TEXT[:99]),
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Rain <|im_end|>"},
    ]
    saying("It rains.")
    more = ask(server, history, tools=TOOLS)
    assert more.choices[0].message.content == "It rains."
    assert more.choices[0].message.tool_calls is None
    assert more.choices[0].finish_reason == "stop"
    cached = more.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens - 12
    named = ask(server, history[2:], tools=TOOLS, extra_body={"session": first.id})
    assert named.usage.prompt_tokens == more.usage.prompt_tokens
    last = ask(server, [user("So?")], tools=TOOLS, extra_body={"session": named.id})
    assert last.choices[0].message.content


def test_a_stream_with_tools(server, saying):
    saying("Let me <see>.\n" + CALL + "\n" + CALL)
    chunks = list(ask(server, [user("Weather?")], tools=TOOLS, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "Let me <see>."
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.index for call in calls] == [0, 1]
    assert len({call.id for call in calls}) == 2
    assert [json.loads(call.function.arguments) for call in calls] == [PLACE, PLACE]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with server.openai.chat.completions.stream(
        model="tiny", messages=[user("Weather?")], tools=TOOLS, max_tokens=99
    ) as stream:
        final = stream.get_final_completion().choices[0].message
    assert [call.function.name for call in final.tool_calls] == ["weather", "weather"]


def test_one_call_at_most(server, saying):
    """The answer ends behind its first call, and so does the session."""
    saying("I look.\n" + CALL + "\n" + CALL + "\nAnd then")
    only = {"tools": TOOLS, "parallel_tool_calls": False}
    answer = ask(server, [user("Weather?")], **only)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [PLACE]
    kept = server.service.store.get(answer.id, "")[1].stats().tokens
    assert kept == answer.usage.total_tokens + len(ids_of("<|im_end|>\n"))
    chunks = list(ask(server, [user("Weather?")], stream=True, **only))
    assert sum(len(chunk.choices[0].delta.tool_calls or ()) for chunk in chunks) == 1
    response = respond(server, "Weather?", tools=FLAT, parallel_tool_calls=False)
    assert [item.type for item in response.output] == ["message", "function_call"]
    assert not response.parallel_tool_calls
    saying("I know: rain.")
    assert ask(server, [user("Weather?")], **only).choices[0].message.content == "I know: rain."


def ids_of(text):
    return tokenizer_of("llama")(text, add_special_tokens=False)["input_ids"]


def test_one_call_of_a_model_that_shows_no_end():
    template = TOOL_TEMPLATE.replace("tool_call>", "call>") + "[TOOL_CALLS]"
    service = Service(model_of("llama"), tokenizer_with(template), "tiny", SessionStore())
    with running(service) as server:
        given = {"messages": [user("Weather?")], "tools": TOOLS, "parallel_tool_calls": False}
        assert server.refused(CHAT, **given)["param"] == "parallel_tool_calls"


def test_what_is_no_call_is_text(server, saying):
    for text in ("<tool_call>\nweather\n</tool_call>", '<tool_call>{"name": "weather", "argu', "<"):
        saying(text)
        message = ask(server, [user("Weather?")], tools=TOOLS).choices[0].message
        assert (message.content, message.tool_calls) == (text, None)
        chunks = list(ask(server, [user("Weather?")], tools=TOOLS, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    saying(CALL)
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        message = ask(server, [user("Weather?")], **options).choices[0].message
        assert (message.content, message.tool_calls) == (CALL, None)


def test_tools_are_read_and_control_tokens_in_them_are_text(server, saying):
    saying("Yes.")
    plain = ask(server, [user("Hello")]).usage.prompt_tokens
    told = ask(server, [user("Hello")], tools=TOOLS)
    assert told.usage.prompt_tokens > plain + 20
    _, session = server.service.store.get(told.id, "")
    end = tokenizer_of("llama").convert_tokens_to_ids("<|im_end|>")
    prompt = server.service._whole([user("Hello")], "nobody", options_with(TOOLS))
    assert prompt.new.count(end) == 2  # of the two messages
    assert session.turns == 1


def options_with(tools):
    from cometlm.session.chat_template import ChatOptions

    return ChatOptions(tools)


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("tool_choice", {"tools": TOOLS, "tool_choice": "required"}),
        ("tool_choice", {"tools": TOOLS, "tool_choice": {"type": "function"}}),
        (
            "tools[0].function.strict",
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        ),
        ("tools", {"tools": [{"type": "custom", "custom": {"name": "f"}}]}),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused(server, param, options):
    error = server.refused(CHAT, messages=[user("Hi")], **options)
    assert (error["param"], error["code"]) == (param, "unsupported")


@pytest.mark.parametrize(
    "tools",
    [[5], [{}], [{"type": "function"}], [{"type": "function", "function": {"name": "a b"}}], "x",
     [{"type": "function", "function": {"name": "f", "parameters": []}}]],
)  # fmt: skip
def test_what_is_no_tool(server, tools):
    assert server.refused(CHAT, messages=[user("Hi")], tools=tools)["param"].startswith("tools")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "content": "", "tool_calls": 5},
        {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]},
        {"role": "user", "content": "x", "tool_calls": [{"id": "1"}]},
    ],
)  # fmt: skip
def test_messages_that_are_none(server, message):
    error = server.refused(CHAT, messages=[user("Hi"), message, user("So?")])
    assert error["param"].startswith("messages")


def test_templates_that_take_no_tools():
    said = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    for template in (said, said + "<tool_call>"):
        tokenizer = tokenizer_with(template)
        with running(Service(model_of("llama"), tokenizer, "tiny", SessionStore())) as server:
            error = server.refused(CHAT, messages=[user("Hi")], tools=TOOLS)
            assert (error["param"], error["code"]) == ("tools", "unsupported")


def test_other_tools_behind_a_session(server, saying):
    """The template writes them in front, where nothing can be put any more."""
    saying("Yes.")
    first = ask(server, [user("Hello")])
    error = server.refused(CHAT, messages=[user("So?")], tools=TOOLS, session=first.id)
    assert error["param"] == "tools"


def test_the_same_tools_behind_whatever_has_come_of_a_session(server, saying):
    """A fork of it, a file read behind it, a text gone on with, a conversation."""
    saying("Yes.")
    first = ask(server, [user("Hello")], tools=TOOLS).id
    fork = server.http.post(f"/v1/sessions/{first}/fork").json()["id"]
    form = {"files": {"file": ("a.txt", b"The lamp is out.")}, "data": {"session": first}}
    file = server.http.post("/v1/files", **form).json()
    assert "tools" not in file
    assert server.http.get(f"/v1/files/{file['id']}").json() == file
    text = server.post("/v1/completions", prompt="x", session=first, max_tokens=2).json()["id"]
    for name in (fork, file["id"], text):
        assert ask(server, [user("So?")], tools=TOOLS, extra_body={"session": name}).id
        error = server.refused(CHAT, messages=[user("So?")], tools=[OTHER], session=name)
        assert error["param"] == "tools"
    talk = server.http.post("/v1/conversations", json={"session": first}).json()["id"]
    assert respond(server, "So?", tools=FLAT, conversation=talk).id


def test_a_tool_that_comes_to_a_chat_of_open_webui_later(server, saying):
    """All of the chat was sent, so it is read anew."""
    saying("Yes.")
    headers = {"X-OpenWebUI-Chat-Id": "a1"}
    first = ask(server, [user("Hello")], extra_headers=headers)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    history = [user("Hello"), said, user("So?")]
    with_tools = ask(server, history, tools=TOOLS, extra_headers=headers)
    assert with_tools.usage == ask(server, history, tools=TOOLS).usage


# --- responses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["previous_response_id", "conversation", "all again"])
def test_responses_with_tools(server, saying, by):
    talk = server.openai.conversations.create() if by == "conversation" else None
    more = {} if talk is None else {"conversation": talk.id}
    saying("I will look.\n" + CALL)
    first = respond(server, "Weather?", tools=FLAT, **more)
    message, call = first.output
    assert message.content[0].text == first.output_text == "I will look."
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", PLACE)
    assert first.tools[0].name == "weather"
    given = [{"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}]
    if by == "previous_response_id":
        more = {by: first.id}
    elif by == "all again":
        given = [user("Weather?"), *[item.model_dump() for item in first.output], *given]
        given[1]["content"] = [{"type": "output_text", "text": "I will look."}]
        given = [{k: v for k, v in item.items() if v is not None} for item in given]
    saying("It rains.")
    second = respond(server, given, tools=FLAT, **more)
    assert second.output_text == "It rains."
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 12
    if talk is not None:
        kinds = [item.type for item in server.openai.conversations.items.list(talk.id, order="asc")]
        assert kinds == ["message", "message", "function_call", "function_call_output", "message"]
    listed = server.openai.responses.input_items.list(second.id)
    assert "function_call_output" in [item.type for item in listed]


@pytest.mark.parametrize("front", ["", "I will look.\n"])
def test_a_stream_of_a_response_with_tools(server, saying, front):
    saying(front + CALL)
    events = list(respond(server, "Weather?", tools=FLAT, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[-5:] == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert ("content_part.added" in kinds) == bool(front)
    done = events[-1].response
    assert [item.type for item in done.output] == ["message"] * bool(front) + ["function_call"]
    assert events[-2].item == done.output[-1]
    assert events[-2].output_index == len(done.output) - 1
    with server.openai.responses.stream(model="tiny", input="Weather?", tools=FLAT) as stream:
        final = stream.get_final_response()
    assert json.loads(final.output[-1].arguments) == PLACE


@pytest.mark.parametrize("front", ["", "I will look.\n"])
def test_logprobs_of_a_response_with_a_call(server, saying, front):
    """A call has no text, so nothing is said of its tokens unless there is text in front of it."""
    saying(front + CALL)
    options = {"tools": FLAT, "include": ["message.output_text.logprobs"]}
    whole = respond(server, "Weather?", **options).output
    events = list(respond(server, "Weather?", stream=True, **options))
    kinds = ["message", "function_call"] if front else ["function_call"]
    assert [item.type for item in whole] == kinds
    assert [item.type for item in events[-1].response.output] == kinds
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(delta.delta for delta in deltas).rstrip() == front.rstrip()
    told = [one.token for delta in deltas for one in delta.logprobs]
    assert (len(told) > 0) == (front != "")
    if front:
        assert told == [one.token for one in whole[0].content[0].logprobs]
        assert "".join(told).startswith(front.rstrip())


# --- forms --------------------------------------------------------------------------------------

HERMES, MISTRAL = TOOL_TEMPLATE, "[TOOL_CALLS]{{ tools }}"
LLAMA = 'Respond in the format {"name": function name, "parameters": values}.{{ tools }}'
ONE = '{"name": "weather", "arguments": {"place": "Lyon ☂"}}'
FORMS = [
    (HERMES, CALL, "", 1),
    (HERMES, f"I look. {CALL}\n\n{CALL}", "I look.", 2),
    (HERMES, f"<tool_call>{ONE}", "", 1),  # a stop cut the end off
    (HERMES, f'<tool_call>{ONE.replace("Lyon", "</tool_call>")}</tool_call>', "", 1),
    (HERMES, f"<tool_call>{ONE[:-2]}", None, 0),
    (HERMES, ONE, None, 0),
    (MISTRAL, f"[TOOL_CALLS][{ONE}, {ONE}]", "", 2),
    (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"place": "Lyon ☂"}[TOOL_CALLS]weather{}', "", 2),
    (MISTRAL, f"See: [TOOL_CALLS] [{ONE}]", "See:", 1),
    (MISTRAL, "[TOOL_CALLS]weather[ARGS]", None, 0),
    (LLAMA, ONE.replace("arguments", "parameters"), "", 1),
    (LLAMA + "<|python_tag|>", f"<|python_tag|>{ONE}; {ONE}", "", 2),
    (LLAMA, ONE.replace("weather", "other"), None, 0),
    (LLAMA, '{"a": 1}', None, 0),
    (LLAMA, f"See {ONE}", None, 0),
]  # fmt: skip


@functools.cache
def calling_of(template):
    return Calling(tokenizer_with(template), TOOLS)


@pytest.mark.parametrize(("template", "text", "said", "count"), FORMS)
@given(data=st.data())
@examples(20)
def test_forms(template, text, said, count, data):
    """However the text comes in pieces, no part of a call is told, and all that is said is."""
    calling = calling_of(template)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)) | {0, len(text)})
    sieve = CallFilter(calling)
    told = [sieve.feed(text[a:b]) for a, b in pairwise(cuts)]
    rest, whole, calls = sieve.finish(text, (), "")
    assert "".join([*told, rest]) == whole == (text if said is None else said)
    assert [call.name for call in calls] == ["weather"] * count
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)


@given(st.text(alphabet='<tool_cal>[TOOL_CALLS]{"name: weather,}/\n ', max_size=60))
@examples(200)
def test_any_text_is_told_whole_where_it_is_no_call(text):
    for template in (HERMES, MISTRAL, LLAMA):
        sieve = CallFilter(calling_of(template))
        told = "".join(map(sieve.feed, text))
        rest, whole, calls = sieve.finish(text, (), "")
        assert told + rest == whole
        assert calls or whole == text


def test_a_tokenizer_that_describes_its_answers():
    pytest.importorskip("transformers.utils.chat_parsing")
    described = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "content": {"close": "<|im_end|>"},
            "tool_calls": {
                "open": "<call>", "close": "</call>", "content": "json", "repeats": True,
                "transform": {"type": "function", "function": "{content}"},
            },
        },
    }  # fmt: skip
    tokenizer = tokenizer_with("{{ tools }}", response_template=described)
    text = f"I look.<call>{ONE}</call>"
    ids = tokenizer(text)["input_ids"]
    calling = Calling(tokenizer, TOOLS)
    said, (call,) = calling.find(text, ids, "<|im_start|>assistant\n")
    assert (said, call.name, json.loads(call.arguments)) == ("I look.", "weather", PLACE)
    assert CallFilter(calling).feed("I look.") == ""


@pytest.mark.parametrize("stop", ["<|im_start|>", "<|im_start|>user"])
def test_a_stop_string_may_hold_special_tokens(server, saying, stop):
    saying("Hello<|im_start|>user\nHow are you?")
    answer = ask(server, [user("Hi")], stop=[stop]).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("Hello", "stop")
    answer = ask(server, [user("Hi")], stop=["you"]).choices[0]
    assert answer.message.content == "Hellouser\nHow are "


def test_special_tokens_that_are_shown():
    tokenizer = tokenizer_of("llama")
    shown = tokenizer.convert_tokens_to_ids("<repo_name>")
    ids = tokenizer("<repo_name>Hi<file_sep>!", add_special_tokens=False)["input_ids"]
    for known, want in (((), "Hi!"), ((shown,), "<repo_name>Hi!")):
        transcript = Transcript(tokenizer, shown=known)
        assert "".join(map(transcript.add, ids)) + transcript.finish() == want

"""litellm: its lines of docs/serving.md, and chats, responses and files further on."""

import asyncio

import litellm
from lines import documented, url

PLACE = {"api_base": f"{url()}/v1", "api_key": "none"}
GIVEN = {"model": "openai/smollm2", **PLACE, "temperature": 0, "num_retries": 0}
ASKED = [{"role": "user", "content": "Who tells the story?", "name": "ann"}]
WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
}
LONG = "Why? " + 20 * "Tell me more of it. "


def text_of(pieces):
    chosen = [piece.choices[0] for piece in pieces if piece.choices]  # the last may tell usage only
    return "".join(choice.delta.content or "" for choice in chosen)


def check_documented():
    names = documented("litellm")
    assert names["answer"].id.startswith("chatcmpl-")
    assert names["event"].response.previous_response_id
    assert names["piece"].choices[0].finish_reason == "length"


def check_chat():
    answer = litellm.completion(messages=ASKED, max_tokens=8, **GIVEN)
    said = answer.choices[0].message.content
    options = {"include_usage": True}
    pieces = list(
        litellm.completion(
            messages=ASKED, max_tokens=8, stream=True, stream_options=options, **GIVEN
        )
    )
    assert text_of(pieces) == said != ""
    assert pieces[-1].usage.total_tokens == answer.usage.total_tokens
    more = {"role": "user", "content": LONG}
    whole = [*ASKED, {"role": "assistant", "content": said}, more]
    for given in ({"messages": whole}, {"messages": [more], "extra_body": {"session": answer.id}}):
        used = litellm.completion(max_tokens=8, **given, **GIVEN).usage
        assert used.prompt_tokens > answer.usage.total_tokens
        assert used.prompt_tokens_details.cached_tokens > 0


async def check_async():
    pieces = await litellm.acompletion(messages=ASKED, max_tokens=8, stream=True, **GIVEN)
    whole = await litellm.acompletion(messages=ASKED, max_tokens=8, **GIVEN)
    assert text_of([piece async for piece in pieces]) == whole.choices[0].message.content


def check_tools():
    tools = [{"type": "function", "function": WEATHER}]
    for streams in (False, True):
        messages = [{"role": "user", "content": "How is the weather in Lyon?"}]
        answer = litellm.completion(messages=messages, tools=tools, stream=streams, **GIVEN)
        if streams:
            answer = litellm.stream_chunk_builder(list(answer))
        said = answer.choices[0].message
        (call,) = said.tool_calls
        assert (call.function.name, call.function.arguments) == ("weather", '{"place": "Lyon"}')
        messages += [said, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
        answer = litellm.completion(messages=messages, tools=tools, **GIVEN)
        assert answer.choices[0].message.content == "It rains."


def check_responses():
    first = litellm.responses(input="Who tells the story?", max_output_tokens=16, **GIVEN)
    behind = {"input": LONG, "previous_response_id": first.id, "max_output_tokens": 16}
    more = litellm.responses(**behind, **GIVEN)
    assert more.usage.input_tokens > first.usage.total_tokens
    events = list(litellm.responses(**behind, stream=True, **GIVEN))
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(pieces) > 8  # as they are written
    assert "".join(pieces) == more.output[0].content[0].text != ""
    assert litellm.get_responses(first.id, **PLACE).output == first.output
    assert litellm.delete_responses(first.id, **PLACE).deleted


def check_tools_of_responses():
    given = {"tools": [{"type": "function", **WEATHER}], **GIVEN}
    first = litellm.responses(input="How is the weather in Lyon?", **given)
    (call,) = (item for item in first.output if item.type == "function_call")
    came = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    more = litellm.responses(input=[came], previous_response_id=first.id, **given)
    assert more.output[0].content[0].text == "It rains."


def check_the_rest():
    text = {**GIVEN, "model": "text-completion-openai/smollm2", "prompt": "Once upon"}
    whole = litellm.text_completion(max_tokens=8, **text).choices[0].text
    pieces = litellm.text_completion(max_tokens=8, stream=True, **text)
    assert whole == "".join(piece.choices[0].text or "" for piece in pieces) != ""
    file = ("log.txt", b"Calm sea. " * 40)
    read = litellm.create_file(
        file=file, purpose="user_data", custom_llm_provider="openai", **PLACE
    )
    behind = {"messages": ASKED, "extra_body": {"session": read.id}, "max_tokens": 8}
    assert litellm.completion(**behind, **GIVEN).usage.prompt_tokens > 80
    for error, wrong in (
        (litellm.BadRequestError, {"max_tokens": 0}),
        (litellm.NotFoundError, {"extra_body": {"session": "chatcmpl-unknown"}}),
    ):
        try:
            litellm.completion(messages=ASKED, **wrong, **GIVEN)
        except error:
            continue
        raise AssertionError(f"it was taken: {wrong}")


check_documented()
check_chat()
asyncio.run(check_async())
check_tools()
check_responses()
check_tools_of_responses()
check_the_rest()

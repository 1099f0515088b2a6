"""llama-index: its lines of docs/serving.md, and chats and responses further on."""

import asyncio

from lines import documented, url
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai import OpenAIResponses
from llama_index.llms.openai_like import OpenAILike

GIVEN = {
    "model": "smollm2",
    "api_base": f"{url()}/v1",
    "api_key": "none",
    "context_window": 1_000_000,
    "max_retries": 0,
    "temperature": 0,
}
LIKE = {**GIVEN, "is_chat_model": True, "is_function_calling_model": True}
QUESTION = ChatMessage("Who tells the story?")
WEATHER = "How is the weather in Lyon?"


def check_documented():
    names = documented("llama-index")
    assert names["llm"]._previous_response_id.startswith("resp_")
    assert str(asyncio.run(names["ask"]())) == "It rains."
    return names["weather"]


def check_tracked():
    """What is asked second is asked behind the first answer, whole or streamed."""
    answers = []
    for streams in (False, True):
        llm = OpenAIResponses(**GIVEN, max_output_tokens=16, track_previous_responses=True)
        first = llm.chat([QUESTION])
        assert first.raw.previous_response_id is None
        more = [ChatMessage("Why?")]
        if streams:
            pieces = list(llm.stream_chat(more))
            answers.append("".join(piece.delta for piece in pieces))
        else:
            answer = llm.chat(more)
            assert answer.raw.previous_response_id == first.raw.id
            assert answer.raw.usage.input_tokens > first.raw.usage.total_tokens
            answers.append(answer.message.content)
    assert answers[0] == answers[1] != ""


def check_like():
    llm = OpenAILike(**LIKE, max_tokens=8)
    answer = llm.chat([QUESTION]).message
    streamed = "".join(piece.delta for piece in llm.stream_chat([QUESTION]))
    assert answer.content == streamed != ""
    history = [QUESTION, answer, ChatMessage("Why? " + 20 * "Tell me more of it. ")]
    assert llm.chat(history).raw.usage.prompt_tokens_details.cached_tokens > 0
    text = OpenAILike(**GIVEN, max_tokens=8)  # no chat template
    whole = text.complete("Once upon").text
    assert whole == "".join(piece.delta for piece in text.stream_complete("Once upon")) != ""


async def check_async():
    llm = OpenAILike(**LIKE, max_tokens=8)
    pieces = [piece.delta async for piece in await llm.astream_chat([QUESTION])]
    assert "".join(pieces) == (await llm.achat([QUESTION])).message.content


def check_tools(llm, weather):
    """It asks for one call at a time where nothing is said."""
    tool = FunctionTool.from_defaults(weather)
    answer = llm.chat_with_tools([tool], user_msg=WEATHER)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("weather", {"place": "Lyon"})
    for streamed in llm.stream_chat_with_tools([tool], user_msg=WEATHER):
        last = streamed
    (again,) = llm.get_tool_calls_from_response(last)
    assert again.tool_kwargs == call.tool_kwargs
    assert str(llm.predict_and_call([tool], WEATHER)) == "Rain at Lyon."


async def check_agent(llm, weather):
    assert str(await FunctionAgent(tools=[weather], llm=llm).run(WEATHER)) == "It rains."


weather = check_documented()
check_tracked()
check_like()
asyncio.run(check_async())
for llm in (OpenAILike(**LIKE), OpenAIResponses(**GIVEN, store=True)):
    check_tools(llm, weather)
    asyncio.run(check_agent(llm, weather))

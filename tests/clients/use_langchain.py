"""langchain-openai: its lines of docs/serving.md, and chats and responses further on."""

from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI, OpenAI
from lines import documented, url

GIVEN = {"model": "smollm2", "base_url": f"{url()}/v1", "api_key": "none", "max_retries": 0}
QUESTION = HumanMessage("Who tells the story?", name="ann")


def joined(pieces):
    whole = None
    for piece in pieces:
        whole = piece if whole is None else whole + piece
    return whole


def check_documented():
    names = documented("langchain-openai")
    ran = [one.content for one in names["asked"] if one.__class__.__name__ == "ToolMessage"]
    assert ran == ["Rain at Lyon."], names["asked"]
    assert names["answer"].text == "It rains."
    first = names["messages"][1]
    assert first.id.startswith("resp_")
    assert first.text
    return names["weather"]


def check_chat(llm, responses):
    """Whole and streamed it is the same answer; the next one goes on from it."""
    answer = llm.invoke([QUESTION])
    streamed = joined(llm.stream([QUESTION], **({} if responses else {"stream_usage": True})))
    assert answer.text
    assert streamed.text == answer.text
    assert streamed.usage_metadata == answer.usage_metadata
    history = [QUESTION, answer, HumanMessage("Why? " + 20 * "Tell me more of it. ")]
    more = llm.invoke(history)
    assert joined(llm.stream(history)).text == more.text
    used = more.usage_metadata
    assert used["input_token_details"]["cache_read"] > 0
    assert used["input_tokens"] > answer.usage_metadata["total_tokens"]
    one, two = llm.batch(["One?", "Two?"])
    assert one.text != two.text


def check_tools(llm, weather):
    able = llm.bind_tools([weather])
    for ask in (able.invoke, lambda messages: joined(able.stream(messages))):
        asked = [HumanMessage("How is the weather in Lyon?")]
        answer = ask(asked)
        assert isinstance(answer, AIMessage)
        assert answer.text == "I look."
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("weather", {"place": "Lyon"})
        result = weather.invoke(call)
        assert ask([*asked, answer, result]).text == "It rains."
    once = llm.bind_tools([weather], parallel_tool_calls=False)
    assert len(once.invoke("How is the weather in Lyon?").tool_calls) == 1


def check_text():
    llm = OpenAI(**GIVEN, temperature=0, max_tokens=8)
    assert llm.invoke("Once upon") == "".join(llm.stream("Once upon")) != ""


weather = check_documented()
for responses in (False, True):
    about = {"use_responses_api": responses, "use_previous_response_id": responses}
    check_chat(ChatOpenAI(**GIVEN, **about, temperature=0, max_tokens=8), responses)
    check_tools(ChatOpenAI(**GIVEN, **about), weather)
check_text()

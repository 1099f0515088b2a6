"""How likely tokens were, against a forward pass over the same ids."""

import pytest
import torch

from cometlm.serve.logprobs import token_bytes, token_text
from tests.serve.test_chat import CHAT, COMPLETIONS, HELLO, ask, events
from tests.sessions import TEXT, session_of, tokenizer_of

OPTIONS = {"logprobs": True, "top_logprobs": 3, "temperature": 0.7, "seed": 5}


@torch.no_grad()
def wanted(session, prompt, chosen):
    """Log-probabilities [V] in front of each token of an answer."""
    session.ask_in_one_chunk(prompt)
    cache, logits = session.begin_answer()
    found = [logits.float().log_softmax(-1)]
    for token in chosen[:-1]:
        out = session.model(
            torch.tensor([[token]]), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = out.past_key_values
        found.append(out.logits[0, -1].float().log_softmax(-1))
    return found


def test_a_chat_s_are_the_model_s(server):
    """Whatever temperature its tokens were drawn with."""
    tokenizer = tokenizer_of("llama")
    answer = ask(server, HELLO, **OPTIONS)
    text, told = answer.choices[0].message.content, answer.choices[0].logprobs.content
    assert len(told) == answer.usage.completion_tokens == 9
    assert bytes(byte for one in told for byte in one.bytes).decode(errors="replace") == text
    by_text = {}
    for i in range(len(tokenizer)):
        by_text.setdefault(bytes(token_bytes(tokenizer, i) or b""), i)
    chosen = [by_text[bytes(one.bytes)] for one in told]
    found = wanted(session_of(), session_of().render_turn(HELLO).opening_ids, chosen)
    for one, logprobs, token in zip(told, found, chosen, strict=True):
        assert one.logprob == pytest.approx(float(logprobs[token]), abs=1e-5)
        top = logprobs.topk(3)
        told_top = [alternative.logprob for alternative in one.top_logprobs]
        assert told_top == pytest.approx(top.values.tolist(), abs=1e-5)
        names = [token_text(tokenizer, i) for i in top.indices.tolist()]
        assert [alternative.token for alternative in one.top_logprobs] == names


@pytest.mark.parametrize("stop", [False, True])
def test_a_stream_says_the_same(server, stop):
    text = ask(server, HELLO, **OPTIONS).choices[0].message.content
    more = {"stop": [text[9:12]]} if stop else {}
    whole = ask(server, HELLO, **OPTIONS, **more).choices[0]
    said = events(server, CHAT, messages=HELLO, max_tokens=9, **OPTIONS, **more)
    choices = [event["choices"][0] for event in said]
    told = [one for c in choices if c["logprobs"] for one in c["logprobs"]["content"]]
    assert told == [one.model_dump() for one in whole.logprobs.content]
    assert (len(told) < 9) == stop


INCLUDE = {"include": ["message.output_text.logprobs"], "top_logprobs": 3, "temperature": 0}
RESPONSES = "/v1/responses"


def without_bytes(told):
    return {name: value for name, value in told.items() if name not in ("bytes", "top_logprobs")}


def test_responses_say_what_chats_say(server):
    options = {"logprobs": True, "top_logprobs": 3}
    want = ask(server, HELLO, **options).choices[0].logprobs.model_dump()["content"]
    assert len(want) == 9
    body = {"input": HELLO, "max_output_tokens": 9}
    made = server.post(RESPONSES, **body, **INCLUDE).json()
    (part,) = made["output"][0]["content"]
    assert part["logprobs"] == want
    assert made["top_logprobs"] == 3
    typed = server.openai.responses.create(model="tiny", **body, **INCLUDE)
    assert [one.model_dump() for one in typed.output[0].content[0].logprobs] == want
    kept = server.http.get(f"{RESPONSES}/{made['id']}").json()
    assert kept["output"][0]["content"] == [{**part, "logprobs": []}]  # told once
    chosen = server.post(RESPONSES, **body, **{**INCLUDE, "top_logprobs": 0}).json()
    told = chosen["output"][0]["content"][0]["logprobs"]
    assert told == [{**one, "top_logprobs": []} for one in want]
    plain = server.post(RESPONSES, **body, temperature=0).json()
    assert plain["output"][0]["content"] == [{**part, "logprobs": []}]


def test_the_events_of_a_response_say_them(server):
    body = {"input": HELLO, "max_output_tokens": 9, **INCLUDE}
    whole = server.post(RESPONSES, **body).json()["output"][0]["content"][0]
    events = list(server.openai.responses.create(model="tiny", stream=True, **body))
    want = [
        {**without_bytes(one), "top_logprobs": [without_bytes(top) for top in one["top_logprobs"]]}
        for one in whole["logprobs"]
    ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole["text"]
    assert [one.to_dict() for event in deltas for one in event.logprobs] == want
    (done,) = (event for event in events if event.type == "response.output_text.done")
    assert [one.to_dict() for one in done.logprobs] == want
    said = events[-1].response.output[0].content[0]
    assert [one.to_dict() for one in said.logprobs] == whole["logprobs"]


def test_completions(server):
    options = {"prompt": TEXT[:50], "max_tokens": 6, "temperature": 0, "logprobs": 2}
    answer = server.post(COMPLETIONS, **options).json()["choices"][0]
    found = answer["logprobs"]
    assert "".join(found["tokens"]) == answer["text"]
    for i, token in enumerate(found["tokens"]):
        assert answer["text"][found["text_offset"][i] :].startswith(token)
        top = found["top_logprobs"][i]
        assert len(top) == 2
        assert top[token] == found["token_logprobs"][i] == max(top.values())
    streamed = [event["choices"][0]["logprobs"] for event in events(server, COMPLETIONS, **options)]
    for name, values in found.items():
        assert [one for told in streamed if told for one in told[name]] == values
    plain = server.post(COMPLETIONS, prompt="Hi", max_tokens=1).json()["choices"][0]
    assert plain["logprobs"] is None


def test_what_is_too_much(server):
    for options in ({"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 2}):
        assert server.refused(CHAT, messages=HELLO, **options)["param"] == "top_logprobs"
    assert server.refused(COMPLETIONS, prompt="Hi", logprobs=6)["param"] == "logprobs"
    for options in ({**INCLUDE, "top_logprobs": 21}, {"top_logprobs": 2}):
        assert server.refused(RESPONSES, input="Hi", **options)["param"] == "top_logprobs"
    for name in ("reasoning.encrypted_content", "file_search_call.results", "x"):
        error = server.refused(RESPONSES, input="Hi", include=[*INCLUDE["include"], name])
        assert (error["param"], error["code"]) == ("include", "unsupported")
        assert name in error["message"]


@pytest.mark.parametrize("kind", ["llama", "like gemma"])
def test_bytes_of_tokens(kind):
    tokenizer = tokenizer_of(kind)
    text = " naïve ☂️ 𝛼 sea"
    ids = tokenizer("a" + text, add_special_tokens=False)["input_ids"]
    found = bytes(byte for token in ids for byte in token_bytes(tokenizer, token))
    assert found.endswith(text.encode())

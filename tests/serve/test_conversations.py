"""Conversations, and which of the names that a request gives it goes on from."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from cometlm.serve import thread
from cometlm.serve.folder import Folder
from cometlm.serve.kept import SessionStore
from cometlm.serve.service import Limits
from cometlm.session.writer import Writer
from tests.serve.running import running, service_of
from tests.serve.test_chat import wait_for
from tests.serve.test_kept import folder_of
from tests.sessions import TEXT, session_of, tokenizer_of

PATH = "/v1/conversations"


def ask(server, text, **options):
    given = {"temperature": 0, "max_output_tokens": 9, **options}
    return server.openai.responses.create(model="tiny", input=text, **given)


def chat(server, messages, headers=None, **options):
    body = {"temperature": 0, "max_tokens": 9, "messages": messages, **options}
    answer = server.http.post(
        "/v1/chat/completions", json={"model": "tiny", **body}, headers=headers
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def user(text):
    return {"role": "user", "content": text}


def texts(server, name, order="asc"):
    listed = server.openai.conversations.items.list(name, order=order)
    return [item.content[0].text for item in listed]


def test_a_conversation_is_a_session_s_and_outlives_the_server(tmp_path):
    session, said = session_of(), []
    with running(service_of(store=SessionStore(folder=folder_of(tmp_path)))) as server:
        made = server.openai.conversations.create(metadata={"for": "a test"})
        for text in ("Hello " + TEXT[:100], "And then?"):
            found = ask(server, text, conversation=made.id)
            want = session.chat(text, max_new_tokens=9, do_sample=False)
            assert found.output_text == want
            assert found.conversation.id == made.id
            said += [text, want]
    with running(service_of(store=SessionStore(folder=folder_of(tmp_path)))) as server:
        again = server.openai.conversations.retrieve(made.id)
        assert again == made
        assert texts(server, made.id) == said
        stream = list(ask(server, "What?", conversation={"id": made.id}, stream=True))
        want = session.chat("What?", max_new_tokens=9, do_sample=False)
        assert stream[-1].response.output_text == want
        assert texts(server, made.id, "desc") == [want, "What?", *said[::-1]]


def test_items_wait_for_the_next_answer(server):
    """What is added is read with the next input, also answers that somebody else gave."""
    made = server.openai.conversations.create(
        items=[user("Hello"), {"role": "assistant", "content": "Yes?"}, user("Never mind.")]
    )
    listed = list(server.openai.conversations.items.list(made.id, order="asc"))
    assert len({item.id for item in listed}) == 3
    server.openai.conversations.items.delete(listed[2].id, conversation_id=made.id)
    (more,) = server.openai.conversations.items.create(made.id, items=[user("Be")]).data
    one = server.openai.conversations.items.retrieve(more.id, conversation_id=made.id)
    assert one.content[0].text == "Be"
    history = [user("Hello"), {"role": "assistant", "content": "Yes?"}, user("Be"), user("kind.")]
    want = chat(server, history)["choices"][0]["message"]["content"]
    assert ask(server, "kind.", conversation=made.id).output_text == want
    error = server.http.delete(f"{PATH}/{made.id}/items/{more.id}").json()["error"]
    assert (error["param"], error["code"]) == ("item_id", "unsupported")
    assert texts(server, made.id) == ["Hello", "Yes?", "Be", "kind.", want]


def test_metadata_and_deletion(server):
    made = server.openai.conversations.create(metadata={"a": "1"})
    assert made.object == "conversation"
    changed = server.openai.conversations.update(made.id, metadata={"b": "2"})
    assert changed.metadata == {"b": "2"}
    found = ask(server, "Hello", conversation=made.id)
    assert server.openai.conversations.retrieve(made.id).metadata == {"b": "2"}
    assert server.openai.conversations.delete(made.id).object == "conversation.deleted"
    for call in (
        lambda: server.openai.conversations.retrieve(made.id),
        lambda: server.openai.conversations.update(made.id, metadata={}),
        lambda: server.openai.conversations.delete(made.id),
        lambda: server.openai.conversations.items.list(made.id),
        lambda: ask(server, "More", conversation=made.id),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "dropped"
    assert ask(server, "More", previous_response_id=found.id).output_text
    with pytest.raises(openai.NotFoundError):
        server.openai.conversations.retrieve(found.id)  # that is a response


def test_a_conversation_behind_a_session(server):
    read = server.openai.files.create(file=("x.txt", TEXT.encode()), purpose="user_data")
    made = server.http.post(PATH, json={"session": read.id}).json()
    want = ask(server, "Why?", previous_response_id=read.id).output_text
    assert ask(server, "Why?", conversation=made["id"]).output_text == want
    assert server.http.post(PATH, json={"session": "sess_1"}).status_code == 404


def test_what_was_read_long_ago_is_not_listed(server, monkeypatch):
    monkeypatch.setattr(thread, "_MOST_BYTES", 500)
    made = server.openai.conversations.create()
    for i in range(4):
        ask(server, f"Turn {i}", conversation=made.id)
    kept = texts(server, made.id)
    assert 2 <= len(kept) < 8
    assert kept[-2] == "Turn 3"


def test_two_at_once():
    """One of them answers; the others are told, and may ask again."""
    with running(service_of()) as server:
        made = server.openai.conversations.create()
        answers = []

        def say(i):
            body = {"input": f"Turn {i}", "conversation": made.id, "max_output_tokens": 30}
            answers.append(server.post("/v1/responses", **body))

        threads = [threading.Thread(target=say, args=(i,)) for i in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        done = [answer for answer in answers if answer.status_code == 200]
        lost = [answer.json()["error"] for answer in answers if answer.status_code == 409]
        assert done
        assert len(done) + len(lost) == 3
        assert all(error["code"] == "conversation_locked" for error in lost)
        assert len(texts(server, made.id)) == 2 * len(done)


@pytest.mark.parametrize("end", ["told", "hung up"])
def test_a_second_one_is_refused_at_once(end):
    """Before it is worked on; when the first has ended, however that was, it may be asked."""
    service = service_of(limits=Limits(most_tokens=10**6))
    with running(service) as server:
        made = server.openai.conversations.create()
        more = {"input": "And?", "conversation": made.id, "max_output_tokens": 2}
        first = {"model": "tiny", "input": "Hi", "conversation": made.id, "stream": True}
        first["max_output_tokens"] = 60 if end == "told" else 10**6
        with server.http.stream("POST", "/v1/responses", json=first) as stream:
            lines = stream.iter_lines()
            next(lines)
            error = server.refused("/v1/responses", 409, **more)
            assert (error["param"], error["code"]) == ("conversation", "conversation_locked")
            assert service.engine.load.waiting == 0
            if end == "told":
                assert "response.incomplete" in "\n".join(lines)
        wait_for(lambda: server.post("/v1/responses", **more).status_code == 200)
        assert len(texts(server, made.id)) == (4 if end == "told" else 2)
        other = server.openai.conversations.create()
        assert server.post("/v1/responses", **{**more, "conversation": other.id}).is_success
        wrong = {**more, "max_output_tokens": 10**7}
        assert [server.post("/v1/responses", **wrong).status_code for _ in "ab"] == [400, 400]


def test_two_servers_at_once(tmp_path, monkeypatch):
    """What one puts in while the other is at it is not lost."""
    monkeypatch.setattr(thread, "_locks", [contextlib.nullcontext()])  # as in two processes
    write = Folder.write

    def slowly(*arguments):
        time.sleep(0.01)
        return write(*arguments)

    monkeypatch.setattr(Folder, "write", slowly)
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(running(service_of(store=SessionStore(folder=folder_of(tmp_path)))))
            for _ in range(2)
        ]
        made = servers[0].openai.conversations.create()

        def add(i):
            body = {"items": [user(f"Item {i}")]}
            return servers[i % 2].http.post(f"{PATH}/{made.id}/items", json=body).status_code

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(add, range(12))) == {200}
        assert sorted(texts(servers[0], made.id)) == sorted(f"Item {i}" for i in range(12))


def test_answers_of_two_servers_at_once(tmp_path):
    """The one that ends second is told so, and what the first said stays."""
    stores = [SessionStore(folder=folder_of(tmp_path)) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(service_of(store=store))) for store in stores]
        made = servers[0].openai.conversations.create()
        first = {"model": "tiny", "input": "Hi", "conversation": made.id, "stream": True}
        first["max_output_tokens"] = 200
        with servers[0].http.stream("POST", "/v1/responses", json=first) as stream:
            lines = stream.iter_lines()
            next(lines)
            thread._answering.clear()  # as in two processes
            body = {"input": "And?", "conversation": made.id, "max_output_tokens": 2}
            second = servers[1].post("/v1/responses", **body)
            assert second.status_code == 200
            rest = "\n".join(lines)
        assert "response.failed" in rest
        assert "conversation_locked" in rest
        assert texts(servers[0], made.id)[0] == "And?"
        assert len(texts(servers[1], made.id)) == 2


@pytest.mark.parametrize(
    "body",
    [
        {"items": [{"type": "reasoning"}]},
        {"items": [user("x")] * 21},
        {"items": [{**user("x"), "id": "1"}] * 2},
        {"metadata": {"a": 1}},
        {"metadata": {"a" * 65: "b"}},
        {"colour": 1},
    ],
)
def test_what_is_no_conversation(server, body):
    answer = server.http.post(PATH, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(next(iter(body)))


# --- which name counts --------------------------------------------------------------------------


def test_names_that_agree_and_names_that_do_not(server):
    talk = server.openai.conversations.create()
    first = ask(server, "Hello", conversation=talk.id)
    other = ask(server, "Hello")
    asked = {"input": "So?", "max_output_tokens": 2}
    path = "/v1/responses"
    both = {"conversation": talk.id, "previous_response_id": first.id}
    assert server.post(path, **asked, **both).status_code == 200
    same = {"previous_response_id": other.id, "session": other.id}
    assert server.post(path, **asked, **same).status_code == 200
    for wrong in (
        {"conversation": talk.id, "previous_response_id": other.id},
        {"previous_response_id": first.id, "session": other.id},
        {"conversation": talk.id, "session": other.id},
    ):
        error = server.refused(path, **asked, **wrong)
        assert error["param"] in wrong
        assert all(param in error["message"] for param in wrong)
    headers = {"X-Session-Id": other.id}
    answer = server.http.post(
        path, json={"model": "tiny", **asked, "session": first.id}, headers=headers
    )
    assert answer.status_code == 400
    for param in ("previous_response_id", "conversation", "session"):
        assert server.refused(path, 404, **asked, **{param: "resp_1"})["param"] == param
    answer = server.http.post(path, json={"model": "tiny", **asked}, headers={"X-Session-Id": "x"})
    assert answer.status_code == 404


def test_a_chat_of_open_webui_is_known_again():
    """Also where earlier messages are not what was sent; and not where it went on otherwise."""
    with running(service_of()) as server:
        headers = {"X-OpenWebUI-Chat-Id": "d7e0"}
        first = chat(server, [user("Hello, it says: " + TEXT)], headers)
        said = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
        history = [user("Hello"), said, user("And?")]  # without what was looked up
        named = chat(server, [user("And?")], session=first["id"])
        title = chat(server, [user("Find a title for: Hello")], headers)  # asked beside it
        found = chat(server, history, headers)
        assert found["choices"][0]["message"] == named["choices"][0]["message"]
        assert found["usage"] == named["usage"]
        assert title["usage"]["prompt_tokens"] < found["usage"]["prompt_tokens"]
        short = chat(server, history)["usage"]["prompt_tokens"]
        changed = {**said, "content": said["content"] + "!"}
        for others, given in (
            (history, {"X-OpenWebUI-Chat-Id": "other"}),
            ([history[0], changed, history[2]], headers),
            ([{"role": "system", "content": "Be brief."}, *history], headers),
        ):
            assert chat(server, others, given)["usage"]["prompt_tokens"] < short + 30
        listed = server.http.get("/v1/sessions?limit=100").json()["data"]
        assert not any(one["id"].startswith("turn-") for one in listed)


def test_branches_of_a_chat_of_open_webui_are_told_apart(monkeypatch):
    """Whose answers are alike: by what was asked, and by what was said before."""
    yes = tokenizer_of("llama")("Yes.", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(Writer, "_chosen", lambda writer, logits: yes[len(writer.ids)])
    said = {"role": "assistant", "content": "Yes."}
    headers = {"X-OpenWebUI-Chat-Id": "d7e0"}
    paris, berlin = "Is Paris in France?", "Is Berlin in Germany?"
    with running(service_of()) as server:

        def asked(*messages):
            return chat(server, [*messages], headers, max_tokens=len(yes))

        def parent(answer):
            return server.http.get(f"/v1/sessions/{answer['id']}").json()["parent"]

        first = asked(user(f"{paris} What was looked up: {TEXT[:60]}"))
        second = asked(user(berlin))
        assert parent(asked(user(paris), said, user("Why?"))) == first["id"]
        assert parent(asked(user(berlin), said, user("Why?"))) == second["id"]
        asked(user(paris), said, user("Is it?"))
        edited = [user("Is Rome there? " * 9), said, user("Is it?"), said, user("Why?")]
        whole = chat(server, edited, max_tokens=len(yes))["usage"]["prompt_tokens"]
        assert asked(*edited)["usage"]["prompt_tokens"] == whole


def test_items_of_the_same_id_are_refused_before_anything_is_read():
    item = {"id": "msg_1", "type": "message", "role": "user", "content": "Hello"}
    with running(service_of()) as server:
        talk = server.openai.conversations.create().id
        error = server.refused("/v1/responses", input=[item, item], conversation=talk)
        assert error["param"] == "input"
        assert error["message"] == "input: two of them have the same id"
        listed = server.http.get("/v1/sessions").json()["data"]
        assert [one["id"] for one in listed] == [talk]

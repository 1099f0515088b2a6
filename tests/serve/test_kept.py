"""What is kept: budgets, expiry, owners, restarts, kills, folders that fail."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import openai
import pytest

from cometlm.serve import kept as kept_module
from cometlm.serve.folder import Folder, Kept
from cometlm.serve.kept import FullError, NotKeptError, SessionStore
from cometlm.serve.trail import Trail
from cometlm.session.file import full_bytes
from tests.serve.running import running, service_of
from tests.sessions import assert_same, model_of, session_of, tokenizer_of
from tests.tiny import refused

CHAT = "/v1/chat/completions"
IDS = [i % 90 + 3 for i in range(200)]


def folder_of(path, kind="llama"):
    return Folder(path, model_of(kind), tokenizer_of(kind))


def session_after(length):
    session = session_of()
    session.read(IDS[:length])
    return session


def put(store, length, owner="ann", **known):
    """A session that has read so many ids; its id."""
    session = session_after(length)
    name = store.ids.new("chatcmpl-", owner)
    known = {"trail": Trail.of(IDS[:length]), "expires": store.expiry(), **known}
    store.put(Kept(name, owner, "chat", 5, **known), session)
    return name


def gone(store, name, owner="ann"):
    with pytest.raises(NotKeptError) as caught:
        store.get(name, owner)
    return caught.value.was_given


@pytest.fixture(params=["memory", "folder", "remote"])
def store(request, tmp_path):
    places = {"memory": None, "folder": tmp_path, "remote": f"memory:/{tmp_path}"}
    place = places[request.param]
    return SessionStore(folder=None if place is None else folder_of(place))


def test_what_is_put_is_found_by_its_owner(store):
    name = put(store, 50, document={"response": {"text": "☂"}})
    kept, session = store.get(name, "ann")
    assert (kept.id, kept.owner, kept.kind, kept.created) == (name, "ann", "chat", 5)
    assert kept.document == {"response": {"text": "☂"}}
    assert_same(session, session_after(50))
    assert not gone(store, name, "bob")
    assert not gone(store, "chatcmpl-" + "0" * 40)
    assert store.sessions == 1
    store.delete(name, "ann")
    assert gone(store, name)
    assert store.sessions == store.memory_bytes == store.folder_bytes == 0


def test_the_longest_beginning_is_found(store):
    names = {length: put(store, length) for length in (20, 64, 100)}
    put(store, 120, owner="bob")

    def found(ids, owner="ann"):
        known = store.longest(ids, owner)
        return None if known is None else known[0].id

    assert found(IDS) == names[100]
    assert found(IDS[:100]) == names[100]
    assert found(IDS[:99]) == names[64]
    assert found([*IDS[:70], 5, *IDS[71:]]) == names[64]
    assert found([5, *IDS[1:]]) is None
    assert found([]) is found(IDS, "cat") is None
    store.delete(names[100], "ann")
    assert found(IDS) == names[64]


def test_the_least_recently_used_leave_memory():
    one = SessionStore()
    put(one, 50)
    size = one.memory_bytes
    store = SessionStore(memory_bytes=int(3.5 * size))
    names = [put(store, 50) for _ in range(3)]
    store.get(names[0], "ann")
    fourth = put(store, 50)
    assert gone(store, names[1])
    for name in (names[0], names[2], fourth):
        store.get(name, "ann")
    assert store.memory_bytes <= 3.5 * size
    with pytest.raises(FullError):
        put(SessionStore(memory_bytes=size // 2), 50)


def test_open_chunks_leave_memory_before_sessions():
    """What was run of them, which can be run again; of those not used for longest first."""
    store = SessionStore()
    names = [put(store, length) for length in (50, 51, 52)]
    size = store.memory_bytes
    sessions = [store.get(name, "ann")[1] for name in names]
    for session in sessions:
        session.begin_answer()
    each = sessions[-1].stats().open_bytes
    assert store.memory_bytes == size + sum(one.stats().open_bytes for one in sessions) > size
    store = SessionStore(memory_bytes=int(size + 1.5 * each))
    for session in sessions:
        store.put(Kept(store.ids.new("chat-", "ann"), "ann", "chat", 5), session)
    assert [session.stats().open_bytes > 0 for session in sessions] == [False, False, True]
    assert store.sessions == 3


def test_the_newest_open_chunk_stays_where_sessions_fill_the_memory():
    one = session_after(59)  # as long as an open chunk gets
    one.begin_answer()
    budget = 6 * one.stats().open_bytes
    store = SessionStore(memory_bytes=budget)
    for length in range(50, 80):
        if length % 12 == 0:  # the end of a chunk
            continue
        session = store.get(put(store, length), "ann")[1]
        session.begin_answer()
        put(store, 20)
        assert session.stats().open_bytes > 0
        assert store.memory_bytes <= budget
    assert store.sessions < 30


def test_what_left_memory_is_read_from_the_folder(tmp_path):
    store = SessionStore(folder=folder_of(tmp_path), memory_bytes=0)
    names = [put(store, length) for length in (20, 50)]
    assert store.memory_bytes == 0
    assert_same(store.get(names[1], "ann")[1], session_after(50))


def test_the_least_recently_used_leave_the_folder(tmp_path):
    store = SessionStore(folder=folder_of(tmp_path))
    put(store, 50)
    size = store.folder_bytes
    small = SessionStore(folder=folder_of(tmp_path / "b"), folder_bytes=int(3.5 * size))
    names = [put(small, 50) for _ in range(3)]
    small.get(names[0], "ann")
    fourth = put(small, 50)
    assert gone(small, names[1])
    left = {path.stem for path in (tmp_path / "b").glob("*.safetensors")}
    assert left == {names[0], names[2], fourth}
    with pytest.raises(FullError):
        put(SessionStore(folder=folder_of(tmp_path / "c"), folder_bytes=size // 2), 50)
    assert list((tmp_path / "c").glob("*.safetensors")) == []


def test_marks_are_held_while_there_is_room(tmp_path):
    """In memory only; without a folder they make room for what was told, and never the reverse."""
    for folder in (None, folder_of(tmp_path)):
        store = SessionStore(folder=folder)
        told = put(store, 50)
        size = store.memory_bytes
        store = SessionStore(memory_bytes=int(2.5 * size), folder=folder)
        told = put(store, 50)
        mark = Kept(store.ids.new("mark-", "ann"), "ann", "mark", 5, trail=Trail.of(IDS[:80]))
        store.hold(mark, session_after(80))
        assert store.longest(IDS, "ann")[0].id == mark.id
        for _ in range(2):
            put(store, 40)
        assert gone(store, mark.id)
        if folder is not None:
            assert store.longest(IDS, "ann")[0].id == told
            store.hold(mark, session_after(80))
            assert not any("mark" in path.name for path in tmp_path.iterdir())
            continue
        kept = [put(store, 40) for _ in range(2)]
        store.hold(mark, session_after(80))  # there is no room
        for name in kept:
            store.get(name, "ann")
        assert gone(store, mark.id)


def test_they_expire(store, monkeypatch):
    soon, later = put(store, 20, expires=time.time() + 50), put(store, 50, expires=None)
    store.get(soon, "ann")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 100)
    assert gone(store, soon)
    store.get(later, "ann")
    assert store.longest(IDS[:30], "ann") is None
    assert store.sessions == 1


def test_a_restart_finds_everything_again(tmp_path):
    first = SessionStore(folder=folder_of(tmp_path))
    names = [put(first, length) for length in (20, 50, 100)]
    time.sleep(0.02)
    first.get(names[1], "ann")
    again = SessionStore(folder=folder_of(tmp_path))
    assert (again.sessions, again.folder_bytes) == (3, first.folder_bytes)
    assert_same(again.get(names[1], "ann")[1], session_after(50))
    assert gone(again, again.ids.new("resp_", "ann"))  # the secret is the same
    less = SessionStore(folder=folder_of(tmp_path), folder_bytes=first.folder_bytes - 1)
    assert less.sessions == 2
    assert gone(less, names[0])  # the others were written later, or used
    assert less.longest(IDS, "ann")[0].id == names[2]


@pytest.fixture(params=["folder", "remote"])
def place(request, tmp_path):
    return tmp_path / "store" if request.param == "folder" else f"memory:/{tmp_path}"


def test_two_servers_share_a_store(place):
    one, two = (SessionStore(folder=folder_of(place), refresh=0.0) for _ in range(2))
    name = put(one, 50)
    assert_same(two.get(name, "ann")[1], session_after(50))
    assert not gone(two, name, "bob")
    later = put(two, 100)
    assert one.longest(IDS, "ann")[0].id == later
    assert {listed.id for listed in one.all_of("ann")} == {name, later}
    assert one.folder_bytes == two.folder_bytes
    one.delete(name, "ann")
    assert gone(two, name)  # which holds it in memory
    assert gone(SessionStore(folder=folder_of(place)), name)
    with pytest.raises(NotKeptError, match="was dropped"):
        two.delete(name, "ann")


def test_what_is_written_anew_is_never_taken_from_memory(place):
    """A conversation keeps its id: another server's next turn would else be lost."""
    one, two = (SessionStore(folder=folder_of(place), refresh=0.0) for _ in range(2))
    name = one.ids.new("conv_", "ann")
    for length in (50, 80):
        one.put(Kept(name, "ann", "conversation", 5), session_after(length))
        for server in (one, two):
            assert_same(server.get(name, "ann")[1], session_after(length))


@pytest.mark.parametrize("looks", [True, False])
def test_what_another_server_renews_does_not_expire(place, looks, monkeypatch):
    """A conversation in use would else be lost a lifetime after another server first saw it."""
    monkeypatch.setattr(kept_module, "_SWEEP", 0.0)
    refresh = 0.0 if looks else 1e6
    one, two = (SessionStore(folder=folder_of(place), refresh=refresh) for _ in range(2))
    begun, name = time.time(), one.ids.new("conv_", "ann")
    one.put(Kept(name, "ann", "conversation", 5, expires=begun + 50), session_after(50))
    assert two.get(name, "ann")[0].expires == begun + 50
    time.sleep(0.02)  # by which the files' times differ
    one.put(Kept(name, "ann", "conversation", 5, expires=begun + 500), session_after(80))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 100)
    if looks:
        assert [listed.expires for listed in two.all_of("ann")] == [begun + 500]
    put(two, 20, owner="bob")
    for server in (one, two):
        assert_same(server.get(name, "ann")[1], session_after(80))
    monkeypatch.setattr(time, "time", lambda: now() + 1000)
    put(two, 30, owner="bob")
    assert gone(one, name)
    assert folder_of(place).find(name) is None


def test_what_another_server_just_used_stays(place):
    """The one that makes room has not looked at the store since."""
    one = SessionStore(folder=folder_of(place))
    names = [put(one, 50) for _ in range(3)]
    two = SessionStore(folder=folder_of(place), folder_bytes=int(one.folder_bytes / 3 * 3.5))
    time.sleep(0.02)
    one.get(names[0], "ann")
    fourth = put(two, 50)
    assert gone(one, names[1])
    for name in (names[0], names[2], fourth):
        one.get(name, "ann")


def test_an_index_in_a_file_is_brought_in_line(place, tmp_path):
    """What came and went meanwhile; what was known is not looked at again."""
    store = SessionStore(folder=folder_of(place), index=tmp_path / "index")
    stays, goes = put(store, 20), put(store, 50)
    store._index.close()
    other = SessionStore(folder=folder_of(place))
    comes = put(other, 100)
    other.delete(goes, "ann")
    folder, seen = folder_of(place), []
    describe = folder.describe
    folder.describe = lambda objects: describe(one for one in objects if not seen.append(one.name))
    again = SessionStore(folder=folder, index=tmp_path / "index")
    assert {one.id for one in again.all_of("ann")} == {stays, comes}
    assert seen == [comes]
    assert gone(again, goes)


def test_files_that_are_none_are_left_alone(tmp_path, caplog):
    store = SessionStore(folder=folder_of(tmp_path))
    name = put(store, 50)
    path = tmp_path / f"{name}.safetensors"
    whole = path.read_bytes()
    for wrong, damaged in {
        "resp_cut": whole[: len(whole) // 2],
        "resp_empty": b"",
        "resp_copied": whole,
        "resp_text": b"hello" * 100,
    }.items():
        (tmp_path / f"{wrong}.safetensors").write_bytes(damaged)
    other = session_of("overlap")
    other.read(IDS[:50])
    other.save(tmp_path / "resp_other.safetensors")
    again = SessionStore(folder=folder_of(tmp_path))
    assert again.sessions == 1
    assert len(caplog.records) == 5
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    path.write_bytes(whole[:-10])
    assert gone(SessionStore(folder=folder_of(tmp_path)), name)
    assert path.exists()


def test_what_a_killed_server_left_is_removed(tmp_path):
    folder = folder_of(tmp_path)
    old, new = tmp_path / ".resp_1.safetensors.abc.part", tmp_path / ".resp_2.safetensors.abc.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    SessionStore(folder=folder)
    assert (old.exists(), new.exists()) == (False, True)  # another server may be writing it


# --- over HTTP ----------------------------------------------------------------------------------


def ask(server, text, **options):
    return server.openai.responses.create(
        model="tiny", input=text, temperature=0, max_output_tokens=5, **options
    )


def test_a_conversation_outlives_the_server(tmp_path):
    def served():
        return running(service_of(store=SessionStore(folder=folder_of(tmp_path))))

    with served() as server:
        first = ask(server, "Hello")
        want = ask(server, "And?", previous_response_id=first.id)
        history = [{"role": "user", "content": "Hello " * 30}]
        chat = server.openai.chat.completions.create(
            model="tiny", messages=history, max_tokens=5, temperature=0
        )
    history.append({"role": "assistant", "content": chat.choices[0].message.content})
    history.append({"role": "user", "content": "And?"})
    with served() as server:
        found = ask(server, "And?", previous_response_id=first.id)
        assert found.output_text == want.output_text
        assert server.openai.responses.retrieve(first.id).output_text == first.output_text
        more = server.openai.chat.completions.create(
            model="tiny", messages=history, max_tokens=5, temperature=0
        )
        assert more.usage.prompt_tokens_details.cached_tokens > 30


def test_a_folder_that_fails_is_a_503(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    service = service_of(store=SessionStore(folder=folder_of(tmp_path)))
    with running(service) as server:
        first = ask(server, "Hello")
        monkeypatch.setattr("cometlm.session.file.write_whole", full)
        error = server.refused("/v1/responses", 503, input="Hello", max_output_tokens=2)
        assert error["code"] == "store"
        stream = server.post("/v1/responses", input="Hello", max_output_tokens=2, stream=True).text
        assert "response.failed" in stream
        assert "response.completed" not in stream
        assert service.store.sessions == 1
        answer = server.post(
            "/v1/responses", input="Hello", max_output_tokens=2, store=False
        )  # needs no store
        assert answer.status_code == 200
        monkeypatch.undo()
        assert ask(server, "And?", previous_response_id=first.id).output_text
    for path in tmp_path.iterdir():
        path.unlink()
    tmp_path.rmdir()
    with running(service_of(store=SessionStore(folder=folder_of(tmp_path / "x")))) as server:
        (tmp_path / "x" / "secret").unlink()
        (tmp_path / "x").rmdir()
        assert server.refused("/v1/responses", 503, input="Hi", max_output_tokens=2)


@pytest.mark.parametrize("has_folder", [False, True])
def test_a_budget_that_no_session_fits(tmp_path, has_folder):
    """It is refused at the start; what becomes too large later says so."""
    name, option = ("folder_bytes", "store") if has_folder else ("memory_bytes", "memory")
    full = full_bytes(model_of("llama"))

    def served(budget):
        folder = folder_of(tmp_path) if has_folder else None
        return service_of(store=SessionStore(folder=folder, **{name: budget}))

    for budget in (0, full - 1):
        with refused(f"{name} (--{option}-gib) must be at least {full} bytes"):
            served(budget)
    with running(served(full + 20000)) as server:
        assert ask(server, "Hello").output_text
        metadata = {f"key{i}": "x" * 500 for i in range(16)}
        body = {"input": "Hi " * 12000, "metadata": metadata, "max_output_tokens": 1}
        answer = server.post("/v1/responses", **body)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "store"
        assert f"{name} (--{option}-gib) are {full + 20000}" in answer.json()["error"]["message"]
        assert "retry-after" not in answer.headers


SERVED = """
import sys
from pathlib import Path
from cometlm.serve.kept import SessionStore
from tests.serve.running import running, service_of
from tests.serve.test_kept import folder_of
store = SessionStore(folder=folder_of(Path(sys.argv[1])))
with running(service_of(store=store)) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_killed_server_keeps_what_it_acknowledged(tmp_path):
    """Killed at random while four clients talk: each id that was told is whole and goes on."""
    rng = random.Random(0)
    told = {}

    def talk(url, number):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        name = None
        try:
            for turn in range(1000):
                made = client.responses.create(
                    model="tiny", input=f"{number}, {turn}", temperature=0, max_output_tokens=4,
                    previous_response_id=name,
                )  # fmt: skip
                told[made.id] = made.output_text
                name = made.id
        except openai.APIConnectionError:
            return

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", SERVED, tmp_path / "store"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return process, process.stdout.readline().strip()

    for _ in range(3):
        process, url = start()
        threads = [threading.Thread(target=talk, args=(url, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        most = len(told) + rng.randrange(2, 12)
        while len(told) < most:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for thread in threads:
            thread.join(60)
    process, url = start()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for name, text in told.items():
        assert client.responses.retrieve(name).output_text == text
        assert client.responses.create(
            model="tiny", input="On?", previous_response_id=name, max_output_tokens=2, store=False
        ).id
    process.communicate("")

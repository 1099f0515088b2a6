"""Sessions of a key: listed, taken home, brought back, forked and deleted."""

import io
import json
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from cometlm import Session
from cometlm.serve.folder import Folder
from cometlm.serve.kept import SessionStore
from cometlm.serve.keys import Keys, new_key
from cometlm.session.file import read_notes
from tests.serve.running import running, service_of
from tests.sessions import TEXT, assert_same, model_of, session_of, tokenizer_of
from tests.test_session_corpus import with_tensor

PATH = "/v1/sessions"


def respond(server, text="Hello there", **options):
    given = {"temperature": 0, "max_output_tokens": 4, **options}
    return server.openai.responses.create(model="tiny", input=text, **given)


def upload(server, content, name="mine.safetensors", **fields):
    return server.http.post(PATH, files={"file": (name, content)}, data=fields)


def file_of(session, path):
    session.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("has_folder", [False, True])
def test_what_is_kept_is_listed(tmp_path, has_folder):
    folder = Folder(tmp_path, model_of("llama"), tokenizer_of("llama")) if has_folder else None
    store = SessionStore(folder=folder)
    with running(service_of(store=store)) as server:
        first = respond(server, "Hello <|im_end|>  " + TEXT)
        chat = server.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], max_tokens=1
        ).json()
        made = server.openai.files.create(file=("log.txt", TEXT.encode()), purpose="user_data")
        more = respond(server, "So?", previous_response_id=made.id)
        found = {one["id"]: one for one in server.http.get(PATH).json()["data"]}
        assert set(found) == {first.id, chat["id"], made.id, more.id}  # and no place in a prompt
        assert found[made.id]["title"] == "log.txt"
        assert found[made.id]["tokens"] == made.tokens
        assert found[chat["id"]]["title"] is None
        assert found[first.id]["title"] == ("Hello <|im_end|> " + TEXT)[:80].strip()
        assert found[more.id]["parent"] == made.id
        for name, one in found.items():
            assert server.http.get(f"{PATH}/{name}").json() == one
            assert set(one) == {
                "id", "object", "created_at", "expires_at", "tokens", "bytes", "parent", "title"
            }  # fmt: skip
            assert 0 <= time.time() - one["created_at"] < 60
            assert one["expires_at"] > time.time()
            assert one["tokens"] == store.get(name, "")[1].stats().tokens
            size = (tmp_path / f"{name}.safetensors").stat().st_size if has_folder else 1
            assert one["bytes"] >= size
    if has_folder:  # another server over the same folder says the same
        again = SessionStore(folder=Folder(tmp_path, model_of("llama"), tokenizer_of("llama")))
        with running(service_of(store=again)) as server:
            assert {one["id"]: one for one in server.http.get(PATH).json()["data"]} == found


def test_pages():
    with running() as server:
        names = [respond(server, f"Hello {i}").id for i in range(5)]
        pages, after = [], None
        while True:
            query = {"limit": 2, "order": "asc"} | ({"after": after} if after else {})
            page = server.http.get(PATH, params=query).json()
            pages += [one["id"] for one in page["data"]]
            ends = (page["data"][0]["id"], page["data"][-1]["id"])
            assert (page["first_id"], page["last_id"]) == ends
            if not page["has_more"]:
                break
            after = page["last_id"]
        assert sorted(pages) == sorted(names)
        newest = [one["id"] for one in server.http.get(PATH).json()["data"]]
        assert newest == pages[::-1]
        for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=none", "colour=red"):
            answer = server.http.get(f"{PATH}?{query}")
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == query.partition("=")[0]
        empty = server.http.get(PATH, params={"after": pages[0]}).json()
        assert empty == {
            "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False
        }  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "overlap"])
def test_a_session_is_taken_home_and_brought_back(tmp_path, kind):
    with running(service_of(kind)) as server:
        first = respond(server, "Hello " + TEXT[:200])
        answer = server.http.get(f"{PATH}/{first.id}/content")
        assert answer.headers["content-length"] == str(len(answer.content))
        assert first.id in answer.headers["content-disposition"]
        path = tmp_path / "home.safetensors"
        path.write_bytes(answer.content)
        assert read_notes(path) == {}  # nothing of the server's
        home = Session.load(path, model_of(kind), tokenizer_of(kind))
        back = upload(server, answer.content).json()
        assert (back["title"], back["parent"]) == ("mine.safetensors", None)
        assert back["tokens"] == home.stats().tokens
        want = home.chat("So?", max_new_tokens=9, do_sample=False)
        for name in (first.id, back["id"]):
            more = respond(server, "So?", previous_response_id=name, max_output_tokens=9)
            assert more.output_text == want


def test_a_library_s_session_is_brought(tmp_path):
    """Its text may still be waiting; what it says is what the library says."""
    session = session_of()
    session.read(TEXT[:333])
    with running() as server:
        made = upload(server, file_of(session, tmp_path / "own")).json()
        assert made["tokens"] == session.stats().tokens
        want = session.ask("So?", max_new_tokens=9, do_sample=False)
        more = respond(server, "So?", previous_response_id=made["id"], max_output_tokens=9)
        assert more.output_text == want


def damaged(path):
    """Files that look like a session's and are none."""
    session = session_of()
    session.read(TEXT[:400])
    list(session.finish())
    whole = file_of(session, path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()

    def written(**changed):
        return save({**tensors, **changed}, metadata)

    name = next(name for name in tensors if name.startswith("state"))
    document = json.loads(metadata["cometlm"])
    del document["digest"], document["made_by"]["settings"]  # as older files
    document["stream"] = {"text": "ab cd " * 50_000, "done": 0, "started": True}
    return {
        "text": b"Hello",
        "nothing": b"",
        "cut": whole[:-100],
        "header": (2**40).to_bytes(8, "little") + whole[8:],
        "other": save({"x": torch.zeros(3)}),
        "nan": written(**{name: torch.full_like(tensors[name], float("nan"))}),
        "shape": written(**{name: tensors[name][:, :1].clone()}),
        "ids": written(open=torch.tensor([10**9])),
        "long": written(open=torch.zeros(10**6, dtype=torch.int64)),
        "waiting": save(tensors, {"cometlm": json.dumps(document)}),
        "deep": save(tensors, {"cometlm": "[" * 10**5}),
        "infinite": written(**{name: tensors[name].clone().fill_(float("-inf"))}),
        "a dtype without infinity": written(x=torch.zeros(8, dtype=torch.float8_e4m3fn)),
        "half bytes": with_tensor(whole, "x", {"dtype": "F4", "shape": [16]}, bytes(8)),
        "a shape of words": with_tensor(whole, "open", {"dtype": "I64", "shape": ["x"]}, bytes(8)),
        "no open chunk": save({k: v for k, v in tensors.items() if k != "open"}, metadata),
    }


def test_files_that_are_no_session(tmp_path):
    with running(most_file_bytes=1 << 20) as server:
        for what, content in damaged(tmp_path / "one").items():
            answer = upload(server, content)
            if what == "long":
                assert answer.status_code == 413
                continue
            assert answer.status_code == 400, what
            error = answer.json()["error"]
            assert error["param"] == "file"
            assert "tmp" not in error["message"]
        assert upload(server, b"x", purpose="y").json()["error"]["param"] == "purpose"
        assert server.http.post(PATH, json={}).status_code == 400
        assert server.http.get(PATH).json()["data"] == []
    with running() as server:
        long = upload(server, damaged(tmp_path / "one")["long"])
        assert long.status_code == 400
        assert "at most 65536" in long.json()["error"]["message"]
        waiting = upload(server, damaged(tmp_path / "one")["waiting"])
        assert "at most 294912 characters, got 300000" in waiting.json()["error"]["message"]


def test_a_session_of_another_model_is_refused(tmp_path):
    session = session_of("qwen3")
    session.read(TEXT[:200])
    with running() as server:
        answer = upload(server, file_of(session, tmp_path / "other"))
        assert answer.status_code == 400
        assert "another model" in answer.json()["error"]["message"]


def test_a_fork_stays(tmp_path):
    store = SessionStore(folder=Folder(tmp_path, model_of("llama"), tokenizer_of("llama")))
    with running(service_of(store=store)) as server:
        first = respond(server, "Hello " + TEXT[:100])
        fork = server.http.post(f"{PATH}/{first.id}/fork").json()
        assert fork["parent"] == first.id
        assert fork["title"].startswith("Hello On day 0")
        assert_same(store.get(fork["id"], "")[1], store.get(first.id, "")[1])
        want = respond(server, "So?", previous_response_id=first.id)
        gone = server.http.delete(f"{PATH}/{first.id}").json()
        assert gone == {"id": first.id, "object": "session", "deleted": True}
        found = respond(server, "So?", previous_response_id=fork["id"])
        assert found.output_text == want.output_text
        for method, end in (("GET", ""), ("GET", "/content"), ("POST", "/fork"), ("DELETE", "")):
            answer = server.http.request(method, f"{PATH}/{first.id}{end}")
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "dropped"
            answer = server.http.request(method, f"{PATH}/sess_1{end}")
            assert answer.json()["error"] == {
                "message": "there is no sess_1", "type": "invalid_request_error",
                "param": "session_id", "code": "not_found",
            }  # fmt: skip


def test_sessions_of_others_do_not_exist(tmp_path):
    path = tmp_path / "keys"
    made = {name: new_key(path, name) for name in ("ann", "bob")}
    with running(keys=Keys.read(path)) as server:
        headers = {name: {"Authorization": f"Bearer {key}"} for name, key in made.items()}
        session = session_of()
        session.read("Hello there")
        answer = server.http.post(
            PATH,
            headers=headers["ann"],
            files={"file": ("x", io.BytesIO(file_of(session, tmp_path / "own")))},
        )
        name = answer.json()["id"]
        assert [s["id"] for s in server.http.get(PATH, headers=headers["ann"]).json()["data"]] == [
            name
        ]
        assert server.http.get(PATH, headers=headers["bob"]).json()["data"] == []
        assert server.http.get(PATH).status_code == 401
        for method, end in (("GET", ""), ("GET", "/content"), ("POST", "/fork"), ("DELETE", "")):
            answer = server.http.request(method, f"{PATH}/{name}{end}", headers=headers["bob"])
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "not_found"
        assert server.http.get(f"{PATH}/{name}", headers=headers["ann"]).status_code == 200

"""Damaged and hostile session files are refused, and nothing is read from them."""

import copy
import json
import random
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cometlm import Session
from tests.sessions import TEXT, assert_same, session_of
from tests.tiny import examples, random_ids, tiny_comet

pytestmark = pytest.mark.usefixtures("small_windows")


# --- damaged and hostile files ------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(small, tmp_path_factory):
    """Bytes of a small session's file."""
    path = tmp_path_factory.mktemp("good") / "s"
    session = Session(small)
    session.read(random_ids(40))
    session.save(path)
    return path.read_bytes()


def parts(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, body):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def with_document(data, change):
    """The file with another document; `change` edits it, or is its text."""
    header, body = parts(data)
    document = json.loads(header["__metadata__"]["cometlm"])
    del document["digest"], document["made_by"]["settings"]  # as older files
    if callable(change):
        change(document)
        change = json.dumps(document)
    header["__metadata__"]["cometlm"] = change
    return joined(header, body)


def with_tensors(data, change):
    """The file with other tensors."""
    header, body = parts(data)
    metadata = header.pop("__metadata__")
    kept = {name: (entry, body[slice(*entry["data_offsets"])]) for name, entry in header.items()}
    change(kept)
    document = json.loads(metadata["cometlm"])
    del document["digest"], document["made_by"]["settings"]  # as older files
    metadata["cometlm"] = json.dumps(document)
    made, out = {"__metadata__": metadata}, b""
    for name, (entry, raw) in kept.items():
        made[name] = {**entry, "data_offsets": [len(out), len(out) + len(raw)]}
        out += raw
    return joined(made, out)


def refuse(small, path, data, message="."):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        Session.load(path, small)
    assert str(path) in str(caught.value)


def test_the_helpers_do_no_damage(small, good, tmp_path):
    for data in (good, with_document(good, lambda document: None), with_tensors(good, len)):
        (tmp_path / "s").write_bytes(data)
        assert Session.load(tmp_path / "s", small).stats().tokens == 40


def test_truncation_anywhere_is_refused(small, good, tmp_path):
    header = 8 + struct.unpack("<Q", good[:8])[0]
    near = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(good) - 1}
    for length in sorted({*range(0, len(good), 23), *near}):
        refuse(small, tmp_path / "s", good[:length])


def test_bytes_at_the_end_are_refused(small, good, tmp_path):
    refuse(small, tmp_path / "s", good + b"\0")


@examples(300)
@given(data=st.data())
def test_a_flipped_byte_of_the_header_is_refused_or_harmless(small, good, tmp_path_factory, data):
    header = 8 + struct.unpack("<Q", good[:8])[0]
    place = data.draw(st.integers(0, header - 1))
    flipped = bytearray(good)
    flipped[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(flipped)
    try:
        session = Session.load(path, small)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 (either is fine)
    else:
        assert len(session.continuation(2)) == 2


@examples(100)
@given(data=st.data())
def test_a_flipped_byte_of_a_tensor_is_refused(small, good, tmp_path_factory, data):
    header = 8 + struct.unpack("<Q", good[:8])[0]
    place = data.draw(st.integers(header, len(good) - 1))
    flipped = bytearray(good)
    flipped[place] ^= data.draw(st.integers(1, 255))
    refuse(small, tmp_path_factory.getbasetemp() / "flipped", flipped, "damaged")


def wrong(entry, **changes):
    return {**entry, **changes}


def set_tensor(name, raw=None, **changes):
    def change(kept):
        entry, old = kept[name]
        kept[name] = (wrong(entry, **changes), old if raw is None else raw)

    return change


def drop(name):
    return lambda kept: kept.pop(name)


def add(name):
    def change(kept):
        kept[name] = kept["open"]

    return change


def ids(*tokens):
    raw = struct.pack(f"<{len(tokens)}q", *tokens)
    return set_tensor("open", raw, shape=[len(tokens)])


TENSORS = {
    "a state of another shape": (set_tensor("state.1", shape=[1, 32, 3]), r"'state\.1'"),
    "a state of two rows": (set_tensor("state.1", shape=[3, 1, 32]), r"'state\.1'"),
    "a state of another rank": (set_tensor("state.1", shape=[96]), r"'state\.1'"),
    "ids of another rank": (set_tensor("open", shape=[1, 4]), "'open'"),
    "a state of another dtype": (set_tensor("state.0", dtype="I64"), r"'state\.0'"),
    "ids of another dtype": (set_tensor("open", dtype="F64"), "'open'"),
    "no ids": (drop("open"), "lacks tensor 'open'"),
    "a layer without state": (drop("state.2"), r"lacks tensor 'state\.2'"),
    "a layer without entries": (drop("entries.0"), r"lacks tensor 'entries\.0'"),
    "a layer too many": (add("state.3"), r"unknown tensor 'state\.3'"),
    "a tensor of another name": (add("code"), "unknown tensor 'code'"),
    "an id above the vocabulary": (ids(5, 96), "token ids"),
    "a negative id": (ids(-1), "token ids"),
    "a huge id": (ids(2**62), "token ids"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors_are_refused(small, good, tmp_path, case):
    change, message = TENSORS[case]
    refuse(small, tmp_path / "s", with_tensors(good, change), message)


@pytest.mark.parametrize("rows", [10**6, 10**12, 2**61, 2**64, -1, 1.5, "3"])
def test_impossible_shapes_are_refused(small, good, tmp_path, rows):
    header, body = parts(good)
    header["open"]["shape"] = [rows]
    refuse(small, tmp_path / "s", joined(header, body))
    if isinstance(rows, int):
        begin = header["open"]["data_offsets"][0]
        header["open"]["data_offsets"] = [begin, begin + 8 * rows]
        refuse(small, tmp_path / "s", joined(header, body))


def test_offsets_that_overlap_or_leave_holes_are_refused(small, good, tmp_path):
    header, body = parts(good)
    overlapping = copy.deepcopy(header)
    overlapping["state.1"]["data_offsets"] = overlapping["state.0"]["data_offsets"]
    refuse(small, tmp_path / "s", joined(overlapping, body))
    shifted = copy.deepcopy(header)
    for entry in shifted.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    refuse(small, tmp_path / "s", joined(shifted, bytes(8) + body))


HEADERS = {
    "no JSON": b"{" * 100,
    "a list": b"[1, 2]",
    "deep JSON": b'{"a":' * 50_000,
    "no UTF-8": b'{"\xff": 1}',
    "metadata that is no text": b'{"__metadata__": {"cometlm": 3}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_wrong_headers_are_refused(small, tmp_path, case):
    refuse(small, tmp_path / "s", joined(HEADERS[case], b""))


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_refused(small, good, tmp_path, length):
    refuse(small, tmp_path / "s", struct.pack("<Q", length) + good[8:])


def setter(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(document):
        for key in keys:
            document = document[key]
        document[last] = value

    return change


DOCUMENTS = {
    "no JSON": ("{oops", "no JSON"),
    "nothing": ("", "no JSON"),
    "deep": ("[" * 100_000, "no JSON"),
    "an endless number": ('{"format": ' + "9" * 10_000 + "}", "damaged"),
    "a list": ("[]", "format"),
    "null": ("null", "format"),
    "a number": ("1", "format"),
    "no format": (lambda document: document.pop("format"), "format"),
    "format in words": (setter("format", "one"), "format"),
    "format true": (setter("format", True), "format"),
    "a newer format": (setter("format", 2), "has format 2.* reads format 1"),
    "an older format": (setter("format", 0), "has format 0"),
    "no stream": (lambda document: document.pop("stream"), "damaged"),
    "a stream of lists": (setter("stream", []), "damaged"),
    "no model": (lambda document: document.pop("model"), "damaged"),
    "no origin": (lambda document: document.pop("made_by"), "damaged"),
    "an origin without weights": (
        lambda document: document["made_by"].pop("memory weights"),
        "damaged",
    ),
    "an origin of numbers": (setter("made_by", "backbone", 7), "damaged"),
    "settings of a list": (setter("made_by", "settings", "[]"), "damaged"),
    "settings of numbers": (setter("made_by", "settings", 7), "damaged"),
    "settings and no digest": (setter("made_by", "settings", "{}"), "digest"),
    "a model of lists": (setter("model", "name", []), "damaged"),
    **{
        f"{name} = {value}": (setter(name, value), "damaged")
        for name in ("folds", "turns", "characters", "entries", "tokens")
        for value in (-1, 1.5, 3.0, "3", None, True, 2**60, float("nan"), float("inf"), [3])
    },
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_wrong_documents_are_refused(small, good, tmp_path, case):
    change, message = DOCUMENTS[case]
    refuse(small, tmp_path / "s", with_document(good, change), message)


def test_counts_that_do_not_fit_the_tensors_are_refused(small, good, tmp_path):
    for folds in (0, 1):  # 40 tokens were three chunks, and the first holds three entries of five
        refuse(small, tmp_path / "s", with_document(good, setter("folds", folds)), "damaged")


def test_an_older_file_without_them_has_full_chunks(small, good, tmp_path):
    def older(document):
        del document["tokens"], document["entries"]
        sizes = json.loads(document["made_by"]["config"])
        del sizes["overlap"]
        document["made_by"]["config"] = json.dumps(sizes)

    (tmp_path / "s").write_bytes(with_document(good, older))
    (tmp_path / "good").write_bytes(good)
    loaded, want = (Session.load(tmp_path / name, small) for name in ("s", "good"))
    assert_same(loaded, want)


@pytest.mark.parametrize(("name", "value"), [("tokens", 37), ("tokens", 2), ("entries", 6)])
def test_more_than_the_chunks_hold_is_refused(small, good, tmp_path, name, value):
    """Three chunks of 12 tokens, and five entries at most."""
    refuse(small, tmp_path / "s", with_document(good, setter(name, value)), "damaged")


def test_less_than_an_overlap_leaves_is_refused(tmp_path):
    """Each fold reads more than it and leaves as much open."""
    session = Session(tiny_comet("llama", overlap=4))
    session.read(random_ids(40))
    session.save(tmp_path / "s")
    good = (tmp_path / "s").read_bytes()
    assert_same(Session.load(tmp_path / "s", session.model), session)

    refuse(session.model, tmp_path / "s", with_document(good, setter("tokens", 19)), "damaged")
    refuse(session.model, tmp_path / "s", with_tensors(good, ids(5, 6, 7)), "damaged")


STREAMS = [
    {"text": 3, "done": 0, "started": True},
    {"text": "abc", "done": 4, "started": True},
    {"text": "abc", "done": -1, "started": True},
    {"text": "abc", "done": 0.0, "started": True},
    {"text": "abc", "done": 0, "started": 1},
    {"text": "abc", "done": 0},
    {"done": 0, "started": True},
    {"text": "lone \ud800 surrogate", "done": 0, "started": True},
]


@pytest.mark.parametrize("stream", STREAMS, ids=repr)
def test_wrong_pending_text_is_refused(tmp_path, stream):
    session = session_of()
    session.read(TEXT[:200])
    session.save(tmp_path / "s")
    data = with_document((tmp_path / "s").read_bytes(), setter("stream", stream))
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        Session.load(tmp_path / "s", session.model, session.tokenizer)


def test_what_is_no_session_file_is_refused(small, tmp_path):
    path = tmp_path / "s"
    refuse(small, path, b"")
    refuse(small, path, b"Dear diary,\nthe lamp went out in the night.\n" * 100)
    refuse(small, path, random.Random(0).randbytes(4000))
    refuse(small, path, b"PK\x03\x04" + bytes(1000))
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"/s is no cometlm session"):
        Session.load(path, small)
    with pytest.raises(ValueError, match=f"{tmp_path} is a directory"):
        Session.load(tmp_path, small)


def test_a_missing_or_forbidden_file_is_an_oserror(small, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        Session.load(tmp_path / "nowhere", small)
    with pytest.raises(OSError, match="s"):
        Session.load(tmp_path / "no folder" / "s", small)

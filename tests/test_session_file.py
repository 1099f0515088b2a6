"""A session outlives its process: what a file keeps, and what it refuses."""

import contextlib
import copy
import errno
import functools
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

import cometlm
from cometlm import Session, text
from cometlm.reference import reference_generate
from cometlm.session import SessionStats
from tests import real
from tests.tiny import random_ids, scramble, tiny_backbone, tiny_comet

TEXT = "".join(
    f"On day {i} the keeper of the lamp wrote: <|im_start|> wind {i * 37 % 100}, naïve ☂️ sea.\n"
    for i in range(12)
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(autouse=True, scope="module")
def small_windows():
    """Text comes out of the tokenizer in many steps, as it does in a long text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_WINDOW", 160)
        patch.setattr(text, "_MARGIN", 96)
        patch.setattr(text, "_CONTEXT", 128)
        yield


@functools.cache
def model_of(kind):
    if kind == "like gemma":
        backbone = tiny_backbone("qwen3", vocab_size=len(real.tokenizer(kind)))
        sizes = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5, "rank": 2}
        model = cometlm.attach(backbone, **sizes)
        scramble(model.model.comet, 0.5)
        return model
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.bfloat16}
    switches = {"no global": "global_memory", "no temporary": "temporary_memory", "no gate": "gate"}
    family = "qwen3" if kind == "qwen3" else "llama"
    sizes = {switches[kind]: False} if kind in switches else {}
    model = real.tiny_comet(family, **sizes).to(dtypes.get(kind, torch.float64))
    if kind == "mixed":
        model.model.comet.float()
    return model


@functools.cache
def tokenizer_of(kind):
    tokenizer = copy.deepcopy(real.tokenizer("like gemma" if kind == "like gemma" else "smollm2"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def small():
    """A tiny model of 96 ids, for what needs no text."""
    return tiny_comet("llama")


def session_of(kind="llama"):
    return Session(model_of(kind), tokenizer_of(kind))


def read_at_random(session, seed):
    """A few reads of text and ids."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 6)):
        if rng.random() < 0.7:
            begin = rng.randrange(len(TEXT))
            session.read(TEXT[begin : begin + rng.randrange(300)])
        else:
            session.read([rng.randrange(50) for _ in range(rng.randrange(1, 30))])


def going_on(session, count=4):
    """The next tokens, and the exact logits that they were chosen by: what the session holds."""
    logits = []
    hook = session.model.lm_head.register_forward_hook(
        lambda module, given_input, out: logits.append(out[0, -1].clone())
    )
    try:
        return session.continuation(count), torch.stack(logits)
    finally:
        hook.remove()


def assert_same(ours, theirs):
    assert ours.stats() == theirs.stats()
    assert ours.characters == theirs.characters
    if theirs.stats().tokens == 0:
        return
    (ids, logits), (want_ids, want_logits) = going_on(ours), going_on(theirs)
    assert ids == want_ids
    assert torch.equal(logits, want_logits)


def reloaded(session, path):
    session.save(path)
    return Session.load(path, session.model, session.tokenizer)


# --- round trips --------------------------------------------------------------------------------

KINDS = [
    "llama",
    "qwen3",
    "like gemma",
    "float32",
    "bfloat16",
    "mixed",
    "no global",
    "no temporary",
    "no gate",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_loaded_session_goes_on_as_the_saved_one(kind, seed, tmp_path):
    session = session_of(kind)
    read_at_random(session, seed)
    loaded = reloaded(session, tmp_path / "s")
    assert_same(loaded, session)
    read_at_random(session, seed + 100)
    read_at_random(loaded, seed + 100)
    for one in (session, loaded):
        list(one.finish())
    assert_same(loaded, session)


def test_an_unread_session(tmp_path):
    loaded = reloaded(session_of(), tmp_path / "s")
    assert loaded.stats() == SessionStats(0, 0, 0)
    want = session_of()
    for session in (loaded, want):
        session.read(TEXT)
    assert_same(loaded, want)


def test_saving_changes_nothing(tmp_path):
    session, want = session_of(), session_of()
    for piece in (TEXT[:333], TEXT[333:]):
        session.read(piece)
        session.save(tmp_path / "s")
        want.read(piece)
    assert_same(session, want)


PROGRAM = """
import json, sys, torch
torch.set_num_threads(1)
from cometlm import Session
from tests import real
session = Session.load(sys.argv[1], real.tiny_comet(), real.tokenizer("smollm2"))
stats = session.stats()
print(json.dumps([stats.tokens, stats.chunks, stats.memory_bytes, session.continuation(8)]))
"""


def test_another_process_goes_on(tmp_path):
    session = session_of()
    session.read(TEXT)
    session.save(tmp_path / "s")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "s")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stats = session.stats()
    want = [stats.tokens, stats.chunks, stats.memory_bytes, session.continuation(8)]
    assert json.loads(done.stdout.splitlines()[-1]) == want


def test_the_file_does_not_grow_with_what_was_read(small, tmp_path):
    sizes = []
    for count in (60, 600, 3001):
        session = Session(small)
        session.read(random_ids(count))
        session.save(tmp_path / "s")
        sizes.append((tmp_path / "s").stat().st_size)
    spread = 12 * 8 + 32  # the open chunk's ids; digits of counts, in steps of 8
    assert max(sizes) - min(sizes) <= spread


def test_the_file_of_a_text_does_not_grow(tmp_path):
    sizes = []
    for times in (2, 8, 20):
        session = session_of()
        session.read("The lamp went out in the night and nobody saw it.\n" * 10 * times)
        session.save(tmp_path / "s")
        sizes.append((tmp_path / "s").stat().st_size)
    text_held = 2 * (160 + 96 + 128)  # a window, its margin and context, escaped as JSON
    assert max(sizes) - min(sizes) <= text_held + 12 * 8 + 32


def test_a_session_is_saved_in_the_middle_of_a_read(small, tmp_path):
    """As `cometlm read --save` does every five minutes."""
    ids = random_ids(100)
    want = Session(small)
    want.read(ids)
    session = Session(small)
    for number, _ in enumerate(session.reading(ids)):
        loaded = reloaded(session, tmp_path / str(number))
        assert loaded.continuation(3) == want.continuation(3)
        list(loaded.settle())
        assert_same(loaded, want)
    assert number == 7


# --- any sequence of operations -----------------------------------------------------------------


class Mirror:
    """The ids that a session must have read: whole texts tokenised at once."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids, self.segment, self.began, self.turns = [], "", False, 0
        self.ends = ()  # of chunks that ended early

    def now(self):
        return self.ids + self._segment_ids()

    def _segment_ids(self):
        if not self.segment:
            return []
        first = [] if self.began else self.tokenizer("")["input_ids"]
        return first + self._plain(self.segment)

    def _plain(self, given_text):
        return self.tokenizer(given_text, add_special_tokens=False)["input_ids"]

    def read_ids(self, ids):
        self.ids, self.segment = [*self.now(), *ids], ""
        self.began = True

    def pose(self, ids):
        """As `Session.pose` promises: the open chunk ends where ids and an eighth do not fit."""
        before, size = self.now(), SIZES["chunk_size"]
        held = len(before) - (self.ends[-1] if self.ends else 0)
        left = (held - 1) % size + 1 if held else 0
        wanted = len(ids) + size // 8
        if left and left + wanted > size >= wanted:
            self.ends = (*self.ends, len(before))
        self.read_ids(ids)

    def opening(self, message):
        return self._plain(f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n")

    def closing(self, answer):
        ids = self._plain("<|im_end|>\n")
        return ids[1:] if answer[-1] == ids[0] else ids

    def fork(self):
        return copy.copy(self)


def following(model, mirror, count):
    with torch.no_grad():
        return reference_generate(model, torch.tensor(mirror.now()), count, mirror.ends)


PIECES = st.builds(
    lambda begin, length: TEXT[begin : begin + length],
    st.integers(0, len(TEXT)),
    st.integers(0, 70),
)
IDS = st.lists(st.integers(0, 95), max_size=15)
OPERATIONS = st.one_of(
    st.tuples(st.just("text"), PIECES, st.lists(st.integers(0, 70), max_size=4)),
    st.tuples(st.just("ids"), IDS, st.sampled_from([list, tuple, iter])),
    st.tuples(st.just("tensor"), IDS.filter(len)),
    st.tuples(st.just("ask"), PIECES, st.booleans(), st.integers(1, 4)),
    st.tuples(st.just("chat"), PIECES, st.booleans(), st.integers(1, 4)),
    st.tuples(st.just("fork")),
    st.tuples(st.just("save")),
)


def apply(operation, session, mirror, path):
    """One operation on a session and its mirror; gives the sessions that it makes."""
    model, tokenizer = session.model, session.tokenizer
    match operation:
        case "text", piece, borders:
            ends = [0, *sorted(min(border, len(piece)) for border in borders), len(piece)]
            for begin, end in pairwise(ends):
                session.read(piece[begin:end])
            mirror.segment += piece
        case "ids", ids, kind:
            session.read(kind(ids))
            if ids:
                mirror.read_ids(ids)
        case "tensor", ids:
            session.read(torch.tensor(ids))
            mirror.read_ids(ids)
        case "ask", prompt, template, count:
            asked = mirror.fork()
            if template:
                asked.pose(asked.opening(prompt))
            else:
                asked.segment += prompt
            if not asked.now():
                with pytest.raises(ValueError, match="nothing was read"):
                    session.ask(prompt, template=template)
                return []
            answer = session.ask(prompt, template=template, max_new_tokens=count, **GREEDY)
            ids = following(model, asked, count)
            assert answer == tokenizer.decode(ids, skip_special_tokens=True)
        case "chat", message, stream, count:
            pieces = session.chat(message, stream=stream, max_new_tokens=count, **GREEDY)
            written = "".join(pieces)
            mirror.pose(mirror.opening(message))
            ids = following(model, mirror, count)
            assert written == tokenizer.decode(ids, skip_special_tokens=True)
            mirror.read_ids([*ids, *mirror.closing(ids)])
        case ("fork",):
            return [(session.fork(), mirror.fork())]
        case ("save",):
            return [(reloaded(session, path), mirror.fork())]
    assert session.stats().tokens == len(mirror.now())
    return []


@pytest.mark.parametrize(("kind", "examples"), [("llama", 30), ("like gemma", 60)])
def test_any_operations_equal_the_reference(kind, examples, tmp_path_factory):
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    path = tmp_path_factory.mktemp("sessions") / "s"

    @settings(max_examples=examples)
    @given(st.lists(st.tuples(st.integers(0, 9), OPERATIONS), min_size=2, max_size=9))
    def run(operations):
        pairs = [(Session(model, tokenizer), Mirror(tokenizer))]
        for who, operation in operations:
            pairs += apply(operation, *pairs[who % len(pairs)], path)
        for session, mirror in pairs:
            assert session.stats().tokens == len(mirror.now())
            if mirror.now():
                assert session.continuation(3) == following(model, mirror, 3)

    run()


@pytest.mark.parametrize("nothing", ["", [], (), torch.tensor([], dtype=torch.long)], ids=repr)
def test_reading_nothing_changes_nothing(nothing):
    session, want = session_of("like gemma"), session_of("like gemma")
    for piece in (TEXT[:50], TEXT[50:99]):
        session.read(nothing)
        session.read(piece)
        want.read(piece)
    assert_same(session, want)


# --- another model ------------------------------------------------------------------------------


def other_memory():
    return cometlm.attach(tiny_backbone("llama"), seed=1, **SIZES)


def other_backbone():
    model = cometlm.attach(tiny_backbone("llama"), **SIZES)
    with torch.no_grad():  # one number of one weight
        model.model.cells[2].layer.mlp.up_proj.weight[7, 11] += 1e-9
    return model


SIZES = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5, "rank": 2}
OTHERS = {
    "backbone": other_backbone,
    "memory weights": other_memory,
    "config": lambda: cometlm.attach(tiny_backbone("llama"), **{**SIZES, "capacity": 6}),
}


@pytest.mark.parametrize("count", [0, 40])
@pytest.mark.parametrize("part", OTHERS)
def test_another_model_is_refused(part, count, tmp_path):
    session = Session(cometlm.attach(tiny_backbone("llama"), **SIZES))
    session.read(random_ids(count))
    session.save(tmp_path / "s")
    with pytest.raises(ValueError, match=rf"{tmp_path / 's'} .*another model: its {part}"):
        Session.load(tmp_path / "s", OTHERS[part]())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype_is_refused(dtype, tmp_path):
    session = Session(cometlm.attach(tiny_backbone("llama"), **SIZES))
    session.read(random_ids(40))
    session.save(tmp_path / "s")
    other = cometlm.attach(tiny_backbone("llama"), **SIZES).to(dtype)
    with pytest.raises(ValueError, match="session of another model"):
        Session.load(tmp_path / "s", other)


def test_the_same_model_made_again_is_accepted(tmp_path):
    session = Session(cometlm.attach(tiny_backbone("llama"), **SIZES))
    session.read(random_ids(40))
    session.save(tmp_path / "s")
    again = cometlm.attach(tiny_backbone("llama"), **SIZES)
    assert_same(Session.load(tmp_path / "s", again), session)


def test_pending_text_needs_its_tokenizer(tmp_path):
    session = session_of()
    session.read("The lamp went out.")
    session.save(tmp_path / "s")
    with pytest.raises(ValueError, match=r"/s was read with a tokenizer"):
        Session.load(tmp_path / "s", session.model)


def test_a_tokenizer_may_come_later(tmp_path):
    """Text after ids goes on; it begins no new text."""
    model, tokenizer = model_of("like gemma"), tokenizer_of("like gemma")
    session, want = Session(model), Session(model, tokenizer)
    for one in (session, want):
        one.read(range(5, 40))
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", model, tokenizer)
    loaded.read("The lamp")
    want.read("The lamp")
    assert_same(loaded, want)


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


@settings(max_examples=300)
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
    "an open chunk that is empty": (ids(), "token ids"),
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

    (tmp_path / "s").write_bytes(with_document(good, older))
    (tmp_path / "good").write_bytes(good)
    loaded, want = (Session.load(tmp_path / name, small) for name in ("s", "good"))
    assert_same(loaded, want)


@pytest.mark.parametrize(("name", "value"), [("tokens", 37), ("tokens", 2), ("entries", 6)])
def test_more_than_the_chunks_hold_is_refused(small, good, tmp_path, name, value):
    """Three chunks of 12 tokens, and five entries at most."""
    refuse(small, tmp_path / "s", with_document(good, setter(name, value)), "damaged")


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


# --- saving -------------------------------------------------------------------------------------


@contextlib.contextmanager
def failing_sync(monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


@contextlib.contextmanager
def small_files(monkeypatch):
    """The system refuses to write more than 1000 bytes into a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def failing_rename(monkeypatch):
    def broken(*paths):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        yield


@pytest.mark.parametrize("failure", [failing_sync, small_files, failing_rename])
@pytest.mark.parametrize("there", [True, False])
def test_a_failed_save_leaves_what_was_there(small, tmp_path, monkeypatch, failure, there):
    path = tmp_path / "s"
    old, new = Session(small), Session(small)
    old.read(random_ids(30, seed=1))
    new.read(random_ids(50, seed=2))
    if there:
        old.save(path)
    with failure(monkeypatch), pytest.raises(OSError, match=r"rror|No space|too large"):
        new.save(path)
    assert list(tmp_path.iterdir()) == ([path] if there else [])
    if there:
        assert_same(Session.load(path, small), old)
    new.save(path)
    assert_same(Session.load(path, small), new)
    assert list(tmp_path.iterdir()) == [path]


def test_saving_where_no_file_can_be_is_an_oserror(small, tmp_path):
    with pytest.raises(OSError, match="no folder"):
        Session(small).save(tmp_path / "no folder" / "s")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        Session(small).save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(small, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        Session(small).save(tmp_path / "s")
    finally:
        assert os.umask(before) == mask
    assert (tmp_path / "s").stat().st_mode & 0o777 == mode


def kill_while_saving(small, folder, times):
    """SIGKILL a process that saves two sessions by turns; gives how often that left a part."""
    path = folder / "s"
    sessions = [Session(small), Session(small)]
    whole = []
    for seed, session in enumerate(sessions):
        session.read(random_ids(40 + 9 * seed, seed=seed))
        session.save(path)
        whole.append(path.read_bytes())
    assert whole[0] != whole[1]
    rng = random.Random(0)
    for _ in range(times):
        before = path.read_bytes()
        child = os.fork()
        if child == 0:  # nothing but saving happens here
            try:
                if rng.random() < 0.5:  # a slow disk
                    os.fsync = lambda handle: time.sleep(0.004)
                while True:
                    for session in sessions:
                        session.save(path)
            finally:
                os._exit(1)
        rng.random()  # as the child did
        time.sleep(rng.random() * 0.04)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)  # it had not ended by itself
        after = path.read_bytes()
        assert after in whole, f"neither one nor the other; before it was {before in whole}"
        assert_same(Session.load(path, small), sessions[whole.index(after)])
    return len(list(folder.glob(".s.*.part")))


def test_a_killed_save_leaves_a_whole_session(small, tmp_path):
    kill_while_saving(small, tmp_path, 15)


@pytest.mark.slow
def test_two_hundred_killed_saves_leave_whole_sessions(small, tmp_path):
    assert kill_while_saving(small, tmp_path, 200) > 0  # some hit the moment of writing


# --- answers that are broken off, and wrong arguments -------------------------------------------


@pytest.fixture
def session():
    session = session_of()
    session.read(TEXT[:300])
    return session


def mirror_of(session):
    mirror = Mirror(session.tokenizer)
    mirror.segment = TEXT[:300]
    return mirror


class Counting(LogitsProcessor):
    """Counts the tokens written; may raise at one of them."""

    def __init__(self, fail_at=None, pause=0.0):
        self.count, self.fail_at, self.pause = 0, fail_at, pause

    def __call__(self, input_ids, scores):
        if self.count == self.fail_at:
            raise RuntimeError("the lamp went out")
        self.count += 1
        time.sleep(self.pause)
        return scores


def options(counting, count):
    return {"logits_processor": LogitsProcessorList([counting]), "max_new_tokens": count, **GREEDY}


def test_an_answer_that_nobody_listens_to_ends(session):
    want, threads, counting = session.fork(), threading.active_count(), Counting()
    pieces = session.ask("Why?", stream=True, **options(counting, 5000))
    assert next(pieces)
    pieces.close()
    assert threading.active_count() == threads
    assert counting.count < 1000
    assert_same(session, want)


def test_a_stream_that_is_never_begun_does_nothing(session):
    want, threads = session.fork(), threading.active_count()
    session.ask("Why?", stream=True)
    session.chat("Why?", stream=True)
    assert threading.active_count() == threads
    assert_same(session, want)


def test_a_chat_that_is_broken_off_keeps_what_was_written(session):
    mirror, threads, counting = mirror_of(session), threading.active_count(), Counting()
    pieces = session.chat("Why?", stream=True, **options(counting, 5000))
    assert next(pieces)
    pieces.close()
    assert threading.active_count() == threads
    assert 0 < counting.count < 1000
    mirror.read_ids(mirror.opening("Why?"))
    written = session.stats().tokens - len(mirror.now()) - len(mirror.closing([0]))
    assert 0 < written <= counting.count
    answer = going_on_from(mirror, session.model, written)
    mirror.read_ids([*answer, *mirror.closing(answer)])
    assert session.continuation(3) == following(session.model, mirror, 3)
    # and the next turn is a second one
    assert session.chat("And then?", max_new_tokens=2, **GREEDY)
    assert session.stats().tokens > len(mirror.now())


def going_on_from(mirror, model, count):
    """Greedy ids after the mirror's; by the model, since the reference is slow for many."""
    session = Session(model)
    session.read(mirror.now())
    return session.continuation(count)


@pytest.mark.parametrize("verb", ["ask", "chat"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_reaches_the_caller(session, verb, stream):
    want, threads = session.fork(), threading.active_count()
    with pytest.raises(RuntimeError, match="the lamp went out"):
        "".join(getattr(session, verb)("Why?", stream=stream, **options(Counting(0), 50)))
    assert threading.active_count() == threads
    assert_same(session, want)


def test_an_error_in_the_middle_of_a_chat_keeps_what_was_written(session):
    mirror = mirror_of(session)
    with pytest.raises(RuntimeError, match="the lamp went out"):
        "".join(session.chat("Why?", stream=True, **options(Counting(7), 50)))
    mirror.read_ids(mirror.opening("Why?"))
    answer = going_on_from(mirror, session.model, 7)
    mirror.read_ids([*answer, *mirror.closing(answer)])
    assert session.stats().tokens == len(mirror.now())
    assert session.continuation(3) == following(session.model, mirror, 3)


@pytest.mark.parametrize("verb", ["ask", "chat"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "wrong_options",
    [
        {"no_such_option": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
        {"max_new_tokens": 0},
        {"max_new_tokens": -3},
        {"temperature": -1.0, "do_sample": True},
        {"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)},
    ],
    ids=str,
)
def test_wrong_generation_options_are_refused(session, verb, stream, wrong_options):
    want = session.fork()
    with pytest.raises(ValueError, match=r"\w"):
        "".join(getattr(session, verb)("Why?", stream=stream, **wrong_options))
    assert_same(session, want)


def test_an_empty_prompt_before_reading_is_refused():
    with pytest.raises(ValueError, match="nothing was read and the prompt is empty"):
        session_of().ask("", template=False)


def test_an_empty_prompt_goes_on(session):
    answer = session.ask("", template=False, max_new_tokens=5, **GREEDY)
    assert answer == session.tokenizer.decode(session.continuation(5), skip_special_tokens=True)


@pytest.mark.parametrize("wrong_ids", [[-1], [5, 10**6], torch.tensor([[3, -7]]), [2**70]])
def test_ids_out_of_range_are_refused_and_nothing_is_lost(session, wrong_ids):
    want = session.fork()
    with pytest.raises(ValueError, match="token ids must lie in 0 … 4915"):
        session.read(wrong_ids)
    assert_same(session, want)


def test_text_that_no_tokenizer_takes_is_refused_and_nothing_is_lost(session):
    """Half a character, as decoding with surrogateescape makes of foreign bytes."""
    want = session.fork()
    for verb in (session.read, session.ask, session.chat):
        with pytest.raises(ValueError, match=r"surrogate|UTF-8|utf-8"):
            verb("a lone \udcff surrogate")
    assert_same(session, want)


def test_without_a_tokenizer_ids_work_and_text_does_not(small, tmp_path):
    session = Session(small)
    session.read(random_ids(30))
    with pytest.raises(ValueError, match="no tokenizer"):
        session.read("text")
    with pytest.raises(ValueError, match="no tokenizer"):
        session.ask("text")
    with pytest.raises(ValueError, match=r"template|tokenizer"):
        session.chat("text")
    assert session.continuation(5) == reference_generate(small, random_ids(30), 5)
    assert_same(reloaded(session, tmp_path / "s"), session)


def test_reading_in_a_fork_leaves_the_session(session):
    want = session_of()
    want.read(TEXT[:300])
    fork = session.fork()
    fork.read(TEXT)
    fork.chat("Why?", max_new_tokens=3)
    assert_same(session, want)
    assert fork.stats().tokens > session.stats().tokens

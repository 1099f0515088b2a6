"""What a session is given to read: what has one meaning is taken, the rest is refused by name."""

import gzip
import io
import os
from array import array
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cometlm.session.sources import pieces
from cometlm.text_file import read_blocks, read_text
from tests import real
from tests.sessions import session_of

WORDS = "The lamp is green. naïve ☂️\n"
IDS = [3, 4, 5]


def taken(source, **options):
    """Text as one string, or ids as one list."""
    got = list(pieces(source, **options))
    if all(isinstance(piece, str) for piece in got):
        return "".join(got)
    return [token for piece in got for token in piece]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


class Column:
    """What pandas and others have: it becomes an array, and goes over its columns' names."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)

    def __iter__(self):
        return iter(["name"])


TEXTS = {
    "text": lambda path: WORDS,
    "bytes": lambda path: WORDS.encode(),
    "a bytearray": lambda path: bytearray(WORDS.encode()),
    "a memoryview": lambda path: memoryview(WORDS.encode()),
    "a path": lambda path: path,
    "a file of text": lambda path: path.open(encoding="utf-8"),
    "a file of bytes": lambda path: path.open("rb"),
    "bytes in memory": lambda path: io.BytesIO(WORDS.encode()),
    "text in memory": lambda path: io.StringIO(WORDS),
    "parts of it": lambda path: iter([WORDS[:4], WORDS[4:].encode(), io.StringIO("")]),
    "an array of texts": lambda path: np.array([WORDS[:4], WORDS[4:]]),
}
ROWS = {
    "a list": list(IDS),
    "a range": range(3, 6),
    "an iterator": iter(IDS),
    "an array": np.array(IDS),
    "an array of small numbers": np.array(IDS, dtype=np.uint8),
    "a list of numpy's numbers": list(np.array(IDS)),
    "a list of torch's numbers": list(torch.tensor(IDS)),
    "a tensor": torch.tensor(IDS),
    "a tensor of one row": torch.tensor([IDS]),
    "input_ids": {"input_ids": IDS},
    "input_ids of one row": {"input_ids": [IDS], "attention_mask": [[1, 1, 1]]},
    "input_ids as a tensor": {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 3)},
    "several": [[3], torch.tensor([4]), np.array([5])],
    "a view of numbers": memoryview(array("i", IDS)),
    "a column": Column(IDS),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_taken(kind, path):
    assert taken(TEXTS[kind](path)) == WORDS


@pytest.mark.parametrize("kind", ROWS)
def test_ids_are_taken(kind):
    assert taken(ROWS[kind]) == IDS


def test_what_a_tokenizer_gives_is_taken():
    tokenizer = real.tokenizer("smollm2")
    want = tokenizer(WORDS)["input_ids"]
    assert taken(tokenizer(WORDS)) == want
    assert taken(tokenizer(WORDS, return_tensors="pt")) == want
    assert taken(tokenizer(WORDS, return_tensors="np")) == want


REFUSED = {
    "None": (None, "None, a NoneType"),
    "a number": (3.5, "a float"),
    "a truth value": (True, "a bool"),
    "truth values": ([True, False], "item 0 .* a bool"),
    "a list with None": (["a", None], "item 1 .* NoneType"),
    "fractions": (torch.tensor([1.5]), "whole numbers, got Tensor of torch.float32"),
    "fractions of numpy": (np.array([1.5]), "whole numbers, got ndarray of float64"),
    "a mask": (torch.tensor([True]), "whole numbers, got Tensor of torch.bool"),
    "several rows": (torch.tensor([IDS, IDS]), r"of one text.* shape \[2, 3\]"),
    "several rows of numpy": (np.array([IDS, IDS]), r"of one text.* shape \[2, 3\]"),
    "several texts": ({"input_ids": [IDS, IDS]}, "input_ids must be those of one text"),
    "padding": (
        {"input_ids": [IDS], "attention_mask": [[0, 1, 1]]},
        "without padding, got an attention_mask with zeros",
    ),
    "another mapping": ({"text": "a"}, "dict without input_ids"),
    "messages": ([{"role": "user", "content": "hi"}], r"ask\(\) and chat\(\) take messages"),
    "a message": ({"role": "user", "content": "hi"}, r"ask\(\) and chat\(\) take messages"),
    "a set": ({1, 2}, "a set, which has no order"),
    "a mask that is too short": (
        {"input_ids": IDS, "attention_mask": [1]},
        "attention_mask must be as long as input_ids, got 1",
    ),
    "masked ids": (np.ma.array(IDS, mask=[0, 1, 0]), "some are masked"),
    "a tensor without data": (torch.tensor(IDS, device="meta"), "on the device meta"),
    "a sparse tensor": (torch.tensor(IDS).to_sparse(), "of layout torch.sparse_coo"),
    "a table": (Column([IDS, IDS]), r"of one text.* shape \[2, 3\]"),
    "a table of texts": (Column([["a"], ["b"]]), r"of one text.* shape \[2, 1\]"),
    "half of a character": ("a\ud800", "what is read is not Unicode text"),
    "a function": (print, "builtin_function_or_method"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_the_rest_is_refused_by_name(kind):
    source, said = REFUSED[kind]
    session = session_of()
    session.read("The lamp. ")
    before = session.stats()
    with pytest.raises(ValueError, match=said):
        session.read(source)
    assert session.stats() == before


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rb", "r"])
def test_a_byte_order_mark_is_dropped(tmp_path, mode):
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + WORDS.encode())
    options = {} if mode == "rb" else {"encoding": "utf-8"}
    with open(tmp_path / "marked.txt", mode, **options) as file:
        assert taken(file) == WORDS
    assert read_text(tmp_path / "marked.txt") == WORDS


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "koi8-r"]
)
def test_other_encodings(tmp_path, encoding):
    words = "одна лампа\n" if encoding == "koi8-r" else "für mich\n"
    (tmp_path / "other.txt").write_bytes((words * 3000).encode(encoding))
    assert taken(tmp_path / "other.txt", encoding=encoding) == words * 3000


def test_an_encoding_that_is_none():
    with pytest.raises(ValueError, match="encoding must be one that Python knows, got 'utf-9'"):
        taken(b"a", encoding="utf-9")
    with pytest.raises(ValueError, match="encoding must be"):
        taken(b"a", encoding="zlib")


@pytest.mark.parametrize("lines", [0, 3, 700, 5000])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_wrong_byte_is_named_with_its_line(tmp_path, lines, as_text):
    before = ("für mich\n" * lines).encode()
    path = tmp_path / "wrong.txt"
    path.write_bytes(before + b"caf\xe9 au lait\n" + before)
    place = f"wrong.txt is not UTF-8 text: byte {len(before) + 4}, in line {lines + 1}, is 0xe9"
    with path.open(encoding="utf-8") as file, pytest.raises(ValueError, match=place):
        taken(file if as_text else path)


def test_what_stands_in_front_of_a_wrong_byte_is_given():
    blocks = read_blocks(io.BytesIO(b"one\r\ntwo" + b"\xff"), "x")
    assert next(blocks) == "one\ntwo"
    with pytest.raises(ValueError, match="byte 9, in line 2, is 0xff"):
        next(blocks)


def test_another_encoding_is_guessed_from_its_mark():
    with pytest.raises(ValueError, match="begins as utf-16 does"):
        taken("für".encode("utf-16"))
    with pytest.raises(ValueError, match="begins as utf-32 does"):
        taken("für".encode("utf-32"))


def test_a_character_over_the_border_of_two_reads(tmp_path):
    for shift in range(4):
        words = "x" * (8192 - shift) + "☂️\r\n" * 3
        assert taken(words.encode()) == words.replace("\r\n", "\n")


@given(st.lists(st.integers(0, 40), max_size=6), st.booleans())
def test_bytes_in_pieces_are_one_text_wherever_they_are_cut(cuts, marked):
    words = "für\r\nmich ☂️\rund"
    data = b"\xef\xbb\xbf" * marked + words.encode()
    places = [0, *sorted(cuts), len(data)]
    parts = [data[begin:end] for begin, end in pairwise(places)]
    assert taken(iter(parts)) == taken(data) == "für\nmich ☂️\nund"


def test_a_wrong_byte_in_pieces_is_named():
    with pytest.raises(ValueError, match="the bytes is not UTF-8 text: byte 5, in line 2"):
        taken([b"one", b"\n\xc3", b"(", "more"])


def test_zero_bytes_are_refused_with_their_line():
    with pytest.raises(ValueError, match="holds a zero byte in line 3"):
        taken(b"one\ntwo\nthr\0ee")


def test_packed_files_are_files(tmp_path):
    with gzip.open(tmp_path / "words.gz", "wb") as file:
        file.write(WORDS.encode())
    with gzip.open(tmp_path / "words.gz", "rt", encoding="utf-8") as file:
        assert taken(file) == WORDS
    with gzip.open(tmp_path / "words.gz", "rb") as file:
        assert taken(file) == WORDS


@pytest.mark.parametrize("mode", ["rb", "r"])
def test_a_pipe_gives_what_has_come(mode):
    outgoing, incoming = os.pipe()
    with os.fdopen(outgoing, mode, **({} if mode == "rb" else {"encoding": "utf-8"})) as file:
        blocks = read_blocks(file, "pipe")
        for line in ("one\n", "two\n"):
            os.write(incoming, line.encode())
            assert next(blocks) == line
        os.close(incoming)
        assert list(blocks) == []


def test_a_directory_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="directory"):
        taken(tmp_path)

"""A text in pieces gives the tokens of the whole text, with real tokenizers."""

import io
import string
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cometlm import text_file
from cometlm.session import token_stream as text
from cometlm.session.token_stream import TokenStream
from cometlm.text_file import read_blocks
from tests import real
from tests.tiny import examples

SLOW_GEMMA = pytest.param("gemma3-270m", marks=pytest.mark.slow)
every = pytest.mark.parametrize("name", ["smollm2", "like gemma", SLOW_GEMMA])

# Small enough that seams are everywhere; the margin is longer than any token (81 characters).
SMALL = {"_WINDOW": 160, "_MARGIN": 96, "_CONTEXT": 128}

TRICKY = [
    "<|im_start|>user\n",
    "<|im_end|>",
    "<|endoftext|>",
    "<bos>",
    "<start_of_turn>",
    "👩‍👩‍👧‍👦",
    "🇩🇪🇫🇷",
    "e\u0301\u0323o\u0308",
    "한국어 텍스트",
    "東京都に行きました。",
    "ὀδυσσεύς",
    "don't we'll I'M",
    "\r\n",
    "\t\tif x:\n",
    "a\xa0b\u2003c\x1cd\x85e",
    "#" * 70,
    "1234567890",
    "</td></tr>\n",
]
words = st.text(string.ascii_letters + string.digits + "'.,-_<|>#=", min_size=1, max_size=12)
parts = st.one_of(
    words.map(" {}".format),
    words.map(" {}".format),
    st.sampled_from(TRICKY),
    st.integers(1, 40).map(lambda n: " " * n),
    st.integers(1, 200).map(lambda n: "\n" * n),
    st.integers(1, 400).map(lambda n: " \n\t "[n % 3 :] * n),
    st.text(max_size=6),
)
texts = st.builds(
    lambda some, times: "".join(some) * times, st.lists(parts, min_size=1), st.integers(1, 20)
)


@contextmanager
def small_windows():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(text, name, value)
        yield


def streamed(tokenizer, pieces):
    stream = TokenStream(tokenizer)
    return [i for piece in pieces for i in stream.feed(piece)] + stream.finish()


def whole(tokenizer, given_text):
    """Control tokens are spelled, but for those that the tokenizer puts in front of any text."""
    return tokenizer(given_text, verbose=False, split_special_tokens=True)["input_ids"]


@st.composite
def cuts(draw, given_text):
    """Pieces of the text: single characters, or borders anywhere."""
    if len(given_text) < 3000 and draw(st.booleans()):
        return list(given_text)
    borders = draw(st.lists(st.integers(0, len(given_text)), max_size=12))
    ends = [0, *sorted(borders), len(given_text)]
    return [given_text[a:b] for a, b in pairwise(ends)]


def difference(ours, theirs):
    """Where two lists of ids part; keeps failures short."""
    if ours == theirs:
        return None
    same = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    at = next(same, min(len(ours), len(theirs)))
    return at, ours[max(at - 2, 0) : at + 3], theirs[max(at - 2, 0) : at + 3]


@every
@examples(40)
@given(data=st.data())
def test_any_split_gives_the_tokens_of_the_whole_text(name, data):
    tokenizer = real.tokenizer(name)
    given_text = data.draw(texts.filter(bool))
    with small_windows():
        ours = streamed(tokenizer, data.draw(cuts(given_text)))
    assert difference(ours, whole(tokenizer, given_text)) is None


@every
def test_real_windows_give_the_tokens_of_the_whole_text(name):
    """The windows as they are, over text with code, prose of many scripts and long runs."""
    tokenizer = real.tokenizer(name)
    paragraphs = [
        "".join(f" {i * 7919 % 10007:x} {TRICKY[i % len(TRICKY)]}" for i in range(600)),
        " " * 3000 + "indented\n" + "\n" * 3000,
        "def f(x):\n\treturn [x**2 for x in range(10)]\n" * 400,
    ]
    given_text = "\n\n".join(paragraphs) * 3
    assert len(given_text) > 4 * text._WINDOW
    want = whole(tokenizer, given_text)
    for size in (1000, 16384, 65536):
        pieces = [given_text[i : i + size] for i in range(0, len(given_text), size)]
        assert difference(streamed(tokenizer, pieces), want) is None


@every
@pytest.mark.parametrize("letters", ["abcdefghij", "東京都に行きました", "x👩‍👩‍👧é"])
def test_text_without_spaces_is_held_back_only_so_far(name, letters):
    tokenizer = real.tokenizer(name)
    given_text = letters * (10 * SMALL["_WINDOW"] * 2 // len(letters))
    size, prefix = SMALL["_WINDOW"] // 2, len(tokenizer("")["input_ids"])
    ids, fed, held = [], 0, []
    with small_windows():
        stream = TokenStream(tokenizer)
        for i in range(0, len(given_text), size):
            piece = given_text[i : i + size]
            ids += stream.feed(piece)
            fed += len(piece)
            held.append(fed - len(tokenizer.decode(ids[prefix:])))
        ids += stream.finish()
    assert 0 <= max(held) <= 9 * SMALL["_WINDOW"]
    assert tokenizer.decode(ids[prefix:]) == given_text


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.characters = 0

    def __call__(self, given_text, **options):
        self.characters += len(given_text)
        return self._tokenizer(given_text, **options)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("letters", ["a b", "abc"], ids=["words", "no spaces"])
def test_small_pieces_do_not_tokenise_the_same_text_again_and_again(letters):
    tokenizer = Counting(real.tokenizer("smollm2"))
    given_text = letters * (6 * SMALL["_WINDOW"] // len(letters))
    with small_windows():
        streamed(tokenizer, given_text)
    assert tokenizer.characters < 20 * len(given_text)


@every
def test_special_tokens_come_once_in_front(name):
    tokenizer = real.tokenizer(name)
    stream = TokenStream(tokenizer)
    assert stream.finish() == []
    first = stream.feed("One text.") + stream.finish()
    second = stream.feed("Another.") + stream.finish()
    assert first == tokenizer("One text.")["input_ids"]
    assert second == tokenizer("Another.", add_special_tokens=False)["input_ids"]


def framed_tokenizer(template, **special):
    """Words as tokens, with special tokens around a text."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "one", "two"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


def test_a_special_token_at_the_end_of_a_text_is_left_out():
    """More text may follow, and an end of sequence in its middle would end it."""
    both_ends = framed_tokenizer("<s> $A </s>", bos_token="<s>", eos_token="</s>")
    end = framed_tokenizer("$A </s>", eos_token="</s>")
    one_for_both = framed_tokenizer("</s> $A", bos_token="</s>", eos_token="</s>")
    assert streamed(both_ends, ["one ", "two"]) == [1, 3, 4]
    assert streamed(end, ["one ", "two"]) == [3, 4]
    assert streamed(one_for_both, ["one ", "two"]) == [2, 3, 4]


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="ByT5Tokenizer gives no offsets"):
        TokenStream(ByT5Tokenizer())


def test_read_blocks_gives_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "_BLOCK", 7)
    path = tmp_path / "text.txt"
    path.write_text("Zwölf 👩‍👩‍👧 Boxkämpfer\n" * 5, encoding="utf-8")
    with path.open(encoding="utf-8") as file:
        blocks = list(read_blocks(file, str(path)))
    assert "".join(blocks) == path.read_text(encoding="utf-8")
    assert max(map(len, blocks)) <= 7


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"caf\xe9 au lait", "UTF-8"), (b"text\0text", "zero byte"), (b"\xff\xfe\x00a", "UTF-8")],
)
def test_read_blocks_refuses_what_is_not_text_and_names_the_file(content, what):
    file = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"book.bin is not .*{what}"):
        list(read_blocks(file, "book.bin"))


def test_text_before_the_bad_bytes_is_given():
    """A file that breaks off late has been read up to there."""
    content = b"word " * text_file._BLOCK + b"\xff"
    file = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    blocks = read_blocks(file, "late.txt")
    assert next(blocks).startswith("word word")
    with pytest.raises(ValueError, match=r"late.txt is not UTF-8"):
        list(blocks)

"""Control tokens that stand in a text are spelled, whatever kind of tokenizer it is."""

import ast
import copy
import gc
import sys
import threading
import weakref
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import cometlm
from cometlm.session.plain_text import PlainText, unused_mark
from tests import real
from tests.tiny import examples

TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LETTERS = "abcdefghij<|>_/ \nused"


def _fast(inner, **options):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "</s>"]})
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<lamp>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _pieces(pre_tokenizer=None, normalizer=None):
    """A tokenizer in SentencePiece's way: a mark for a space, and letters."""
    vocabulary = ["<unk>", "<s>", "▁", *dict.fromkeys(LETTERS.replace(" ", "")), "▁a", "en", "nd"]
    vocabulary += ["|>", "<|", "endr"]
    merges = [("▁", "a"), ("e", "n"), ("n", "d"), ("|", ">"), ("<", "|")]
    vocabulary.remove("endr")
    known = {token: i for i, token in enumerate(dict.fromkeys([*vocabulary, *LETTERS[:10]]))}
    inner = Tokenizer(models.BPE({**known, "n": len(known)}, merges, unk_token="<unk>"))
    inner.pre_tokenizer, inner.normalizer = pre_tokenizer, normalizer
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return _fast(inner)


def _words():
    known = {"<unk>": 0, "<|end|>": 1, **{letter: i + 2 for i, letter in enumerate(set(LETTERS))}}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return _fast(inner)


def _bytes():
    tokenizer = copy.deepcopy(real.tokenizer("smollm2"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "</s>"]})
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<lamp>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _slow():
    tokenizer = ByT5Tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


KINDS = {
    "bytes": _bytes,
    "a space in front of the first word": lambda: _pieces(
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    "a space in front of every part": lambda: _pieces(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "words that are control tokens too": _words,
    "slow": _slow,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


TEXTS = st.lists(
    st.sampled_from(["<|end|>", "</s>", "<|user|>", "<|assistant|>", "a", " ", "bed", "\n", "<|"]),
    min_size=1,
).map("".join)


@examples(40)
@given(text=TEXTS)
def test_no_control_token_comes_out_of_a_text(tokenizer, text):
    plain = PlainText.of(tokenizer)
    ids = plain.encode(text)
    unknown = tokenizer.unk_token_id
    assert not {i for i in ids if i != unknown} & set(plain.control.values())
    if unknown not in ids:
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_text_without_control_tokens_is_as_it_was(tokenizer):
    text = "a bed\n abed <| end"
    assert PlainText.of(tokenizer).encode(text) == tokenizer.encode(text, add_special_tokens=False)


@examples(20)
@given(text=TEXTS)
def test_spans_say_where_each_one_stands(text):
    tokenizer = KINDS["words that are control tokens too"]()
    ids, spans = PlainText.of(tokenizer).encode_with_spans(text)
    assert len(ids) == len(spans)
    assert [begin for begin, _ in spans] == sorted(begin for begin, _ in spans)


def test_words_of_a_domain_stay_tokens():
    tokenizer = _bytes()
    assert PlainText.of(tokenizer).encode("<lamp>") == tokenizer.convert_tokens_to_ids(["<lamp>"])


@examples(40)
@given(text=TEXTS)
def test_in_a_frame_text_is_what_it_is_elsewhere(tokenizer, text):
    """Between the frame's tokens stand the text's letters, and no space comes or goes."""
    plain = PlainText.of(tokenizer)
    mark = unused_mark(text)
    framed = f"<|end|>{plain.escaped('a' + text + 'a', mark)}<|end|>"
    (end,) = tokenizer.encode("<|end|>", add_special_tokens=False)
    ids = plain.encode_frame(framed, mark)
    assert (ids[0], ids[-1], ids.count(end)) == (end, end, 2)
    pieces = tokenizer.convert_ids_to_tokens(ids[1:-1])
    written = "".join(pieces).replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")
    if tokenizer.encode("<|end|>a", add_special_tokens=False)[1:] == tokenizer.encode("a"):
        written, text = written.replace(" ", ""), text.replace(" ", "")  # it puts spaces everywhere
    if tokenizer.unk_token not in pieces:
        assert written == f"a{text}a"


@examples(60)
@given(texts=st.lists(TEXTS, min_size=2, max_size=4), most=st.sampled_from([0, 80, 1000]))
def test_a_frame_in_parts_has_the_ids_of_the_whole(tokenizer, texts, most):
    """Whatever of it was tokenised before, and whether that is remembered or not."""
    plain = PlainText(tokenizer)
    plain._frame_parts._most = most
    for end in range(1, len(texts) + 1):
        frame = "".join(texts[:end])
        whole, _ = plain.encode_frame_with_spans(frame, unused_mark(frame))
        assert plain.encode_frame(frame, unused_mark(frame)) == whole
    assert plain._frame_parts._held <= most


STRANGE = {
    "takes white space in front": AddedToken("<|r|>", lstrip=True, special=True),
    "takes white space behind": AddedToken("<|r|>", rstrip=True, special=True),
    "is one between words only": AddedToken("<|r|>", single_word=True, special=True),
    "overlaps another": AddedToken("><|end", special=True),
    "is looked for in what is left": AddedToken("<|r|>", normalized=True, special=True),
}


@pytest.mark.parametrize("token", STRANGE.values(), ids=STRANGE)
@examples(40)
@given(parts=st.lists(st.sampled_from(["<|r|>", "<|end|>", ">", " ", "a", "\n"]), max_size=8))
def test_tokens_that_are_no_borders(token, parts):
    tokenizer = _bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": [token, "<|end|>"]})
    plain, frame = PlainText(tokenizer), "".join(parts)
    assert plain.encode_frame(frame, "*") == plain.encode_frame_with_spans(frame, "*")[0]


def test_a_token_behind_a_normaliser_is_no_border():
    tokenizer = KINDS["a space in front of every part"]()
    tokenizer.chat_template = ""  # so that <lamp> and its like are no control tokens
    plain = PlainText(tokenizer)
    assert not plain.takes_alike
    for frame in ("a<lamp>a", "<|end|>a<lamp>a<|end|><lamp>"):
        assert plain.encode_frame(frame, "*") == plain.encode_frame_with_spans(frame, "*")[0]


def test_what_was_tokenised_before_is_not_tokenised_again(monkeypatch):
    tokenizer = _bytes()
    plain, taken = PlainText(tokenizer), []
    encode = plain._frame_parts._encode
    monkeypatch.setattr(
        plain._frame_parts, "_encode", lambda parts: taken.append(parts) or encode(parts)
    )
    plain.encode_frame("<|end|>a bed", "*")
    plain.encode_frame("<|end|>a bed<|end|> bed", "*")
    plain.encode_frame("<|end|>a bed<|end|> bed", "*")
    assert taken == [["<|end|>a bed"], ["<|end|> bed"]]


def test_white_space_that_a_token_takes_with_it():
    tokenizer = _bytes()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|r|>", rstrip=True, special=True)]}
    )
    plain = PlainText.of(tokenizer)
    mark = unused_mark("")
    ids = plain.encode_frame(f"<|r|>\n{plain.escaped('a<|end|>', mark)}<|r|>", mark)
    assert tokenizer.decode(ids) == "<|r|>a<|end|><|r|>"
    assert ids == plain.encode_frame(f"<|r|>{plain.escaped('a<|end|>', mark)}<|r|>", mark)


def test_threads_do_not_change_what_counts_in_each_others_text():
    tokenizer = real.tokenizer("smollm2")
    plain, frame, text = PlainText.of(tokenizer), "<|im_start|>user\nHi<|im_end|>\n", "a bed " * 20
    want, done = plain.encode_frame(frame, unused_mark(frame)), threading.Event()

    def read():
        while not done.is_set():
            plain.encode(text)

    thread = threading.Thread(target=read)
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for _ in range(1000):
            assert plain.encode_frame(frame, unused_mark(frame)) == want
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(often)


def test_tokens_that_come_later_count():
    tokenizer = _bytes()
    assert "<|new|>" not in PlainText.of(tokenizer).control
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert "<|new|>" in PlainText.of(tokenizer).control


def test_a_mark_stands_nowhere():
    first = unused_mark("")
    assert unused_mark([{"content": [first]}]) not in (first, "")
    assert unused_mark({first: 1}) != first


def test_only_a_few_tokenizers_are_kept():
    seen = []
    for _ in range(20):
        tokenizer = _words()
        PlainText.of(tokenizer)
        seen.append(weakref.ref(tokenizer))
    del tokenizer
    gc.collect()
    assert sum(one() is not None for one in seen) <= 16


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        (normalizers.NFKC(), "\uff1c\uff5c\uff45\uff4e\uff44\uff5c\uff1e"),  # wide letters
        (normalizers.Lowercase(), "<|END|>"),
        (normalizers.Lowercase(), "<|End|>"),
    ],
)
def test_letters_that_a_tokenizer_takes_for_a_control_token(change, alike):
    tokenizer = _pieces(normalizer=change)
    turn = AddedToken("<|turn|>", special=True, normalized=True)
    end = AddedToken("<|end|>", special=True, normalized=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [turn, end]})
    plain = PlainText.of(tokenizer)
    frame = f"<|turn|>a{alike}b</s>"
    if plain.control["<|end|>"] not in tokenizer(frame)["input_ids"]:
        assert Version(transformers.__version__) < Version("5.17")
        pytest.skip("this transformers takes them for text, whatever the tokenizer says")
    found = [number for number in plain.encode_frame(frame, "*") if number in plain._ids]
    unknown = tokenizer.unk_token_id
    assert [n for n in found if n != unknown] == [plain.control["<|turn|>"], plain.control["</s>"]]


def test_words_of_a_templates_code_are_no_control_tokens():
    tokenizer = _bytes()
    tokenizer.add_tokens(["content", "user", "<|in a comment|>", "<|of a string|>"])
    tokenizer.chat_template = (
        "{# <|in a comment|> #}{{ '<|of a string|>' }}user: {{ messages[0]['content'] }}"
    )
    control = PlainText.of(tokenizer).control
    assert "<|of a string|>" in control
    assert not {"content", "user", "<|in a comment|>"} & set(control)


def test_names_that_a_template_knows_stay_names():
    tokenizer = _bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": ["role"]})
    plain = PlainText.of(tokenizer)
    given = {"role": "role", "arguments": {"<|end|>": "</s>"}}
    assert plain.escaped(given, "*") == {
        "role": "r*ole",
        "arguments": {"<*|end|>": "<*/s>"},
    }


@pytest.mark.parametrize("package", ["eval", "methods", "session", "tasks"])
def test_nothing_asks_a_tokenizer_itself(package):
    """Only `plain_text` does: elsewhere it would be forgotten that text is only text."""
    folder = Path(cometlm.__file__).parent / package
    files = [path for path in folder.rglob("*.py") if path.name != "plain_text.py"]
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).removesuffix(".encode").rpartition(".")[2]
                assert called.strip("_") != "tokenizer", f"{path}:{node.lineno}"

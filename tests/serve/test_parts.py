"""Text out of tokens, trails of ids, ids of sessions, keys."""

import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cometlm.serve.ids import Ids
from cometlm.serve.keys import Keys, new_key
from cometlm.serve.trail import Trail, beginnings
from cometlm.serve.transcript import Transcript
from tests.sessions import TEXT, tokenizer_of
from tests.tiny import examples, refused

KINDS = ("llama", "like gemma")


def told(transcript, ids):
    """What a reader is told piece by piece; tokens after a stop are not written any more."""
    pieces = []
    for token in ids:
        pieces.append(transcript.add(token))
        if transcript.is_stopped:
            break
    return [*pieces, transcript.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_the_text(kind):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer(TEXT[:400], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    transcript = Transcript(tokenizer)
    pieces = told(transcript, ids)
    assert "".join(pieces) == transcript.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)
    assert transcript.kept_ids() == list(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6))
@examples(60)
def test_pieces_of_any_tokens(kind, seed):
    """Also of tokens that are half of a character; the end then shows it."""
    tokenizer, rng = tokenizer_of(kind), random.Random(seed)
    ids = [rng.randrange(len(tokenizer)) for _ in range(20)]
    transcript = Transcript(tokenizer)
    assert "".join(told(transcript, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@given(begin=st.integers(0, 300), length=st.integers(1, 12), other=st.text(max_size=3))
@examples(100)
def test_stop_strings(kind, begin, length, other):
    tokenizer = tokenizer_of(kind)
    text = TEXT[20:400]
    stop = text[begin : begin + length]
    # Of two that lie in each other the one that is whole first ends the answer, token by token.
    assume(not other or (other not in stop and stop not in other))
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    transcript = Transcript(tokenizer, [stop, *([other] if other else [])])
    pieces = told(transcript, ids)
    found = [at for at in (whole.find(stop), whole.find(other) if other else -1) if at >= 0]
    assert "".join(pieces) == transcript.text
    assert transcript.text == whole[: min(found)] if found else whole
    assert transcript.is_stopped == bool(found)
    if found:
        kept = transcript.kept_ids()
        assert tokenizer.decode(kept, skip_special_tokens=True) == transcript.text
        assert kept[:-4] == ids[: len(kept[:-4])]


@given(st.lists(st.integers(0, 50000), max_size=300), st.data())
@examples(100)
def test_trails(ids, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    trail, begin = Trail(), 0
    for cut in [*cuts, len(ids)]:
        trail = trail.extended(ids[begin:cut])
        begin = cut
        assert trail == Trail.of(ids[:cut]) == Trail.from_json(trail.to_json())
    lengths = [*cuts, len(ids) + 1, len(ids)]
    found = dict(beginnings(ids, lengths))
    assert found == {n: Trail.of(ids[:n]).digest for n in {*cuts, len(ids)} if n > 0}


def test_trails_of_other_ids_differ():
    ids = list(range(200))
    digests = {Trail.of(ids[:n]).digest for n in range(201)}
    for place in (0, 63, 64, 127, 199):
        digests.add(Trail.of([*ids[:place], 7777, *ids[place + 1 :]]).digest)
    assert len(digests) == 206


def test_ids_are_known_again_by_their_owner_only():
    ids = Ids(b"secret")
    name = ids.new("resp_", "ann")
    assert name != ids.new("resp_", "ann")
    assert ids.was_given(name, "ann")
    assert Ids(b"secret").was_given(name, "ann")
    assert not ids.was_given(name, "bob")
    assert not Ids(b"other").was_given(name, "ann")
    for wrong in (name[:-1], name + "0", name.upper(), "../" + name, name.replace("_", "-"), ""):
        assert not ids.was_given(wrong, "ann")


def test_keys(tmp_path):
    path = tmp_path / "keys"
    first, second = new_key(path, "ann"), new_key(path, "bob")
    assert path.stat().st_mode & 0o077 == 0
    assert first not in path.read_text()
    keys = Keys.read(path)
    assert keys.owner_of(first) == Keys.read(path).owner_of(first) != keys.owner_of(second)
    assert None not in (keys.owner_of(first), keys.owner_of(second))
    assert keys.owner_of("") is keys.owner_of(first[:-1]) is keys.owner_of(first + "x") is None
    with refused("has a key of the name 'ann'"):
        new_key(path, "ann")
    with refused("a name must be"):
        new_key(path, "two words")


@pytest.mark.parametrize(
    "begin", ["", "# ours", "# ours\n", f"bob {'a' * 64}", f"bob {'a' * 64}\n"]
)
def test_a_key_is_added_to_a_file_that_was_written_by_hand(tmp_path, begin):
    path = tmp_path / "keys"
    path.write_text(begin)
    key = new_key(path, "eve")
    assert Keys.read(path).owner_of(key) is not None
    assert path.read_text().startswith(begin)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "holds no key"), ("ann 12", "line 1"), (f"a {'0' * 64}\na {'1' * 64}", "line 2")],
)
def test_files_of_keys_that_are_none(tmp_path, text, said):
    path = tmp_path / "keys"
    path.write_text(text)
    with refused(said):
        Keys.read(path)

"""Haystacks: as long as asked, drawn from their generator alone, with needles at words."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.tasks.haystack import Haystack, hide
from tests.real import tokenizer

PROSE = "The ship left the harbour in the rain. It carried salt, iron and two hundred letters.\n"


@pytest.fixture(scope="module")
def words():
    return tokenizer("smollm2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("haystack")
    (folder / "long.txt").write_text(PROSE * 100)
    (folder / "short.txt").write_text("Ein Fluß, ein Café. " * 10)
    (folder / "empty.txt").write_text("")
    return sorted(folder.iterdir())


@given(tokens=st.integers(0, 2000), seed=st.integers(0, 5))
def test_draws(words, files, tokens, seed):
    drawn = Haystack(words, files).draw(random.Random(seed), tokens)
    assert len(drawn) == tokens
    assert Haystack(words, files).draw(random.Random(seed), tokens) == drawn


def test_a_draw_longer_than_its_file_goes_on_in_others(words, files):
    assert len(Haystack(words, files[-1:]).draw(random.Random(0), 2000)) == 2000


def test_a_file_that_is_no_text_ends_no_draw(words, tmp_path):
    (tmp_path / "data").write_bytes(b"\xff" * 1000)
    with pytest.raises(ValueError, match=r"data must hold text in UTF-8"):
        Haystack(words, [tmp_path / "data"]).draw(random.Random(0), 10)


def test_files_without_text_are_refused(words, files):
    with pytest.raises(ValueError, match="files must hold text"):
        Haystack(words, files[:1])


@pytest.mark.parametrize("name", ["smollm2", "like gemma"])
@given(depths=st.lists(st.floats(0, 1), min_size=1, max_size=4), tokens=st.integers(0, 120))
def test_needles_stand_where_it_says_and_the_rest_is_as_it_was(name, depths, tokens):
    words = tokenizer(name)
    haystack = words.encode(PROSE * 10, add_special_tokens=False)[:tokens]
    needles = [words.encode(f"needle {i}", add_special_tokens=False) for i in range(len(depths))]
    ids, ranges = hide(words, haystack, needles, depths)
    assert [ids[where.start : where.stop] for where in ranges] == needles
    within = {place for where in ranges for place in where}
    assert [id_ for place, id_ in enumerate(ids) if place not in within] == haystack


@pytest.mark.parametrize("name", ["smollm2", "like gemma"])
def test_needles_stand_before_words(name):
    words = tokenizer(name)
    haystack = words.encode(PROSE * 2, add_special_tokens=False)
    for place in range(1, len(haystack) - 16):
        _, (where,) = hide(words, haystack, [[5]], [place / len(haystack)])
        assert place <= where.start < place + 16
        before = words.decode(haystack[: where.start])
        after = words.decode(haystack)[len(before) :]
        assert not (before[-1:].isalpha() and after[:1].isalpha())

"""The index of what is kept: a file of one process, which may be lost at any time."""

import random
import sqlite3

import pytest

from cometlm.serve.folder import Kept
from cometlm.serve.index import Index
from cometlm.serve.trail import Trail


def filled(path=None, about="a store"):
    index = Index(path, about)
    for i in range(20):
        kept = Kept(f"id-{i}", "ann", "chat", i, trail=Trail.of(range(i)), tokens=i)
        index.add(kept, 10, float(i))
    return index


def test_what_is_added_is_known():
    index = filled()
    index.add(Kept("id-x", "bob", "file", 5, document={"filename": "b.txt"}), 7, 0.5)
    assert (len(index), index.nbytes) == (21, 207)
    assert index.listed("id-x", "bob").title == "b.txt"
    assert index.listed("id-x", "ann") is None
    assert [one.id for one in index.all_of("ann")] == [f"id-{i}" for i in range(20)]
    assert sorted(index.lengths("ann", 5)) == [0, 1, 2, 3, 4, 5]
    assert index.with_trail("ann", 7, Trail.of(range(7)).digest) == "id-7"
    assert index.with_trail("bob", 7, Trail.of(range(7)).digest) is None
    assert index.oldest() == ("id-0", 0.0)
    index.use("id-0", 100.0)
    assert index.oldest() == ("id-x", 0.5)
    index.remove(["id-x", "id-1"])
    assert index.oldest() == ("id-2", 2.0)


def test_marks_end_with_the_process(tmp_path):
    index = filled(tmp_path / "index")
    index.add(Kept("mark-1", "ann", "mark", 0), 0, 0.0, is_passing=True)
    assert index.is_passing("mark-1")
    assert not index.is_passing("id-1")
    assert "mark-1" not in index.names()
    assert "mark-1" not in {one.id for one in index.all_of("ann")}
    assert len(index) == 21
    index.close()
    assert len(Index(tmp_path / "index", "a store")) == 20


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "other", "older"])
def test_what_is_no_index_is_made_anew(tmp_path, damage):
    path = tmp_path / "index"
    index = filled(path)
    index.close()
    whole, rng = bytearray(path.read_bytes()), random.Random(0)
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        for place in rng.sample(range(100, len(whole)), 2000):
            whole[place] ^= 255
        path.write_bytes(whole)
    elif damage == "older":
        base = sqlite3.connect(path)
        base.execute("PRAGMA user_version = 99")
        base.close()
    else:
        path.write_bytes({"text": b"hello " * 1000, "empty": b""}.get(damage, whole))
    again = Index(path, "another store" if damage == "other" else "a store")
    assert len(again) == 0
    again.add(Kept("id-1", "ann", "chat", 1), 1, 1.0)
    assert len(again) == 1


def test_a_file_belongs_to_one_process(tmp_path):
    index = filled(tmp_path / "index")
    with pytest.raises(OSError, match="index cannot be used: database is locked"):
        Index(tmp_path / "index", "a store")
    assert len(index) == 20

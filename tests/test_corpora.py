"""Texts by name: out of Debian's packages, unpacked once, and files of one's own."""

import shutil
import struct
import zlib

import pytest

from cometlm.data import corpora
from cometlm.data.corpora import CORPORA, Corpus, corpus_files, corpus_names, r_strings


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("COMETLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "texts"


def r_object(strings, latin=()):
    """R's serialisation (version 2) of a vector of strings, as an .rdb holds it."""
    raw = b"X\n" + struct.pack(">iii", 2, 0, 0) + struct.pack(">Ii", 16, len(strings))
    for i, text in enumerate(strings):
        encoded = text.encode("latin-1" if i in latin else "utf-8")
        flags = 9 | (1 << 14 if i in latin else 1 << 15)
        raw += struct.pack(">Ii", flags, len(encoded)) + encoded
    return struct.pack(">i", len(raw)) + zlib.compress(raw)


NUMBERS = struct.pack(">i", 22) + zlib.compress(
    b"X\n" + struct.pack(">iii", 2, 0, 0) + struct.pack(">Iid", 14, 1, 0.5)
)


def test_vectors_of_strings_are_read_and_others_passed_over():
    novel = ["EMMA", "", "Café in Bath"]
    found = list(r_strings(r_object(novel, latin={2}) + NUMBERS + r_object(["two"])))
    assert found == [novel, ["two"]]


@pytest.mark.parametrize("cut", [3, 10, -1])
def test_a_cut_database_is_refused(cut):
    with pytest.raises(ValueError, match="R database"):
        list(r_strings(r_object(["EMMA", "by"])[:cut]))


@pytest.fixture
def packages(monkeypatch):
    """Debian's packages, as they would be unpacked."""
    asked = []

    def unpack(package, name, target):
        asked.append(package)
        data = target / "usr/lib/R/site-library/janeaustenr/data"
        data.mkdir(parents=True)
        novels = ["EMMA", "PERSUASION", "Northanger Abbey"]
        (data / "Rdata.rdb").write_bytes(b"".join(r_object([title, "x"]) for title in novels))

    monkeypatch.setattr(corpora, "_unpack", unpack)
    return asked


def test_held_out_files_are_a_text_of_their_own(cache, packages):
    assert [path.name for path in corpus_files("austen")] == ["emma.txt"]
    held_out = [path.name for path in corpus_files("austen-test")]
    assert held_out == ["northanger_abbey.txt", "persuasion.txt"]
    assert packages == ["r-cran-janeaustenr"]  # fetched once
    assert [path.name for path in cache.iterdir()] == ["austen"]  # and nothing left over


def test_a_package_without_a_held_out_file_is_refused(cache, packages, monkeypatch):
    monkeypatch.setattr(corpora, "r_strings", lambda raw: iter([["EMMA"], ["PERSUASION"]]))
    with pytest.raises(OSError, match=r"without northanger_abbey\.txt; or name files of your own"):
        corpus_files("austen")
    assert list(cache.iterdir()) == []


def test_without_debian(cache, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OSError, match=r"there is no apt-get here; name files of your own"):
        corpus_files("bible")


def test_files_of_ones_own(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.md", "sub/a.txt", ".git/config", ".hidden"):
        (tmp_path / name).write_text("words")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    names = [path.name for path in corpus_files(tmp_path)]
    assert names == ["b.md", "a.txt"]
    assert corpus_files(tmp_path / "b.md") == [tmp_path / "b.md"]
    assert [path.name for path in corpus_files(f"{tmp_path}/**/*.txt")] == ["a.txt"]


def test_program_text(cache):
    assert any(path.name == "argparse.py" for path in corpus_files("python"))
    assert all(path.suffix == ".py" for path in corpus_files("transformers")[:50])
    assert not any("site-packages" in path.parts for path in corpus_files("python"))


def test_no_text_of_that_name(tmp_path):
    with pytest.raises(ValueError, match=r"'nothing' is no corpus: .*bible, .*austen-test"):
        corpus_files("nothing")
    with pytest.raises(ValueError, match="has no files"):
        corpus_files(f"{tmp_path}/*.txt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"), [("bible", 4_000_000), ("austen-test", 800_000), ("perl", 7_000_000)]
)
def test_real_packages(cache, name, least):
    """Needs apt and its index, as CI has them."""
    files = corpus_files(name)
    assert sum(path.stat().st_size for path in files) > least
    if name == "bible":
        assert files[0].read_text().rstrip().endswith("Amen.")


class Letters(Corpus):
    about = "letters, one of them held out"
    held_out = ("b.txt",)

    def __init__(self, folder):
        self.folder = folder

    def files(self):
        return sorted(self.folder.glob("*.txt"))


def test_a_corpus_of_ones_own(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("words")
    monkeypatch.setattr(CORPORA, "_known", dict(CORPORA._known))
    CORPORA.add("letters", Letters(tmp_path))
    assert corpus_files("letters") == [tmp_path / "a.txt"]
    assert corpus_files("letters-test") == [tmp_path / "b.txt"]
    assert "letters" in corpus_names()
    assert all(corpus.about for corpus in CORPORA.values())

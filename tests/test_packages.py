"""Data of packages: found where Python and Node look, and a command where they are not."""

import importlib

import pytest

from cometlm.data.packages import NpmPackage, PipPackage

LETTERS = PipPackage("Two-Letters", "1.2", "letters")
TABLES = NpmPackage("tables.json", "3.4.5", "tables")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package as pip leaves one in a folder that Python imports from."""
    (tmp_path / "two_letters" / "data").mkdir(parents=True)
    (tmp_path / "two_letters" / "data" / "a.txt").write_text("Dear A")
    about = tmp_path / "two_letters-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: two-letters\nVersion: 1.2\n")
    (about / "RECORD").write_text("two_letters/data/a.txt,,\ntwo_letters-1.2.dist-info/RECORD,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("installed")
def test_a_file_of_pip():
    assert LETTERS.file("data/a.txt").read_text() == "Dear A"
    assert LETTERS.file("a.txt") == LETTERS.file("two_letters/data/a.txt")
    with pytest.raises(OSError, match=r"holds no ata/a\.txt; run: pip install"):
        LETTERS.file("ata/a.txt")  # whole parts of a path, not the end of a name


def test_what_pip_lacks_names_the_command():
    command = r"run: pip install --no-deps Two-Letters==1\.2"
    with pytest.raises(OSError, match=rf"letters come with Two-Letters; {command}"):
        LETTERS.file("a.txt")


def test_npm_looks_where_node_does(tmp_path, monkeypatch):
    command = r"tables come with tables\.json; run: npm install --no-save tables\.json@3\.4\.5"
    here = tmp_path / "project" / "deep"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.delenv("NODE_PATH", raising=False)
    with pytest.raises(OSError, match=command):
        TABLES.file("package.json")
    for folder, text in ((tmp_path / "elsewhere", "far"), (here.parent / "node_modules", "near")):
        (folder / "tables.json").mkdir(parents=True)
        (folder / "tables.json" / "package.json").write_text(text)
        monkeypatch.setenv("NODE_PATH", str(tmp_path / "elsewhere"))
        assert TABLES.file("package.json").read_text() == text

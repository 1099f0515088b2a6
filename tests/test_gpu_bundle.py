"""The bundle for a machine without network: cutting, joining, making it."""

import json
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bundle
import pieces
from cometlm import __version__
from cometlm.loading import BUILT_IN

ROOT = Path(__file__).parents[1]
ORIGIN = pieces.Origin("1.0", "0123abc", "3.12")
DATA = bytes(range(250)) * 4
LIMIT = 300  # four pieces, the last of 100 bytes


def cut(folder, data=DATA, limit=LIMIT, origin=ORIGIN):
    """A folder with the pieces of some bytes; and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder.parent / "whole"
    whole.write_bytes(data)
    manifest = pieces.cut(whole, folder, limit, origin)
    whole.unlink()
    return manifest


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(path):
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.fixture
def made(tmp_path):
    """A folder with four pieces of nothing in particular."""
    cut(tmp_path / "made")
    return tmp_path / "made"


# --- pieces -------------------------------------------------------------------------------------


@given(data=st.binary(max_size=300), limit=st.integers(30, 400))
def test_what_is_cut_is_joined_again(data, limit):
    with tempfile.TemporaryDirectory() as work:
        folder, again = Path(work) / "pieces", Path(work) / "again"
        manifest = cut(folder, data, limit)
        assert pieces.read_manifest(folder / pieces.MANIFEST) == manifest
        sizes = [(folder / piece.name).stat().st_size for piece in manifest.pieces]
        assert max(sizes, default=0) <= limit
        assert len(sizes) == -(-len(data) // limit)
        pieces.join(manifest, folder, again)
        assert again.read_bytes() == data


@given(size=st.integers(0, 1 << 34), limit=st.integers(1 << 20, 1 << 30))
def test_pieces_are_as_few_as_there_can_be_and_about_equal(size, limit):
    step = pieces._even_size(size, limit)
    count = -(-size // limit)
    assert 0 < step <= limit
    assert -(-size // step) == count
    assert step * count - size < (count + 1) * pieces.MIB  # the last is not much smaller


def test_a_limit_below_one_byte_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"limit .* 1 .* got 0"):
        cut(tmp_path / "made", limit=0)


def test_missing_and_damaged_pieces_are_named(made, tmp_path):
    manifest = pieces.read_manifest(made / pieces.MANIFEST)
    (made / "piece-01").unlink()
    damage(made / "piece-02")
    (made / "piece-03").write_bytes(b"too short")
    with pytest.raises(ValueError, match=r"^piece-01 .*missing, piece-02 .*ged, piece-03 .*ged$"):
        pieces.join(manifest, made, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_pieces_in_another_order_are_not_the_whole(made, tmp_path):
    """Each is right, but the manifest is not."""
    manifest = pieces.read_manifest(made / pieces.MANIFEST)
    turned = replace(manifest, pieces=manifest.pieces[::-1])
    with pytest.raises(ValueError, match=manifest.sha256):
        pieces.join(turned, made, tmp_path / "whole")
    assert names(tmp_path) == ["made"]


def test_a_second_cut_leaves_the_same_or_nothing_of_the_first(made):
    first = {path.name: path.read_bytes() for path in made.iterdir()}
    (made / "notes.txt").write_text("mine")
    (made / "piece-07.part").write_bytes(b"left by a run that was killed")
    cut(made)
    assert {name: (made / name).read_bytes() for name in first} == first
    assert names(made) == [pieces.MANIFEST, "notes.txt", *sorted(first)[1:]]
    cut(made, DATA[:400])
    assert names(made) == [pieces.MANIFEST, "notes.txt", "piece-00", "piece-01"]


def test_a_stop_leaves_nothing_that_looks_whole(made, monkeypatch):
    copy = pieces._copy

    def stopped(source, target, size, whole):
        if Path(target.name).name.startswith("piece-02"):
            target.write(b"a few bytes")
            raise KeyboardInterrupt
        return copy(source, target, size, whole)

    monkeypatch.setattr(pieces, "_copy", stopped)
    with pytest.raises(KeyboardInterrupt):
        cut(made)
    assert names(made) == ["piece-00", "piece-01"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: text.replace('"size"', '"length"'),
        lambda text: text.replace("piece-01", "../piece-01"),
    ],
)
def test_a_damaged_manifest_is_refused(made, change):
    path = made / pieces.MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        pieces.read_manifest(path)


def test_a_manifest_of_another_format_is_refused(made):
    path = made / pieces.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2, "more": "in it"}))
    with pytest.raises(ValueError, match="format 2, but this version reads 1"):
        pieces.read_manifest(path)


# --- making it ----------------------------------------------------------------------------------


def test_versions_are_those_that_are_tested():
    wanted = {wheel.name: wheel.version for wheel in bundle.WHEELS}
    known = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert wanted["gguf"] == known["gguf"]
    (package,) = BUILT_IN["smollm2"].packages
    assert wanted[package] == BUILT_IN["smollm2"].version
    assert bundle.version() == __version__


def test_an_archive_depends_on_names_and_bytes_only(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(DATA)
    two.write_bytes(b"")
    made = []
    for date in (1_000_000_000, 2_000_000_000):
        os.utime(one, (date, date))
        bundle.pack([one, two], tmp_path / "made.zip")
        made.append((tmp_path / "made.zip").read_bytes())
    assert made[0] == made[1]
    assert made[0].index(DATA) < 100  # as it is: wheels are compressed already


def test_a_wheel_is_fetched_once(tmp_path, monkeypatch):
    asked = []

    def pip(*arguments):
        asked.append(arguments)
        target = arguments[arguments.index("--dest") + 1]
        (Path(target) / "two_words-1.0-py3-none-any.whl").write_bytes(b"wheel")

    monkeypatch.setattr(bundle, "_pip", pip)
    wheel = bundle.Wheel("two-words", "1.0", "a test")
    first = bundle.fetch(wheel, "3.12", tmp_path / "wheels")
    assert bundle.fetch(wheel, "3.12", tmp_path / "wheels") == first
    assert len(asked) == 1
    assert ("--python-version", "3.12") in zip(asked[0], asked[0][1:], strict=False)
    bundle.fetch(replace(wheel, version="1.0.1"), "3.12", tmp_path / "wheels")
    assert len(asked) == 2


def test_a_stopped_download_is_not_taken_for_a_wheel(tmp_path, monkeypatch):
    def pip(*arguments):
        target = arguments[arguments.index("--dest") + 1]
        (Path(target) / "gguf-1.0-py3-none-any.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "_pip", pip)
    with pytest.raises(KeyboardInterrupt):
        bundle.fetch(bundle.Wheel("gguf", "1.0", "a test"), "3.12", tmp_path)
    assert names(tmp_path) == []


def test_what_pip_cannot_do_is_an_error(tmp_path, capsys):
    assert bundle.main(["--python", "no version", "--wheels", str(tmp_path / "wheels")]) == 1
    assert "pip download" in capsys.readouterr().err

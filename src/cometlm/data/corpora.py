"""Corpora: real texts by name, from where no hub is needed.

They are Debian's packages, Python's sources and files of your own. Packages are downloaded with
`apt-get download` and unpacked into the cache, never installed, so nobody needs to be root and
nothing on the system changes.

To add a corpus, write a class with `files` in a file of its own and put one of it into `CORPORA`,
or name it as an entry point of the group `cometlm.corpora`.
"""

from __future__ import annotations

import glob
import gzip
import importlib.util
import shutil
import struct
import subprocess
import sysconfig
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cometlm.checkpoints.backbones import cache_folder
from cometlm.registry import Registry

_CHARACTERS, _STRINGS = 9, 16  # of R's serialisation
_LATIN1 = 1 << 14  # the same, in the flags of a string
_OWN = "or name files of your own instead"
_TEST = "-test"


class Corpus(ABC):
    """Plain text files under a name.

    Attributes:
        about: what it is, in one line.
        held_out: names of files that are for tests only. They are the corpus NAME-test, and no part
            of NAME.
    """

    about: str
    held_out: tuple[str, ...] = ()

    @abstractmethod
    def files(self) -> list[Path]:
        """All of its files, held out or not, always in the same order; fetched if missing.

        Raises:
            OSError: they cannot be fetched.
        """


@dataclass(frozen=True)
class DebianCorpus(Corpus):
    """A text that comes in Debian's packages.

    Attributes:
        name: of its folder in the cache.
        packages: Debian packages that hold it.
        write: from the folder that they were unpacked in to plain files in another.
        about, held_out: see `Corpus`.
    """

    name: str
    packages: tuple[str, ...]
    write: Callable[[Path, Path], None]
    about: str
    held_out: tuple[str, ...] = ()

    def files(self) -> list[Path]:
        """See `Corpus.files`."""
        return sorted(self._folder().iterdir())

    def _folder(self) -> Path:
        """Where its files are kept, made if it is missing."""
        folder = cache_folder() / "texts" / self.name
        if folder.exists():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{self.name}-") as work:
            unpacked, made = Path(work) / "unpacked", Path(work) / "made"
            unpacked.mkdir()
            made.mkdir()
            for package in self.packages:
                _unpack(package, self.name, unpacked)
            self.write(unpacked, made)
            self._check({file.name: file.stat().st_size for file in made.iterdir()})
            try:
                made.rename(folder)
            except OSError:  # another process was faster; its copy is as good
                if not folder.is_dir():
                    raise
        return folder

    def _check(self, sizes: dict[str, int]) -> None:
        """A held-out file under another name would be trained on unseen."""
        missing = [file for file in self.held_out if file not in sizes]
        if missing or not any(sizes.values()):
            packages, lacking = " and ".join(self.packages), ", ".join(missing) or "any text"
            raise OSError(f"what {packages} holds is not as expected: without {lacking}; {_OWN}")


class StandardLibrary(Corpus):
    """The sources of Python's standard library that is running."""

    about = "the standard library's sources, program text that is here already"

    def files(self) -> list[Path]:
        """Without what others installed into its folder, and without its repetitive tests."""
        root = Path(sysconfig.get_path("stdlib"))
        others = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        return sorted(p for p in root.rglob("*.py") if not others & set(p.relative_to(root).parts))


@dataclass(frozen=True)
class PackageSources(Corpus):
    """The sources of an installed package.

    Attributes:
        package: its name as it is imported.
        about: see `Corpus`.
    """

    package: str
    about: str

    def files(self) -> list[Path]:
        """None where the package is not installed."""
        return _package(self.package)


def _write_bible(unpacked: Path, target: Path) -> None:
    (program,) = _found(unpacked, "usr/bin/bible")
    data = str(unpacked / "usr/lib")
    text = _run([str(program), "-p", data, "-f", "gen1:1-rev22:21"], unpacked)
    (target / "bible.txt").write_bytes(text)


def _write_anarchism(unpacked: Path, target: Path) -> None:
    for path in _found(unpacked, "usr/share/doc/anarchism/markdown/*.md.gz"):
        (target / path.stem).write_bytes(gzip.decompress(path.read_bytes()))


def _write_perl(unpacked: Path, target: Path) -> None:
    for path in _found(unpacked, "usr/share/perl/*/pod/*.pod"):
        shutil.copy(path, target)


def _write_austen(unpacked: Path, target: Path) -> None:
    (database,) = _found(unpacked, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    for lines in r_strings(database.read_bytes()):
        if title := next((line.strip() for line in lines if line.strip()), ""):
            name = f"{title.lower().replace(' ', '_')}.txt"
            (target / name).write_text("\n".join(lines), encoding="utf-8")


_OURS: dict[str, Corpus] = {
    "bible": DebianCorpus(
        "bible",
        ("bible-kjv", "bible-kjv-text"),
        _write_bible,
        "King James Bible, one file, 1.2M tokens",
    ),
    "anarchism": DebianCorpus(
        "anarchism", ("anarchism",), _write_anarchism, "An Anarchist FAQ, essays, 2.8M tokens"
    ),
    "austen": DebianCorpus(
        "austen",
        ("r-cran-janeaustenr",),
        _write_austen,
        "six novels by Jane Austen, 1M tokens, two of them held out",
        held_out=("northanger_abbey.txt", "persuasion.txt"),
    ),
    "perl": DebianCorpus(
        "perl",
        ("perl-doc",),
        _write_perl,
        "Perl's manual, 2M tokens, some pages of it held out",
        held_out=(
            *("perlfaq5.pod", "perlfaq6.pod", "perlfaq8.pod", "perlfunc.pod", "perlipc.pod"),
            *("perlopentut.pod", "perlre.pod", "perlrequick.pod", "perlretut.pod"),
        ),
    ),
    "python": StandardLibrary(),
    "transformers": PackageSources(
        "transformers", "the sources of transformers, program text that is here already"
    ),
}
CORPORA: Registry[Corpus] = Registry("corpus", "cometlm.corpora", _OURS)


def corpus_names() -> list[str]:
    """The names that `corpus_files` knows; of other packages without their NAME-test."""
    tests = [f"{name}{_TEST}" for name, corpus in _OURS.items() if corpus.held_out]
    return [*CORPORA, *tests]


def corpus_files(name: str | Path) -> list[Path]:
    """The plain files of a corpus, always in the same order.

    Args:
        name: one of `CORPORA`, without what it holds out; NAME-test, that alone ("austen" without
            the held-out novels, "austen-test" those). Else files of your own: one, a directory
            (hidden and binary files in it are passed over) or a pattern like "notes/**/*.md".
            Else an installed package, its sources.

    Raises:
        ValueError: a name that is nothing of these, or no files there.
        OSError: a corpus that cannot be fetched.
    """
    wanted = str(name)
    base = wanted.removesuffix(_TEST)
    if wanted in CORPORA:
        files = _part(CORPORA[wanted], held_out=False)
    elif base in CORPORA and CORPORA[base].held_out:
        files = _part(CORPORA[base], held_out=True)
    else:
        files = _own_files(wanted)
    if not files:
        raise ValueError(f"corpus {wanted!r} has no files")
    return files


def _part(corpus: Corpus, held_out: bool) -> list[Path]:
    return [file for file in corpus.files() if (file.name in corpus.held_out) == held_out]


def _own_files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = ((file, file.relative_to(path).parts) for file in path.rglob("*"))
        visible = [file for file, parts in inside if not any(part[0] == "." for part in parts)]
        return sorted(file for file in visible if file.is_file() and not _is_binary(file))
    if any(sign in name for sign in "*?["):
        found = map(Path, glob.glob(str(path), recursive=True))
        return sorted(file for file in found if file.is_file())
    files = _package(name)
    if not files:
        raise ValueError(
            f"{name!r} is no corpus: name a file, a directory, an installed package, or one of "
            f"{', '.join(corpus_names())}"
        )
    return files


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def _package(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    roots = (spec and spec.submodule_search_locations) or ()
    return sorted(file for root in roots for file in Path(root).rglob("*.py"))


# --- fetching -----------------------------------------------------------------------------------


def _unpack(package: str, name: str, target: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise OSError(
                f"the text {name!r} comes in Debian's package {package}, and there is no {tool} "
                "here; name files of your own instead"
            )
    with tempfile.TemporaryDirectory() as work:
        _run(["apt-get", "download", package], Path(work))
        (deb,) = _found(Path(work), "*.deb")
        _run(["dpkg-deb", "-x", str(deb), str(target)], Path(work))


def _found(folder: Path, pattern: str) -> list[Path]:
    """Files of a package; another version of it may have them elsewhere."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise OSError(f"there is no {pattern} in what was downloaded; {_OWN}")
    return found


def _run(command: list[str], folder: Path) -> bytes:
    """What a command says; its complaints only if it fails, since apt warns without a need."""
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", errors="replace").strip()
        raise OSError(
            f"{' '.join(command)} failed: {said} (if apt knows no packages yet, run "
            f"'apt-get update' first; {_OWN})"
        )
    return done.stdout


# --- R's format ---------------------------------------------------------------------------------


def r_strings(database: bytes) -> Iterator[list[str]]:
    """The vectors of strings in an R package's lazy-load database (`Rdata.rdb`).

    Each object is its length uncompressed, four bytes, and a zlib stream of R's binary
    serialisation. Objects that are no vectors of strings are passed over.

    Raises:
        ValueError: this is no such database, or only a part of one.
    """
    place = 0
    while place < len(database):
        stream = zlib.decompressobj()
        try:
            lines = _string_vector(stream.decompress(database[place + 4 :]))
        except (zlib.error, struct.error) as error:
            raise ValueError(f"byte {place} of the R database cannot be read: {error}") from error
        if not stream.eof:
            raise ValueError(f"the R database ends within its object at byte {place}")
        place = len(database) - len(stream.unused_data)
        if lines is not None:
            yield lines


def _string_vector(raw: bytes) -> list[str] | None:
    """The strings of an object: two letters, three versions, maybe an encoding, the vector."""
    (version,) = struct.unpack_from(">i", raw, 2)
    place = 14
    if version >= 3:
        (length,) = struct.unpack_from(">i", raw, place)
        place += 4 + length
    flags, count = struct.unpack_from(">Ii", raw, place)
    place += 8
    if flags & 0xFF != _STRINGS:
        return None
    lines = []
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", raw, place)
        if flags & 0xFF != _CHARACTERS:
            raise struct.error(f"a string was expected, got an object of type {flags & 0xFF}")
        place += 8
        encoding = "latin-1" if flags & _LATIN1 else "utf-8"
        lines.append(raw[place : place + max(0, length)].decode(encoding, errors="replace"))
        place += max(0, length)  # -1 stands for a missing string
    return lines

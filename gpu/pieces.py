"""One large file cut into pieces that can travel one by one, and put together again.

A folder of pieces holds:

    manifest.json   what the pieces make, and the size and sha256 of each and of the whole
    piece-00 …      the whole, cut

It needs the standard library only: the machine that puts pieces together has nothing of ours yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

FORMAT = 1
MANIFEST = "manifest.json"
MIB = 1 << 20
_PART = ".part"  # a file that is being written


@dataclass(frozen=True)
class Piece:
    """What a piece must be: its file name, bytes and digest."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Origin:
    """What a bundle was made from.

    Attributes:
        version: of cometlm.
        commit: of its sources; ends in "-dirty" if they were changed since.
        python: the version of Python that the wheels are for, as in "3.12".
    """

    version: str
    commit: str
    python: str

    def __str__(self) -> str:
        return f"cometlm {self.version}, commit {self.commit}, Python {self.python}"


@dataclass(frozen=True)
class Manifest:
    """What a whole bundle is: its origin, bytes and digest, and its pieces in order."""

    origin: Origin
    size: int
    sha256: str
    pieces: tuple[Piece, ...]


def cut(whole: Path, folder: Path, limit: int, origin: Origin) -> Manifest:
    """Write a file's pieces and their manifest, in place of what pieces `folder` held.

    The pieces are about equal, so that each leaves as much room as it can in a transfer. The
    manifest is written last: pieces without one are not taken for a bundle.

    Args:
        limit: bytes of a piece at most.

    Raises:
        ValueError: the limit is below 1.
        OSError: the disk is full or the like.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1 byte, got {limit}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for old in folder.iterdir():
        if is_piece(old.name.removesuffix(_PART)):
            old.unlink()
    size = whole.stat().st_size
    step = _even_size(size, limit)
    digest = hashlib.sha256()
    pieces = []
    with whole.open("rb") as source:
        for number, start in enumerate(range(0, size, step)):
            name = f"piece-{number:02}"
            with whole_file(folder / name) as target:
                sha256 = _copy(source, target, min(step, size - start), digest)
            pieces.append(Piece(name, min(step, size - start), sha256))
    manifest = Manifest(origin, size, digest.hexdigest(), tuple(pieces))
    write_manifest(manifest, folder)
    return manifest


def fault(piece: Piece, folder: Path) -> str | None:
    """What is wrong with a piece in `folder`, as "piece-00 is missing"; None if it is right."""
    path = folder / piece.name
    if not path.is_file():
        return f"{piece.name} is missing"
    if path.stat().st_size != piece.size or sha256_of(path) != piece.sha256:
        return f"{piece.name} is damaged"
    return None


def join(manifest: Manifest, folder: Path, target: Path) -> None:
    """Put the pieces together.

    Raises:
        ValueError: pieces are missing or damaged, or do not make the whole.
        OSError: the disk is full or the like.
    """
    faults = [found for piece in manifest.pieces if (found := fault(piece, folder))]
    if faults:
        raise ValueError(", ".join(faults))
    digest = hashlib.sha256()
    with whole_file(target) as file:
        for piece in manifest.pieces:
            with (folder / piece.name).open("rb") as source:
                _copy(source, file, piece.size, digest)
        if digest.hexdigest() != manifest.sha256:
            raise ValueError(
                f"the pieces make a file of sha256 {digest.hexdigest()}, expected {manifest.sha256}"
            )


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file.

    Raises:
        ValueError: it is damaged, or of a format that this version does not read.
        OSError: it cannot be read.
    """
    try:
        document = json.loads(path.read_bytes())
        found = document.pop("format")
        if found != FORMAT:
            raise ValueError(f"{path} has format {found}, but this version reads {FORMAT}")
        document["origin"] = Origin(**document["origin"])
        document["pieces"] = tuple(Piece(**piece) for piece in document["pieces"])
        manifest = Manifest(**document)
        wrong = [piece.name for piece in manifest.pieces if not is_piece(piece.name)]
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if wrong:  # a name like ../x would be written to elsewhere
        raise ValueError(f"{path} is damaged: a piece is called {wrong[0]!r}, expected piece-NN")
    return manifest


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest into `folder`, whole or not at all."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1) + "\n"
    with whole_file(folder / MANIFEST) as file:
        file.write(text.encode())


def is_piece(name: str) -> bool:
    """Whether a file of that name is a piece."""
    return re.fullmatch(r"piece-\d{2,}", name) is not None


def sha256_of(path: Path) -> str:
    """The digest of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name when it is whole; a stop on the way leaves nothing."""
    part = path.with_name(path.name + _PART)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _even_size(size: int, limit: int) -> int:
    """Bytes of a piece: as few pieces as there can be, of equal size, in whole MiB if these fit.

    Whole MiB keep the first pieces the same when the end of the bundle changes a little.
    """
    count = max(1, -(-size // limit))
    even = max(1, -(-size // count))
    return min(limit, -(-even // MIB) * MIB)


def _copy(source: BinaryIO, target: BinaryIO, size: int, whole: Any) -> str:
    """Copy so many bytes, add them to the digest of the whole, and return their own."""
    own = hashlib.sha256()
    left = size
    while left:
        block = source.read(min(MIB, left))
        if not block:
            raise OSError(f"{source.name} ended {left} bytes early")
        own.update(block)
        whole.update(block)
        target.write(block)
        left -= len(block)
    return own.hexdigest()

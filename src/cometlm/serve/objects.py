"""Objects by name in a place that several servers may share: a folder, or any URL of fsspec.

An object is whole or not there: in a folder it is renamed when it is on the disk, elsewhere it
comes with a single put, or under another name first where there is none. When an object was used
last is told by the place's own clock, so servers need not agree on the time: by the time of a file,
or of an empty object `used/NAME`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from filelock import FileLock, Timeout

from cometlm.checkpoints.atomic_write import write_whole

T = TypeVar("T")

SUFFIX = ".safetensors"
_LEFT_BEHIND = 3600  # seconds after which what is half there is of a killed process
# Whose puts appear whole. Elsewhere an object is written under another name, and moved.
_SINGLE_PUT = {"abfs", "adl", "az", "gcs", "gs", "memory", "s3", "s3a"}
_VERSIONED = {"s3", "s3a"}  # where a put may name the version that it replaces
_MOST_PUT = 5 << 30  # bytes that S3 takes at once
_LOCKS = 64  # files, which the objects of a folder share
_PATIENCE = 10.0  # seconds that one server waits for another to write an object
_MODIFIED = ("LastModified", "mtime", "last_modified", "modified", "updated", "created")


@dataclass(frozen=True)
class Found:
    """An object that is there.

    Attributes:
        name: of it.
        nbytes: its size.
        used: when it was written or used last, in seconds by the place's clock.
    """

    name: str
    nbytes: int
    used: float


class ChangedError(OSError):
    """Another server changed an object, or is at it."""


class Objects(Protocol):
    """A place; all of it raises `OSError` where the place cannot be used."""

    def create(self, key: str, data: bytes) -> bytes:
        """Put a small object that nobody ever changes; what is there then, whoever put it."""

    def exists(self, key: str) -> bool:
        """Whether such an object is there."""

    def write(self, name: str, save: Callable[[Path], None], replacing: str | None = None) -> int:
        """Put what `save` writes to a file; its size.

        Where a version is named that `changing` gave, `ChangedError` if it is there no longer.
        """

    def changing(self, name: str) -> contextlib.AbstractContextManager[str | None]:
        """While an object is read, and written anew as a whole: for one server at a time.

        Others wait, or fail when they write what this gives as `replacing`: its version now.
        """

    def read(self, name: str, load: Callable[[Path], T]) -> T:
        """What `load` makes of a file; `FileNotFoundError` where there is none."""

    def open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """An object from its beginning, of which no more is fetched than is read."""

    def all(self) -> Iterator[Found]:
        """All that is there; what a killed process left half written is removed."""

    def find(self, name: str) -> Found | None:
        """One object; None: it is not there."""

    def touch(self, name: str) -> bool:
        """Note that it is used now, if that can be noted; whether it is there."""

    def remove(self, name: str) -> None:
        """Remove it, if it is there."""


def objects_at(place: Path | str) -> Objects:
    """The objects of a folder, which is made if it is missing, or of a URL of fsspec.

    Raises:
        ValueError: a URL of a kind that nothing here knows.
        OSError: it cannot be used.
    """
    if isinstance(place, str) and "://" in place and not place.startswith("file://"):
        return RemoteObjects(place)
    return FolderObjects(Path(str(place).removeprefix("file://")))


class FolderObjects:
    """Files of a folder on this machine, or of one that is mounted.

    Args:
        path: made if it is missing.

    Raises:
        OSError: it cannot be made or written to.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "cannot be written to", str(path))
        self._folder = path

    def create(self, key: str, data: bytes) -> bytes:
        """See `Objects`."""
        path = self._folder / key
        if not path.exists():
            part = self._folder / f".{key}.{secrets.token_hex(8)}{SUFFIX}.0.part"
            write_whole(part, data)
            part.chmod(0o600)
            with contextlib.suppress(FileExistsError):
                os.link(part, path)  # fails where another server was first
            part.unlink()
        return path.read_bytes()

    def exists(self, key: str) -> bool:
        """See `Objects`."""
        return (self._folder / key).exists()

    def write(self, name: str, save: Callable[[Path], None], replacing: str | None = None) -> int:
        """See `Objects`; `save` has to write a file that appears whole."""
        path = self._path(name)
        save(path)
        return path.stat().st_size

    @contextlib.contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """See `Objects`: by a lock of the file system, which goes with the process that has it."""
        place = zlib.crc32(name.encode()) % _LOCKS
        lock = FileLock(self._folder / f".{place}.lock", timeout=_PATIENCE, mode=0o600)
        try:
            lock.acquire(poll_interval=0.01)
        except Timeout as error:
            raise ChangedError(errno.EBUSY, "another server changes it", name) from error
        except NotImplementedError as error:
            raise OSError(errno.ENOLCK, "the file system has no locks", name) from error
        try:
            yield
        finally:
            lock.release()

    def read(self, name: str, load: Callable[[Path], T]) -> T:
        """See `Objects`."""
        return load(self._path(name))

    def open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """See `Objects`."""
        return self._path(name).open("rb")

    def all(self) -> Iterator[Found]:
        """See `Objects`."""
        self._tidy()
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not entry.name.endswith(SUFFIX) or entry.name.startswith("."):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    about = entry.stat()
                    yield Found(entry.name.removesuffix(SUFFIX), about.st_size, about.st_mtime)

    def find(self, name: str) -> Found | None:
        """See `Objects`."""
        try:
            about = self._path(name).stat()
        except FileNotFoundError:
            return None
        return Found(name, about.st_size, about.st_mtime)

    def touch(self, name: str) -> bool:
        """See `Objects`."""
        path = self._path(name)
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        except OSError:  # of a folder that is read-only now, everything can still be read
            return path.exists()
        return True

    def remove(self, name: str) -> None:
        """See `Objects`."""
        with contextlib.suppress(FileNotFoundError):
            self._path(name).unlink()

    def _tidy(self) -> None:
        """Remove what a killed process left half written."""
        for part in self._folder.glob(f".*{SUFFIX}.*.part"):  # of `write_whole`
            with contextlib.suppress(OSError):
                if time.time() - part.stat().st_mtime > _LEFT_BEHIND:
                    part.unlink()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"


class RemoteObjects:
    """Objects below a URL that fsspec knows, such as `s3://bucket/sessions`.

    Sessions travel through a temporary file of this machine. Credentials and endpoints are those of
    the environment, as the file system's own library reads them.

    Args:
        url: where to; a bucket has to be there.

    Raises:
        ValueError: a kind of URL that is unknown, or whose library is missing.
        OSError: it cannot be used.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            lacks_s3 = isinstance(error, ImportError) and url.startswith("s3://")
            hint = "; pip install 'cometlm[s3]'" if lacks_s3 else ""
            raise ValueError(f"{url}: {error}{hint}") from error
        kinds = self._fs.protocol
        kinds = {kinds} if isinstance(kinds, str) else set(kinds)
        self._is_single_put = bool(kinds & _SINGLE_PUT)
        self._has_versions = bool(kinds & _VERSIONED)
        self._root = self._root.rstrip("/")
        if not self._is_single_put:
            with _as_oserror():
                self._fs.makedirs(f"{self._root}/used", exist_ok=True)

    def create(self, key: str, data: bytes) -> bytes:
        """See `Objects`."""
        path = f"{self._root}/{key}"
        with _as_oserror():
            try:
                return bytes(self._fs.cat_file(path))
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):  # another server was first
                    self._fs.pipe_file(path, data, mode="create")
                return bytes(self._fs.cat_file(path))

    def exists(self, key: str) -> bool:
        """See `Objects`."""
        return self._info(f"{self._root}/{key}") is not None

    def write(self, name: str, save: Callable[[Path], None], replacing: str | None = None) -> int:
        """See `Objects`."""
        with tempfile.TemporaryDirectory(prefix="cometlm-") as folder:
            file = Path(folder, f"{name}{SUFFIX}")
            save(file)
            data = file.read_bytes()
        with _as_oserror():
            if replacing is None:
                self._put(self._path(name), data)
            else:
                self._replace(self._path(name), data, replacing)
        return len(data)

    @contextlib.contextmanager
    def changing(self, name: str) -> Iterator[str | None]:
        """See `Objects`: S3 compares versions; elsewhere nothing does, and the later put stays."""
        about = self._info(self._path(name)) if self._has_versions else None
        yield None if about is None else about.get("ETag")

    def read(self, name: str, load: Callable[[Path], T]) -> T:
        """See `Objects`."""
        with tempfile.TemporaryDirectory(prefix="cometlm-") as folder:
            file = Path(folder, f"{name}{SUFFIX}")
            with _as_oserror():
                self._fs.get_file(self._path(name), str(file))
            return load(file)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """See `Objects`."""
        with _as_oserror(), self._fs.open(self._path(name), "rb", block_size=1 << 16) as file:
            yield file

    def all(self) -> Iterator[Found]:
        """See `Objects`."""
        marks = {mark["name"]: _when(mark) for mark in self._listed(f"{self._root}/used")}
        for about in self._listed(self._root):
            name = about["name"].rpartition("/")[2]
            if not name.endswith(SUFFIX) or name.startswith("."):
                continue
            name, written = name.removesuffix(SUFFIX), _when(about)
            used = marks.pop(f"{self._root}/used/{name}", written)
            yield Found(name, about["size"], max(written, used))
        for path, when in marks.items():  # of objects that are gone
            if time.time() - when > _LEFT_BEHIND:
                self._remove(path)

    def find(self, name: str) -> Found | None:
        """See `Objects`."""
        about, mark = self._info(self._path(name)), self._info(self._mark(name))
        if about is None:
            return None
        used = max(_when(about), 0.0 if mark is None else _when(mark))
        return Found(name, about["size"], used)

    def touch(self, name: str) -> bool:
        """See `Objects`."""
        if self._info(self._path(name)) is None:
            return False
        with contextlib.suppress(OSError), _as_oserror():
            self._fs.pipe_file(self._mark(name), b"")
        return True

    def remove(self, name: str) -> None:
        """See `Objects`."""
        self._remove(self._path(name))
        self._remove(self._mark(name))

    def _put(self, path: str, data: bytes) -> None:
        if self._is_single_put:
            self._fs.pipe_file(path, data)
            return
        part = f"{self._root}/.{secrets.token_hex(8)}.part"
        try:
            self._fs.pipe_file(part, data)
            self._fs.mv(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self._fs.rm_file(part)
            raise

    def _replace(self, path: str, data: bytes, version: str) -> None:
        try:
            # In parts it would not be compared.
            self._fs.pipe_file(path, data, chunksize=_MOST_PUT, IfMatch=version)
        except (OSError, ValueError) as error:
            now = self._info(path)
            if now is None or now.get("ETag") != version:
                raise ChangedError(errno.EBUSY, "another server changed it", path) from error
            raise

    def _listed(self, path: str) -> list[dict[str, Any]]:
        with _as_oserror():
            try:
                return list(self._fs.ls(path, detail=True))
            except FileNotFoundError:
                return []

    def _info(self, path: str) -> dict[str, Any] | None:
        with _as_oserror():
            try:
                return dict(self._fs.info(path))
            except FileNotFoundError:
                return None

    def _remove(self, path: str) -> None:
        with _as_oserror(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}{SUFFIX}"

    def _mark(self, name: str) -> str:
        return f"{self._root}/used/{name}"


@contextlib.contextmanager
def _as_oserror() -> Iterator[None]:
    """Turn what a file system's library raises of its own into an `OSError`."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def _when(about: Mapping[str, Any]) -> float:
    """When an object was written, in seconds; file systems name and say it in different ways."""
    value = next((about[key] for key in _MODIFIED if about.get(key) is not None), 0.0)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)

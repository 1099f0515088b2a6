"""An index of what is kept, in SQLite: who owns what, what it has read, how large, last used when.

It belongs to one process and is made from the sessions themselves: whoever loses it loses nothing.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from cometlm.serve.folder import Kept

_log = logging.getLogger(__name__)
_FORMAT = 1
_AT_ONCE = 500  # values of one statement


@dataclass(frozen=True)
class Listed:
    """What a list says of a session that is kept: all but itself and its document.

    Attributes:
        id, kind, created, expires, parent, tokens, title: see `Kept`.
        nbytes: of its file, or in memory where there is no folder.
    """

    id: str
    kind: str
    created: int
    expires: float | None
    parent: str | None
    tokens: int | None
    title: str | None
    nbytes: int

    @classmethod
    def of(cls, kept: Kept, nbytes: int) -> Listed:
        """Of a session and its size."""
        return cls(
            kept.id,
            kept.kind,
            kept.created,
            kept.expires,
            kept.parent,
            kept.tokens,
            kept.title,
            nbytes,
        )


_LISTED = ", ".join(field.name for field in fields(Listed))
_TABLES = f"""
CREATE TABLE about (value TEXT NOT NULL);
CREATE TABLE sessions (
    id TEXT PRIMARY KEY,
    kind TEXT, created INTEGER, expires REAL, parent TEXT, tokens INTEGER, title TEXT,
    nbytes INTEGER NOT NULL,
    owner TEXT NOT NULL,
    length INTEGER, digest TEXT,  -- of its trail
    used REAL NOT NULL,  -- by the store's clock
    added REAL NOT NULL,  -- by ours
    is_passing INTEGER NOT NULL  -- it is in memory only, and goes when it leaves that
) WITHOUT ROWID;
CREATE INDEX by_trail ON sessions (owner, length, digest);
CREATE INDEX by_use ON sessions (is_passing, used);
CREATE INDEX by_end ON sessions (expires);
PRAGMA user_version = {_FORMAT};
"""


class Index:
    """See above. Threads may share it.

    Args:
        path: a file of this process's own, which is made anew where it is missing, damaged or of
            something else; None: in memory.
        about: of what it is.

    Raises:
        OSError: the file cannot be written, or another process has it.
    """

    def __init__(self, path: Path | None = None, about: str = "") -> None:
        self._lock = threading.RLock()
        with _as_oserror(path):
            try:
                self._base = _opened(path, about)
            except _StaleError as error:
                assert path is not None
                _log.warning("the index %s is made anew: %s", path, error)
                for suffix in ("", "-journal", "-wal", "-shm"):
                    Path(f"{path}{suffix}").unlink(missing_ok=True)
                self._base = _opened(path, about)

    def add(self, kept: Kept, nbytes: int, used: float, is_passing: bool = False) -> None:
        """Note a session."""
        trail = (None, None) if kept.trail is None else (kept.trail.length, kept.trail.digest)
        row = (*astuple(Listed.of(kept, nbytes)), kept.owner, *trail, used, time.time(), is_passing)
        self._run(f"INSERT OR REPLACE INTO sessions VALUES ({', '.join('?' * len(row))})", row)

    def remove(self, names: Iterable[str]) -> None:
        """Forget sessions."""
        for some in _in_parts(list(names)):
            self._run(f"DELETE FROM sessions WHERE id IN ({_places(some)})", some)

    def use(self, name: str, when: float) -> None:
        """Note when a session was used."""
        self._run("UPDATE sessions SET used = ? WHERE id = ? AND used <> ?", (when, name, when))

    def listed(self, name: str, owner: str) -> Listed | None:
        """What is known of one session of an owner."""
        rows = self._run(
            f"SELECT {_LISTED} FROM sessions WHERE id = ? AND owner = ?", (name, owner)
        )
        return Listed(*rows[0]) if rows else None

    def all_of(self, owner: str) -> list[Listed]:
        """What an owner was given, the oldest first."""
        rows = self._run(
            f"SELECT {_LISTED} FROM sessions WHERE owner = ? AND NOT is_passing "
            "ORDER BY created, id",
            (owner,),
        )
        return [Listed(*row) for row in rows]

    def is_passing(self, name: str) -> bool:
        """Whether a session is in memory only."""
        return bool(self._run("SELECT 1 FROM sessions WHERE id = ? AND is_passing", (name,)))

    def lengths(self, owner: str, most: int) -> list[int]:
        """Lengths of an owner's trails."""
        rows = self._run(
            "SELECT DISTINCT length FROM sessions WHERE owner = ? AND length <= ?", (owner, most)
        )
        return [length for (length,) in rows]

    def with_trail(self, owner: str, length: int, digest: str) -> str | None:
        """The session, the latest if there are several, that has read this."""
        rows = self._run(
            "SELECT id FROM sessions WHERE owner = ? AND length = ? AND digest = ? "
            "ORDER BY added DESC LIMIT 1",
            (owner, length, digest),
        )
        return str(rows[0][0]) if rows else None

    def oldest(self) -> tuple[str, float] | None:
        """The least recently used of the sessions that do not only pass, and when."""
        rows = self._run(
            "SELECT id, used FROM sessions WHERE NOT is_passing ORDER BY used, added LIMIT 1"
        )
        return rows[0] if rows else None

    def expired(self) -> list[str]:
        """Sessions whose time is over."""
        return [name for (name,) in self._run("SELECT id FROM sessions WHERE expires < ?", _now())]

    def names(self, before: float | None = None) -> set[str]:
        """Sessions that do not only pass, and were added before some time."""
        rows = self._run(
            "SELECT id FROM sessions WHERE NOT is_passing AND added <= ?",
            _now() if before is None else (before,),
        )
        return {name for (name,) in rows}

    def sizes_and_use(self, kinds: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Bytes of sessions of some kinds, and when they were used last."""
        rows = self._run(
            f"SELECT id, nbytes, used FROM sessions WHERE kind IN ({_places(kinds)})", kinds
        )
        return {name: (nbytes, used) for name, nbytes, used in rows}

    def kind(self, name: str) -> str | None:
        """What a session is; None: it is not known."""
        rows = self._run("SELECT kind FROM sessions WHERE id = ?", (name,))
        return rows[0][0] if rows else None

    def passing(self) -> set[str]:
        """Sessions that are in memory only."""
        return {name for (name,) in self._run("SELECT id FROM sessions WHERE is_passing")}

    def __len__(self) -> int:
        (count,) = self._run("SELECT COUNT(*) FROM sessions")[0]
        return int(count)

    @property
    def nbytes(self) -> int:
        """Bytes of all sessions."""
        (total,) = self._run("SELECT COALESCE(SUM(nbytes), 0) FROM sessions")[0]
        return int(total)

    def close(self) -> None:
        """Let another process have the file."""
        with self._lock:
            self._base.close()

    def _run(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock, _as_oserror():
            return self._base.execute(statement, values).fetchall()


class _StaleError(Exception):
    """The file is no index of this."""


def _opened(path: Path | None, about: str) -> sqlite3.Connection:
    """A connection to an index, which is made where there is none; it is locked for others."""
    base = sqlite3.connect(
        path or ":memory:", timeout=1.0, isolation_level=None, check_same_thread=False
    )
    try:
        # What a crash leaves of it is looked at, and made anew if it is not sound.
        base.execute("PRAGMA synchronous = OFF")
        base.execute("PRAGMA locking_mode = EXCLUSIVE")
        (version,) = base.execute("PRAGMA user_version").fetchone()
        base.execute("BEGIN EXCLUSIVE")
        base.execute("COMMIT")
        if version == 0 and not base.execute("SELECT * FROM sqlite_master").fetchall():
            base.executescript(_TABLES)
            base.execute("INSERT INTO about VALUES (?)", (about,))
        elif version != _FORMAT or base.execute("SELECT * FROM about").fetchall() != [(about,)]:
            raise _StaleError("it is of another store or model")
        elif (said := base.execute("PRAGMA quick_check(1)").fetchone()) != ("ok",):
            raise _StaleError(str(said))
        base.execute("DELETE FROM sessions WHERE is_passing")
    except sqlite3.OperationalError:  # locked, no place, read-only
        base.close()
        raise
    except sqlite3.DatabaseError as error:
        base.close()
        raise _StaleError(str(error)) from error
    except _StaleError:
        base.close()
        raise
    return base


@contextlib.contextmanager
def _as_oserror(path: Path | None = None) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(f"the index {path or ''} cannot be used: {error}") from error


def _in_parts(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for begin in range(0, len(values), _AT_ONCE):
        yield values[begin : begin + _AT_ONCE]


def _places(values: Sequence[str]) -> str:
    return ", ".join("?" * len(values))


def _now() -> tuple[float]:
    return (time.time(),)
